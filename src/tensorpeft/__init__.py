"""Tensor-network adapters for Hugging Face PEFT. Importing this package registers every method with PEFT."""

from tensorpeft.methods.dota import DotaConfig
from tensorpeft.methods.fact import FactConfig
from tensorpeft.methods.flora import FloraConfig
from tensorpeft.methods.lora_pt import LoraPtConfig
from tensorpeft.methods.loretta import LorettaConfig
from tensorpeft.methods.loretta_adapter import LorettaAdapterConfig
from tensorpeft.methods.lorta import LortaConfig
from tensorpeft.methods.lotr import LotrConfig
from tensorpeft.methods.metatt import MetaTtConfig
from tensorpeft.methods.metatt_sweep import MetaTtSweep
from tensorpeft.methods.nola import NolaConfig
from tensorpeft.methods.quanta import QuantaConfig
from tensorpeft.methods.quantum_peft import QuantumPeftConfig
from tensorpeft.methods.superlora import SuperLoraConfig
from tensorpeft.methods.tcur_lora import TcurLoraConfig
from tensorpeft.methods.tenslora import TensLoraConfig
from tensorpeft.plugin.bounded_steps import BoundedSteps
from tensorpeft.plugin.gradients import initialize_from_gradients
from tensorpeft.plugin.kept_frames import save_frames
from tensorpeft.plugin.tensor_map import print_tensor_map
from tensorpeft.quantization import load_delta
from tensorpeft.quantization import quantizer as _quantizer  # noqa: F401  # registers residual bases with transformers

__all__ = [
    "BoundedSteps",
    "DotaConfig",
    "FactConfig",
    "FloraConfig",
    "LoraPtConfig",
    "LorettaAdapterConfig",
    "LorettaConfig",
    "LortaConfig",
    "LotrConfig",
    "MetaTtConfig",
    "MetaTtSweep",
    "NolaConfig",
    "QuantaConfig",
    "QuantumPeftConfig",
    "SuperLoraConfig",
    "TcurLoraConfig",
    "TensLoraConfig",
    "initialize_from_gradients",
    "load_delta",
    "print_tensor_map",
    "save_frames",
]
__version__ = "0.1.0"
