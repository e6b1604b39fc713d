"""QDoTA's base layer against its formula; what must be equal bit for bit under an adapter on it."""

import copy
from math import prod
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from residual_bases import adapted, base_of, config_of, fresh, trained
from torch import Tensor, nn

from cases import MODELS, Model, logits, over_models, perturb, tokens
from tensorpeft import DotaConfig, LortaConfig
from tensorpeft.plugin.layer import TensorLayer

bitsandbytes = pytest.importorskip("bitsandbytes")
from tensorpeft.quantization import residual  # noqa: E402  # needs bitsandbytes
from tensorpeft.quantization.residual import ResidualLinear4bit, Split, split  # noqa: E402

FORMULA_TOLERANCE = 2e-6  # of the largest entry: sums of some 50 float32 products
# QLoRA, appendix E: the quantiles of a normal distribution that NF4 rounds to.
CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=torch.float64)  # fmt: skip
MODES = [(4, 3, 4), (2, 5, 4), 8]  # of a (48, 40) matrix, and the bond


def residuals(model: nn.Module) -> dict[str, ResidualLinear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ResidualLinear4bit)}


def mpo(cores: list[Tensor]) -> Tensor:  # (out, in)
    """The matrix of three cores in float64, by its definition."""
    matrix = torch.einsum("aijb,bklc,cmnd->ikmjln", *(core.double() for core in cores))
    return matrix.reshape(prod(matrix.shape[:3]), -1)


def nf4(matrix: Tensor) -> Tensor:  # (out, in)
    """The nearest NF4 matrix (QLoRA, section 3): each block of 64 in row order is a scale times one of 16 values."""
    blocks = nn.functional.pad(matrix.flatten(), (0, -matrix.numel() % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = CODE[(blocks / scale).unsqueeze(-1).sub(CODE).abs().argmin(-1)]
    return (nearest * scale).flatten()[: matrix.numel()].view_as(matrix)


def plain_weight(model: Model, name: str) -> Tensor:  # (out, in)
    layer = fresh(model).get_submodule(name)
    return (layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()).detach().double()


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= FORMULA_TOLERANCE * expected.abs().max()


@over_models
def test_layer_multiplies_by_the_rounded_residual_and_the_cores(model: Model):
    layers = residuals(base_of(model, double_quant=False))
    assert {name.split(".")[-1] for name in layers} == {target.split(".")[-1] for target in model.targets}
    for name, layer in layers.items():
        start = mpo(layer.start.cores())
        weight = nf4(plain_weight(model, name) - start) + start
        assert_near(layer.weight_with(()), weight)
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(3))
        bias = 0 if layer.bias is None else layer.bias.double()
        assert_near(layer(x), x.double() @ weight.T + bias)


@over_models
def test_gradients_are_those_of_the_formula(model: Model):
    peft_model = trained(model, base_of(model, double_quant=False))
    for layer in (module for module in peft_model.modules() if isinstance(module, TensorLayer)):
        base, cores = layer.get_base_layer(), layer.updates["default"].cores()
        name = next(name for name, module in peft_model.get_base_model().named_modules() if module is layer)
        rest = nf4(plain_weight(model, name) - mpo(base.start.cores()))
        x = torch.randn(7, base.in_features, generator=torch.Generator().manual_seed(3), requires_grad=True)
        grad = torch.randn(7, base.out_features, generator=torch.Generator().manual_seed(4))
        found = torch.autograd.grad(layer(x), [x, *cores], grad)
        exact = [tensor.detach().double().requires_grad_() for tensor in (x, *cores)]
        y = exact[0] @ (rest + mpo(exact[1:])).T
        for one, other in zip(found, torch.autograd.grad(y, exact, grad.double()), strict=True):
            assert_near(one, other)


def dense(parts: Split) -> Tensor:  # (out, in)
    residual = bitsandbytes.functional.dequantize_4bit(parts.residual.data, parts.residual.quant_state)
    return residual.double() + mpo(parts.cores)


def error(found: Tensor, weight: Tensor) -> float:
    return ((weight - found).norm() / weight.norm()).item()


def test_the_best_pair_of_all_rounds_is_returned():
    last_was_best = []
    for seed in range(8):
        weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(seed))
        one = split(weight, *MODES, rounds=1)
        many = split(weight, *MODES, rounds=6)
        assert many.errors[: len(one.errors)] == one.errors
        for parts in (one, many):
            assert error(dense(parts), weight.double()) == pytest.approx(min(parts.errors), rel=1e-5)
        assert min(many.errors) < one.errors[0]
        last_was_best.append(many.errors[-1] == min(many.errors))
    assert not all(last_was_best)  # or else this test would not tell the best from the last


def test_one_round_beats_rounding_the_whole_of_a_weight_with_structure():
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 2, 8), (8, 3, 5, 8), (8, 4, 4, 1)]
    weight = mpo([torch.randn(shape, generator=generator) for shape in shapes])
    weight = (weight / weight.std() + 0.1 * torch.randn(48, 40, generator=generator)).float()
    parts = split(weight, *MODES)
    rounded = nf4(weight.double())
    assert error(dense(parts), weight.double()) < 0.2 * error(rounded, weight.double())


@over_models
@pytest.mark.parametrize("arguments", [{}, {"rounds": 3, "double_quant": False}, {"compute_dtype": torch.bfloat16}])
def test_start_is_the_base(model: Model, arguments: dict):
    base, peft_model = base_of(model, **arguments), adapted(model, **arguments)
    assert torch.equal(logits(peft_model), logits(base))
    assert torch.equal(peft_model(input_ids=tokens()).logits, logits(base))
    outputs = []
    for module in (peft_model.train(), base.train()):
        torch.manual_seed(0)  # of the model's dropout
        outputs.append(module(input_ids=tokens()).logits)
    assert torch.equal(*outputs)


@over_models
@pytest.mark.parametrize("arguments", [{}, {"compute_dtype": torch.bfloat16}])
def test_one_token_is_decoded_without_the_sum_of_the_weight_s_parts(model: Model, arguments: dict, monkeypatch):
    """Apart: the same numbers up to rounding, the base's own bits at the start, and no weight is made."""
    one, base, peft_model = tokens(1, 1), base_of(model, **arguments), adapted(model, **arguments)
    assert torch.equal(logits(peft_model, one), logits(base, one))
    perturb(peft_model)
    monkeypatch.setattr(residual, "effective_linear", None)
    found = logits(peft_model, one)
    monkeypatch.undo()
    monkeypatch.setattr(residual, "add_apart", lambda x, cuts: None)
    tolerance = 3e-2 if arguments else 1e-5
    torch.testing.assert_close(found, logits(peft_model, one), rtol=tolerance, atol=tolerance)
    assert not torch.equal(found, logits(base, one))


@over_models
def test_disabled_is_the_base_after_training_and_after_merging(model: Model):
    peft_model, expected = trained(model), logits(base_of(model))
    assert not torch.allclose(logits(peft_model), expected)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), expected)
    peft_model.merge_adapter()
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), expected)


@over_models
def test_two_adapters_do_not_touch_each_other(model: Model):
    peft_model = trained(model)
    first = logits(peft_model)
    peft_model.add_adapter("second", config_of(model))
    assert torch.equal(logits(peft_model), first)
    peft_model.set_adapter("second")
    assert torch.equal(logits(peft_model), logits(base_of(model)))
    perturb(peft_model, seed=5)
    assert not torch.allclose(logits(peft_model), first)
    peft_model.set_adapter("default")
    assert torch.equal(logits(peft_model), first)


@over_models
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reloaded_adapter_is_the_saved_one(model: Model, low_cpu_mem_usage: bool, tmp_path: Path):
    peft_model = trained(model)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(model), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), logits(peft_model))


@pytest.mark.parametrize(
    "config",
    [LortaConfig(r=4), LoraConfig(r=4), DotaConfig(r=4, init_weights="random")],
    ids=["lorta", "lora", "dota-random"],
)
@over_models
def test_other_starts_and_methods_work_on_it(model: Model, config: PeftConfig):
    config = copy.deepcopy(config)
    config.target_modules, config.task_type = set(model.targets), model.task_type
    peft_model, expected = get_peft_model(base_of(model), config).eval(), logits(base_of(model))
    assert torch.equal(logits(peft_model), expected)
    with torch.no_grad():
        for parameter in (parameter for parameter in peft_model.parameters() if parameter.requires_grad):
            parameter += 0.1
    assert not torch.allclose(logits(peft_model), expected)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), expected)


def test_a_base_with_a_start_of_its_own_has_no_balanced_one():
    config = DotaConfig(r=4, init_weights="balanced", target_modules=set(MODELS[0].targets))
    with pytest.raises(ValueError, match="Use init_weights=True"):
        get_peft_model(base_of(MODELS[0]), config)


@over_models
def test_rows_of_a_mixed_batch_are_what_each_adapter_gives_alone(model: Model):
    peft_model = trained(model)
    peft_model.add_adapter("second", config_of(model))
    peft_model.set_adapter("second")
    perturb(peft_model, seed=5)
    names = ["second", "default", "__base__"]
    mixed = logits(peft_model, tokens(), adapter_names=names)
    with peft_model.disable_adapter():
        expected = {"__base__": logits(peft_model)}
    for name in names[:2]:
        peft_model.set_adapter(name)
        expected[name] = logits(peft_model)
    for k, name in enumerate(names):
        torch.testing.assert_close(mixed[k], expected[name][k], atol=1e-5, rtol=1e-5)  # two products instead of one
    assert not torch.allclose(expected["default"], expected["second"])
