"""LoRETTA, FLoRA, NOLA and Quantum-PEFT: their dense formulas through whole models, and what is special to each."""

import copy
import hashlib
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from cases import MODELS, Model, logits, over_models, perturb, tokens
from own_factor_oracles import (
    METHODS,
    Method,
    bases_of,
    circuit_matrix,
    dense_updates,
    philox_block,
    random_bases,
    train_of,
    trained,
)
from tensorpeft import FloraConfig, LorettaConfig, NolaConfig, QuantumPeftConfig
from tensorpeft.export import to_lora
from tensorpeft.networks.pauli import num_angles, orthonormal_rows
from tensorpeft.networks.random_bases import random_basis

TOLERANCE = 1e-10
LORETTA, FLORA, NOLA, QUANTUM = METHODS.values()
LLAMA = MODELS[0]
pytestmark = pytest.mark.filterwarnings("ignore:the size .* is prime")
over_methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@over_methods
@over_models
def test_updates_and_outputs_are_those_of_the_dense_formula(model: Model, method: Method):
    peft_model, base = method.adapt(model).double(), model.fresh().double()
    before, updates = logits(base), dense_updates(method, base, trained(peft_model))
    assert len(updates) == 2 * len(model.targets)
    for name, update in updates.items():
        if method in (FLORA, NOLA):  # the others have their own test
            count = sum(tensor.numel() for tensor in trained(peft_model)[name].values())
            assert count == (2 * 5 if method is NOLA else 3 * sum(update.shape) + 3 * 3)
        assert np.abs(update).max() > 1e-3, name  # nothing is proved by zeros
        actual = peft_model.base_model.model.get_submodule(name).get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(actual, update, rtol=0, atol=TOLERANCE, err_msg=name)
        base.get_submodule(name).weight.data += torch.from_numpy(np.ascontiguousarray(update))
    assert (logits(base) - before).abs().max() > 1e-4
    torch.testing.assert_close(logits(peft_model), logits(base), rtol=0, atol=TOLERANCE)


@over_methods
@over_models
def test_gradients_are_those_of_the_dense_formula(model: Model, method: Method):
    peft_model, base = method.adapt(model).double(), model.fresh().double()
    layers = trained(peft_model)
    copies = {layer: {k: t.detach().clone().requires_grad_() for k, t in layers[layer].items()} for layer in layers}
    updates = dense_updates(method, base, copies, torch)
    weights = {f"{name}.weight": base.get_submodule(name).weight.detach() + updates[name] for name in updates}
    output = peft_model(input_ids=tokens()).logits
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (output * direction).sum().backward()
    (torch.func.functional_call(base, weights, kwargs={"input_ids": tokens()}).logits * direction).sum().backward()
    for name, tensors in layers.items():
        for key, tensor in tensors.items():
            expected = copies[name][key].grad
            assert (tensor.grad - expected).abs().max() < TOLERANCE * expected.abs().max(), (name, key)  # not of zeros


@over_methods
@over_models
def test_the_exported_lora_is_the_adapter(model: Model, method: Method, tmp_path):
    """Written from memory, or from a saved adapter and its base's configuration: no weights of the base are read."""
    model.fresh().config.save_pretrained(tmp_path / "base")
    peft_model = method.adapt(model)
    peft_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft_model.save_pretrained(tmp_path / "adapter")
    assert (logits(peft_model) - logits(model.fresh())).abs().max() > 1e-4
    for source in (peft_model, tmp_path / "adapter"):
        assert all(layer.error == 0 for layer in to_lora(source, tmp_path / "lora"))
        loaded = PeftModel.from_pretrained(model.fresh(), tmp_path / "lora").eval()
        assert loaded.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(logits(loaded), logits(peft_model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_methods
@over_models
def test_starts_as_the_base_and_leaves_it_in_any_dtype(model: Model, method: Method, dtype: torch.dtype):
    """The adapter stays in float32, or is rounded with the model: a few roundings (2⁻⁹) besides those of the base."""
    base = model.fresh().to(dtype)
    peft_model = get_peft_model(copy.deepcopy(base), method.make(model, alpha=300)).eval()
    assert torch.equal(logits(peft_model), logits(base))
    peft_model(input_ids=tokens()).logits.square().sum().backward()
    for tensors in trained(peft_model).values():
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert any(tensor.grad.abs().max() > 0 for tensor in tensors.values())
    perturb(peft_model)
    before, expected = logits(copy.deepcopy(base).float()), logits(copy.deepcopy(peft_model).float())
    tolerance = 0.05 * (expected - before).norm() + 2 * (logits(base) - before).norm()
    rounded, merged = copy.deepcopy(peft_model).to(dtype), copy.deepcopy(peft_model).merge_and_unload()
    for output in (logits(peft_model), logits(rounded), logits(merged)):
        assert output.dtype == dtype
        assert (output - expected).norm() < tolerance < 0.6 * (expected - before).norm()


@over_methods
def test_what_is_saved_after_a_change_of_dtype_is_what_was_in_memory(method: Method, tmp_path):
    """As after an evaluation in half precision. A checkpoint without bases is right only if theirs were not rounded."""
    peft_model, base = method.adapt(LLAMA).to(torch.bfloat16).float(), LLAMA.fresh().to(torch.bfloat16).float()
    peft_model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path).eval()), logits(peft_model))


@over_models
@pytest.mark.parametrize(
    ("method", "more"),
    [(LORETTA, [{}] * 5), (FLORA, [{}] * 5), (QUANTUM, [{}] * 5)]
    + [(NOLA, [{"seed": seed} for seed in seeds]) for seeds in ([1, 2, 3, 4, 5], [4] * 5, [1, 1, 1, 1, 2])],
    ids=["loretta", "flora", "quantum-peft", "nola-seeds-differ", "nola-one-seed", "nola-one-seed-differs"],
)
def test_five_adapters_in_one_batch(model: Model, method: Method, more: list[dict[str, Any]]):
    peft_model = method.adapt(model, **more[0])
    names = ["default", "v", "w", "x", "y"]  # PEFT warns of a name that is part of the method's
    for name, arguments in zip(names[1:], more[1:]):
        peft_model.add_adapter(name, method.make(model, init_weights=False, **arguments))
    peft_model.double().eval()
    rows, inputs = ["w", "__base__", "default", "y", "v", "w", "x"], tokens(batch=7)
    mixed, alone = logits(peft_model, inputs, adapter_names=rows), {"__base__": logits(model.fresh().double(), inputs)}
    for name in names:
        peft_model.set_adapter(name)
        alone[name] = logits(peft_model, inputs)
    expected = [alone[name][k] for k, name in enumerate(rows)]
    torch.testing.assert_close(mixed, torch.stack(expected), atol=TOLERANCE, rtol=0)


def test_loretta_has_the_paper_s_number_of_parameters():
    modes, shapes = train_of(768, 768, r=8, tt_rank=5)
    assert modes == {"A": [8, 8, 12, 8], "B": [8, 8, 12, 8]}
    expected = sum(5 * side[0] + 5 * side[-1] + sum(5 * mode * 5 for mode in side[1:-1]) for side in modes.values())
    assert sum(map(prod, shapes["A"] + shapes["B"])) == expected == 1160


@pytest.mark.parametrize(("size", "r"), product([24, 97, 1024, 4096, 7919, 11008, 14336, 50257], [1, 7, 8]))
def test_loretta_splits_any_size(size: int, r: int):
    modes, _ = train_of(size, 64, r=r)
    assert (prod(modes["A"]), prod(modes["B"])) == (r * 64, r * size)


@pytest.mark.parametrize(("size", "r"), [(768, 8), (11008, 8), (50257, 8), (24, 8), (97, 8), (7919, 8), (97, 1)])
def test_no_core_of_loretta_s_is_larger_than_the_factor_it_helps_make(size: int, r: int):
    """Bonds above `min(product of the modes left, right)` add parameters and no freedom: LoRA's factor is smaller."""
    _, shapes = train_of(size, 64, r=r)
    assert max(map(prod, shapes["A"])) <= r * 64
    assert max(map(prod, shapes["B"])) <= r * size


def test_loretta_s_modes_can_be_given(tmp_path):
    peft_model = LORETTA.adapt(LLAMA, modes={72: [3, 4, 6], 132: [12, 11]})
    tensors = trained(peft_model)["model.layers.1.mlp.up_proj"]  # 24 -> 44
    assert [tuple(tensors[f"down_{k}"].shape) for k in (1, 2, 3)] == [(1, 3, 2), (2, 4, 2), (2, 6, 1)]
    assert [tuple(tensors[f"up_{k}"].shape) for k in (1, 2)] == [(1, 12, 2), (2, 11, 1)]
    peft_model.save_pretrained(tmp_path)  # JSON's keys are strings
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.fresh(), tmp_path).eval()), logits(peft_model))


@pytest.mark.parametrize(
    ("configs", "field", "values"),
    [
        ([LorettaConfig, FloraConfig, NolaConfig, QuantumPeftConfig], "r", [0, 2.5]),
        ([LorettaConfig, FloraConfig, NolaConfig, QuantumPeftConfig], "alpha", [0, float("nan")]),
        ([LorettaConfig], "tt_rank", [0]),
        ([LorettaConfig], "modes", [{72: [8, 8]}, {72: []}]),
        ([LorettaConfig], "modes", [{72: [-8, -9]}, {72: [8.0, 9.0]}]),
        ([LorettaConfig], "modes", [[8, 9]]),
        ([NolaConfig], "seed", [-1, 2**64, "x", 1.5, True]),
        ([NolaConfig], "num_bases", [0]),
        ([QuantumPeftConfig], "num_layers", [0, 2**15]),
    ],
)
def test_impossible_configuration(configs: list[type[PeftConfig]], field: str, values: list[Any]):
    for config, value in product(configs, values):
        with pytest.raises(ValueError, match=rf"^{field}\b"):
            config(target_modules=["q_proj"], **{field: value})


def test_quantum_peft_s_circuit_at_zero_angles_is_its_signs():
    expected = torch.diag(torch.tensor([1.0, 1, 1, -1, 1, 1, -1, 1]))
    assert torch.equal(orthonormal_rows(torch.zeros(num_angles(8, 1)), 8, num_layers=1, count=8), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 24, 32, 64])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_quantum_peft_s_columns_are_a_dense_circuit_s(size: int, num_layers: int):
    bits = max((size - 1).bit_length(), 1)
    generator = torch.Generator().manual_seed(size)
    angles = 6 * torch.rand(2, num_angles(size, num_layers), generator=generator, dtype=torch.float64) - 3
    rows = orthonormal_rows(angles, size, num_layers, count=size)
    for some, expected in zip(rows, (circuit_matrix(each.numpy(), bits, num_layers) for each in angles)):
        np.testing.assert_allclose(some.numpy(), expected[:size, :size].T, rtol=0, atol=1e-14)
        if size == 2**bits:
            np.testing.assert_allclose(some @ some.T, np.eye(size), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("size", "num_layers", "expected"),
    [(1024, 1, 28), (1024, 2, 46), (1024, 4, 82), (4096, 1, 34), (4096, 2, 56), (4096, 4, 100), (768, 1, 28)],
)
def test_quantum_peft_has_the_formula_s_number_of_angles(size: int, num_layers: int, expected: int):
    bits = (size - 1).bit_length()
    assert num_angles(size, num_layers) == (2 * num_layers + 1) * bits - 2 * num_layers == expected


def test_quantum_peft_s_rank_is_cut_to_the_weight_s():
    model = QUANTUM.adapt(LLAMA, r=99)
    assert {
        (tensors["diagonal"].shape, len(model.base_model.model.get_submodule(name).weight))
        for name, tensors in trained(model).items()
    } == {((24,), 24), ((12,), 12), ((24,), 44)}


@pytest.mark.parametrize("seed", [0, 5, 2**53 + 1, 2**64 - 1])
def test_nola_s_bases_are_an_independent_generator_s(seed: int):
    """Ours in plain integers; its known answer is Random123's (kat_vectors, philox4x64 10, the digits of pi)."""
    counter = 0x082EFA98EC4E6C89_A4093822299F31D0_13198A2E03707344_243F6A8885A308D3
    block = philox_block(counter, (0x452821E638D01377, 0xBE5466CF34E90C6C))
    assert block == (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6)
    for side, size, shape in (("down", 24, (5, 3, 24)), ("up", 44, (5, 44, 3)), ("up", 7, (1, 7, 1))):
        basis = random_basis(seed, side, size, shape)
        assert basis.dtype == torch.float32
        assert np.array_equal(basis.double().numpy(), random_bases(seed, side, size, shape))
        for other in ((seed ^ 1, side, size), (seed, "up" if side == "down" else "down", size), (seed, side, size + 1)):
            assert not torch.equal(random_basis(*other, shape), basis)


def test_nola_s_bases_never_change():
    """A saved adapter is its coefficients and a seed: other bases would make all of them worthless."""
    bases = random_basis(0, "down", 768, (2, 8, 768)), random_basis(2**64 - 1, "up", 97, (3, 97, 4))
    digests = [hashlib.sha256(basis.numpy().astype("<f4").tobytes()).hexdigest() for basis in bases]
    assert digests[0] == "2f2626f5c6774e264ece93def47b8fd92c748089684c37199ebee919f92003cb"  # made by the oracle
    assert digests[1] == "89da653d6aca87b6f51dcd214b844fe875bcad75b100d6e11a9b00ef1eb0cafc"


def test_nola_s_bases_are_in_memory_once_and_in_no_checkpoint(tmp_path):
    model = NOLA.adapt(LLAMA)
    bases = bases_of(model)
    assert list(bases) == ["down_24", "down_44", "up_12", "up_24", "up_44"]  # for 10 layers
    assert len({basis.data_ptr() for basis in bases.values()}) == 5
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
    assert [layer.updates["default"].shared.up_44 is bases["up_44"] for layer in layers] == [True] * 10
    assert {key.rpartition(".")[2] for key in model.state_dict() if "nola" in key} == {"alpha", "beta"}
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in load_file(path).items()}
    assert saved == {f"{name}.nola_update.{key}": (5,) for name in trained(model) for key in ("alpha", "beta")}
    assert path.stat().st_size < 20 * (5 * 4 + 160)  # the numbers, and a key of 160 bytes
    torch.manual_seed(99)  # of no importance to the bases
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), logits(model))


def test_two_seeds_in_one_model_do_not_touch_each_other():
    model = NOLA.adapt(LLAMA)
    first, bases = logits(model), {name: basis.clone() for name, basis in bases_of(model).items()}
    model.add_adapter("second", NOLA.make(LLAMA, seed=1))
    model.set_adapter("second")
    others = bases_of(model, "second")
    assert not any(torch.equal(others[name], bases[name]) for name in bases)
    model(input_ids=tokens()).logits.square().sum().backward()
    torch.optim.AdamW(model.parameters(), lr=1.0).step()
    second = logits(model)
    assert all(torch.equal(basis, bases[name]) for name, basis in bases_of(model).items())
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert not bases_of(model)
    assert not bases_of(model.merge_and_unload(), "second")


def test_a_copy_of_a_nola_model_is_independent():
    model = NOLA.adapt(LLAMA)
    twin, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), before)
    for basis in bases_of(twin).values():
        basis.mul_(-2)
    assert not torch.allclose(logits(twin), before)  # it reads its own
    perturb(twin)
    assert torch.equal(logits(model), before)
