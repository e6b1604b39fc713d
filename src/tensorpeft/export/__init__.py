"""Leaving our world: adapters in forms that other libraries read."""

from tensorpeft.export.dense import to_dense
from tensorpeft.export.gguf import to_gguf_lora, to_gguf_model
from tensorpeft.export.lora import ExportedLayer, to_lora

__all__ = ["ExportedLayer", "to_dense", "to_gguf_lora", "to_gguf_model", "to_lora"]
