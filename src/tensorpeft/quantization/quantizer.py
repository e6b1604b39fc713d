"""Residual checkpoints for transformers: after `import tensorpeft`, `from_pretrained` loads what we have quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, build_glob_alternation, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "tensorpeft_residual_nf4"
_LACKED = (
    "the checkpoint of this residual base lacks it. Download the base again, or quantise it again; adapters fit only "
    "the base that they were trained on."
)


class ResidualConfig(QuantizationConfigMixin):
    """What a residual base is made of: `quantization_config` in its `config.json`.

    Args:
        residuals: full name of a residual layer -> the shapes of its cores.
        nf4: full names of the layers that are plain NF4.
        compute_dtype: what products run in, such as "bfloat16"; None: in the dtype of the input.
        double_quant: whether the blocks' scales are quantised too.
        rounds: of decomposition and quantisation, for the record.
    """

    def __init__(
        self,
        residuals: dict[str, list[list[int]]],
        nf4: list[str],
        compute_dtype: str | None = None,
        double_quant: bool = True,
        rounds: int = 1,
        quant_method: str = METHOD,
    ):
        self.quant_method = quant_method  # type: ignore[assignment]
        self.residuals = residuals
        self.nf4 = nf4
        self.compute_dtype = compute_dtype
        self.double_quant = double_quant
        self.rounds = rounds

    def torch_compute_dtype(self) -> torch.dtype | None:
        """`compute_dtype` as torch's."""
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)


class ResidualHfQuantizer(Bnb4BitHfQuantizer):
    """Loads a residual base: bitsandbytes' 4-bit weights, read as transformers reads them, and cores beside them."""

    quantization_config: ResidualConfig  # type: ignore[assignment]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot be loaded.

        Raises:
            ImportError: bitsandbytes is missing.
            ValueError: the checkpoint is not quantised, or layers are to be offloaded.
        """
        if find_spec("bitsandbytes") is None:
            raise ImportError('a residual base is stored by bitsandbytes. Run: pip install "tensorpeft[4bit]"')
        device_map = kwargs.get("device_map")
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map puts layers on {sorted(map(str, places))}: a 4-bit layer cannot be offloaded. Put all of "
                'the model on one or more GPUs, or all of it on the CPU (device_map="cpu").'
            )
        if not self.pre_quantized:
            raise ValueError(
                "a ResidualConfig describes a checkpoint that is quantised already. To quantise a model, call "
                "tensorpeft.quantization.quantize_residual(model, DotaConfig(...)), or run: tensorpeft quantize"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.modules_to_not_convert = []
        replace_layers(model, self.quantization_config)
        kept = kept_in_float32(model, model.dtype)
        self._dtypes = {
            name: torch.float32 if name in kept else parameter.dtype
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point()
        }

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        """Settle dtypes, and refuse a checkpoint that lacks something of a 4-bit layer.

        Raises:
            ValueError: it does; transformers would fill it with whatever was in memory, and only report it.
        """
        check_complete(model, self.quantization_config)
        # transformers hands every tensor called "weight" to bitsandbytes' reading, which leaves it in the file's dtype;
        # so a model loaded with another one would have both.
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and name in self._dtypes:  # a weight in 4 bits is not
                parameter.data = parameter.data.to(self._dtypes[name])
        forget_reading(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, Any]]:
        """Nothing of its own; called when saving, so that a configuration that no longer fits is noticed.

        Raises:
            ValueError: layers have been merged or dequantised.
        """
        from tensorpeft.quantization.residual import ResidualLinear4bit

        modules = dict(model.named_modules())
        # Under an adapter that transformers itself has added, a layer is called base_layer.
        residuals = {
            name.replace(".base_layer", "") for name in modules if isinstance(modules[name], ResidualLinear4bit)
        }
        own_names = _own_names(model, self.quantization_config.residuals)
        gone = [name for name, own_name in own_names.items() if own_name not in residuals]
        if gone:
            raise ValueError(
                f"cannot save a residual base of which {len(gone)} layers are merged, such as {gone[0]}: other layers "
                "are still in 4 bits. Call tensorpeft.quantization.dequantize(model) first, and save a plain model."
            )
        return None, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from tensorpeft.quantization.residual import dequantize_layers

        dequantize_layers(model, dtype)
        return model


def kept_in_float32(
    model: nn.Module,
    dtype: torch.dtype,  # of all others
) -> set[str]:  # names of parameters and buffers
    """What of a model transformers keeps in float32 where it loads it in another dtype."""
    plan = model._get_dtype_plan(dtype) if isinstance(model, PreTrainedModel) else {}
    if not plan:
        return set()
    pattern, *_ = build_glob_alternation(list(plan))
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers()) if pattern.search(name)}


def forget_reading(model: Any) -> None:
    """Let transformers save a loaded 4-bit model, or what became of one; until it does by itself.

    It saves through the reverse of what it loaded through, and bitsandbytes' reading has no reverse. It needs none:
    the state dict has the checkpoint's own keys.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [item for item in conversions if not _is_of_quantizer(item)] or None


def _is_of_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))


def replace_layers(model: nn.Module, config: ResidualConfig) -> None:
    """Put empty 4-bit layers on the meta device where a residual base has them.

    Raises:
        ValueError: the model has no such layer, or one of another size.
    """
    from tensorpeft.quantization.residual import ResidualLinear4bit, nf4_linear

    compute_dtype = config.torch_compute_dtype()
    for name, own_name in _own_names(model, [*config.residuals, *config.nf4]).items():
        old = _linear_at(model, own_name)
        out, in_ = old.weight.shape if isinstance(old, nn.Linear) else reversed(old.weight.shape)  # Conv1D
        has_bias = old.bias is not None
        if name in config.residuals:
            shapes = config.residuals[name]
            new: nn.Module = ResidualLinear4bit(
                in_, out, has_bias, shapes, compute_dtype, config.double_quant, device="meta"
            )
        else:
            new = nf4_linear((out, in_), has_bias, compute_dtype, config.double_quant)
        if has_bias:
            new.bias = nn.Parameter(old.bias.detach(), requires_grad=False)
        new.source_cls = type(old)  # type: ignore[assignment]
        model.set_submodule(own_name, new.requires_grad_(False))


def is_residual(config: Any) -> bool:  # of a model
    """Whether it is that of a residual base."""
    found = getattr(config, "quantization_config", None) or {}
    return (found.get("quant_method") if isinstance(found, Mapping) else found.quant_method) == METHOD


def put_starts(
    model: Any,  # on the meta device
    folder: Path,  # of the base's safetensors
) -> None:
    """Give a skeleton the 4-bit layers that its configuration names, and of their numbers the cores alone.

    An adapter that starts from them needs no more to say what its update is.

    Raises:
        ValueError: the model has no such layer, or the files lack a core.
    """
    found = model.config.quantization_config
    config = found if isinstance(found, ResidualConfig) else ResidualConfig(**found)
    replace_layers(model, config)
    starts: dict[str, Tensor] = {}
    own_key = _own_keys(model)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            starts |= {own_key(key): file.get_tensor(key) for key in file.keys() if ".start." in key}  # noqa: SIM118
    for name in _own_names(model, config.residuals).values():
        start = model.get_submodule(name).start
        for key in start.state_dict():
            if f"{name}.start.{key}" not in starts:
                raise ValueError(f"{name}.start.{key}: {_LACKED}")
        start.load_state_dict({key: starts[f"{name}.start.{key}"] for key in start.state_dict()}, assign=True)


def _own_keys(model: Any) -> Callable[[str], str]:
    """From a checkpoint's key to the model's, as `from_pretrained` goes: transformers saves many under other names."""
    conversions = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    own = model.state_dict()

    def own_key(key: str) -> str:
        for renamings in (conversions, []):
            renamed, _ = rename_source_key(key, renamings, [], model.base_model_prefix, own)
            if renamed in own:
                return renamed
        return key

    return own_key


def check_complete(model: nn.Module, config: ResidualConfig) -> None:
    """Raise a `ValueError` if a tensor of a 4-bit layer, or of its start, was not in the checkpoint."""
    for name, own_name in _own_names(model, [*config.residuals, *config.nf4]).items():
        layer = model.get_submodule(own_name)
        for key, tensor in (*layer.named_parameters(), *getattr(layer, "start", nn.Module()).named_buffers("start")):
            if not getattr(tensor, "_is_hf_initialized", False):  # transformers marks what it has read
                raise ValueError(f"{name}.{key}: {_LACKED}")


def _own_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Layers' names in this model, by those given: with another head, it has or lacks the prefix of its base model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {name for name, _ in model.named_modules()}
    candidates = {name: (name, prefix + name, name.removeprefix(prefix)) for name in names}
    return {name: next((own for own in owns if own in found), name) for name, owns in candidates.items()}


def _linear_at(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"the residual base has a layer {name}, this {type(model).__name__} has not. Load it with the class it was "
            "made from (architectures in its config.json)."
        ) from error


def mark_quantised(model: nn.Module, config: ResidualConfig) -> None:
    """Tell transformers, PEFT and trainers what the model is now; a plain module has nobody to tell."""
    if isinstance(model, PreTrainedModel):
        # It is no longer what lies there, and an adapter's configuration would name it as its base.
        model.name_or_path = model.config._name_or_path = ""
        model.hf_quantizer = ResidualHfQuantizer(config)  # type: ignore[assignment]
        model.config.quantization_config = config  # type: ignore[assignment]
        model.quantization_method = METHOD  # type: ignore[assignment]
        model.is_quantized = model.is_loaded_in_4bit = True  # type: ignore[assignment]
        model.config._is_quantized = True  # type: ignore[attr-defined]


# Called rather than written as decorators, which have no types: the classes would lose theirs.
register_quantization_config(METHOD)(ResidualConfig)
register_quantizer(METHOD)(ResidualHfQuantizer)
