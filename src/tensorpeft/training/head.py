"""A new head: which parameters are its, and one of which no more than a LoRA of some layers is trained."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorpeft.training.head_recipe import HeadRecipe

# As PEFT and transformers call a layer that is new to a model.
_HEADS = ("classifier", "score", "head")


def is_head(
    name: str,  # of a parameter
) -> bool:
    """Whether a parameter is of a head that is new to the model."""
    return not set(name.split(".")).isdisjoint(_HEADS)


class HeadLayer(nn.Module):
    """`y = x (W + (alpha / r) · up · down)ᵀ + b`, where up and down are trained and start at zero update.

    W and b are buffers, because PEFT trains every parameter of a head that it saves, and saves both.

    Args:
        linear: what the layer is at its start.
        r: rank of the LoRA; None: nothing is trained.
        alpha: the update is scaled by alpha / r.
    """

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)

    def __init__(self, linear: nn.Linear, r: int | None, alpha: float = 16):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.down = self.up = None
        if r is not None:
            self.scale = alpha / r
            self.down = nn.Parameter(torch.empty(r, linear.in_features))  # float32, whatever the head is in
            self.up = nn.Parameter(torch.zeros(linear.out_features, r))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as LoRA
            self.to(linear.weight.device)

    def sum(self) -> Tensor:  # (out, in)
        """The weight with its update."""
        if self.up is None or self.down is None:
            return self.weight
        return self.weight + (self.scale * self.up @ self.down).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(*batch, in) -> (*batch, out)."""
        return F.linear(x, self.sum(), self.bias)

    def folded(self) -> nn.Linear:
        """The linear layer that it is now."""
        out, in_ = self.weight.shape
        linear = nn.Linear(in_, out, self.bias is not None, self.weight.device, self.weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.sum())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


def restrict_head(
    model: nn.Module,  # before it has an adapter
    recipe: HeadRecipe,
) -> None:
    """Replace the linear layers of the model's new head: of those that are named a LoRA is trained, of others nothing.

    Raises:
        ValueError: no layer of the head has such a name.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_head(name)]
    chosen = [name for name in names if any(f".{name}".endswith(f".{end}") for end in recipe.target_modules)]
    if not chosen:
        raise ValueError(
            f"head.target_modules={recipe.target_modules}: no linear layer of the head is called so. It has "
            f"{', '.join(names) or 'none'}."
        )
    for name in names:
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, HeadLayer(linear, recipe.r if name in chosen else None, recipe.alpha))


def fold_head(model: nn.Module) -> None:
    """Turn a head that `restrict_head` has made into linear layers, which any model of its class loads."""
    for name, module in list(model.named_modules()):
        if isinstance(module, HeadLayer):
            model.set_submodule(name, module.folded().requires_grad_(False))
