"""Tensor-network adapters for Hugging Face PEFT. Importing this package registers every method with PEFT."""

from tensorpeft.methods.dota import DotaConfig

__all__ = ["DotaConfig"]
__version__ = "0.1.0"
