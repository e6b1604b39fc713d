"""Leaving our world: adapters in forms that other libraries read."""

from tensorpeft.export.check import ExportCheck, check_export, is_measurable
from tensorpeft.export.commands import start_commands
from tensorpeft.export.delta import DeltaLayer, to_delta
from tensorpeft.export.dense import to_dense
from tensorpeft.export.distil import distil
from tensorpeft.export.gguf import to_gguf_lora, to_gguf_model
from tensorpeft.export.lora import ExportedLayer, has_exact_lora, to_lora

__all__ = [
    "DeltaLayer",
    "ExportCheck",
    "ExportedLayer",
    "check_export",
    "distil",
    "has_exact_lora",
    "is_measurable",
    "start_commands",
    "to_delta",
    "to_dense",
    "to_gguf_lora",
    "to_gguf_model",
    "to_lora",
]
