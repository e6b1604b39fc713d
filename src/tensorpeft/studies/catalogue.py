"""Every method once, as plain data: what `compare` and `plan` know by name, and what help texts list.

It imports nothing but the standard library, and nothing of ours: the command reads it before the library is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        key: how commands and recipes call it.
        label: how tables and plots call it; of an adapter with a knob, the knob's value follows.
        adapter: a recipe's ``adapter``: method and fields, but for the layers; None: all weights are trained.
        rate: the learning rate that suits it, as a multiple of the one that suits LoRA.
        knob: the field of the adapter that makes it larger, which a budget sets; None: there is none.
        rank: the field that a plan's rank sets; None: its size is told by ``knob`` alone.
        start_rows: a recipe's ``data.start_rows``, what its frames are set from; None: they start at random.
        quantize: a recipe's ``quantize``, what is done to the model first; None: nothing.
        has_own_targets: whether it stands at other layers than those that are named for all.
        is_planned: whether a plan has it where no methods are named; one of every kind of ours, and LoRA.
        note: what a reader of its row must know.
    """

    key: str
    label: str
    adapter: Mapping[str, Any] | None
    rate: float = 1
    knob: str | None = "r"
    rank: str | None = "r"
    start_rows: int | None = None
    quantize: Mapping[str, Any] | None = None
    has_own_targets: bool = False
    is_planned: bool = False
    note: str = ""

    @property
    def adapter_method(self) -> str | None:
        """Of its adapter, as PEFT calls it."""
        return None if self.adapter is None else self.adapter["method"]

    @property
    def starts_in_base(self) -> bool:
        """Whether its quantised base keeps the start, so that the adapter's file has none."""
        return self.quantize is not None and self.quantize.get("residual", True)


REFERENCE = "lora"  # what others are measured against
_START_ROWS = 64
_LORA = {"method": "lora", "r": 8, "lora_alpha": 16}

# The multiples are what MiniLM's docstrings chose (docs/results.md), to a factor of three.
METHODS = (
    Method("full", "full fine-tuning", None, 0.03, knob=None, rank=None),
    Method(REFERENCE, "LoRA", _LORA, is_planned=True),
    Method("dota", "DoTA", {"method": "dota", "r": 16}, is_planned=True),
    Method("dota-random", "DoTA-random", {"method": "dota", "r": 16, "init_weights": "random"}, 3),
    Method("lorta", "LoRTA", {"method": "lorta", "r": 16}, 10, is_planned=True),
    Method("lotr", "LoTR", {"method": "lotr", "r": 16}, 3, is_planned=True),
    Method("fact-tt", "FacT-TT", {"method": "fact", "r": 16}, 3, is_planned=True),
    Method("fact-tk", "FacT-TK", {"method": "fact", "r": 16, "core": "tk"}, 3, is_planned=True),
    Method("metatt", "MetaTT", {"method": "metatt", "r": 16}, is_planned=True),
    Method("metatt-5d", "MetaTT-5D", {"method": "metatt", "r": 16, "variant": "5d"}, is_planned=True),
    Method("tenslora", "TensLoRA", {"method": "tenslora", "r": 8}, is_planned=True),
    # Its trains hardly grow with r, and one that is a large prime is one mode.
    Method("loretta", "LoRETTA", {"method": "loretta", "r": 8}, 3, knob="tt_rank", is_planned=True),
    Method(
        "loretta-adapter",
        "LoRETTA-adp",
        {"method": "lorettaadapter", "tt_rank": 5},
        3,
        knob="tt_rank",
        rank=None,
        has_own_targets=True,
        is_planned=True,
        note="bottlenecks behind the attention and MLP blocks; not linear, so it cannot be merged.",
    ),
    Method("flora", "FLoRA", {"method": "flora", "r": 8}, is_planned=True),
    Method("flora-cores", "FLoRA, cores", {"method": "flora", "r": 8, "train": "cores"}, start_rows=_START_ROWS),
    Method("lotr-cores", "LoTR, cores", {"method": "lotr", "r": 16, "train": "cores"}, start_rows=_START_ROWS),
    Method("lora-gradient", "LoRA, A from gradients", _LORA, start_rows=_START_ROWS),
    Method(
        "nola",
        "NOLA",
        {"method": "nola", "r": 8, "num_bases": 64},
        10,
        knob="num_bases",
        rank=None,
        is_planned=True,
    ),
    Method("quanta", "QuanTA", {"method": "quanta"}, 0.3, knob=None, rank=None, is_planned=True),
    Method(
        "quantum-peft",
        "Quantum-PEFT",
        {"method": "quantumpeft", "r": 4},
        10,
        knob="num_layers",
        is_planned=True,
    ),
    Method("superlora", "SuperLoRA", {"method": "superlora", "r": 8}, 3, is_planned=True),
    Method("lora-pt", "LoRA-PT", {"method": "lorapt", "r": 1}, 0.3, is_planned=True),
    Method("tcurlora", "tCURLoRA", {"method": "tcurlora", "r": 8}, 0.3, is_planned=True),
    Method("dora", "DoRA", {**_LORA, "use_dora": True}),
    Method("rslora", "rsLoRA", {**_LORA, "use_rslora": True}),
    Method("pissa", "PiSSA", {"method": "lora", "r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"}, 0.3),
    Method("vera", "VeRA", {"method": "vera", "r": 256}, 3, rank=None),
    Method("ia3", "IA3", {"method": "ia3"}, 10, knob=None, rank=None),
    Method("qlora", "QLoRA", _LORA, quantize={"residual": False}, note="all linear weights in 4 bits (NF4)."),
    Method(
        "qdota",
        "QDoTA",
        {"method": "dota", "r": 16},
        quantize={"rounds": 5},
        note="the residuals of the adapted weights, and the other weights, in 4 bits (NF4), 5 rounds.",
    ),
)
# Methods of adapters, as PEFT calls them, whose update is no product of two thin factors; of the last it is no matrix.
OF_HIGH_RANK = ("dota", "lorapt", "quanta", "superlora", "tcurlora")
NOT_LINEAR = ("lorettaadapter",)
DEFAULT_COMPARED = ("full", REFERENCE, "dota", "dota-random", "lorta", "lotr")
DEFAULT_PLANNED = tuple(method.key for method in METHODS if method.is_planned)


def methods_by_key() -> dict[str, Method]:
    """All of them."""
    return {method.key: method for method in METHODS}


def choose_methods(
    keys: str | None,  # such as "lora,dota"; None: those that are planned by default
) -> tuple[Method, ...]:
    """The methods with these keys, in the catalogue's order.

    Raises:
        ValueError: a key is unknown.
    """
    known = methods_by_key()
    wanted = set(DEFAULT_PLANNED) if keys is None else {key.strip() for key in keys.split(",")}
    if unknown := sorted(wanted - set(known)):
        raise ValueError(f"--methods {keys}: no method {unknown[0]!r}. Choose from {', '.join(known)}.")
    return tuple(method for key, method in known.items() if key in wanted)


def variant_fields(method: Method) -> list[str]:
    """What makes a method another one than the first of its configuration: DoRA's use_dora."""
    plain = next(other.adapter for other in METHODS if other.adapter_method == method.adapter_method)
    return [name for name in method.adapter or () if name not in (plain or {})]


def most_like(
    adapter: Mapping[str, Any] | None,  # of a recipe; None: all weights are trained
) -> Method:
    """The method that an adapter is, whatever its size; one of its own where there is none."""
    name = None if adapter is None else adapter["method"]
    unknown = Method(str(name), str(name), adapter, knob="r" if "r" in (adapter or {}) else None)
    return max(all_like(adapter), key=lambda method: len(variant_fields(method)), default=unknown)


def all_like(
    adapter: Mapping[str, Any] | None,  # of a recipe; None: all weights are trained
) -> list[Method]:
    """All methods that an adapter is, whatever its size: PiSSA is LoRA, too."""
    name, fields = (None, {}) if adapter is None else (adapter["method"], adapter)
    return [
        method
        for method in METHODS
        if method.adapter_method == name
        and all(fields.get(field) == (method.adapter or {})[field] for field in variant_fields(method))
    ]
