"""QDoTA's base: the residual in 4 bits, the cores beside it. Needs bitsandbytes (`pip install "tensorpeft[4bit]"`).

And updates in 8 or 4 bits, which need nothing.
"""

from tensorpeft.quantization.delta import load_delta
from tensorpeft.quantization.model import dequantize, quantize_residual
from tensorpeft.quantization.streamed import quantize_checkpoint

__all__ = ["dequantize", "load_delta", "quantize_checkpoint", "quantize_residual"]
