"""SuperLoRA: its dense formula through whole models, the paper's sizes, and what forms a group."""

import re
import string
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTModel
from transformers.pytorch_utils import Conv1D

from cases import MODELS, Model, logits, over_models, tiny_llama, tokens
from tensorpeft import SuperLoraConfig
from tensorpeft.modes import fold_modes

TOLERANCE = 1e-10
LLAMA = MODELS[0]
FORMS = [
    {"tensor_order": 2, "grouping": "weight"},
    {"tensor_order": 2, "num_factors": 2, "grouping": "type"},
    {"tensor_order": 3, "grouping": "all"},
    {"tensor_order": 3, "num_factors": 3, "grouping": "layer"},
    {"tensor_order": 4, "num_factors": 2, "grouping": "all"},
]
over_forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))


def adapt(model: Model, **arguments: Any) -> PeftModel:
    torch.manual_seed(3)
    config = SuperLoraConfig(**{"r": 3, "alpha": 7, "init_weights": False, **arguments}, target_modules=model.targets)
    return get_peft_model(model.fresh(), config).eval()


def factors_of(model: PeftModel) -> dict[str, nn.Parameter]:
    """The trained parameters by name."""
    found = [(name.rpartition(".")[2], parameter) for name, parameter in model.named_parameters()]
    return {name: parameter for name, parameter in found if parameter.requires_grad}


def group_of(name: str, grouping: str) -> str:
    """The group of a layer of the tiny models."""
    if grouping == "all":
        return "all"
    if grouping == "layer":
        return re.match(r".*?\.\d+", name)[0].replace(".", "_")
    return (re.sub(r"\.\d+\.", ".n.", name) if grouping == "type" else name).replace(".", "_")


def vector(factors: Mapping[str, Any], group: str) -> Any:
    """All entries of a group's tensor, by one einsum for every T and the Kronecker product of them."""
    result = None
    for k in range(1, 9):
        parts = [factors[name] for m in range(1, 9) if (name := f"{group}_A_{k}_{m}") in factors]
        if not parts:
            break
        ranks, modes = string.ascii_uppercase[: len(parts)], string.ascii_lowercase[: len(parts)]
        if len(parts) == 2:
            entries = parts[0] @ parts[1].T
        else:
            pairs = ",".join(mode + rank for mode, rank in zip(modes, ranks, strict=True))
            einsum = np.einsum if isinstance(parts[0], np.ndarray) else torch.einsum
            entries = einsum(f"{ranks},{pairs}->{modes}", factors[f"{group}_C_{k}"], *parts)
        kron = np.kron if isinstance(entries, np.ndarray) else torch.kron
        result = entries if result is None else kron(result, entries)
    return result.reshape(-1)


def dense_updates(base: nn.Module, names: list[str], factors: Mapping[str, Any], form: Mapping[str, Any]) -> dict:
    """{layer: its update as the layer stores its weight}: (7 / 3) times its part of the vector."""
    updates, taken = {}, dict[str, int]()
    for name in names:
        layer = base.get_submodule(name)
        out, in_ = layer.weight.T.shape if isinstance(layer, Conv1D) else layer.weight.shape
        group = group_of(name, form["grouping"])
        first = taken.get(group, 0)
        update = 7 / 3 * vector(factors, group)[first : first + out * in_].reshape(out, in_)
        taken[group] = first + out * in_
        updates[name] = update.T if isinstance(layer, Conv1D) else update
    return updates


@over_forms
@over_models
def test_updates_outputs_and_gradients_are_those_of_the_dense_formula(model: Model, form: dict[str, Any]):
    peft_model, base = adapt(model, **form).double(), model.fresh().double()
    factors, names = factors_of(peft_model), peft_model.targeted_module_names
    updates = dense_updates(base, names, {name: f.detach().numpy() for name, f in factors.items()}, form)
    for name, update in updates.items():
        assert np.abs(update).max() > 1e-3, name  # nothing is proved by zeros
        actual = peft_model.base_model.model.get_submodule(name).get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(actual, update, rtol=0, atol=TOLERANCE, err_msg=name)
    copies = {name: factor.detach().clone().requires_grad_() for name, factor in factors.items()}
    updates = dense_updates(base, names, copies, form)
    weights = {f"{name}.weight": base.get_submodule(name).weight.detach() + updates[name] for name in updates}
    expected = torch.func.functional_call(base, weights, kwargs={"input_ids": tokens()}).logits
    output = peft_model(input_ids=tokens()).logits
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)
    assert (output - logits(base)).abs().max() > 1e-4
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, factor in factors.items():
        assert (factor.grad - copies[name].grad).abs().max() <= TOLERANCE * copies[name].grad.abs().max(), name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"tensor_order": 2}, 7552 * 8),
        ({"tensor_order": 3}, 728 * 8 + 8**3),
        ({"tensor_order": 2, "grouping": "weight"}, 36_864 * 8),
        ({"tensor_order": 2, "grouping": "layer"}, 12 * (1024 + 1152) * 8),
        ({"tensor_order": 2, "num_factors": 2}, (54 + 64 + 64 + 64) * 8),
    ],
)
def test_vit_has_the_formula_s_number_of_parameters(arguments: dict[str, Any], expected: int):
    with torch.device("meta"):
        model = ViTModel(ViTConfig())
        peft_model = get_peft_model(model, SuperLoraConfig(r=8, target_modules=["q_proj", "v_proj"], **arguments))
    assert peft_model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("size", [*range(1, 50), 97, 7919, 2**20 - 1, 14_155_776, 6_476_005_376])
@pytest.mark.parametrize("num_modes", [2, 3, 4, 6])
def test_a_vector_is_folded_to_nearly_equal_modes_that_hold_it(size: int, num_modes: int):
    modes = fold_modes(size, num_modes)
    assert len(modes) == num_modes
    assert prod(modes) >= size
    assert prod((*modes[1:], modes[0] - 1)) < size  # nothing is larger than it need be
    assert sum(modes) < 1.011 * num_modes * size ** (1 / num_modes) + num_modes


def test_groups_are_those_that_were_asked_for():
    model = LLAMA
    layers = [f"model_layers_{k}" for k in range(2)]
    types = [
        f"model_layers_n_{name}_proj" for name in ("self_attn_q", "self_attn_k", "self_attn_v", "mlp_up", "mlp_down")
    ]
    expected = {"all": {"all"}, "layer": set(layers), "type": set(types)}
    for grouping, groups in expected.items():
        names = factors_of(adapt(model, grouping=grouping))
        assert {name.split("_A_")[0] for name in names if "_A_" in name} == groups
    assert len({name.split("_A_")[0] for name in factors_of(adapt(model, grouping="weight")) if "_A_" in name}) == 10


@pytest.mark.parametrize("tensor_order", [2, 3])
def test_tensors_before_the_last_start_with_entries_of_variance_one(tensor_order: int):
    factors = factors_of(adapt(LLAMA, tensor_order=tensor_order, num_factors=2, r=4, grouping="weight"))
    squares = list[torch.Tensor]()
    for name in {name.partition("_A_")[0] for name in factors if "_A_" in name}:
        parts = [factors[f"{name}_A_1_{m}"] for m in range(1, tensor_order + 1)]
        if tensor_order == 2:
            tensor = parts[0] @ parts[1].t()
        else:
            tensor = torch.einsum("abc,ia,jb,kc->ijk", factors[f"{name}_C_1"], *parts)
        squares.append(tensor.detach().square().mean())
    assert 0.6 < torch.stack(squares).mean().item() < 1.6


def test_a_weight_is_made_of_its_own_slices():
    """Not of the whole vector: what is made for one of many weights does not grow with their number."""
    model = Model("llama", lambda: tiny_llama(num_hidden_layers=12), ["q_proj"], "CAUSAL_LM")
    layer = adapt(model, tensor_order=2).base_model.model.model.layers[5].self_attn.q_proj
    with _Largest() as largest:
        layer.get_delta_weight("default")
    assert largest.count <= 24 * 24 + 2 * 84  # of 12 · 24 · 24 = 72 · 96


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.count = max(self.count, result.numel())
        return result


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("tensor_order", 1),
        ("tensor_order", 9),
        ("num_factors", 0),
        ("grouping", "layers"),
        ("alpha", 0),
        ("init_weights", "yes"),
    ],
)
def test_impossible_configuration(field: str, value: Any):
    with pytest.raises(ValueError, match=rf"^{field}\b"):
        SuperLoraConfig(target_modules=["q_proj"], **{field: value})
