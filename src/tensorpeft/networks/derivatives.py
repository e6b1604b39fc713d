"""Derivatives beyond a backward pass: second ones, and those of `torch.func` and of forward mode.

A custom function of this package knows its first derivative. Whoever asks for more gets the same map, made of plain
operations: equal up to rounding, and slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_torch: Any = torch
_forward_ad: Any = forward_ad


def is_transformed() -> bool:
    """Whether only plain operations are understood: by a transform of `torch.func` (grad, vmap, jvp, …), forward mode,
    `torch.jit.trace`, `torch.export` (but where it is strict: then dynamo reads the code).
    """
    if _torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        # Export runs this code on tensors that record what is done; dynamo, which reads it, knows custom functions.
        return not torch.compiler.is_dynamo_compiling()
    return _torch._C._are_functorch_transforms_active() or _forward_ad._current_level >= 0


def is_compiled_without_gradients() -> bool:
    """Whether a compiler reads this and sees no gradient: it breaks its graph at a custom function, then."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def as_no_view(tensor: Tensor) -> Tensor:
    """A tensor that nobody else holds, for a custom function to return: what is no view may be changed in place.

    An activation with `inplace=True` does that to a layer's output.
    """
    return _torch.ops.aten._unsafe_view(tensor, tensor.shape)  # type: ignore[no-any-return]


def gradients(
    plain: Callable[[Sequence[Any]], Sequence[Tensor]],
    inputs: Sequence[Any],
    wanted: Sequence[bool],  # of each input
    grads: Sequence[Tensor | None],  # of each output
) -> list[Tensor | None]:  # of each input
    """The gradients of the inputs of a map of plain operations, themselves differentiable."""
    # Views: an input that stands in two places has a gradient for each.
    inputs = [tensor.view_as(tensor) if want else tensor for tensor, want in zip(inputs, wanted)]
    asked = [tensor for tensor, want in zip(inputs, wanted) if want]
    if not asked:
        return [None for _ in wanted]
    outputs = [(output, grad) for output, grad in zip(plain(inputs), grads) if grad is not None]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in outputs],
            asked,
            [grad for _, grad in outputs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if want else None for want in wanted]


def linear_gradients(
    plain: Callable[..., Tensor],  # x, weight and the tensors -> the output without its bias
    inputs: Sequence[Any],  # x, weight and the tensors
    wanted: Sequence[bool],  # of x, weight, bias and the tensors
    grad: Tensor,  # of the output
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:  # of x, weight, bias and the tensors
    """The gradients of a linear map with a bias, themselves differentiable."""
    needs_x, needs_weight, needs_bias, *needs_tensors = wanted
    grad_x, grad_weight, *grads = gradients(
        lambda given: [plain(*given)], inputs, (needs_x, needs_weight, *needs_tensors), [grad]
    )
    return grad_x, grad_weight, grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None, grads
