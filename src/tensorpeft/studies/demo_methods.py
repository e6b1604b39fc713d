"""The methods that ``tensorpeft demo`` compares. To compare another one, add it to ``METHODS``."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from peft import IA3Config, LoraConfig, PeftConfig, VeraConfig
from torch import nn

from tensorpeft import (
    DotaConfig,
    FloraConfig,
    LorettaAdapterConfig,
    LorettaConfig,
    LortaConfig,
    LotrConfig,
    NolaConfig,
    QuantaConfig,
)
from tensorpeft.quantization import quantize_residual
from tensorpeft.studies.optimizers import MakeOptimizer, adamw, lora_fa

# BERT's query, key, value and both MLP weights. A list of suffixes cannot say it: "output.dense" is also the end of
# the attention's output projection, "attention.output.dense".
TARGETS = r".*\.layer\.\d+\.(attention\.self\.(query|key|value)|intermediate\.dense|output\.dense)"
MLP = r".*\.layer\.\d+\.(intermediate\.dense|output\.dense)"
# What LoRTA's paper adapts: the attention's four projections.
ATTENTION = r".*\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)"
REFERENCE = "lora"


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        key: how ``--methods`` calls it.
        name: how tables and plots call it.
        make_config: a new PEFT configuration, or None to train every weight of the model.
        rates: the learning rates to choose from, ascending; every method starts with the same number (`rates_beyond`).
        note: what a reader of its row must know.
        quantise: what is done to the pretrained model before it is adapted; None: nothing.
        is_default: whether it runs where no methods are named.
        make_optimizer: what it is trained with.
    """

    key: str
    name: str
    make_config: Callable[[], PeftConfig | None]
    rates: tuple[float, ...]
    note: str = ""
    quantise: Callable[[nn.Module, PeftConfig], nn.Module] | None = None
    is_default: bool = True
    make_optimizer: MakeOptimizer = adamw


def _to_residuals(model: nn.Module, config: PeftConfig) -> nn.Module:
    return quantize_residual(model, config, rounds=5)  # pyright: ignore[reportArgumentType]


METHODS = (
    Method("full", "full fine-tuning", lambda: None, (3e-5, 1e-4, 3e-4)),
    Method(
        REFERENCE,
        "LoRA r=8",
        lambda: LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="SEQ_CLS"),
        (1e-3, 3e-3, 1e-2),
    ),
    Method(
        "dota",
        "DoTA r=16",
        lambda: DotaConfig(r=16, target_modules=TARGETS, task_type="SEQ_CLS"),
        (1e-3, 3e-3, 1e-2),
        note="its saved file holds the cores' start beside the trained cores.",
    ),
    Method(
        "dota-random",
        "DoTA-random r=16",
        lambda: DotaConfig(r=16, init_weights="random", target_modules=TARGETS, task_type="SEQ_CLS"),
        (3e-3, 1e-2, 3e-2),
    ),
    Method(
        "lorta",
        "LoRTA r=16",
        lambda: LortaConfig(r=16, target_modules=ATTENTION, task_type="SEQ_CLS"),
        (1e-2, 3e-2, 1e-1),
        note="adapts query, key, value and the attention's output, as its paper does.",
    ),
    Method(
        "lotr",
        "LoTR r=16",
        lambda: LotrConfig(r=16, target_modules=TARGETS, task_type="SEQ_CLS"),
        (3e-3, 1e-2, 3e-2),
    ),
    Method(
        "loretta",
        "LoRETTA r=8",
        lambda: LorettaConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS"),
        (3e-3, 1e-2, 3e-2),
        is_default=False,
    ),
    Method(
        "loretta-adapter",
        "LoRETTA-adp w=64",
        lambda: LorettaAdapterConfig(task_type="SEQ_CLS"),
        (3e-3, 1e-2, 3e-2),
        note="bottlenecks behind the attention and MLP blocks; not linear, so it cannot be merged.",
        is_default=False,
    ),
    Method(
        "flora",
        "FLoRA r=8",
        lambda: FloraConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS"),
        (1e-3, 3e-3, 1e-2),
        is_default=False,
    ),
    Method(
        "nola",
        "NOLA r=8 k=64",
        lambda: NolaConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS"),
        (1e-2, 3e-2, 1e-1),
        is_default=False,
    ),
    Method(
        "quanta",
        "QuanTA 4 axes",
        lambda: QuantaConfig(target_modules=TARGETS, task_type="SEQ_CLS"),
        (3e-4, 1e-3, 3e-3),
        is_default=False,
    ),
    Method(
        "lora-fa",
        "LoRA-FA r=8",
        lambda: LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="SEQ_CLS"),
        (1e-3, 3e-3, 1e-2),
        note="a LoRA with PEFT's optimiser of that name: A is frozen.",
        is_default=False,
        make_optimizer=lora_fa,
    ),
    Method(
        "pissa",
        "PiSSA r=8",
        lambda: LoraConfig(r=8, lora_alpha=8, init_lora_weights="pissa", target_modules=TARGETS, task_type="SEQ_CLS"),
        (3e-4, 1e-3, 3e-3),
        is_default=False,
    ),
    Method(
        "dora",
        "DoRA r=8",
        lambda: LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=TARGETS, task_type="SEQ_CLS"),
        (1e-3, 3e-3, 1e-2),
        is_default=False,
    ),
    Method(
        "vera",
        "VeRA r=256",
        lambda: VeraConfig(r=256, target_modules=TARGETS, task_type="SEQ_CLS"),
        (3e-3, 1e-2, 3e-2),
        note="its saved file holds its frozen projections too (PEFT's default).",
        is_default=False,
    ),
    Method(
        "ia3",
        "IA3",
        lambda: IA3Config(target_modules=TARGETS, feedforward_modules=MLP, task_type="SEQ_CLS"),
        (1e-2, 3e-2, 1e-1),
        is_default=False,
    ),
    Method(
        "qlora",
        "QLoRA r=8",
        lambda: LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="SEQ_CLS"),
        (1e-3, 3e-3, 1e-2),
        note="all linear weights of the model in 4 bits (NF4, double quantisation).",
        quantise=lambda model, config: quantize_residual(model, None),
        is_default=False,
    ),
    Method(
        "qdota",
        "QDoTA r=16",
        lambda: DotaConfig(r=16, target_modules=TARGETS, task_type="SEQ_CLS"),
        (1e-3, 3e-3, 1e-2),
        note="the residuals of the adapted weights, and the other weights, in 4 bits (NF4), 5 rounds.",
        quantise=_to_residuals,
        is_default=False,
    ),
)


def choose_methods(
    keys: str | None,  # such as "lora,dota"; "all"; None: those that run by default
    rate_scale: float = 1.0,
) -> tuple[Method, ...]:
    """The methods with these keys, in the order of ``METHODS``, their learning rates times ``rate_scale``.

    Raises:
        ValueError: a key is unknown.
    """
    known = [method.key for method in METHODS]
    if keys is None:
        wanted = {method.key for method in METHODS if method.is_default}
    else:
        wanted = set(known) if keys == "all" else {key.strip() for key in keys.split(",")}
    if unknown := sorted(wanted - set(known)):
        raise ValueError(f"--methods {keys}: no method {unknown[0]!r}. Choose from {', '.join(known)}.")
    chosen = [method for method in METHODS if method.key in wanted]
    return tuple(replace(method, rates=tuple(rate * rate_scale for rate in method.rates)) for method in chosen)
