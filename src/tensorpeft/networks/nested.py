"""Tensors that several backward passes within one use, and whose gradient must come once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class GradientsOnce:
    """What stands in for tensors that layers share, while reentrant checkpoints of these layers compute again.

    Each such checkpoint has a backward pass of its own, within the one that runs. DistributedDataParallel averages a
    gradient when it first comes, so it would average what the first checkpoint brings. Here the checkpoints' gradients
    add up in stand-ins, and go to the tensors when the outer pass ends.

    Not where nobody waits: FSDP has its own end of the pass, before this one; a `static_graph` counts the gradients.
    """

    def __init__(self) -> None:
        self._is_awaited = False  # by a DistributedDataParallel, whose forward pass has run
        self._has_come = False  # since then
        self._stand_ins: dict[int, dict[str, Tensor]] = {}  # by the backward pass that checkpoints compute again in

    def tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """These tensors; in a backward pass, where need be, what stands in for them.

        Raises:
            ValueError: ZeRO-3 awaits the gradient, whose tensors are not whole when the outer pass ends. In that pass:
                a gradient has been handed over already, and has been averaged.
        """
        task = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        if task == -1:
            self._begin_pass()
            return tensors
        if not torch.is_grad_enabled():
            return tensors
        if any(t.requires_grad and hasattr(t, "ds_id") for t in tensors.values()) and _is_reentrant():
            raise ValueError(
                "reentrant gradient checkpointing under DeepSpeed's ZeRO-3: it takes one gradient of each factor that "
                "layers share. Pass gradient_checkpointing_kwargs={'use_reentrant': False} (transformers' default)."
            )
        if not self._is_awaited:
            return tensors
        if task not in self._stand_ins:
            self._stand_ins[task] = {name: t.detach().requires_grad_(t.requires_grad) for name, t in tensors.items()}
            engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore
            engine.queue_callback(lambda: self._hand_over(tensors, self._stand_ins.pop(task)))
        return self._stand_ins[task]

    def _begin_pass(self) -> None:
        self._has_come = False
        self._stand_ins.clear()  # of a pass that failed
        parallel: Any = DistributedDataParallel._get_active_ddp_module()  # pyright: ignore[reportPrivateUsage]
        # An evaluation between forward and backward pass says nothing of them.
        if parallel is not None or torch.is_grad_enabled():
            self._is_awaited = parallel is not None and _averages_at_once(parallel)

    def _hand_over(self, tensors: Mapping[str, Tensor], stand_ins: Mapping[str, Tensor]) -> None:
        grads = {name: stand_in.grad for name, stand_in in stand_ins.items() if stand_in.grad is not None}
        if not grads:  # it was no reentrant checkpoint: what it computes again is not walked back
            return
        if self._has_come:
            raise ValueError(
                "reentrant checkpoints within reentrant ones, or a second backward pass of one forward pass, under "
                "DistributedDataParallel: it would average only the first gradient of the factors that layers share. "
                "Pass use_reentrant=False to the checkpoints, or static_graph=True to DistributedDataParallel."
            )
        self._has_come = True
        torch.autograd.backward([tensors[name] for name in grads], list(grads.values()))


def _is_reentrant() -> bool:
    """Whether what is computed again in a backward pass is so by a reentrant checkpoint: the others set hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # pyright: ignore


def _averages_at_once(parallel: Any) -> bool:  # a DistributedDataParallel
    """Whether it averages each gradient when it first comes."""
    if parallel.static_graph or not parallel.require_backward_grad_sync:
        return False
    return dist.get_world_size(parallel.process_group) > 1
