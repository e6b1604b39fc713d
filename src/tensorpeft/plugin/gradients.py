"""A start that looks at the user's data: frames from the gradient, which is sketched and never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn

from tensorpeft.networks.dtypes import without_autocast
from tensorpeft.networks.sketch import Noise, Sketch, sketch_bytes
from tensorpeft.plugin.base_weight import StackedWeight, is_convolution
from tensorpeft.plugin.framed import Framed, framed_of

Batch = Mapping[str, Any]


def initialize_from_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    adapter_name: str = "default",
    loss_of: Callable[[nn.Module, Batch], Tensor] | None = None,
    seed: int = 0,
) -> None:
    """Set the frames of a new adapter where the gradient of the user's own loss has its energy.

    In the way of PEFT's `initialize_lora_eva_weights`: after `get_peft_model` and before training. The model is then
    still the base model, bit for bit. The gradient `G = Σ dyᵀ x` of a weight is gathered from its layer's inputs and
    its outputs' gradients as two thin products (`networks.sketch`), so that a base in 4 bits, or one whose gradients
    have no room, serves as well; its memory is (out + 1.5 in) · (2 r + 16) float32 numbers per adapted weight. Which
    factors of which method are frames, docs/frames.md says; of PEFT's own LoRA A is, its rows as long as LoRA's are.

    In several processes (`torch.distributed`), each brings its own batches, and all get the frames of their sum.

    Args:
        model: the result of `get_peft_model`, as it starts; in training mode dropout acts, and gradient checkpointing.
        batches: some batches of the data, with labels, on the model's device; 32 to 64 rows are enough. Each counts
            as its loss does, a mean over its own tokens.
        adapter_name: of the adapter, which is active.
        loss_of: the loss of a batch; None: `model(**batch).loss`.
        seed: of the sketches.

    Raises:
        TypeError: not a PEFT model.
        ValueError: the method has no frames, or not at these layers; the adapter is not active, or is trained already;
            no batch, or one without a loss; a layer that no gradient reaches, or one that is zero or not finite.
            Nothing has been changed.

    Source: of frames per weight, LoRA-SB (arXiv 2411.19557); of those that layers share, ours.

    >>> import torch, transformers
    >>> from peft import get_peft_model
    >>> from tensorpeft import LotrConfig
    >>> sizes = dict(vocab_size=96, hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4)
    >>> base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    >>> model = get_peft_model(base, LotrConfig(r=4, train="cores", target_modules=["q_proj", "v_proj"]))
    >>> ids = torch.arange(14).view(2, 7)
    >>> initialize_from_gradients(model, [{"input_ids": ids, "labels": ids}])
    >>> model.peft_config["default"].gradient_start
    {'batches': 1, 'rows': 2, 'seed': 0}
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"a {type(model).__name__}: expected the result of get_peft_model.")
    framed = framed_of(model, adapter_name)
    layers = _checked_layers(model, framed)
    shapes = _shapes(layers)
    rank, noise = framed.rank(shapes), Noise(seed)
    sketches = {name: Sketch(*shape, rank, noise, _device_of(layers[name], framed)) for name, shape in shapes.items()}
    num_batches = num_rows = 0
    with gathering(model, layers, sketches) as reached:
        for batch in batches:
            loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
            if loss is None:
                raise ValueError("batches: the model gave no loss. Pass batches with labels, or loss_of.")
            loss.backward()
            num_batches += 1
            num_rows += next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)
    counts = torch.tensor([num_batches, num_rows, *(reached[name] for name in layers)])
    if _is_distributed():
        counts = _sum_over_processes(counts, sketches)
    num_batches, num_rows, *times = counts.tolist()
    if not num_batches:
        raise ValueError("batches: there is none. Pass some batches of the training data, 32 to 64 rows in all.")
    for name, count in zip(layers, times):
        _check_sketch(name, count, sketches[name])
    with without_autocast(next(iter(sketches.values())).left.device):
        gradients = {name: sketch.gradient() for name, sketch in sketches.items()}
        framed.set_frames(layers, gradients, {"batches": num_batches, "rows": num_rows, "seed": seed})
    if _is_distributed():
        _broadcast(module for layer in layers.values() for module in framed.modules_of(layer))


def start_bytes(model: PeftModel, adapter_name: str = "default") -> int:
    """The memory of the sketches that `initialize_from_gradients` gathers on a model, on the meta device as well."""
    framed = framed_of(model, adapter_name)
    shapes = _shapes(dict(framed.layers(model)))
    return sum(sketch_bytes(*shape, framed.rank(shapes)) for shape in shapes.values())


def _device_of(layer: Any, framed: Framed) -> torch.device:
    """Where the layer computes: of a base that is put away (meta) that is where its adapter is."""
    modules = (layer.get_base_layer(), *framed.modules_of(layer))
    tensors = (tensor for module in modules for tensor in chain(module.parameters(), module.buffers()))
    return next(tensor.device for tensor in tensors if not tensor.is_meta)


def _shapes(layers: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers' weights."""
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def _checked_layers(model: PeftModel, framed: Framed) -> dict[str, Any]:
    """The adapter's layers by their full names, all of which have frames that may be set."""
    adapter_name = framed.adapter_name
    if adapter_name not in model.active_adapters:
        raise ValueError(f"{adapter_name}: only an active adapter has gradients. Call set_adapter({adapter_name!r}).")
    layers = dict(framed.layers(model))
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        if not isinstance(layer, framed.layer_type) or isinstance(base, StackedWeight) or is_convolution(base):
            raise ValueError(f"{name}: frames from gradients are of linear layers. Take this one out of the targets.")
        if not framed.adds_nothing(layer):
            raise ValueError(
                f"{name}: its update is not zero. Frames are set before training, of an adapter that starts as the "
                "identity (init_weights=True)."
            )
    return layers


class _KeptInput(torch.autograd.Function):
    """An input that is wanted in the backward pass, kept as autograd keeps its own: a checkpoint makes it again."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError  # nothing is made of it


@contextmanager
def gathering(
    model: nn.Module, layers: Mapping[str, nn.Module], sketches: Mapping[str, Sketch]
) -> Iterator[dict[str, int]]:
    """Inside, backward passes add to the sketches; how often, by layer. Gradients and random numbers are put back."""
    reached = dict.fromkeys(layers, 0)

    def gather(name: str, x: Tensor, grad: Tensor) -> None:
        sketches[name].add(x, grad)
        reached[name] += 1

    def watch(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:  # not in the first pass of a reentrant checkpoint
            anchor = torch.empty(0, requires_grad=True)
            kept: Any = _KeptInput.apply(anchor, args[0].detach())
            output.register_hook(lambda grad: gather(name, kept.grad_fn.saved_tensors[0], grad))

    parameters = [p for p in model.parameters() if p.requires_grad]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    before = [p.grad for p in parameters]
    handles = [layer.register_forward_hook(partial(watch, name)) for name, layer in layers.items()]
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            for parameter in parameters:
                parameter.grad = None
            yield reached
    finally:
        for handle in handles:
            handle.remove()
        for parameter, grad in zip(parameters, before):
            parameter.grad = grad


def _check_sketch(name: str, count: int, sketch: Sketch) -> None:
    if not count:
        raise ValueError(f"{name}: no gradient has reached this layer. Exclude it, or pass batches that it sees.")
    largest = max(sketch.left.abs().max().item(), sketch.right.abs().max().item())
    if not 0 < largest < float("inf"):
        raise ValueError(
            f"{name}: its gradient is {'zero' if largest == 0 else 'not finite'}: expected batches with labels, on "
            "which the model's loss is a number that depends on this layer."
        )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _sum_over_processes(counts: Tensor, sketches: Mapping[str, Sketch]) -> Tensor:
    device = next(iter(sketches.values())).left.device
    counts = counts.to(device)
    for tensor in (counts, *(t for s in sketches.values() for t in (s.left, s.right))):
        dist.all_reduce(tensor)
    return counts


def _broadcast(modules: Iterable[nn.Module]) -> None:
    """The first process's tensors to all: other hardware may have found other signs."""
    tensors = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    for tensor in tensors.values():
        dist.broadcast(tensor.data, 0)
