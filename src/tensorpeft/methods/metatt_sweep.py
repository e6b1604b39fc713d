"""MetaTT's rank schedule: trains that are trained at a larger rank and cut while they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from tensorpeft.methods.metatt import MetaTtConfig
from tensorpeft.networks.train_slices import TrainFactors, TrainSliceUpdate
from tensorpeft.plugin.config import check_rank

_NOTHING_TO_CUT = "no MetaTT adapter of this model is trained: add one (MetaTtConfig), or leave the sweep out."


def cut_ranks(
    model: nn.Module,  # with `MetaTtConfig` adapters
    rank: int,
    optimizer: Any = None,  # torch's, or what wraps one
) -> bool:
    """Cut the bonds of all MetaTT adapters that are trained to a rank: whether there were larger ones.

    Each train is rounded: right to left made orthogonal, left to right cut by SVD, so that its error is at most
    √(N − 1) times the best one's; its norm is then spread equally over its N cores. The cores are new parameters, which
    take the old ones' places in the optimiser; its state of them is dropped. The bonds are written into the
    configuration, and saved with it.

    Raises:
        ValueError: a core is zero, as the last one is before the first step; or the model has no such adapter that is
            trained. Nothing has been changed.
    """
    check_rank("rank", rank)
    trained = _trained(model)
    if not trained:
        raise ValueError(_NOTHING_TO_CUT)
    larger = [(config, factors, name) for config, factors in trained for name in _larger(factors, rank)]
    if zero := next((name for _, factors, name in larger if _has_zero(factors, name)), None):
        raise ValueError(
            f"{zero}: a core of this train is still zero, so that a cut would choose its directions at random. Sweep "
            "after a step of training that has moved it."
        )
    for config, factors, name in larger:
        replaced = factors.cut(name, rank)
        config.bonds = {**(config.bonds or {}), name: factors.bonds(name)}
        if optimizer is not None:
            _replace(optimizer, replaced)
    for module in model.modules():
        if isinstance(module, TrainSliceUpdate):
            module.train(module.training)  # what its group keeps of the old cores goes
    return bool(larger)


class MetaTtSweep(TrainerCallback):
    """Cuts the ranks of MetaTT adapters while a transformers `Trainer` trains them (`cut_ranks`).

    The schedule of the learning rate goes on. A cut that is due while a core is still zero waits until it is not. A
    checkpoint holds the cut cores and their bonds. To resume from one, make the model from it,
    `PeftModel.from_pretrained(base, checkpoint, is_trainable=True)`, then `trainer.train(resume_from_checkpoint=...)`.

    Args:
        ranks: {step: the largest bond from then on}, falling, such as `{200: 8, 400: 6, 600: 4}`.
        unit: what the keys count: "steps" of the optimiser or "epochs".

    Raises:
        ValueError: an empty schedule, a step or rank below 1, ranks that rise, an unknown unit. When training begins:
            no MetaTT adapter is trained; several processes, whose wrappers have laid the parameters out; or
            `load_best_model_at_end`, whose checkpoint may have other ranks than the model.

    >>> MetaTtSweep({1: 8, 2: 4}, unit="epochs").rank_at(1.5)
    8
    """

    def __init__(self, ranks: Mapping[int, int], unit: Literal["steps", "epochs"] = "steps"):
        if unit not in ("steps", "epochs"):
            raise ValueError(f'unit={unit!r}: expected "steps" or "epochs".')
        if not ranks:
            raise ValueError(f"ranks={ranks!r}: expected at least one cut, such as {{200: 8}}.")
        for when, rank in ranks.items():
            check_rank(unit, when)
            check_rank("ranks", rank)
        in_order = [ranks[when] for when in sorted(ranks)]
        if in_order != sorted(in_order, reverse=True):
            raise ValueError(f"ranks={dict(ranks)}: expected ranks that fall; a sweep cuts, it does not grow.")
        self.ranks = dict(ranks)
        self.unit = unit

    def rank_at(self, progress: float) -> int | None:
        """The largest bond after so many steps or epochs; None before the first cut."""
        return min((rank for when, rank in self.ranks.items() if when <= progress), default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what could not go on after a cut."""
        if not _trained(kwargs["model"]):
            raise ValueError(_NOTHING_TO_CUT)
        if args.parallel_mode == ParallelMode.DISTRIBUTED:
            raise ValueError(
                "MetaTtSweep: several processes, but a cut makes new parameters, which DistributedDataParallel, FSDP "
                "and DeepSpeed do not learn of. Train in one process, or without the sweep."
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "MetaTtSweep: load_best_model_at_end=True, but the best checkpoint may have larger ranks than the "
                "model then has. Leave it out, and load that checkpoint with PeftModel.from_pretrained."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut, if that is due."""
        rank = self.rank_at(state.global_step if self.unit == "steps" else state.epoch)
        model = kwargs["model"]
        if rank is None or any(
            _has_zero(factors, name) for _, factors in _trained(model) for name in _larger(factors, rank)
        ):
            return
        cut_ranks(model, rank, kwargs["optimizer"])


def _larger(factors: TrainFactors, rank: int) -> list[str]:
    return [name for name in factors.sizes if max(factors.bonds(name)) > rank]


def _has_zero(factors: TrainFactors, name: str) -> bool:
    return not all(core.any() for core in factors.cores(name))


def _trained(model: nn.Module) -> list[tuple[MetaTtConfig, TrainFactors]]:
    """The trains of adapters with their configurations, which PEFT holds at the model under the adapters' names."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    return [
        (configs[name.rpartition(".")[2]], module)
        for name, module in model.named_modules()
        if isinstance(module, TrainFactors) and all(core.requires_grad for core in module.parameters())
    ]


def _replace(optimizer: Any, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
    for parameter in replaced:
        optimizer.state.pop(parameter, None)
