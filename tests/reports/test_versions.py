"""The versions that stand in every result."""

import platform

import peft
import torch

from tensorpeft.reports import versions


def test_what_is_installed_has_its_version_and_what_is_not_is_left_out(monkeypatch):
    monkeypatch.setattr(versions, "_LIBRARIES", ("torch", "peft", "no-such-library"))
    found = versions.find_versions()
    assert list(found) == ["python", "torch", "peft"]
    assert found["python"] == platform.python_version()
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["peft"] == peft.__version__
