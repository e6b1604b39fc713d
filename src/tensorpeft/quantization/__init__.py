"""QDoTA's base: the residual in 4 bits, the cores beside it. Needs bitsandbytes (`pip install "tensorpeft[4bit]"`)."""

from tensorpeft.quantization.model import dequantize, quantize_residual
from tensorpeft.quantization.streamed import quantize_checkpoint

__all__ = ["dequantize", "quantize_checkpoint", "quantize_residual"]
