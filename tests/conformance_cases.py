"""Our methods as rows of PEFT's own tests (read by the harness that `test_peft_conformance.py` runs)."""

from tensorpeft import DotaConfig, FactConfig, FloraConfig, LorettaConfig, LortaConfig, LotrConfig, NolaConfig


def _low_rank_cases(name, config, arguments):
    return [
        (f"{name} one layer", "MLP", config, {"target_modules": ["lin0"], **arguments}),
        (f"{name} two layers", "MLP", config, {"target_modules": ["lin0", "lin1"], **arguments}),
        (f"{name} saved module", "MLP", config, {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **arguments}),
        (f"{name} Conv1D", "EmbConv1D", config, {"target_modules": ["conv1d"], **arguments}),
    ]


CASES = [
    ("DoTA one layer", "MLP", DotaConfig, {"target_modules": ["lin0"], "r": 4, "num_cores": 2}),
    ("DoTA two layers", "MLP", DotaConfig, {"target_modules": ["lin0", "lin1"], "r": 4, "num_cores": 2}),
    ("DoTA three cores", "MLP", DotaConfig, {"target_modules": ["lin0"], "r": 4, "num_cores": 3}),
    ("DoTA random", "MLP", DotaConfig, {"target_modules": ["lin0"], "r": 4, "num_cores": 2, "init_weights": "random"}),
    (
        "DoTA and a saved module",
        "MLP",
        DotaConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "r": 4, "num_cores": 2},
    ),
    ("DoTA Conv1D", "EmbConv1D", DotaConfig, {"target_modules": ["conv1d"], "r": 4, "num_cores": 3}),
    *_low_rank_cases("LoRTA", LortaConfig, {"r": 4}),
    # PEFT trains at rates of 0.5 and more: at the usual scale these diverge on layers this small.
    *_low_rank_cases("LoTR", LotrConfig, {"r": 4, "alpha": 1}),
    *_low_rank_cases("FacT-TT", FactConfig, {"r": 4, "scale": 0.25}),
    ("FacT-TK", "MLP", FactConfig, {"target_modules": ["lin0"], "r": 4, "core": "tk"}),
    *_low_rank_cases("LoRETTA", LorettaConfig, {"r": 4, "alpha": 0.3}),
    *_low_rank_cases("FLoRA", FloraConfig, {"r": 4, "alpha": 1}),
    *_low_rank_cases("NOLA", NolaConfig, {"r": 4, "num_bases": 16, "alpha": 1}),
]
MIXED_BATCH = [DotaConfig, LortaConfig, LotrConfig, FactConfig, LorettaConfig, FloraConfig, NolaConfig]
CONV1D = MIXED_BATCH
