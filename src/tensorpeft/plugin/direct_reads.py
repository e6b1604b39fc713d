"""Layers whose weight is read by the module around them, instead of a call: an adapter there would do nothing."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

# What is asked about a child without calling it, and about a weight without a look at its numbers.
_QUESTIONS = ("hasattr", "isinstance")
_FACTS = ("device", "dtype", "ndim", "shape", "size", "numel")


class _Uses(NamedTuple):
    """What a module's forward does with its children, by their names."""

    read: frozenset[str]  # takes the weight of
    called: frozenset[str]  # calls, or hands to somebody who may


def reads_weight_itself(parent: nn.Module | None, name: str) -> bool:
    """Whether the forward of `parent` multiplies by the weight of its child `name` without calling it.

    Read from the source of its class; False where there is none. A child that is called on some ways and read on
    others counts as called, but for the output projection of a Mamba mixer: the kernels that are used wherever they
    are installed read it.
    """
    if parent is None:
        return False
    uses = _uses_of(type(parent))
    if name not in uses.read:
        return False
    return name not in uses.called or (name == "out_proj" and "conv1d" in uses.read - uses.called)


@cache
def _uses_of(cls: type[nn.Module]) -> _Uses:
    methods: dict[str, list[ast.FunctionDef]] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        if base is PreTrainedModel or not issubclass(base, nn.Module):
            continue  # long, and no forward of layers
        for method in _methods_of(base):
            methods.setdefault(method.name, []).append(method)
    read, called, seen = set[str](), set[str](), set[str]()
    waiting = ["forward"]
    while waiting:
        if (method_name := waiting.pop()) in seen:
            continue
        seen.add(method_name)
        for method in methods.get(method_name, ()):
            reads, others = _reads_and_others(method)
            read |= reads
            called |= others
            waiting += others & methods.keys()
    return _Uses(frozenset(read), frozenset(called))


def _methods_of(cls: type) -> list[ast.FunctionDef]:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # made without a file, such as in a notebook's cell
        return []
    return [node for node in getattr(tree, "body", ()) if isinstance(node, ast.FunctionDef)]


def _reads_and_others(method: ast.FunctionDef) -> tuple[set[str], set[str]]:
    """The children whose weight a method takes, but for its dtype and the like; and all that it uses otherwise."""
    arguments = [*method.args.posonlyargs, *method.args.args]
    if not arguments:
        return set(), set()
    parents = {id(child): node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    reads, others = set[str](), set[str]()
    for node in ast.walk(method):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id != arguments[0].arg:
            continue
        outer = parents[id(node)]
        if isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id in _QUESTIONS:
            continue
        if not isinstance(outer, ast.Attribute):
            others.add(node.attr)
        elif outer.attr == "weight" and not _asks_about(parents.get(id(outer))):
            reads.add(node.attr)
    return reads, others


def _asks_about(node: ast.AST | None) -> bool:
    """Whether this takes of a weight what does not depend on its numbers."""
    return isinstance(node, ast.Attribute) and node.attr in _FACTS


# What gives the numbers to who looks at a model, not to who computes with it.
_COPIES = ("detach", "clone", "cpu", "cuda", "numpy", "tolist")
_FIGURES = (
    "norm",
    "sum",
    "mean",
    "std",
    "var",
    "min",
    "max",
    "amin",
    "amax",
    "isnan",
    "isfinite",
    "isinf",
    "any",
    "all",
)
_LOOKS = (*_COPIES, *_FIGURES)
# What is still the weight, in another form.
_FORMS = ("to", "float", "double", "half", "bfloat16", "abs", "__getitem__", "t")


class UncalledWeight(Tensor):
    """The base weight of an adapted layer, as the module around it sees it: with its facts, but not to multiply by.

    torch's own fused encoder layers see that it is no plain tensor, and call their layers. Made by `uncalled`.
    """

    layer_name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A tensor of its own, with the numbers."""
        return self.detach().clone()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What the function says of the weight.

        Raises:
            ValueError: it computes a tensor from it, or writes to it.
        """
        name = func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            result = NotImplemented if name.endswith("_") and not name.endswith("__") else func(*args, **(kwargs or {}))
        makes_tensor = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        is_a_look = name in _LOOKS or func == Tensor.data.__get__  # type: ignore[attr-defined]
        (layer, *_) = (leaf.layer_name for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        if isinstance(result, Tensor) and name in _FORMS:
            return _seen_as(result, layer)
        if result is NotImplemented or (makes_tensor and not is_a_look):
            raise ValueError(
                f"{layer}: the model reads this layer's weight ({name}) instead of calling the layer, so that the "
                "active adapter would have no effect here. Name it in exclude_modules, or merge the adapter first "
                "(merge_adapter)."
            )
        return result


def uncalled(weight: Tensor, layer_name: str) -> Tensor:
    """A plain weight as an `UncalledWeight`; any other, as it is."""
    if type(weight) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return weight
    seen = _seen_as(weight.detach(), layer_name)
    vars(seen).update(vars(weight), layer_name=layer_name)  # flags, such as "initialised already"
    return seen


def _seen_as(tensor: Tensor, layer_name: str) -> UncalledWeight:
    seen = tensor.as_subclass(UncalledWeight)
    seen.layer_name = layer_name
    return seen
