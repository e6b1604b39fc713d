"""Imports point one way: the arrows of the house, read from the source."""

import ast
import re
from pathlib import Path

import pytest

import tensorpeft

ROOT = Path(tensorpeft.__file__).parent
PLUGIN_FOR_METHODS = {"plugin.config", "plugin.patterns", "plugin.registration"}
# room -> what it may import of this package, besides itself; None: the public API only
ARROWS: dict[str, set[str] | None] = {
    "modes": set(),
    "sites": set(),
    "networks": {"modes"},
    "plugin": {"sites", "networks"},
    "methods": {"modes", "networks", "sites", *PLUGIN_FOR_METHODS},
    "__init__": {"methods", "plugin", "quantization"},
    # The names of models and the classes of architectures; what loads a model stands on quantization.
    "loading": {"", "quantization", "tasks.task"},
    "quantization": {"loading.architectures", "loading.errors", "loading.names", "networks", "plugin", "sites"},
    "export": {"loading", "networks", "plugin", "quantization"},
    "tasks": set(),
    "evaluation": {"", "loading", "tasks"},
    "training": {"", "evaluation", "loading", "quantization", "tasks"},
    "studies": {"", "evaluation", "loading", "networks", "plugin.base_weight", "quantization", "tasks", "training"},
    "cli": {"", "cli_inspect", "cli_options", "evaluation", "export", "quantization", "studies", "tasks", "training"},
    "cli_inspect": {"cli_options", "studies"},
    "cli_options": {""},
    "__main__": {"cli"},
}
MAY_IMPORT_PEFT = {"evaluation", "export", "loading", "plugin", "studies", "training"}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Full names of the imported modules, function-level imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path):
    room = room_of(path)
    own = {
        name.removeprefix("tensorpeft").removeprefix(".") for name in imports_of(path) if name.startswith("tensorpeft")
    }
    for name in own:
        allowed = ARROWS[room] | {room}
        assert any(name == other or (other and name.startswith(f"{other}.")) for other in allowed), (
            f"{path.relative_to(ROOT)} imports tensorpeft.{name}; {room} may import {sorted(allowed)}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_plugin_and_applications_know_peft(path: Path):
    if room_of(path) not in MAY_IMPORT_PEFT:
        assert not {name for name in imports_of(path) if name.partition(".")[0] == "peft"}


def test_modes_are_plain_integers():
    assert "torch" not in {name.partition(".")[0] for name in imports_of(ROOT / "modes.py")}


def test_shared_code_knows_no_method():
    methods = {path.stem for path in (ROOT / "methods").glob("*.py")} - {"__init__"}
    for path in FILES:
        if room_of(path) in {"plugin", "sites"}:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            words = {word.lower() for name in names for word in re.findall("[A-Z]?[a-z0-9]+", name)}
            assert not words & methods, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
