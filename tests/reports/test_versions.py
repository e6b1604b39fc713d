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


def test_only_libraries_of_several_versions_are_told():
    same = {"python": "3.11", "torch": "2.6"}
    assert versions.tell_differing([("LoRA", same), ("DoTA", same), ("older", {})]) == []
    (line,) = versions.tell_differing([("LoRA", same), ("LoRA", same), ("DoTA", {**same, "torch": "2.7"})])
    assert line == "Versions differ: torch 2.6 (LoRA), 2.7 (DoTA)."
