"""Tensor-network adapters for Hugging Face PEFT. Importing this package registers every method with PEFT."""

from tensorpeft.methods.dota import DotaConfig
from tensorpeft.methods.fact import FactConfig
from tensorpeft.methods.flora import FloraConfig
from tensorpeft.methods.loretta import LorettaConfig
from tensorpeft.methods.loretta_adapter import LorettaAdapterConfig
from tensorpeft.methods.lorta import LortaConfig
from tensorpeft.methods.lotr import LotrConfig
from tensorpeft.methods.nola import NolaConfig
from tensorpeft.methods.quanta import QuantaConfig
from tensorpeft.plugin.tensor_map import print_tensor_map
from tensorpeft.quantization import load_delta
from tensorpeft.quantization import quantizer as _quantizer  # noqa: F401  # registers residual bases with transformers

__all__ = [
    "DotaConfig",
    "FactConfig",
    "FloraConfig",
    "LorettaAdapterConfig",
    "LorettaConfig",
    "LortaConfig",
    "LotrConfig",
    "NolaConfig",
    "QuantaConfig",
    "load_delta",
    "print_tensor_map",
]
__version__ = "0.1.0"
