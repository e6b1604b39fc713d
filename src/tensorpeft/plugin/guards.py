"""PEFT's and transformers' loading and saving, so that what is refused has changed nothing and left no file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from tensorpeft.plugin.checkpoint import Source, add_loading_hint, check_config_file, loading_from
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.holder import UpdateHolder
from tensorpeft.plugin.loading import check_checkpoint, check_starts, own_key
from tensorpeft.plugin.rollback import unchanged_on_error

_DOWNLOAD = frozenset(inspect.signature(hf_hub_download).parameters)


def guarded_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's `from_pretrained` or `load_adapter`; if it fails with one of our adapters, the model is as before.

    The adapter is compared with the file before anything is allocated. PEFT passes over keywords that it does not know,
    so that there is one more, `verify_base=False`: the digests of a residual base are not made again.

    Raises:
        ValueError: whatever is wrong with the checkpoint, after the name of its folder; also where PEFT raises the bare
            `KeyError` of a tensor that the file lacks.
    """
    signature = inspect.signature(load)

    @wraps(load)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        model: nn.Module = arguments["model" if "model" in arguments else "self"]
        more = {**arguments, **arguments.get("kwargs", {})}
        if "model" in arguments and more.get("key_mapping") is None:  # what `from_pretrained` then does
            more["key_mapping"] = getattr(model, "_checkpoint_conversion_mapping", None)
        source = _source_of(arguments["model_id"], more)
        with _guarding(model, source, has_file="config" not in arguments):
            configs = getattr(model, "peft_config", {})
            if "model" not in arguments and isinstance(configs.get(arguments["adapter_name"]), TensorConfig):
                source.read_shapes()  # of an adapter that is there: nothing will be built
            with _staying_dispatched(model, lambda: _is_ours(source, arguments)):
                return load(*args, **kwargs)

    return guarded


def hinting_card(write: Callable[..., None]) -> Callable[..., None]:
    """`PeftModel.create_or_update_model_card`, whose card says how an adapter of ours is loaded."""

    @wraps(write)
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        write(self, output_dir)
        ours = [config for config in self.peft_config.values() if isinstance(config, TensorConfig)]
        if ours:
            methods = [config.registered_type.value.lower() for config in ours]
            add_loading_hint(Path(output_dir) / "README.md", methods)

    return create_or_update_model_card


def guarded_load_of_transformers(load: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedModel.load_adapter` as `guarded_load`, with the checks that PEFT's own ways ask the tuner for.

    Raises:
        ValueError: see `guarded_load`.
    """
    signature = inspect.signature(load)

    @wraps(load)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        model, model_id = arguments["self"], arguments.get("peft_model_id")
        more = {**arguments, **arguments.get("kwargs", {}), **(arguments.get("adapter_kwargs") or {})}
        source = None if model_id is None else _source_of(model_id, more)
        load_weights = model._load_pretrained_model

        def check_and_load_weights(**kwargs: Any) -> Any:
            adapter_name = arguments.get("adapter_name") or "default"
            if isinstance(model.peft_config[adapter_name], TensorConfig):
                _check_files(model, adapter_name, kwargs["state_dict"], kwargs["checkpoint_files"])
                config = kwargs["load_config"]
                kwargs["load_config"] = replace(config, device_map=_places(model, config.device_map))
            return load_weights(**kwargs)

        with _guarding(model, source, has_file=arguments.get("peft_config") is None):
            model._load_pretrained_model = check_and_load_weights
            try:
                return load(*args, **kwargs)
            finally:
                del model._load_pretrained_model

    return guarded


@contextmanager
def _staying_dispatched(model: nn.Module, is_ours: Callable[[], bool]) -> Iterator[None]:
    """Hide from PEFT that accelerate has placed the layers, if the adapter is one of ours.

    PEFT would take the whole model apart and place it again, an adapter's tensors like a base's: where they are put
    away between the calls of a module of their own, they are missing in the layers that share them. As it is, the base
    stays where it is, and an adapter is where its layers compute.
    """
    placed = [module for module in model.modules() if "hf_device_map" in vars(module)]
    placed = placed if placed and is_ours() else []
    maps = [vars(module).pop("hf_device_map") for module in placed]
    try:
        yield
    finally:
        for module, places in zip(placed, maps):
            module.hf_device_map = places


def _is_ours(source: Source, arguments: Mapping[str, Any]) -> bool:
    """Whether PEFT is about to load an adapter of one of our methods."""
    configs = getattr(arguments.get("self"), "peft_config", {})
    config = arguments.get("config") or configs.get(arguments.get("adapter_name"))
    if config is not None:
        return isinstance(config, TensorConfig)
    peft_type = PeftConfig._get_peft_type(source.model_id, **source.download)
    return issubclass(PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type, object), TensorConfig)


def _source_of(model_id: Any, arguments: Mapping[str, Any]) -> Source:
    download = {key: value for key, value in arguments.items() if key in _DOWNLOAD}
    verifies, ignores = arguments.get("verify_base", True), arguments.get("ignore_mismatched_sizes", False)
    return Source(str(model_id), download, verifies, bool(ignores), arguments.get("key_mapping") or {})


@contextmanager
def _guarding(model: nn.Module, source: Source | None, has_file: bool) -> Iterator[None]:
    """What fails inside changes nothing, and names the folder."""
    name = "the given tensors" if source is None else source.model_id
    if source is not None and has_file:
        check_config_file(source.folder)
    ours = False

    def is_ours() -> bool:
        nonlocal ours
        ours = any(isinstance(module, UpdateHolder) for module in model.modules())
        return ours

    try:
        with unchanged_on_error(model, is_ours), loading_from(source):
            yield
    except KeyError as error:
        if not ours:
            raise
        raise ValueError(
            f"{name}: the checkpoint lacks {error}, which its configuration says is there (modules_to_save). Save the "
            "adapter again."
        ) from error
    except ValueError as error:
        if not str(error).startswith(name):
            error.args = (f"{name}: {error}",)
        raise


def _places(model: nn.Module, places: Mapping[str, Any]) -> dict[str, Any]:
    """A device map where an adapter's tensors are where they are, also in layers that are put away to the disk."""
    own = {
        f"{name}.{module.adapter_layer_names[0]}": tensor.device
        for name, module in model.named_modules()
        if isinstance(module, UpdateHolder)
        for tensor in module.updates.state_dict().values()
    }
    return {**{name: "cpu" if place == "disk" else place for name, place in places.items()}, **own}


def _check_files(
    model: nn.Module,
    adapter_name: str,
    state_dict: Mapping[str, Tensor] | None,
    checkpoint_files: Sequence[str],
) -> None:
    """Ask of the tensors that transformers is about to load what `TensorModel` asks of those that PEFT does."""
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    files = (load_file(file) for file in checkpoint_files)
    found = {key: tensor for part in ([state_dict] if state_dict else files) for key, tensor in part.items()}
    found = {own_key(key): tensor for key, tensor in found.items()}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key, held in module.adapter_state_dict_load_map(adapter_name).items():
                found[f"{name}.{held}"] = found.pop(f"{name}.{key}")
    check_starts(model, adapter_name, check_checkpoint(model, config, adapter_name, found))


def guarded_save(save: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's `save_pretrained`, which does not write a file that `guarded_load` refuses."""

    @wraps(save)
    def guarded(self: Any, save_directory: str, safe_serialization: bool = True, *args: Any, **kwargs: Any) -> None:
        if not safe_serialization and any(isinstance(config, TensorConfig) for config in self.peft_config.values()):
            raise ValueError(
                "safe_serialization=False would write a pickle, which is never loaded: it can run any code. Leave it "
                "out (True, the default)."
            )
        save(self, save_directory, safe_serialization, *args, **kwargs)

    return guarded
