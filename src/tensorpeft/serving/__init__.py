"""Engines that serve adapters: vLLM finds `register` by its entry point, and expands adapters by their names."""

from tensorpeft.serving.resolver import register

__all__ = ["register"]
