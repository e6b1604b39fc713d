"""The memory and the operations of a training step, counted on fake tensors: shapes, and no numbers.

A fake tensor knows its shape, type and device, so that a step of a model of any size runs in seconds and in no memory;
every operation is seen, with the storages that it makes and when they are freed. Compared with measured steps by
`benchmarks/plan_memory.py`.
"""

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary


class StepCosts(NamedTuple):
    """What a forward and backward cost.

    Args:
        peak_bytes: the most that is allocated above the model at any time, gradients included.
        flops: floating-point operations of all products.
    """

    peak_bytes: int
    flops: int


def count_step(
    model: nn.Module,  # in training mode, on the meta device; its tensors become fake ones
    batch: int,
    length: int,
) -> StepCosts:
    """The costs of a step on `batch` texts of `length` tokens."""
    with FakeTensorMode():
        _make_fake(model)
        tokens = torch.ones(batch, length, dtype=torch.long)
        with _Counter() as counter:
            _loss(model, tokens).backward()
    return StepCosts(counter.peak, counter.flops)


def _loss(model: Any, tokens: Tensor) -> Tensor:
    """The language model's own; of another model the sum of what it returns."""
    if hasattr(model, "lm_head"):
        return model(input_ids=tokens, labels=tokens).loss
    output = model(input_ids=tokens)
    return (output.logits if "logits" in output else output.last_hidden_state).float().sum()


def _make_fake(model: nn.Module) -> None:
    """Replace every parameter and buffer, shared ones by a shared one."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = fakes[id(tensor)]  # type: ignore[assignment]


@cache
def _flop_formula(packet: Any) -> Callable[..., int] | None:
    """Torch's; what works in place, as `addmm_`, has as many as what does not, but is not in its list."""
    functional = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet)
    return flop_registry.get(packet) or flop_registry.get(functional)


class _Counter(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed, and the operations of products.

    By torch's formulas, but without its FlopCounterMode: that follows the modules with hooks which hold what
    checkpointing of activations has freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.flops = 0
        self._allocated = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked more often than all else; the other modes take long
        result = function(*args, **(kwargs or {}))
        if (formula := _flop_formula(function._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._known[storage] = True
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, num_bytes: int) -> None:
        self._allocated += num_bytes
        self.peak = max(self.peak, self._allocated)
