"""Training whose steps are bounded by what they do to the model's predictions, whatever the learning rate."""

import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tensorpeft.plugin.evaluation_mode import evaluation_mode
from tensorpeft.plugin.routes import without_kept_sums

# Of a batch: so many rows are looked at, and so many of their predictions.
_ROWS, _PREDICTIONS = 4, 256
# The steps whose median is the typical one, and how far above the bound a single one may be.
_TYPICAL, _OUTLIER = 5, 4
# A step is shortened so often, to between these shares of what it was, before it is not taken at all.
_TRIES, _SHARES = 8, (0.1, 0.9)
_IGNORED = -100  # a label that the loss leaves out
# Arguments of a forward that ask for a loss, not for logits.
_OF_LOSS = ("labels", "num_items_in_batch", "fused_lm_head", "return_dict")


class BoundedSteps(TrainerCallback, ExportableState):
    """Bounds how much a step of a transformers `Trainer` changes the model's predictions.

    A step of an optimiser says how far the numbers move; how far that moves the model depends on the adapter, on its
    rank, its scale, how its factors multiply. So every method wants a learning rate of its own, and one that is three
    times too high can ruin a run. Here the measure is the model itself: the Kullback-Leibler divergence of its
    predictions before a step from those after it, KL(before ‖ after) in nats, the mean over predictions of the step's
    own batch that the loss is taken on. It grows with the square of the rate. Where the median of the last five steps
    that were looked at is above the bound, the rate is scaled down so that it is not; a single step is shortened to
    four times the bound. A rate that is too high so becomes one that is not; one that is too low stays as it is. (The
    measure is that of trust-region methods: Schulman et al. 2015, arXiv 1502.05477.)

    Predictions must say something of what is trained: a classifier whose head starts from noise predicts chance at
    first, whatever becomes of the model beneath, and is not protected.

    A step that is looked at costs two forward passes of at most four rows, and a copy of what is trained. Schedule,
    optimiser, data and loss are the trainer's own; the log's ``rate_scale`` is the factor on the schedule's rate.
    Whatever has logits can be trained: language models (SFT, DPO, GRPO), classifiers.

    Args:
        max_kl: the bound on a typical step, in nats; above what rounding alone changes in half precision.
        first_steps: so many are all looked at.
        every: after these, one of so many.

    Attributes:
        scale: the factor on the learning rate, 1 at first. What it comes from is saved with a checkpoint, and read when
            training is resumed from one.

    Raises:
        ValueError: a bound that is not above zero, fewer than 0 first steps, ``every`` below 1. When training begins:
            the model is in shards (FSDP, DeepSpeed). At a step: the model's output tells no probabilities, or it
            was not called with arguments by name; the predictions or the gradients are no numbers.

    >>> bound = BoundedSteps(max_kl=0.01)
    >>> bound.is_looked_at(3), bound.is_looked_at(33), bound.is_looked_at(40)
    (True, False, True)
    """

    def __init__(self, max_kl: float = 0.01, first_steps: int = 10, every: int = 10):
        if not max_kl > 0:
            raise ValueError(f"max_kl={max_kl}: expected nats above 0, such as 0.01.")
        if first_steps < 0 or every < 1:
            raise ValueError(f"first_steps={first_steps}, every={every}: expected at least 0 and at least 1.")
        self.max_kl = max_kl
        self.first_steps = first_steps
        self.every = every
        self.scale = 1.0
        self.peak = 0.0  # the highest rate so far that the schedule gave a group of parameters
        self.curvatures: list[float] = []  # of the last steps looked at: divergence over the square of the rate
        self._rates: list[Any] = []
        self._inputs: dict[str, Any] = {}
        self._hook: Any = None
        self._start: list[tuple[nn.Parameter, Tensor]] = []
        self._before: Tensor | None = None

    def is_looked_at(self, step: int) -> bool:
        """Whether what this step does is measured; steps count from 0."""
        return step < self.first_steps or step % self.every == 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        arguments = {"max_kl": self.max_kl, "first_steps": self.first_steps, "every": self.every}
        return {"args": arguments, "attributes": {"peak": self.peak, "curvatures": self.curvatures}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what cannot be measured; take up what the checkpoint kept that is gone on from."""
        model: nn.Module = kwargs["model"]
        if args.deepspeed_plugin is not None or _is_sharded(model):
            raise ValueError(
                "BoundedSteps: the model is in shards (FSDP, DeepSpeed), whose steps cannot be shortened here. Train "
                "with DistributedDataParallel or in one process, or without the bound."
            )
        self.scale, self.peak, self.curvatures = 1.0, 0.0, []
        kept = (state.stateful_callbacks or {}).get(type(self).__name__) if state.global_step else None
        if isinstance(kept, Mapping):
            for name in self.state()["attributes"]:
                setattr(self, name, kept["attributes"][name])
        self._let_go()
        self._hook = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._let_go()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rates of this step; where it is looked at, keep where it starts."""
        groups = kwargs["optimizer"].param_groups
        self._rates = [group["lr"] for group in groups]
        if self.is_looked_at(state.global_step) and max(self._rates) > 0:
            self._start = [(p, p.detach().clone()) for group in groups for p in group["params"]]
            self._before = self._predictions(kwargs["model"])
            if not args.fp16:  # whose scaler leaves such a step out
                _check_numbers(self._before, [p.grad for p, _ in self._start if p.grad is not None])
        self.peak = max(self.peak, *map(float, self._rates))
        self.scale = self._scale()
        for group in groups:
            group["lr"] = group["lr"] * self.scale

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step, and shorten it if it is far too long; give the rates back to their schedule."""
        for group, rate in zip(kwargs["optimizer"].param_groups, self._rates, strict=True):
            group["lr"] = rate
        if self._before is None:
            return
        share, divergence = self._shorten(kwargs["model"], self._before)
        rate = float(max(self._rates)) * self.scale * share
        if divergence:  # not where a scaler of half precision has skipped the step
            self.curvatures = [*self.curvatures, divergence / rate**2][-_TYPICAL:]
        self._start, self._before = [], None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the scale into the log's line of training, and into what is printed of it."""
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1]["rate_scale"] = self.scale
            if kwargs.get("logs"):
                kwargs["logs"]["rate_scale"] = self.scale

    def _scale(self) -> float:
        """What makes the schedule's peak a rate at which a typical step keeps the bound; at most 1."""
        if not self.curvatures or (typical := median(self.curvatures)) <= 0:
            return 1.0
        return min(1.0, math.sqrt(self.max_kl / typical) / self.peak)

    def _shorten(self, model: nn.Module, before: Tensor) -> tuple[float, float | None]:
        """The share of the step that is taken, and the divergence that it makes; None: there is no prediction."""
        steps = [(parameter, start, parameter.detach() - start) for parameter, start in self._start]
        share, most = 1.0, _OUTLIER * self.max_kl
        for _ in range(_TRIES):
            divergence = _divergence(before, self._predictions(model))
            if divergence is None or divergence <= most:  # not where it is no number
                return share, divergence
            least, largest = _SHARES
            share *= min(max(math.sqrt(most / divergence), least), largest) if math.isfinite(divergence) else least
            for parameter, start, step in steps:
                parameter.copy_(start + share * step)
        for parameter, start, _ in steps:
            parameter.copy_(start)
        return share, most

    @torch.no_grad()
    def _predictions(self, model: nn.Module) -> Tensor:
        """Log-probabilities (predictions, classes) of the batch that was last trained on."""
        if not self._inputs:
            raise ValueError(
                "BoundedSteps: no batch was seen: expected the model to be called with arguments by name, as Trainer "
                "calls it. Call it so, or train without the bound."
            )
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        unused = _of_loss_alone(base, self._inputs)
        arguments = {name: value for name, value in self._inputs.items() if name not in unused}
        with evaluation_mode(model), without_kept_sums():
            logits = getattr(model(**arguments), "logits", None)
        if logits is None:
            raise ValueError("BoundedSteps: the model's output has no logits. Train it without the bound.")
        logits = _of_classes(logits, getattr(getattr(base, "config", None), "problem_type", None))
        return _of_loss(logits, self._inputs, _predicts_next(base)).float().log_softmax(-1)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self._inputs = _first_rows(kwargs)

    def _let_go(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._inputs, self._start, self._before = None, {}, [], None


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters()) or any(
        isinstance(module, FullyShardedDataParallel) for module in model.modules()
    )


def _first_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch's first rows; as it is where its rows cannot be told."""
    of_rows = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() > 0}
    if len({len(value) for value in of_rows.values()}) != 1:  # such as packed sequences, with where they begin
        return dict(inputs)
    return {**inputs, **{name: value[:_ROWS] for name, value in of_rows.items()}}


def _of_loss_alone(model: Any, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments that its predictions do without: of an encoder-decoder, labels may be all that its decoder gets."""
    is_decoding = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    has_inputs = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    return tuple(name for name in _OF_LOSS if name != "labels") if is_decoding and not has_inputs else _OF_LOSS


def _of_classes(
    logits: Tensor,
    problem: str | None,  # a classifier's, as its configuration has it
) -> Tensor:  # (…, classes), each prediction a choice of one class
    """Logits with the classes last.

    Raises:
        ValueError: they tell no probabilities.
    """
    if problem == "multi_label_classification":  # each label is there or not
        return torch.stack([logits, torch.zeros_like(logits)], dim=-1)
    if logits.dim() == 4:  # an image's: (rows, classes, height, width)
        logits = logits.movedim(1, -1)
    if problem == "regression" or logits.shape[-1] < 2:
        found = "one logit" if logits.shape[-1] < 2 else "numbers (problem_type='regression')"
        raise ValueError(f"BoundedSteps: the model's output has {found}, no probabilities. Train it without the bound.")
    return logits


def _of_loss(
    logits: Tensor,  # (rows, classes), or of a language model (rows, tokens, classes)
    inputs: Mapping[str, Any],
    predicts_next: bool,  # a token's logits are of the next one
) -> Tensor:
    """The logits (predictions, classes) that the loss is taken on, some of them where there are many."""
    if logits.dim() > 2:
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        chosen = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        if isinstance(labels, Tensor) and labels.shape == chosen.shape:
            chosen = labels != _IGNORED
        elif isinstance(mask, Tensor) and mask.shape == chosen.shape:
            chosen = mask.bool()
        if predicts_next:
            logits, chosen = logits[:, :-1], chosen[:, 1:]
        logits = logits[chosen]
    return logits[:: max(1, math.ceil(len(logits) / _PREDICTIONS))]


def _predicts_next(model: Any) -> bool:
    """Whether it is a causal language model."""
    generates = hasattr(model, "can_generate") and model.can_generate()
    return generates and not model.config.is_encoder_decoder


def _divergence(before: Tensor, after: Tensor) -> float | None:
    """KL(before ‖ after) of log-probabilities (predictions, classes) in nats, the mean over those of all processes."""
    # What is impossible before the step adds nothing, though it be impossible after it, too.
    terms = torch.where(before.isneginf(), 0.0, before.exp() * (before - after))
    found = (terms.sum().item(), len(before))
    of_all: list[Any] = [found]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        of_all = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_all, found)
    total, predictions = (sum(column) for column in zip(*of_all, strict=True))
    return total / predictions if predictions else None


def _check_numbers(predictions: Tensor, gradients: Iterable[Tensor]) -> None:
    """Refuse to go on from where no step leads out."""
    found = "predictions" if predictions.isnan().any() else ""
    if not found and any(not gradient.isfinite().all() for gradient in gradients):
        found = "gradients"
    if found:
        raise ValueError(
            f"BoundedSteps: the {found} of this step are no finite numbers: no step can be bounded, and an optimiser "
            "with moments never forgets them. Look for what makes them so: a base in float16, a batch without a label, "
            "a loss that rose in the steps before."
        )
