"""PEFT's loading and saving, so that what is refused has changed nothing and left no file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from huggingface_hub import hf_hub_download
from torch import nn

from tensorpeft.plugin.checkpoint import Source, check_config_file, loading_from
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.holder import UpdateHolder
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
        model: nn.Module = arguments.get("model", arguments.get("self"))
        model_id, more = str(arguments["model_id"]), {**arguments, **arguments.get("kwargs", {})}
        download = {key: value for key, value in more.items() if key in _DOWNLOAD}
        source = Source(model_id, download, more.get("verify_base", True))
        if "config" not in arguments:
            check_config_file(source.folder)
        ours = False

        def is_ours() -> bool:
            nonlocal ours
            ours = any(isinstance(module, UpdateHolder) for module in model.modules())
            return ours

        try:
            with unchanged_on_error(model, is_ours), loading_from(source):
                configs = getattr(model, "peft_config", {})
                if "model" not in arguments and isinstance(configs.get(arguments["adapter_name"]), TensorConfig):
                    source.read_shapes()  # of an adapter that is there: nothing will be built
                return load(*args, **kwargs)
        except KeyError as error:
            if not ours:
                raise
            raise ValueError(
                f"{model_id}: the checkpoint lacks {error}, which its configuration says is there (modules_to_save). "
                "Save the adapter again."
            ) from error
        except ValueError as error:
            if not str(error).startswith(model_id):
                error.args = (f"{model_id}: {error}",)
            raise

    return guarded


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
