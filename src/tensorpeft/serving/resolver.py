"""vLLM's question for an adapter that it does not know, and what starts the plug-in."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorpeft.loading.cache import cache_folder
from tensorpeft.serving.adapters import ServedAdapters
from tensorpeft.serving.cache import BoundedCache

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

ADAPTERS, BASE_NAMES, CACHE_GB = "TENSORPEFT_ADAPTERS", "TENSORPEFT_BASE_NAMES", "TENSORPEFT_SERVING_CACHE_GB"
_DEFAULT_GB = 10.0
# Below vLLM's own logger, which has the handler.
_log = logging.getLogger("vllm.tensorpeft")


class TensorResolver:
    """vLLM's `LoRAResolver` for a folder of adapters: `register` makes it one, so that this module needs no vLLM."""

    def __init__(self, adapters: ServedAdapters) -> None:
        self._adapters = adapters

    async def resolve_lora(
        self,
        base_model_name: str,  # folder or Hub name
        lora_name: str,  # as a client wrote it
    ) -> LoRARequest | None:
        """The adapter of that name as a LoRA; None: there is none of ours, and another resolver may know it.

        The server answers other requests meanwhile.

        Raises:
            ValueError: it is refused; vLLM answers with the reason, and status 400.
            RuntimeError: it could not be expanded, for a reason that is not the client's; status 500.
        """
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        try:
            folder = await asyncio.to_thread(self._adapters.find, lora_name, base_model_name)
        except ValueError as error:
            _log.warning("Refused: %s", error)
            raise
        except Exception as error:
            _log.exception("Adapter %r could not be expanded", lora_name)
            raise RuntimeError(f"adapter {lora_name!r} could not be expanded: see the server's log.") from error
        if folder is None:
            return None
        # vLLM counts its adapters itself, and puts its own number here.
        return LoRARequest(lora_name=lora_name, lora_int_id=1 + int(folder.name[:8], 16), lora_path=str(folder))


def register() -> None:
    """Let vLLM ask for the adapters of the folder that TENSORPEFT_ADAPTERS names.

    Raises:
        ValueError: there is no such folder, or TENSORPEFT_SERVING_CACHE_GB is no size.
    """
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

    registry: Any = LoRAResolverRegistry
    LoRAResolver.register(TensorResolver)
    registry.register_resolver("tensorpeft", TensorResolver(adapters_of(Path(os.environ[ADAPTERS]))))


def adapters_of(folder: Path) -> ServedAdapters:
    """The adapters of a folder, with names of the base and a cache as the environment says.

    Raises:
        ValueError: there is no such folder, or TENSORPEFT_SERVING_CACHE_GB is no size.
    """
    if not folder.is_dir():
        raise ValueError(f"{ADAPTERS}={folder}: there is no such folder. Expected one with a folder per adapter.")
    given = os.environ.get(CACHE_GB, "")
    try:
        max_bytes = int(float(given or _DEFAULT_GB) * 1e9)
    except (ValueError, OverflowError):
        max_bytes = 0
    if max_bytes < 1:
        raise ValueError(f"{CACHE_GB}={given}: expected the cache's largest size, such as {_DEFAULT_GB:g}.")
    names = [name.strip() for name in os.environ.get(BASE_NAMES, "").split(",")]
    return ServedAdapters(folder, BoundedCache(cache_folder() / "served", max_bytes), [*filter(None, names)])
