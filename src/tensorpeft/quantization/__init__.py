"""QDoTA's base: the residual in 4 bits, the cores beside it. Needs bitsandbytes (`pip install "tensorpeft[4bit]"`)."""

from tensorpeft.quantization.model import dequantize, quantize_residual

__all__ = ["dequantize", "quantize_residual"]
