"""The examples in docstrings are run."""

import doctest
import importlib
from pathlib import Path

import pytest

import tensorpeft

SOURCE = Path(tensorpeft.__file__).parent
WITH_EXAMPLES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if ">>> " in path.read_text("utf-8"))


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=str)
def test_examples_print_what_they_say(path: Path):
    name = ".".join(["tensorpeft", *path.with_suffix("").parts])
    module = importlib.import_module(name.removesuffix(".__init__"))
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_such_examples():
    assert len(WITH_EXAMPLES) > 30
