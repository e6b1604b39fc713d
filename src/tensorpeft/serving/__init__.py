"""Engines that serve adapters: vLLM comes to `register` by its entry point, `tensorpeft_vllm`."""

from tensorpeft.serving.resolver import register

__all__ = ["register"]
