"""The examples in public docstrings are run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["modes", "networks.mpo", "methods.dota"])
def test_examples_print_what_they_say(name: str):
    result = doctest.testmod(importlib.import_module(f"tensorpeft.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
