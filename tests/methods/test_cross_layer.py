"""Methods of shared factors against the dense tensors of their formulas, over the architectures that people adapt."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from cases import tiny_llama, tokens
from cross_layer_oracles import (
    ARCHITECTURES,
    Architecture,
    lorta_updates,
    over_layer_updates,
    stacked_updates,
    train_updates,
)
from tensorpeft import FactConfig, LortaConfig, LotrConfig, MetaTtConfig, TensLoraConfig

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Method:
    """A method, and the factor s of its formula for these arguments; no two sizes or factors are equal by chance."""

    name: str
    config: type[PeftConfig]
    arguments: dict[str, Any]
    scale: float

    def adapt(self, model: nn.Module, targets: list[str], **more: Any) -> PeftModel:
        torch.manual_seed(3)
        config = self.config(**self.arguments, init_weights=False, target_modules=targets, **more)
        return get_peft_model(model, config).double().eval()

    def dense(
        self,
        architecture: Architecture,
        factors: dict[str, Any],
        xp: ModuleType = np,
    ) -> dict[str, Any]:  # {layer: (out, in)}
        if self.config is LortaConfig:
            return lorta_updates(architecture, factors, self.scale, xp)
        if self.config is MetaTtConfig:
            has_heads = self.arguments["variant"] == "5d"
            return train_updates(architecture, shapes(architecture), factors, self.scale, has_heads, xp)
        if self.config is TensLoraConfig:
            arrangement = self.arguments["arrangement"]
            return stacked_updates(architecture, shapes(architecture), factors, self.scale, arrangement, xp)
        return over_layer_updates(shapes(architecture), factors, self.scale, xp)


def tenslora(arrangement: str, r: int | list[int], **more: Any) -> Method:
    scale = 6.0 if more else 0.6
    arguments = {"r": r, "arrangement": arrangement, "scale": scale, **more}
    return Method(f"tenslora-{arrangement}{'-cp' if more else ''}", TensLoraConfig, arguments, scale)


LORTA = Method("lorta", LortaConfig, {"r": 3, "alpha": 7}, 7 / 3)
METHODS = [
    LORTA,
    Method("lotr", LotrConfig, {"r": 3, "alpha": 7}, 7 / 3),
    Method("fact-tt", FactConfig, {"r": 3, "core": "tt", "scale": 0.6}, 0.6),
    Method("fact-tk", FactConfig, {"r": 3, "core": "tk", "scale": 0.6}, 0.6),
    Method("metatt", MetaTtConfig, {"r": 3, "variant": "4d", "alpha": 0.6}, 0.6),
    Method("metatt-5d", MetaTtConfig, {"r": 3, "variant": "5d", "alpha": 0.6}, 0.6),
    tenslora("QKV_Depth", [3, 4, 2, 5]),
    tenslora("Att_QKV_Depth", [5, 4, 3, 2, 3]),
]
# Every way to stack; what the others of the list have is tested over all architectures.
ARRANGEMENTS = [
    tenslora("Att", [4, 3, 2]),
    tenslora("QKV", [2, 3, 4]),
    tenslora("Depth", [3, 2, 4]),
    tenslora("Att_QKV", [3, 4, 5, 2]),
    tenslora("Att_Depth", [9, 2, 2, 3]),
    tenslora("QKV_Depth", 3, decomposition="cp"),
    tenslora("Att", 3, decomposition="cp"),
    tenslora("Att_QKV_Depth", 3, decomposition="cp"),
]
SOME = ("llama-grouped", "gpt2-conv1d", "gpt-neox-interleaved", "t5")
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
over_methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
over_arrangements = pytest.mark.parametrize("method", ARRANGEMENTS, ids=lambda method: method.name)
over_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
# The weights of every architecture with the methods that split them in every way; the others with some.
over_pairs = pytest.mark.parametrize(
    ("architecture", "method"),
    [
        pytest.param(
            architecture,
            method,
            id=f"{architecture.name}-{method.name}",
            marks=[] if method in METHODS[:4] or architecture.name in SOME else pytest.mark.thorough,
        )
        for architecture in ARCHITECTURES
        for method in METHODS
    ],
)


def shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Every adapted layer's (out, in), in module order."""
    attention = {f"{block}.{name}" for block in architecture.attention for name in architecture.projections}
    sites = attention | {f"{block}.{name}" for block in architecture.mlp for name in architecture.mlp_layers}
    modules = {name: module for name, module in architecture.fresh().named_modules() if name in sites}
    assert set(modules) == sites
    return {name: tuple(stored(module, module.weight).shape) for name, module in modules.items()}


def stored(layer: nn.Module, weight: Any) -> Any:  # (out, in) and back
    """The weight as the layer stores it: GPT-2's Conv1D has (in, out)."""
    return weight.T if isinstance(layer, Conv1D) else weight


def shared_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by the last part of their name."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    factors = {name.rpartition(".")[2]: parameter for name, parameter in trained}
    assert len(factors) == len(trained)
    return factors


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: factor.detach().numpy() for name, factor in shared_factors(model).items()}


def adapted_layers(model: PeftModel) -> dict[str, nn.Module]:
    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if hasattr(module, "get_delta_weight")}


def inputs(architecture: Architecture) -> dict[str, torch.Tensor]:
    decoder_input = {"decoder_input_ids": tokens(length=5, seed=4)} if architecture.has_decoder_input else {}
    return {"input_ids": tokens(), **decoder_input}


@over_pairs
def test_updates_are_the_slices_of_the_dense_tensor(architecture: Architecture, method: Method):
    """Catches a swapped mode, row, head order or transpose in any layer."""
    model = method.adapt(architecture.fresh(), architecture.targets)
    layers, expected = adapted_layers(model), method.dense(architecture, arrays(model))
    base = architecture.fresh()
    assert set(layers) == set(expected)
    for name, update in expected.items():
        actual = layers[name].get_delta_weight("default").detach().numpy()
        assert np.abs(update).max() > 1e-3, name  # nothing is proved by zeros
        np.testing.assert_allclose(
            actual, stored(base.get_submodule(name), update), rtol=0, atol=TOLERANCE, err_msg=name
        )


@over_arrangements
@pytest.mark.parametrize("name", SOME[:3])
def test_updates_are_the_slices_of_the_dense_tensor_in_every_arrangement(name: str, method: Method):
    test_updates_are_the_slices_of_the_dense_tensor(BY_NAME[name], method)


@over_pairs
def test_outputs_are_those_of_the_base_with_dense_weights(architecture: Architecture, method: Method):
    """The layers multiply by the factors in an order of their own; get_delta_weight says nothing about that path."""
    model, base = method.adapt(architecture.fresh(), architecture.targets), architecture.fresh()
    with torch.no_grad():
        before = base(**inputs(architecture)).logits
        for name, update in method.dense(architecture, arrays(model)).items():
            layer = base.get_submodule(name)
            layer.weight += torch.from_numpy(np.ascontiguousarray(stored(layer, update)))
        expected = base(**inputs(architecture)).logits
        actual = model(**inputs(architecture)).logits
    assert (expected - before).abs().max() > 1e-4
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@over_pairs
def test_gradients_are_those_of_the_dense_formula(architecture: Architecture, method: Method):
    """A shared factor collects its gradient from every layer, also from those that use only some of its rows."""
    model, base = method.adapt(architecture.fresh(), architecture.targets), architecture.fresh()
    factors = shared_factors(model)
    actual = model(**inputs(architecture)).logits
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    actual_gradients = torch.autograd.grad((actual * direction).sum(), list(factors.values()))
    copies = {name: factor.detach().clone().requires_grad_() for name, factor in factors.items()}
    weights = {}
    for name, update in method.dense(architecture, copies, torch).items():
        layer = base.get_submodule(name)
        weights[f"{name}.weight"] = layer.weight.detach() + stored(layer, update)
    output = torch.func.functional_call(base, weights, kwargs=inputs(architecture)).logits
    gradients = torch.autograd.grad((output * direction).sum(), list(copies.values()))
    for name, actual_gradient, gradient in zip(factors, actual_gradients, gradients, strict=True):
        size = gradient.abs().max()
        assert size > 1e-6, name
        error = (actual_gradient - gradient).abs().max() / size
        assert error < TOLERANCE, f"{name}: {error:.1e}"


@over_architectures
def test_all_lorta_updates_share_one_basis_of_the_hidden_side(architecture: Architecture):
    """All q, k, v and transposed o (all up, gate and transposed down) have their rows in the span of one A: rank r."""
    model = LORTA.adapt(architecture.fresh(), architecture.targets)
    for blocks, layers in (
        (architecture.attention, {name: letters == "o" for name, letters in architecture.projections.items()}),
        (architecture.mlp, {name: side == "columns" for name, side in architecture.mlp_layers.items()}),
    ):
        rows = []
        for name, is_transposed in ((f"{block}.{name}", turned) for block in blocks for name, turned in layers.items()):
            layer = model.base_model.model.get_submodule(name)
            update = stored(layer.get_base_layer(), layer.get_delta_weight("default").detach().numpy())
            rows.append(update.T if is_transposed else update)
        assert len(rows) == len(blocks) * len(layers) >= 2
        assert np.linalg.matrix_rank(np.concatenate(rows), rtol=1e-10) == LORTA.arguments["r"]


LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_3_8B = {**LLAMA_2_7B, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
ROBERTA_BASE = {
    "vocab_size": 50265,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
ROBERTA_LARGE = {
    **ROBERTA_BASE,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
ENCODER_QKV = ["query", "key", "value"]
QV, QKVO, MLP = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def build_llama(sizes: dict[str, int]) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def build_roberta(sizes: dict[str, int]) -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes))


@pytest.mark.parametrize(
    ("build", "sizes", "config", "expected"),
    [
        (build_llama, LLAMA_2_7B, LortaConfig(r=4, target_modules=QV), 17_160),
        (build_llama, LLAMA_2_7B, LortaConfig(r=64, target_modules=QV), 274_560),
        (build_llama, LLAMA_2_7B, LortaConfig(r=4, target_modules=QKVO), 4_292 * 4),
        (build_llama, LLAMA_2_7B, LortaConfig(r=64, target_modules=QKVO), 4_292 * 64),
        (build_llama, LLAMA_2_7B, LortaConfig(r=4, target_modules=MLP), (4096 + 11008 + 32 + 3) * 4),
        (build_llama, LLAMA_2_7B, LotrConfig(r=4, target_modules=QV), 33_792),
        (build_llama, LLAMA_2_7B, LotrConfig(r=64, target_modules=QV), 786_432),
        (build_llama, LLAMA_2_7B, FactConfig(r=4, core="tt", target_modules=QV), 33_792),
        (build_llama, LLAMA_2_7B, FactConfig(r=64, core="tt", target_modules=QV), 786_432),
        (build_llama, LLAMA_2_7B, FactConfig(r=4, core="tk", target_modules=QV), 33_088),
        (build_llama, LLAMA_2_7B, FactConfig(r=64, core="tk", target_modules=QV), 790_528),
        # Grouped queries: v has 1024 rows, so that q and v are two tensors of 32 weights each, except in LoRTA.
        (build_llama, LLAMA_3_8B, LortaConfig(r=4, target_modules=QV), (4096 + 128 + 32 + 32 + 2) * 4),
        (build_llama, LLAMA_3_8B, LotrConfig(r=4, target_modules=QV), 2 * 32 * 4**2 + (4096 + 4096 + 4096 + 1024) * 4),
        (
            build_llama,
            LLAMA_3_8B,
            FactConfig(r=4, core="tk", target_modules=QV),
            (4096 + 4096 + 32) * 4 + 4**3 + (4096 + 1024 + 32) * 4 + 4**3,
        ),
        (build_llama, LLAMA_2_7B, MetaTtConfig(r=8, target_modules=QV), 67_712),
        (build_llama, LLAMA_2_7B, MetaTtConfig(r=64, target_modules=QV), 663_552),
        (build_llama, LLAMA_2_7B, MetaTtConfig(r=8, variant="5d", target_modules=QV), 38_016),
        # Keys and values use the first heads of the queries' core.
        (build_llama, LLAMA_3_8B, MetaTtConfig(r=4, variant="5d", target_modules=QV), 4224 * 4 + (32 + 2 + 32) * 16),
        (build_roberta, ROBERTA_BASE, MetaTtConfig(r=8, target_modules=["query", "value"]), 13_184),
        (build_roberta, ROBERTA_BASE, MetaTtConfig(r=16, variant="5d", target_modules=["query", "value"]), 19_968),
        (build_roberta, ROBERTA_LARGE, MetaTtConfig(r=16, target_modules=["query", "value"]), 39_424),
        *[
            (
                build_roberta,
                ROBERTA_BASE,
                TensLoraConfig(r=r, **how, target_modules=["query", "key", "value"]),
                expected,
            )
            for r, how, expected in (
                (8, {"arrangement": "Att"}, 261_504),
                (8, {"arrangement": "QKV"}, 153_888),
                (8, {"arrangement": "Depth"}, 38_688),
                (8, {"arrangement": "Att_QKV"}, 130_464),
                (8, {"arrangement": "Att_Depth"}, 32_832),
                (8, {"arrangement": "QKV_Depth"}, 16_504),
                (8, {"arrangement": "Att_QKV_Depth"}, 39_640),
                (4, {"arrangement": "QKV_Depth"}, 6_460),
                (8, {"arrangement": "QKV_Depth", "decomposition": "cp"}, 12_408),
            )
        ],
        (build_roberta, ROBERTA_BASE, LortaConfig(r=4, target_modules=["query", "value"]), 3_432),
        (build_roberta, ROBERTA_LARGE, LortaConfig(r=8, target_modules=["query", "value"]), 9_040),
    ],
)
def test_parameters_are_as_many_as_the_papers_say(build, sizes: dict[str, int], config: PeftConfig, expected: int):
    with torch.device("meta"):
        model = build(sizes)
    assert get_peft_model(model, config).get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2-conv1d", "bert", "opt"])
def test_layers_that_are_not_adapted_have_no_row(name: str):
    """Rows of C_L are counted over the adapted layers; layer 1 alone takes row 0."""
    second = BY_NAME[name]
    second = replace(second, attention=second.attention[1:], mlp=second.mlp[1:])
    model = LORTA.adapt(second.fresh(), second.targets, layers_to_transform=[1])
    layers, factors = adapted_layers(model), arrays(model)
    assert factors["attention_C_L"].shape == factors["mlp_C_L"].shape == (1, 3)
    expected = lorta_updates(second, factors, LORTA.scale)
    assert set(layers) == set(expected)
    for site, update in expected.items():
        actual = layers[site].get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(
            actual, stored(layers[site].get_base_layer(), update), rtol=0, atol=TOLERANCE, err_msg=site
        )


class Attention(nn.Module):
    """An attention as one writes it at home, in a model without a configuration."""

    def __init__(self, hidden: int):
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (*batch, hidden)
        return torch.tanh(self.q_proj(x)) * self.v_proj(x)


class Plain(nn.Module):
    """Layers of the given hidden sizes; each sees the first features of the input."""

    def __init__(self, *hidden_sizes: int):
        super().__init__()
        self.hidden_sizes = hidden_sizes
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(hidden)}) for hidden in hidden_sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (*batch, sum of the hidden sizes)
        outputs = [layer["attn"](x[..., :hidden]) for layer, hidden in zip(self.layers, self.hidden_sizes)]
        return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, r"r=0: expected a whole number of at least 1"),
        ({"r": 2.5}, r"r=2\.5: expected a whole number"),
        ({"alpha": 0}, r"alpha=0: expected .* above 0"),
        ({"alpha": -1}, r"alpha=-1: expected .* above 0"),
        ({"alpha": float("nan")}, r"alpha=nan: expected a finite number"),
        ({"head_dim": 0}, r"head_dim=0: expected a whole number of at least 1"),
        ({"init_weights": "svd"}, r"init_weights='svd': expected"),
    ],
)
def test_impossible_configuration(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LortaConfig(target_modules=["q_proj"], **arguments)


@pytest.mark.parametrize(
    ("build", "x", "arguments", "message"),
    [
        pytest.param(
            BY_NAME["bert"].fresh,
            tokens(),
            {"target_modules": r".*(query|pooler\.dense)"},
            r"bert\.pooler\.dense: .*(target_modules|exclude_modules)",
            id="outside-any-block",
        ),
        pytest.param(
            BY_NAME["bert"].fresh,
            tokens(),
            {"target_modules": ["query"], "head_dim": 5},
            r"bert\.encoder\.layer\.0\.attention\.self\.query: 24 .*head_dim=5.*Pass",
            id="heads-that-do-not-fit",
        ),
        pytest.param(
            lambda: Plain(24, 24),
            torch.ones(2, 24),
            {"target_modules": ["q_proj", "v_proj"]},
            r"layers\.0\.attn\.q_proj: .*Pass head_dim",
            id="no-head-information",
        ),
        pytest.param(
            lambda: Plain(24, 32),
            torch.ones(2, 32),
            {"target_modules": ["q_proj", "v_proj"], "head_dim": 8},
            r"layers\.1\.attn\.q_proj: .*32.*layers\.0\.attn\.q_proj.*24.*(exclude_modules|LotrConfig)",
            id="hidden-sizes-that-differ",
        ),
    ],
)
def test_impossible_targets_leave_the_model_as_it_was(build, x: torch.Tensor, arguments: dict[str, Any], message: str):
    torch.manual_seed(0)
    model = build().eval()
    modules = [(name, type(module)) for name, module in model.named_modules()]
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = output_of(model, x)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LortaConfig(r=4, **arguments))
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert not hasattr(model, "peft_config")
    assert torch.equal(output_of(model, x), before)


def output_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize(
    ("hidden_sizes", "config"),
    [
        ((24, 24), LortaConfig(r=3, head_dim=6, init_weights=False, target_modules=["q_proj", "v_proj"])),
        ((24, 32), LotrConfig(r=3, init_weights=False, target_modules=["q_proj", "v_proj"])),
        (
            (24, 32),
            LortaConfig(
                r=3,
                head_dim=8,
                init_weights=False,
                target_modules=["q_proj", "v_proj"],
                exclude_modules=r"layers\.0\..*",
            ),
        ),
    ],
    ids=["pass-head_dim", "use-lotr", "exclude-the-others"],
)
def test_what_the_errors_advise_works(hidden_sizes: tuple[int, ...], config: PeftConfig):
    torch.manual_seed(0)
    model, x = Plain(*hidden_sizes), torch.ones(2, max(hidden_sizes))
    before = output_of(model, x)
    assert (output_of(get_peft_model(model, config).eval(), x) - before).abs().max() > 1e-4


@over_methods
def test_a_checkpoint_holds_every_shared_factor_once(method: Method, tmp_path):
    """Six layers share the factors: one copy a layer would be six times the bytes."""
    torch.manual_seed(0)
    targets = [*QKVO, *MLP]
    model = method.adapt(tiny_llama(num_hidden_layers=6), targets).float()
    factors = shared_factors(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    num_parameters = sum(factor.numel() for factor in factors.values())
    assert 4 * num_parameters < path.stat().st_size <= 4 * num_parameters * 1.05 + 1024 + 160 * len(factors)
    saved = load_file(path)
    assert sorted(key.rpartition(".")[2] for key in saved) == sorted(factors)
    for key, tensor in saved.items():
        assert torch.equal(tensor, factors[key.rpartition(".")[2]]), key
