"""A new head: which parameters are its, and one of which less is trained than all of it."""

import math
import warnings
from collections.abc import Collection
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorpeft.modes import modes_near_8
from tensorpeft.networks.tensor_train import contract, random_train
from tensorpeft.training.head_recipe import HeadRecipe

# The ends of the names of what PEFT takes for a classifier's head: it trains and saves these by itself.
_OF_PEFT = ("classifier", "score")
# Attribute of a base: the names of its new modules.
_NEW = "new_modules"


def note_new(
    model: nn.Module,  # before it has an adapter
    parameters: Collection[str],  # names of those that start from noise
) -> None:
    """Note which modules of a model are new: the largest ones all of whose parameters start from noise."""
    found: list[str] = []
    for name, module in model.named_modules():  # a module before its parts
        own = [f"{name}.{key}" for key, _ in module.named_parameters()]
        if name and own and set(parameters).issuperset(own) and not name.startswith(tuple(f"{f}." for f in found)):
            found.append(name)
    setattr(model, _NEW, tuple(found))


def new_modules(model: nn.Module) -> tuple[str, ...]:
    """What `note_new` has noted of a model, or of the base of an adapted one."""
    return getattr(model, _NEW, ())


def is_head(
    name: str,  # of a parameter or module
    model: nn.Module,  # of which it is; adapted or not
) -> bool:
    """Whether it is of the model's head: of what is new to it, or of what PEFT takes for a head."""
    of_peft = any(part.endswith(_OF_PEFT) for part in name.split("."))
    return of_peft or any(f".{new}." in f".{name}." for new in new_modules(model))


def train_new(
    config: Any,  # of the adapter, which is changed
    model: nn.Module,
) -> None:
    """Have PEFT train and save all new modules of a model. What it does not know it would leave random and unsaved.

    Raises:
        ValueError: the adapter's method can train no modules beside it.
    """
    known = (*_OF_PEFT, *(getattr(config, "modules_to_save", None) or ()))

    def is_known(name: str) -> bool:  # or a part of what is
        return any(parent.endswith(known) for parent in accumulate(name.split("."), "{}.{}".format))

    if others := [name for name in new_modules(model) if not is_known(name)]:
        if not hasattr(config, "modules_to_save"):
            raise ValueError(
                f"adapter: {', '.join(others)} of {type(model).__name__} start from noise, and beside a "
                f"{type(config).__name__} PEFT cannot train them. Choose another method, such as lora."
            )
        config.modules_to_save = [*(config.modules_to_save or ()), *others]


class HeadLayer(nn.Module):
    """A linear layer of which nothing is trained.

    W and b are buffers, because PEFT trains every parameter of a head that it saves, and saves both.

    Args:
        linear: what the layer is at its start.
    """

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def sum(self) -> Tensor:  # (out, in)
        """The weight as it is now. Differentiable."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(*batch, in) -> (*batch, out)."""
        return F.linear(x, self.sum().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def folded(self) -> nn.Linear:
        """The linear layer that it is now."""
        weight = self.sum().detach()
        linear = nn.Linear(weight.shape[1], len(weight), self.bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


class LoraHeadLayer(HeadLayer):
    """`y = x (W + (alpha / r) · up · down)ᵀ + b`, where up and down are trained and start at zero update.

    Args:
        linear: what the layer is at its start.
        r: rank of the LoRA.
        alpha: the update is scaled by alpha / r.
    """

    def __init__(self, linear: nn.Linear, r: int, alpha: float):
        super().__init__(linear)
        self.scale = alpha / r
        self.down = nn.Parameter(torch.empty(r, linear.in_features))  # float32, whatever the head is in
        self.up = nn.Parameter(torch.zeros(linear.out_features, r))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as LoRA
        self.to(linear.weight.device)

    def sum(self) -> Tensor:  # (out, in)
        """The weight with its update."""
        return self.weight + (self.scale * self.up @ self.down).to(self.weight.dtype)


class TrainHeadLayer(HeadLayer):
    """`y = x Wᵀ + b`, W a tensor train over modes near 8 of the outputs and then of the inputs; all of it is trained.

    It starts from noise of the variance that the layer's own weight has.

    Args:
        linear: what it stands for.
        tt_rank: bond dimension.

    Source: LoRETTA (arXiv 2402.11417), "tensorized classifier".
    """

    # A LoRA's layer has the frozen weight to tell it: what the model around is cast to.
    dtype_of_model: Tensor

    def __init__(self, linear: nn.Linear, tt_rank: int):
        super().__init__(linear)
        weight, bias = self.weight, self.bias
        del self.weight
        if bias is not None:
            del self.bias
            self.bias = nn.Parameter(bias.float())
        self.shape = weight.shape
        self.register_buffer("dtype_of_model", weight.new_empty(0), persistent=False)
        modes = [mode for size in self.shape for mode in _modes(size)]
        cores = random_train(modes, tt_rank, std=1.0)  # float32, whatever the head is in, as is the bias
        cores[0] = cores[0].to(weight.device) * weight.float().std(correction=0)
        self.cores = nn.ParameterList(cores)
        self.to(weight.device)

    def sum(self) -> Tensor:  # (out, in)
        """The train's entries as a matrix."""
        return contract(list(self.cores)).view(self.shape).to(self.dtype_of_model.dtype)


def _modes(size: int) -> list[int]:
    """Near 8; a size with a large prime has a large mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a prime stays whole, and what a configuration of ours could say instead
        modes = modes_near_8(size)
    return [mode for mode in modes if mode > 1] or [1]


def _head_layer(linear: nn.Linear, recipe: HeadRecipe) -> HeadLayer:
    """What a chosen layer becomes."""
    if recipe.tt_rank is not None:
        return TrainHeadLayer(linear, recipe.tt_rank)
    return LoraHeadLayer(linear, recipe.r or 8, recipe.alpha or 16)


def restrict_head(
    model: nn.Module,  # before it has an adapter
    recipe: HeadRecipe,
) -> None:
    """Replace linear layers of the model's new head: those that are named, and the others where these are not trained.

    Raises:
        ValueError: no layer of the head has such a name.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_head(name, model)]
    chosen = [name for name in names if any(f".{name}".endswith(f".{end}") for end in recipe.target_modules)]
    if not chosen:
        raise ValueError(
            f"head.target_modules={recipe.target_modules}: no linear layer of the head is called so. It has "
            f"{', '.join(names) or 'none'}."
        )
    for name in names:
        linear: Any = model.get_submodule(name)
        if name in chosen:
            model.set_submodule(name, _head_layer(linear, recipe))
        elif not recipe.train_others:
            model.set_submodule(name, HeadLayer(linear))


def fold_head(model: nn.Module) -> None:
    """Turn a head that `restrict_head` has made into linear layers, which any model of its class loads."""
    for name, module in list(model.named_modules()):
        if isinstance(module, HeadLayer):
            model.set_submodule(name, module.folded().requires_grad_(False))
