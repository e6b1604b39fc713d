"""A weight to adapt, as a method sees it: a name and a shape. No method knows an architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One weight (out, in) that an adapter adapts.

    Args:
        name: full name of the linear layer in the model, such as `model.layers.0.self_attn.q_proj`.
        out: output features, the rows of its weight.
        in_: input features, the columns.
    """

    name: str
    out: int
    in_: int
