"""The adapters that the benchmarks compare, by name, and the layers that they adapt."""

from collections.abc import Callable

from peft import LoraConfig, PeftConfig

from tensorpeft import (
    DotaConfig,
    FactConfig,
    FloraConfig,
    LoraPtConfig,
    LorettaAdapterConfig,
    LorettaConfig,
    LortaConfig,
    LotrConfig,
    MetaTtConfig,
    NolaConfig,
    QuantaConfig,
    QuantumPeftConfig,
    SuperLoraConfig,
    TcurLoraConfig,
    TensLoraConfig,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# Of a rank, where they have one.
ADAPTERS: dict[str, Callable[[int], PeftConfig]] = {
    "LoRA": lambda r: LoraConfig(r=r, target_modules=TARGETS),
    "DoRA": lambda r: LoraConfig(r=r, use_dora=True, target_modules=TARGETS),
    "DoTA": lambda r: DotaConfig(r=r, target_modules=TARGETS),
    "DoTA, random": lambda r: DotaConfig(r=r, init_weights="random", target_modules=TARGETS),
    "LoRTA": lambda r: LortaConfig(r=r, target_modules=TARGETS),
    "LoTR": lambda r: LotrConfig(r=r, target_modules=TARGETS),
    "FacT-TT": lambda r: FactConfig(r=r, target_modules=TARGETS),
    "FacT-TK": lambda r: FactConfig(r=r, core="tk", target_modules=TARGETS),
    "MetaTT": lambda r: MetaTtConfig(r=r, target_modules=TARGETS),
    "MetaTT-5D": lambda r: MetaTtConfig(r=r, variant="5d", target_modules=TARGETS),
    "TensLoRA": lambda r: TensLoraConfig(r=r, target_modules=TARGETS),
    "TensLoRA, heads": lambda r: TensLoraConfig(r=r, arrangement="Att_QKV_Depth", target_modules=TARGETS),
    "FLoRA": lambda r: FloraConfig(r=r, target_modules=TARGETS),
    "NOLA": lambda r: NolaConfig(r=r, target_modules=TARGETS),
    "LoRETTA": lambda r: LorettaConfig(r=r, target_modules=TARGETS),
    "LoRETTA-adp": lambda r: LorettaAdapterConfig(),
    "Quantum-PEFT": lambda r: QuantumPeftConfig(r=r, target_modules=TARGETS),
    "SuperLoRA": lambda r: SuperLoraConfig(r=r, target_modules=TARGETS),
    "LoRA-PT": lambda r: LoraPtConfig(r=1, target_modules=TARGETS),
    "tCURLoRA": lambda r: TcurLoraConfig(r=r, target_modules=TARGETS),
    "QuanTA 4 axes": lambda r: QuantaConfig(target_modules=TARGETS),
    "QuanTA 3 axes": lambda r: QuantaConfig(num_axes=3, target_modules=TARGETS),
    # On bases in 4 bits.
    "QLoRA": lambda r: LoraConfig(r=r, target_modules=TARGETS),
    "QDoTA": lambda r: DotaConfig(r=r, target_modules=TARGETS),
}
