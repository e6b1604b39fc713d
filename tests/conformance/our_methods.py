"""Our methods as rows of PEFT's own tests (read by the harness that `test_peft_conformance.py` runs).

The harness asks every method for `init_weights=False`, a start that is not the identity. LoRA-PT and tCURLoRA have no
such start.
"""

import os

from tensorpeft import (
    DotaConfig,
    FactConfig,
    FloraConfig,
    LorettaAdapterConfig,
    LorettaConfig,
    LortaConfig,
    LotrConfig,
    NolaConfig,
    QuantaConfig,
    QuantumPeftConfig,
    SuperLoraConfig,
)


def _cases(name, config, arguments):
    """What differs between methods; what the shared layer does with more targets is asked of DoTA and LoRTA."""
    return [
        (f"{name} one layer", "MLP", config, {"target_modules": ["lin0"], **arguments}),
        (f"{name} Conv1D", "EmbConv1D", config, {"target_modules": ["conv1d"], **arguments}),
    ]


_CASES = {
    "DoTA": [
        ("DoTA one layer", "MLP", DotaConfig, {"target_modules": ["lin0"], "r": 4, "num_cores": 2}),
        ("DoTA two layers", "MLP", DotaConfig, {"target_modules": ["lin0", "lin1"], "r": 4, "num_cores": 2}),
        ("DoTA three cores", "MLP", DotaConfig, {"target_modules": ["lin0"], "r": 4, "num_cores": 3}),
        (
            "DoTA random",
            "MLP",
            DotaConfig,
            {"target_modules": ["lin0"], "r": 4, "num_cores": 2, "init_weights": "random"},
        ),
        (
            "DoTA and a saved module",
            "MLP",
            DotaConfig,
            {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "r": 4, "num_cores": 2},
        ),
        ("DoTA Conv1D", "EmbConv1D", DotaConfig, {"target_modules": ["conv1d"], "r": 4, "num_cores": 3}),
    ],
    "others": [
        *_cases("LoRTA", LortaConfig, {"r": 4}),
        ("LoRTA two layers", "MLP", LortaConfig, {"target_modules": ["lin0", "lin1"], "r": 4}),
        (
            "LoRTA and a saved module",
            "MLP",
            LortaConfig,
            {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "r": 4},
        ),
        # PEFT trains at rates of 0.5 and more: at the usual scale these diverge on layers this small.
        *_cases("LoTR", LotrConfig, {"r": 4, "alpha": 1}),
        *_cases("FacT-TT", FactConfig, {"r": 4, "scale": 0.25}),
        ("FacT-TK", "MLP", FactConfig, {"target_modules": ["lin0"], "r": 4, "core": "tk"}),
        *_cases("LoRETTA", LorettaConfig, {"r": 4, "alpha": 0.3}),
        *_cases("FLoRA", FloraConfig, {"r": 4, "alpha": 1}),
        *_cases("NOLA", NolaConfig, {"r": 4, "num_bases": 16, "alpha": 1}),
        *_cases("Quantum-PEFT", QuantumPeftConfig, {"r": 4, "alpha": 1}),
        *_cases("SuperLoRA", SuperLoraConfig, {"r": 4, "alpha": 1}),
        *_cases("QuanTA", QuantaConfig, {"num_axes": 2}),
        *_cases("LoRETTA adapter", LorettaAdapterConfig, {"bottleneck": 8}),
        *(
            (f"FLoRA {model}", model, FloraConfig, {"target_modules": targets, "r": 4, "alpha": 1})
            for model, targets in [
                ("Conv1d", ["conv1d"]),
                ("Conv2d", ["conv2d"]),
                ("Conv2d", ["conv2d", "lin0"]),
                ("Conv2d1x1", ["conv2d"]),
                ("Conv2dGroups", ["conv2d"]),
                ("Conv2dGroups2", ["conv2d"]),
                ("Conv3d", ["conv3d"]),
            ]
        ),
    ],
}
# Which of the two; both without it.
_GROUP = os.environ.get("CONFORMANCE_METHODS")
CASES = [case for group, cases in _CASES.items() if _GROUP in (None, group) for case in cases]
MIXED_BATCH = CONV1D = list(dict.fromkeys(config for _, _, config, _ in CASES))
NO_MERGE = [LorettaAdapterConfig]
