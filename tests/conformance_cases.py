"""Our methods as rows of PEFT's own tests (read by the harness that `test_peft_conformance.py` runs)."""

from tensorpeft import DotaConfig

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
]
MIXED_BATCH = [DotaConfig]
CONV1D = [DotaConfig]
