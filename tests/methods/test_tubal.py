"""LoRA-PT and tCURLoRA: their dense formula by complex FFTs, where they start, and their size."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from cases import MODELS, Model, logits, over_models, perturb, tiny_llama, tokens
from tensorpeft import LoraPtConfig, TcurLoraConfig
from tensorpeft.networks.tubal import leading_triplets

TOLERANCE = 1e-10
LLAMA = MODELS[0]
# Stacks of 3 and of 4 weights: with and without a slice in the middle.
LAYERS = pytest.mark.parametrize("num_layers", [1, 2, 3], ids=lambda number: f"{number}-layers")


def adapt(model: Model, config: type[PeftConfig], r: int = 2) -> PeftModel:
    peft_model = get_peft_model(model.fresh(), config(r=r, target_modules=model.targets)).double().eval()
    return peft_model


def factors_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """Trained, frozen and start factors by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name.rpartition(".")[2]: tensor for name, tensor in named if "_update.default." in name}


def complex_slices(packed: Any, xp: Any = np) -> list[Any]:  # n slices of a complex tensor
    """Re_0, Re_1, Im_1, Re_2, … as the slices of the whole FFT of a real tensor."""
    count = len(packed)
    half = [packed[0] + 0j]
    for k in range(1, count // 2 + 1):
        half.append(packed[2 * k - 1] + (1j * packed[2 * k] if 2 * k < count else 0))
    return [half[k] if k < len(half) else xp.conj(half[count - k]) for k in range(count)]


def stack(left: Any, core: Any, right: Any, xp: Any = np) -> Any:  # (n, out, in)
    """`ifft(U_k S_k V_kᴴ)` along the stack, of which nothing imaginary may remain."""
    slices = []
    for u, s, v in zip(*(complex_slices(part, xp) for part in (left, core, right)), strict=True):
        slices.append((u * s if s.ndim == 1 else u @ s) @ xp.conj(v).T)
    result = xp.fft.ifft(xp.stack(slices), axis=0) if xp is np else torch.fft.ifft(torch.stack(slices), dim=0)
    assert abs(result.imag).max() < 1e-12
    return result.real


def dense_updates(base: nn.Module, names: list[str], factors: Mapping[str, Any], xp: Any = np) -> dict[str, Any]:
    """{layer: its update as the layer stores its weight}."""
    places, updates = dict[str, int](), {}
    for name in names:
        layer = base.get_submodule(name)
        out, in_ = layer.weight.T.shape if isinstance(layer, Conv1D) else layer.weight.shape
        shape = f"{out}x{in_}"
        index = places.setdefault(shape, 0)
        places[shape] += 1
        update = stack(*(factors[f"{shape}_{factor}"] for factor in "USV"), xp)[index]
        if f"start_{shape}_U" in factors:
            update = update - stack(*(factors[f"start_{shape}_{factor}"] for factor in "USV"), xp)[index]
        updates[name] = update.T if isinstance(layer, Conv1D) else update
    return updates


@pytest.mark.parametrize("config", [LoraPtConfig, TcurLoraConfig])
@over_models
def test_updates_outputs_and_gradients_are_those_of_the_dense_formula(model: Model, config: type[PeftConfig]):
    peft_model, base = adapt(model, config), model.fresh().double()
    perturb(peft_model, scale=1.0 if config is LoraPtConfig else 3.0)
    factors, names = factors_of(peft_model), peft_model.targeted_module_names
    updates = dense_updates(base, names, {name: factor.detach().numpy() for name, factor in factors.items()})
    for name, update in updates.items():
        assert np.abs(update).max() > 1e-3, name  # nothing is proved by zeros
        actual = peft_model.base_model.model.get_submodule(name).get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(actual, update, rtol=0, atol=TOLERANCE, err_msg=name)
    copies = {name: f.detach().clone().requires_grad_(f.requires_grad) for name, f in factors.items()}
    updates = dense_updates(base, names, copies, torch)
    weights = {f"{name}.weight": base.get_submodule(name).weight.detach() + updates[name] for name in updates}
    expected = torch.func.functional_call(base, weights, kwargs={"input_ids": tokens()}).logits
    output = peft_model(input_ids=tokens()).logits
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)
    assert (output - logits(base)).abs().max() > 1e-5
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, factor in factors.items():
        if factor.requires_grad:
            gradient = copies[name].grad
            assert (factor.grad - gradient).abs().max() <= TOLERANCE * gradient.abs().max(), name


def stacks_of_weights(num_layers: int) -> tuple[Model, dict[str, np.ndarray]]:
    """A model, and the weights of each shape among its targets in the model's order."""
    model = Model("llama", lambda: tiny_llama(num_hidden_layers=num_layers), LLAMA.targets, "CAUSAL_LM")
    shapes: dict[str, list[np.ndarray]] = {}
    for name, layer in model.fresh().double().named_modules():
        if name.endswith(tuple(model.targets)):
            shapes.setdefault("{}x{}".format(*layer.weight.shape), []).append(layer.weight.detach().numpy())
    return model, {shape: np.stack(weights) for shape, weights in shapes.items()}


@LAYERS
def test_lora_pt_starts_at_the_truncated_t_svd(num_layers: int):
    model, stacks = stacks_of_weights(num_layers)
    factors = factors_of(adapt(model, LoraPtConfig, r=3))
    for shape, weights in stacks.items():
        u, s, vh = np.linalg.svd(np.fft.fft(weights, axis=0), full_matrices=False)
        expected = np.fft.ifft(u[..., :3] * s[:, None, :3] @ vh[:, :3], axis=0)
        actual = stack(*(factors[f"start_{shape}_{factor}"].numpy() for factor in "USV"))
        np.testing.assert_allclose(actual, expected.real, rtol=0, atol=1e-6)  # decomposed in float32
        for factor in "USV":
            assert torch.equal(factors[f"start_{shape}_{factor}"], factors[f"{shape}_{factor}"])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("sides", [(5, 9), (9, 5), (6, 6)])
def test_all_triplets_are_the_weights(count: int, sides: tuple[int, int]):
    generator = torch.Generator().manual_seed(count)
    weights = torch.randn(count, *sides, generator=generator, dtype=torch.float64)
    triplets = leading_triplets(weights, min(sides))
    np.testing.assert_allclose(stack(*(factor.numpy() for factor in triplets)), weights, rtol=0, atol=1e-9)


def test_weights_of_zeros_and_constant_ones_have_triplets():
    for weights in (torch.zeros(3, 6, 5), torch.ones(4, 5, 6), torch.eye(6).expand(3, 6, 6)):
        triplets = leading_triplets(weights, 2)
        assert all(bool(factor.isfinite().all()) for factor in triplets)


def test_the_update_is_of_rank_n_r():
    peft_model = adapt(LLAMA, LoraPtConfig, r=1)
    perturb(peft_model)
    layer = peft_model.base_model.model.model.layers[0].mlp.up_proj  # in a stack of two
    values = torch.linalg.svdvals(layer.get_delta_weight("default"))
    assert values[3] > 1e-4 > 1e-12 > values[4]  # of the trained factors, and of the start


# The weights of a UNETR's encoder: 12 layers of q, k, v, o (768 x 768), up and down.
UNETR = {
    f"{name}_{k}": nn.Linear(in_, out, bias=False, device="meta")
    for k in range(12)
    for name, out, in_ in [*((name, 768, 768) for name in "qkvo"), ("up", 3072, 768), ("down", 768, 3072)]
}


@pytest.mark.parametrize(
    ("config", "r", "expected"),
    [
        (LoraPtConfig, 1, 73_776 + 46_092 + 46_092),
        (LoraPtConfig, 8, 590_208 + 2 * 368_736),
        (TcurLoraConfig, 1, 72),
        (TcurLoraConfig, 8, 4_608),
        (TcurLoraConfig, 16, 18_432),
    ],
)
def test_unetr_has_the_formula_s_number_of_parameters(config: type[PeftConfig], r: int, expected: int):
    peft_model = get_peft_model(nn.ModuleDict(UNETR), config(r=r, target_modules=list(UNETR)))
    assert peft_model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("alpha", [1, 3])
@LAYERS
def test_tcurlora_s_columns_and_rows_are_the_longest_ones(num_layers: int, alpha: float):
    model, stacks = stacks_of_weights(num_layers)
    config = TcurLoraConfig(r=3, alpha=alpha, target_modules=model.targets)
    factors = factors_of(get_peft_model(model.fresh(), config).double())
    for shape, weights in stacks.items():
        spectrum = np.fft.fft(weights, axis=0)
        columns = np.argsort(-np.linalg.norm(spectrum, axis=1).sum(0))[:3]
        rows = np.argsort(-np.linalg.norm(spectrum[:, :, columns], axis=2).sum(0))[:3]
        unit = np.sqrt(np.mean(np.abs(spectrum[:, rows][:, :, columns]) ** 2))
        for factor, expected in (("U", alpha / unit * spectrum[:, :, columns]), ("V", spectrum[:, rows].conj().mT)):
            actual = np.stack(complex_slices(factors[f"{shape}_{factor}"].numpy()))
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)  # transformed in float32
        assert factors[f"{shape}_S"].shape == (len(weights), 3, 3)
        assert not factors[f"{shape}_S"].any()


@pytest.mark.parametrize("config", [LoraPtConfig, TcurLoraConfig])
def test_weights_that_are_not_finite_are_refused_by_name(config: type[PeftConfig]):
    model = LLAMA.fresh()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj and the others of its shape: .*finite"):
        get_peft_model(model, config(target_modules=["up_proj"]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("arguments", [{"r": 0}, {"r": True}, {"alpha": 0}, {"alpha": float("nan")}])
def test_impossible_configuration(arguments: dict[str, Any]):
    (field,) = arguments
    for config in [LoraPtConfig, TcurLoraConfig] if field == "r" else [TcurLoraConfig]:
        with pytest.raises(ValueError, match=rf"^{field}="):
            config(**arguments)
