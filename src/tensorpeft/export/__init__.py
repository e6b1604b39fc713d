"""Leaving our world: adapters in forms that other libraries read."""

from tensorpeft.export.dense import to_dense
from tensorpeft.export.lora import ExportedLayer, to_lora

__all__ = ["ExportedLayer", "to_dense", "to_lora"]
