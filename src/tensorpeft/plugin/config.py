"""The configuration that every method's own is built on: which weights, and `build`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, ClassVar, Protocol, get_args, get_origin, get_type_hints

from peft import PeftConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType
from torch import Tensor, nn

from tensorpeft.networks.sketch import Gradient
from tensorpeft.networks.update import AbstractUpdate
from tensorpeft.sites import Site

# What a configuration, which may come from a damaged file, can ask for. No network is that large, and a tensor of
# order three in the one still has a size that fits 64 bits; a size has no more factors than the other.
LARGEST_RANK, LARGEST_NUM_MODES = 2**20, 64


class Bases(Protocol):
    """What a model has at the sites that an adapter adapts."""

    def read_weight(self, site: Site) -> Tensor:
        """The pretrained weight (out, in), dequantised if need be; of a convolution (out, in / groups · kernel).

        On the meta device where there is none to read, or where a checkpoint's tensors will replace whatever is built:
        allocate only.
        """
        ...

    def start(self, site: Site) -> nn.Module | None:
        """What the base layer holds itself for an update to start at, where it is one that adds updates by itself."""
        ...


@dataclass
class TensorConfig(PeftConfig, ABC):
    """The fields that all methods share, with PEFT's names and meanings.

    Args:
        target_modules: names (endings) of the linear layers to adapt, a regular expression for their full names, or
            "all-linear" (all but the output head). None: the layers of PEFT's LoRA mapping for the architecture.
        target_parameters: names (endings) of parameters (experts, out, in) to adapt beside the layers, such as
            "experts.gate_up_proj"; with `target_modules=[]` they alone. Every expert's matrix is a weight of its own.
        exclude_modules: names (endings), or a regular expression, of layers to leave out.
        modules_to_save: names of further modules to train in full and save, such as a new classification head.
        layers_to_transform: index or indices of the layers to adapt, for `target_modules` given as a list.
        layers_pattern: name of the list of layers that the indices count in, if it is not found by itself.
        trainable_token_indices: tokens whose embeddings are trained too, of the input embeddings or of {name: tokens}.
        ensure_weight_tying: whether what is trained of tied embeddings (`modules_to_save`, `trainable_token_indices`)
            stays tied.
        site_order: names of the adapted weights, "*" for each number, in the order in which shared factors count them;
            written where an adapter has such factors, and compared where it is loaded. None: not known, as in older
            files.

    Raises:
        ValueError: `layers_to_transform` beside a regular expression, or `layers_pattern` alone.
    """

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Which linear layers to adapt."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Stacks of experts' weights to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Which layers to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full and save."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained too."}
    )
    ensure_weight_tying: bool = field(default=False, metadata={"help": "Whether tied embeddings stay tied."})
    site_order: list[str] | None = field(default=None, metadata={"help": "Written: how shared factors count weights."})

    # Set by `plugin.registration.register`.
    registered_type: ClassVar[PeftType]
    # What `target_modules=None` means: {model type: names of layers}.
    default_targets: ClassVar[Mapping[str, list[str]]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    adapts_convolutions: ClassVar[bool] = False
    # Whether every further layer of a model adds as many parameters, and as much work, as the one before it.
    grows_by_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check what PEFT would silently ignore, or trip over later."""
        _check_kinds(self)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            if isinstance(pattern := getattr(self, name), str):
                _check_pattern(name, pattern)
        check_is_bool("ensure_weight_tying", self.ensure_weight_tying)
        super().__post_init__()
        self.peft_type = self.registered_type
        if isinstance(self.layers_to_transform, range):  # which no JSON has
            self.layers_to_transform = list(self.layers_to_transform)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} works with a list of target_modules, but "
                f"target_modules={self.target_modules!r} is a regular expression: put the layers into it."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} says where to count, but layers_to_transform, which layers, "
                "is missing: pass both or neither."
            )

    def settle(self, sites: Sequence[Site], bases: Bases) -> None:
        """Write into the configuration what the updates' shapes take from the weights. Called before `build`.

        Most methods' shapes take nothing from them. What is settled is saved with the adapter: it can be loaded where
        there are no weights to read, and is not settled anew.

        Raises:
            ValueError: a weight that is needed cannot be read.
        """

    def of_sum(self, others: Sequence[Any]) -> TensorConfig:
        """That of the sum of its updates and others': of all their ranks, multiplied by nothing.

        Asked of methods with an `AbstractSummableUpdate`, where `sum_shared` has found that they have a sum.
        """
        raise NotImplementedError

    @abstractmethod
    def build(
        self,
        sites: Sequence[Site],
        bases: Bases,
    ) -> Mapping[str, AbstractUpdate]:
        """An update for every site, by the site's name. Updates that share factors name one module as `shared`.

        Args:
            sites: all weights that this adapter adapts.
            bases: what the model has at the sites.

        Raises:
            ValueError: a site that the method cannot serve; nothing has been changed by then.
        """

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, sets in one order: what is written does not differ from process to process."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


@dataclass
class FramedConfig(TensorConfig, ABC):
    """The fields of a method that has frames: factors that say in which subspaces its updates lie.

    Args:
        gradient_start: what `initialize_from_gradients` has set the frames from: rows, seed; written by it, so that it
            is saved. None: they start at random.
        frames: a folder, or a name on the Hub, where `tensorpeft.save_frames` has kept frozen frames that many adapters
            share; they are then no part of this adapter's file. None: the frames are its own.

    Raises:
        ValueError: `frames` for an adapter that trains its own.
    """

    gradient_start: dict[str, int] | None = field(
        default=None, metadata={"help": "Written when the frames are set from gradients."}
    )
    frames: str | None = field(default=None, metadata={"help": "Where frozen frames are kept that adapters share."})

    def __post_init__(self) -> None:
        """Check that the frames are not trained where they are others' too."""
        super().__post_init__()
        if self.frames is not None and not self.freezes_frames():
            raise ValueError(
                f"frames={self.frames!r}: this adapter trains its frames, which are then its own. Leave it out, or "
                "freeze them, where its method can."
            )

    def freezes_frames(self) -> bool:
        """Whether the frames stay as they start."""
        return False

    @abstractmethod
    def frame_rank(self, sites: Mapping[str, tuple[int, int]]) -> int:  # {name: (out, in)}
        """Of how many leading singular vectors of every weight's gradient `set_frames` makes something."""

    @abstractmethod
    def set_frames(
        self,
        updates: Mapping[str, Any],  # of this configuration, by the name of the layer
        gradients: Mapping[str, Gradient],  # of each of the same layers
    ) -> None:
        """Set the frames where the gradients' energy is, and what is between them so that every update is zero.

        Raises:
            ValueError: an update has no frames, such as a convolution's; nothing has been changed by then.
        """


def _check_kinds(config: TensorConfig) -> None:
    """Raise a `ValueError` that names a field with a list where a text or a mapping belongs, or the like.

    Only of such fields: those of numbers say themselves what they expect.
    """
    hints = get_type_hints(type(config))
    for name in (item.name for item in fields(config)):
        kinds = {get_origin(kind) or kind for kind in get_args(hints[name]) or (hints[name],)}
        if get_origin(hints[name]) in (dict, list):
            kinds = {get_origin(hints[name])}
        if not any(kind in (dict, list) or (isinstance(kind, type) and issubclass(kind, str)) for kind in kinds):
            continue
        value = getattr(config, name)
        is_list = isinstance(value, (list, tuple, set, frozenset, range))
        items = next((get_args(kind) for kind in get_args(hints[name]) if get_origin(kind) is list), ())
        fits = list in kinds and all(isinstance(item, items) for item in value) if is_list else None
        if fits is None:
            fits = isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type) and kind is not list))
        if not fits:
            raise ValueError(f"{name}={value!r}: expected {str(hints[name]).replace('NoneType', 'None')}.")


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r}: expected a regular expression, but {error}.") from error


def own_fields(config: PeftConfig) -> list[str]:
    """The names of the fields that a method's configuration adds to the shared ones."""
    shared = {item.name for item in fields(FramedConfig)}
    return [item.name for item in fields(config) if item.name not in shared]


def check_rank(name: str, value: object, largest: int = LARGEST_RANK) -> None:
    """Raise a `ValueError` that names the field unless its value is a whole number from 1 to `largest`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1, such as 16.")
    if value > largest:
        raise ValueError(f"{name}={value}: expected a whole number of at most {largest}, such as 16.")


def check_num_modes(name: str, value: object, example: int) -> None:
    """Raise a `ValueError` that names the field unless its value is a number of factors that a size can have."""
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= LARGEST_NUM_MODES:
        raise ValueError(
            f"{name}={value!r}: expected a whole number of at least 2, such as {example}, and of at most "
            f"{LARGEST_NUM_MODES}."
        )


def check_modes(modes: object, num_modes: int | None = None, of: str = "tensor") -> dict[int, list[int]] | None:
    """The field `modes`, {size: [mode, …]}, with integer keys (JSON has none).

    Raises:
        ValueError: not such a dictionary, a mode below 1, a product that is not the size, or another number of modes
            than `num_modes` (None: any from 2), one per what `of` says.
    """
    if modes is None:
        return None
    if not isinstance(modes, Mapping):
        raise ValueError(
            f"modes={modes!r}: expected a dictionary from a size to its modes, such as {{384: [4, 12, 8]}}."
        )
    for size, factors in modes.items():
        count = f"{num_modes} modes, one per {of}," if num_modes else "at least 2 modes"
        is_whole = isinstance(factors, (list, tuple)) and all(type(mode) is int and mode > 0 for mode in factors)
        if not is_whole or prod(factors) != int(size) or len(factors) != (num_modes or max(len(factors), 2)):
            product = prod(factors) if is_whole else None
            raise ValueError(
                f"modes[{size}]={factors}: expected {count} that are whole numbers from 1 with the product {size}"
                + (f"; got {len(factors)} with the product {product}." if is_whole else ".")
            )
    return {int(size): list(factors) for size, factors in modes.items()}


def check_scale(name: str, value: object) -> None:
    """Raise a `ValueError` that names the field unless its value is a finite number above 0."""
    if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r}: expected a finite number above 0.")


def check_is_bool(name: str, value: object) -> None:
    """Raise a `ValueError` that names the field unless its value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False.")
