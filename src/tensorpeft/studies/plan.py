"""``tensorpeft plan``: what every method would be and cost on a model, from its configuration alone."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tensorpeft.loading.architectures import build_empty, find_class
from tensorpeft.loading.errors import explained
from tensorpeft.loading.models import load_config
from tensorpeft.plugin.gradients import start_bytes
from tensorpeft.quantization.model import plan_layers
from tensorpeft.studies.budget import closest_value
from tensorpeft.studies.catalogue import REFERENCE, Method, choose_methods, methods_by_key
from tensorpeft.studies.fake_step import StepCosts, count_step
from tensorpeft.training.adapters import make_config

# Models of at most so many layers are stepped through in full. Of others two and three layers are, which give the rest:
# from the second on every layer adds the same. (The first may be frozen in part, or hold no peak.)
_MAX_LAYERS = 4
_RANK = 16  # where neither a rank nor a budget is given


@dataclass(frozen=True)
class MethodPlan:
    """What one method is on a model. Bytes throughout.

    Args:
        method: which.
        knob: the field that tells its size; None: it has none.
        value: of that field.
        trained: parameters.
        saved: size of the adapter's file, without its header.
        frozen: of the adapter, in memory: DoTA's start, NOLA's bases.
        start: the sketches of a start from gradients, which are gone when training begins.
        step: of the model with the adapter, in bfloat16.
        flops_ratio: floating-point operations of a step against LoRA's.
        problem: why the model cannot have it; all else is zero then.
    """

    method: Method
    knob: str | None = None
    value: int = 0
    trained: int = 0
    saved: int = 0
    frozen: int = 0
    start: int = 0
    step: StepCosts = field(default_factory=lambda: StepCosts(0, 0))
    flops_ratio: float = 0.0
    problem: str = ""

    def config(self, targets: list[str] | str | None) -> PeftConfig:
        """Its configuration on these layers; None: PEFT's for the architecture."""
        fields = {**(self.method.adapter or {}), **({self.knob: self.value} if self.knob else {})}
        if not self.method.has_own_targets:
            fields["target_modules"] = targets
        return make_config(fields, None)

    def total(self, base: int) -> int:
        """The memory of training on a base of so many bytes: weights, adapter, AdamW's moments, the peak of a step.

        A start from gradients takes a step's memory with sketches in the place of the moments.
        """
        moments = 8 * self.trained
        return base + self.frozen + 4 * self.trained + max(moments, self.start) + self.step.peak_bytes


@dataclass(frozen=True)
class ModelPlan:
    """What the methods are on a model.

    Args:
        name: the model's.
        num_parameters: its own.
        base_bytes: of its weights, by form: "bf16", and "NF4" (linear layers but the head in 4 bits).
        methods: in the order of the catalogue.
        batch: texts of a step.
        length: tokens of a text.
        gradient_checkpointing: whether a step keeps only the inputs of the blocks and computes the rest once more.
    """

    name: str
    num_parameters: int
    base_bytes: dict[str, int]
    methods: tuple[MethodPlan, ...]
    batch: int
    length: int
    gradient_checkpointing: bool = False


def plan_model(
    name: str,  # Hub name, or folder, of a model; only its config.json is read
    methods: Sequence[Method] | None = None,  # None: those that are planned by default
    rank: int | None = None,
    budget: int | None = None,  # trained parameters; each method gets the value that comes closest
    targets: list[str] | str | None = None,
    batch: int = 1,
    length: int = 512,
    gradient_checkpointing: bool = False,
    on_method: Callable[[str], object] = lambda text: None,  # called after each
) -> ModelPlan:
    """The plan of every method. Reads no weight and allocates none.

    Raises:
        ValueError: both a rank and a budget, a number below 1, or a model that transformers cannot build, or not with
            gradient checkpointing.
    """
    if rank is not None and budget is not None:
        raise ValueError(f"rank={rank}, budget={budget}: a budget chooses the rank. Pass one of the two.")
    for option, value in (("rank", rank), ("budget", budget), ("batch", batch), ("length", length)):
        if value is not None and value < 1:
            raise ValueError(f"{option}={value}: expected a whole number of at least 1.")
    planner = _Planner(load_config(name), batch, length, gradient_checkpointing, rank, budget, targets)
    model = planner.build()
    if gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing. Plan without it.")
    plans: list[MethodPlan] = []
    for plan in _map_in_processes(planner.plan, choose_methods(None) if methods is None else methods):
        on_method(plan.method.label)
        plans.append(plan)
    reference = next((plan.step.flops for plan in plans if plan.method.key == REFERENCE), 0)
    if reference == 0 and any(not plan.problem for plan in plans):
        reference = planner.count_step(planner.size(methods_by_key()[REFERENCE])).flops
    plans = [replace(plan, flops_ratio=plan.step.flops / (reference or 1)) for plan in plans]  # 0: there is none
    return ModelPlan(
        name, model.num_parameters(), _base_bytes(model), tuple(plans), batch, length, gradient_checkpointing
    )


def enable_checkpointing(model: Any) -> None:
    """Let an adapted model checkpoint the activations of its blocks, as Trainer does."""
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.config.use_cache = False


def build_skeleton(name: str) -> nn.Module:
    """The model on the meta device: shapes, and no numbers."""
    return _Planner(load_config(name)).build()


class _AdapterSizes(NamedTuple):
    """The sizes of an adapter that a plan tells, as `MethodPlan` does."""

    trained: int
    saved: int
    frozen: int
    start: int

    @classmethod
    def of(cls, model: PeftModel, method: Method) -> _AdapterSizes:
        """Those of the adapter that the model has."""
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        # "auto" would ask the Hub whether embeddings have grown.
        saved = _num_bytes(get_peft_model_state_dict(model, save_embedding_layers=False).values())
        frozen = _num_bytes(tensor for key, tensor in model.named_buffers() if "_update." in key)
        if method.starts_in_base:
            saved -= frozen
        return cls(trained, saved, frozen, start_bytes(model) if method.start_rows is not None else 0)


@dataclass(frozen=True)
class _Planner:
    """Plans methods on a model, which it builds at any depth on the meta device, in bfloat16; see `plan_model`."""

    config: PretrainedConfig
    batch: int = 1
    length: int = 1
    gradient_checkpointing: bool = False
    rank: int | None = None
    budget: int | None = None
    targets: list[str] | str | None = None

    def plan(self, method: Method) -> MethodPlan:
        """The plan, without the ratio to LoRA; a method that the model cannot have is one with a problem."""
        plan = MethodPlan(method)
        try:
            plan = self.size(method)
            return replace(plan, **self.measure_adapter(plan)._asdict(), step=self.count_step(plan))
        except ValueError as error:
            return replace(plan, problem=str(error))

    def size(self, method: Method) -> MethodPlan:
        """The method at the size that is asked for, and no more known of it."""
        if method.adapter is None:
            raise ValueError("all weights are trained: a plan is of adapters.")
        if self.budget is not None and method.knob is not None:

            def count(value: int) -> int:
                return self.measure_adapter(MethodPlan(method, method.knob, value)).trained

            return MethodPlan(method, method.knob, closest_value(count, self.budget))
        if method.rank is not None:
            return MethodPlan(method, method.rank, self.rank or _RANK)
        return MethodPlan(method, method.knob, method.adapter[method.knob] if method.knob else 0)

    @property
    def depth(self) -> int:
        """Layers; 0 where the configuration does not say."""
        return int(getattr(self.config, "num_hidden_layers", 0) or 0)

    def build(self, depth: int | None = None) -> PreTrainedModel:
        """The model, of another depth if one is given."""
        config = copy.deepcopy(self.config)
        if depth is not None:
            config.num_hidden_layers = depth  # type: ignore[attr-defined]
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:depth]  # type: ignore[attr-defined]
        return build_empty(find_class(config, type(config).__name__), config).to(torch.bfloat16)  # type: ignore[arg-type]

    def adapt(self, plan: MethodPlan, depth: int | None = None) -> PeftModel:
        """A new model of this depth, with an adapter."""
        with torch.device("meta"):  # what an adapter draws at random, too
            return get_peft_model(self.build(depth), plan.config(self.targets), low_cpu_mem_usage=True)  # type: ignore

    @cached_property
    def has_equal_layers(self) -> bool:
        """Whether from the second layer on all weights repeat, so that two depths tell of any."""
        if self.depth <= _MAX_LAYERS:
            return False
        two, three, full = (
            Counter(weight.shape for weight in self.build(depth).parameters()) for depth in (2, 3, None)
        )
        return all(_affine(two[shape], three[shape], self.depth) == full[shape] for shape in full | two | three)

    def count_step(self, plan: MethodPlan) -> StepCosts:
        """Of the full depth, extrapolated where that is large."""

        def count(depth: int | None) -> StepCosts:
            model = self.adapt(plan, depth).train()
            if self.gradient_checkpointing:
                enable_checkpointing(model)
            with explained(type(self.config).__name__):
                return count_step(model.get_base_model(), self.batch, self.length)

        return StepCosts(*self._at_full_depth(count, self.depth > _MAX_LAYERS and self._grows_by_layers(plan)))

    def measure_adapter(self, plan: MethodPlan) -> _AdapterSizes:
        """At the full depth."""
        is_extrapolated = self._grows_by_layers(plan) and self.has_equal_layers

        def measure(depth: int | None) -> _AdapterSizes:
            return _AdapterSizes.of(self.adapt(plan, depth), plan.method)

        return _AdapterSizes(*self._at_full_depth(measure, is_extrapolated))

    def _grows_by_layers(self, plan: MethodPlan) -> bool:
        return getattr(plan.config(self.targets), "grows_by_layers", True)  # PEFT's own methods all do

    def _at_full_depth(self, measure: Callable[[int | None], Iterable[int]], extrapolated: bool) -> Iterable[int]:
        if not extrapolated:
            return measure(None)
        return [_affine(two, three, self.depth) for two, three in zip(measure(2), measure(3), strict=True)]


def _affine(two: int, three: int, depth: int) -> int:
    """Of any depth, from the values at two and three layers."""
    return two + (three - two) * (depth - 2)


def _map_in_processes(function: Callable[[Method], MethodPlan], methods: Sequence[Method]) -> Iterator[MethodPlan]:
    """`map`, in a process per core: counting is Python's work, seconds per method, which threads cannot share.

    The processes are forked, as those of a DataLoader are, because a new one would import torch for longer than it
    works; so it is done where forking is sound: on Linux, and without an accelerator, for whose devices autograd starts
    threads that no fork outlives. The first method is planned before: what it imports, and the operations that its fake
    tensors come to know, the others then have.
    """
    can_fork = sys.platform == "linux" and not torch.accelerator.is_available()
    workers = min(len(methods) - 1, len(os.sched_getaffinity(0))) if can_fork else 1
    if workers <= 1:
        yield from map(function, methods)
        return
    yield function(methods[0])
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_begin_process) as pool:
        # Not `map`: after Ctrl-C it cancels what is waiting, and Python 3.11 fails to end a pool of cancelled work.
        for planned in [pool.submit(function, method) for method in methods[1:]]:
            yield planned.result()


def _begin_process() -> None:
    # One thread: a forked process must not wait for the threads of its parent.
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes: the parent tells of it, the others just end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _base_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Of the weights in bfloat16, and with the linear layers but the head in 4 bits, double quantisation included."""
    _, plain = plan_layers(model, None)
    names = {f"{name}.weight" for name in plain}
    nf4 = sum(
        nf4_bytes(parameter.numel()) if name in names else 2 * parameter.numel()
        for name, parameter in model.named_parameters()
    )
    return {"bf16": 2 * model.num_parameters(), "NF4": nf4}


def nf4_bytes(numel: int) -> int:
    """Of a weight: codes of half a byte, a byte per block of 64, four bytes per 256 blocks, and an offset."""
    blocks = ceil(numel / 64)
    return ceil(numel / 2) + blocks + 4 * ceil(blocks / 256) + 4
