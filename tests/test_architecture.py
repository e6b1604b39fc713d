"""Imports point one way: the arrows of the house, read from the source."""

import ast
import re
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig

import tensorpeft
import tensorpeft_cli
from tensorpeft.plugin.config import TensorConfig, own_fields

ROOT = Path(tensorpeft.__file__).parent
PLUGIN_FOR_METHODS = {"plugin.config", "plugin.patterns", "plugin.registration"}
# room -> what it may import of this package, besides itself; "": the public API
ARROWS: dict[str, set[str]] = {
    "modes": set(),
    "sites": set(),
    "networks": {"modes"},
    "plugin": {"sites", "networks"},
    "methods": {"modes", "networks", "sites", *PLUGIN_FOR_METHODS},
    "__init__": {"methods", "plugin", "quantization"},
    # The names of models and the classes of architectures; what loads a model stands on quantization.
    "loading": {"", "models", "plugin.checkpoint", "plugin.config", "quantization", "reports.files", "tasks.task"},
    "quantization": {
        "loading.architectures",
        "loading.errors",
        "loading.names",
        "networks",
        "plugin",
        "reports.files",
        "reports.folders",
        "sites",
    },
    "export": {"loading", "networks", "plugin", "quantization", "reports.files", "reports.folders"},
    "tasks": set(),
    "models": {"tasks"},
    "reports": set(),
    "evaluation": {"", "loading", "plugin.evaluation_mode", "reports", "tasks"},
    "training": {
        "",
        "evaluation",
        "loading",
        "models",
        "modes",
        "networks.tensor_train",  # a head's layer may be one
        "quantization",
        "recipes",
        "reports",
        "tasks",
    },
    "studies": {
        "",
        "evaluation",
        "loading",
        "modes",
        "networks",
        "plugin.base_weight",
        "plugin.gradients",
        "quantization",
        "reports",
        "tasks",
        "training",
    },
    "recipes": set(),
    "serving": {"export", "loading", "plugin.config", "reports.files"},
    "__main__": set(),
}
# What of networks/ is the same for every network, and so may be known to the plug-in.
SHARED_NETWORK_CODE = {
    "cut",
    "derivatives",
    "group",
    "dtypes",
    "effective",
    "kernels",
    "low_rank",
    "nested",
    "triton_kernels",
    "update",
    "sketch",
    "versions",
}
MAY_IMPORT_PEFT = {"evaluation", "export", "loading", "plugin", "serving", "studies", "training"}
FILES = sorted(ROOT.rglob("*.py"))
COMMAND = sorted(Path(tensorpeft_cli.__file__).parent.glob("*.py"))
COMMAND_MAY_IMPORT = {"", "evaluation", "export", "quantization", "studies", "training"}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path, at_import: bool = False, with_names: bool = False) -> set[str]:
    """Full names of the imported modules: all, or those of its top level; and, if asked, of what is taken of them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if with_names else set()
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path):
    room = room_of(path)
    own = {
        name.removeprefix("tensorpeft").removeprefix(".")
        for name in imports_of(path)
        if name.partition(".")[0] == "tensorpeft"
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


@pytest.mark.parametrize("path", COMMAND, ids=lambda path: path.name)
def test_the_command_imports_the_package_where_it_needs_it(path: Path):
    at_import = {name.partition(".")[0] for name in imports_of(path, at_import=True)}
    assert at_import <= sys.stdlib_module_names | {"tensorpeft_cli"}
    rooms = {name.split(".")[1] if "." in name else "" for name in imports_of(path) if name.startswith("tensorpeft.")}
    assert rooms <= COMMAND_MAY_IMPORT


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_knows_the_command_but_its_own_start(path: Path):
    if path.name != "__main__.py":
        assert not {name for name in imports_of(path) if name.partition(".")[0] == "tensorpeft_cli"}


def test_what_the_command_reads_at_once_needs_the_standard_library_alone():
    read = {name for path in COMMAND for name in re.findall(r'read_plain\("(.+?)"\)', path.read_text(encoding="utf-8"))}
    assert len(read) >= 3
    for name in read:
        assert {module.partition(".")[0] for module in imports_of(ROOT / name)} <= sys.stdlib_module_names, name


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


def test_the_plugin_knows_no_network():
    """Neither a module of one, nor what one defines, nor a setting of a single method; not even in a text."""
    networks = [path for path in (ROOT / "networks").glob("*.py") if path.stem not in SHARED_NETWORK_CODE]
    defined = {name for path in networks for name in public_names_of(path)}
    assert {"FrozenCores", "decompose", "CpFactors", "CIRCUIT"} <= defined
    configs = [value for value in vars(tensorpeft).values() if isinstance(value, type) and value is not TensorConfig]
    configs = [config for config in configs if issubclass(config, TensorConfig)]
    counts = Counter(name for config in configs for name in own_fields(config))
    of_one_method = {name for name, count in counts.items() if count == 1} - {item.name for item in fields(LoraConfig)}
    assert {"num_cores", "num_axes", "num_bases"} <= of_one_method
    of_one_method -= {"seed"}  # whatever draws has one
    methods = {path.stem for path in (ROOT / "methods").glob("*.py")} - {"__init__"}
    for path in (ROOT / "plugin").glob("*.py"):
        modules = {name.removeprefix("tensorpeft.networks.") for name in imports_of(path) if ".networks." in name}
        assert modules <= SHARED_NETWORK_CODE, path
        words = words_of(path)
        assert not words & (defined | of_one_method | {"cores", "axes", "bonds"}), path
        assert not {word.lower() for word in words} & methods, path


def public_names_of(path: Path) -> set[str]:
    """The classes, functions and constants that a module defines."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def words_of(path: Path) -> set[str]:
    """All words of a file but those of its docstrings' examples, which need a method to show something."""
    text = re.sub(r"^ *>>> .*?(?=^ *(\"\"\"|$))", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"\w+", text))


def test_no_module_imports_one_that_imports_it():
    """Function-level imports included: one that hides a cycle says that a function stands in the wrong module."""
    modules = {
        ".".join(("tensorpeft", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in FILES
    }
    edges = {name: imports_of(path, with_names=True) & set(modules) - {name} for name, path in modules.items()}
    assert "tensorpeft.quantization.quantizer" in edges["tensorpeft"] & edges["tensorpeft.quantization.model"]
    while leaves := {name for name, others in edges.items() if not others}:
        edges = {name: others - leaves for name, others in edges.items() if name not in leaves}
    assert not edges


@pytest.mark.parametrize("path", [*FILES, *COMMAND], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_are_short(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
