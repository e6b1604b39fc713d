"""QuanTA: its dense formula through whole models by both routes of training, its circuits alone, and its start."""

import copy
from math import inf, prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from cases import MODELS, Model, logits, over_models, perturb, tokens
from own_factor_oracles import trained
from quanta_oracle import adapt, axes_of, dense_updates, expected_shapes, quanta_update
from tensorpeft import QuantaConfig
from tensorpeft.networks import circuit, effective
from tensorpeft.networks.circuit import CircuitUpdate, apply_circuit, circuit_shapes
from tensorpeft.networks.effective import effective_linear, effective_weight

TOLERANCE = 1e-10
LLAMA = MODELS[0]
ROUTES = {"apart": inf, "in-weight": 0}  # max_rows_apart
CIRCUITS = {  # (out_axes, in_axes)
    "square": ((3, 2, 2), (3, 2, 2)),
    "shrinking": ((2, 1, 3), (3, 2, 4)),
    "growing": ((3, 2, 4), (2, 1, 3)),
    "mixed": ((3, 1, 2, 2), (2, 2, 1, 3)),
    "mixed-other-way": ((2, 2, 1, 3), (3, 1, 2, 2)),
    "two-axes": ((5, 2), (3, 4)),
    "two-axes-growing": ((5, 4), (3, 2)),
    "ones": ((1, 4, 1, 2), (3, 1, 1, 2)),
    "all-ones": ((1, 1, 1), (1, 1, 1)),
    "five-axes": ((2, 1, 2, 1, 2), (1, 2, 2, 1, 3)),
}
over_routes = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
over_num_axes = pytest.mark.parametrize("num_axes", [2, 3, 4])
over_circuits = pytest.mark.parametrize(("out_axes", "in_axes"), CIRCUITS.values(), ids=CIRCUITS)


def take(route: float, model: nn.Module) -> Any:
    """The model, trained by one route whatever the batch."""
    updates = [module for module in model.modules() if isinstance(module, CircuitUpdate)]
    assert updates
    for update in updates:
        update.max_rows_apart = route
    return model


def random_circuit(out_axes, in_axes, scale: float = 0.3, dtype: torch.dtype = torch.float64) -> CircuitUpdate:
    update, generator = CircuitUpdate(circuit_shapes(out_axes, in_axes)).to(dtype), torch.Generator().manual_seed(5)
    for parameter in update.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return update


def oracle(update: CircuitUpdate, out_axes, in_axes) -> Tensor:
    deviations = [
        getattr(update, f"tensor_{k + 1}").detach().double().numpy() for k in range(len(list(update.parameters())))
    ]
    return torch.from_numpy(quanta_update(deviations, out_axes, in_axes))


@pytest.fixture
def calls_apart(monkeypatch) -> list[int]:
    """The rows of every call that goes through the circuit."""
    calls = []

    def spy(x, *arguments):
        calls.append(x.numel() // x.shape[-1])
        return apply_circuit(x, *arguments)

    monkeypatch.setattr(circuit, "apply_circuit", spy)
    return calls


@over_num_axes
@over_models
def test_updates_and_outputs_are_those_of_the_dense_formula(model: Model, num_axes: int):
    peft_model, base = adapt(model, num_axes).double(), model.fresh().double()
    before, updates = logits(base), dense_updates(base, trained(peft_model), num_axes)
    assert len(updates) == 2 * len(model.targets)
    for name, update in updates.items():
        assert np.abs(update).max() > 1e-1, name  # nothing is proved by zeros
        actual = peft_model.base_model.model.get_submodule(name).get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(actual, update, rtol=0, atol=TOLERANCE, err_msg=name)
        base.get_submodule(name).weight.data += torch.from_numpy(np.ascontiguousarray(update))
    assert (logits(base) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(peft_model), logits(base), rtol=0, atol=TOLERANCE)


@over_routes
@over_num_axes
@over_models
def test_outputs_and_gradients_in_training_are_those_of_the_dense_formula(
    model: Model, num_axes: int, route: float, calls_apart: list[int]
):
    peft_model, base = take(route, adapt(model, num_axes).double()), model.fresh().double()
    layers = trained(peft_model)
    copies = {layer: {k: t.detach().clone().requires_grad_() for k, t in layers[layer].items()} for layer in layers}
    updates = dense_updates(base, copies, num_axes, torch)
    weights = {f"{name}.weight": base.get_submodule(name).weight.detach() + updates[name] for name in updates}
    output = peft_model(input_ids=tokens()).logits
    assert calls_apart == ([tokens().numel()] * len(updates) if route else [])
    expected_output = torch.func.functional_call(base, weights, kwargs={"input_ids": tokens()}).logits
    torch.testing.assert_close(output, expected_output, rtol=0, atol=TOLERANCE)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for logits_ in (output, expected_output):
        (logits_ * direction).sum().backward()
    for name, tensors in layers.items():
        for key, tensor in tensors.items():
            expected = copies[name][key].grad
            assert (tensor.grad - expected).abs().max() < TOLERANCE * expected.abs().max(), (name, key)  # not of zeros


@over_circuits
def test_shapes_are_those_of_the_rule(out_axes, in_axes):
    shapes = circuit_shapes(out_axes, in_axes)
    assert list(shapes.tensors) == expected_shapes(out_axes, in_axes)
    assert (shapes.out_axes, shapes.in_axes) == (out_axes, in_axes)
    sizes = [tuple(parameter.shape) for parameter in CircuitUpdate(shapes).parameters()]
    assert sizes == expected_shapes(out_axes, in_axes)


def test_shapes_of_a_rectangle_by_hand():
    """Axis −1 shrinks 5 to 3 in its first tensor; axis −2 grows 2 to 4 and axis −3 grows 1 to 6 in their last."""
    expected = [(3, 2, 5, 2), (3, 1, 3, 1), (4, 6, 2, 1)]
    assert list(circuit_shapes((6, 4, 3), (1, 2, 5)).tensors) == expected


@over_circuits
def test_weight_is_that_of_the_dense_formula(out_axes, in_axes):
    update = random_circuit(out_axes, in_axes)
    expected = oracle(update, out_axes, in_axes)
    assert expected.shape == (prod(out_axes), prod(in_axes))
    torch.testing.assert_close(update.matrix(), expected, rtol=0, atol=1e-13)


def test_one_tensor_of_two_axes_is_the_update_itself():
    """Its first axis is the last one of the features."""
    update = random_circuit((5, 2), (3, 4))
    expected = torch.einsum("baqp->abpq", update.tensor_1).reshape(10, 12)  # a: first axis of 5, q: last axis of 4
    torch.testing.assert_close(update.matrix(), expected, rtol=0, atol=1e-15)


@over_circuits
@pytest.mark.parametrize("route", ["apart", "in-weight", "in-blocks-of-it"])
def test_gradcheck(route: str, out_axes, in_axes, monkeypatch):
    if route == "in-blocks-of-it":
        monkeypatch.setitem(effective._BLOCK_ELEMENTS, "cpu", 3 * prod(in_axes))
    update = random_circuit(out_axes, in_axes)
    x = torch.randn(2, 2, prod(in_axes), dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor, *deviations: Tensor) -> Tensor:
        if route == "apart":
            return apply_circuit(x, deviations, update.shapes)
        return effective_linear(x, None, None, [update.cut()._replace(cores=deviations)])

    expected = x @ oracle(update, out_axes, in_axes).T
    torch.testing.assert_close(apply(x, *update.deviations()), expected, rtol=0, atol=1e-13)
    # Blocks only cut elsewhere: there, a random projection of the Jacobian.
    assert torch.autograd.gradcheck(apply, (x, *update.deviations()), fast_mode=route == "in-blocks-of-it")


def test_a_circuit_of_many_axes():
    axes = (2, 1, 1, 2, 1, 1, 1, 3), (1, 2, 1, 2, 1, 1, 1, 2)
    update = random_circuit(*axes)
    x = torch.randn(3, prod(axes[1]), dtype=torch.float64)
    expected = oracle(update, *axes)
    torch.testing.assert_close(update.matrix(), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(apply_circuit(x, update.deviations(), update.shapes), x @ expected.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("route", [inf, -1], ids=["apart", "in-weight"])  # -1: of no row too
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_batches_of_any_shape(batch: tuple[int, ...], route: float):
    """An expert of a mixture may get no token at all."""
    update = take(route, random_circuit((3, 4), (3, 2)))
    x = torch.randn(*batch, 6, dtype=torch.float64, requires_grad=True)
    result = update(x)
    torch.testing.assert_close(result, x @ oracle(update, (3, 4), (3, 2)).T, rtol=0, atol=1e-13)
    result.sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        torch.testing.assert_close(update(x), result)


def test_the_paper_s_number_of_parameters():
    axes = (16, 8, 8, 4)
    assert sum(map(prod, expected_shapes(axes, axes))) == 43_008
    assert sum(parameter.numel() for parameter in CircuitUpdate(circuit_shapes(axes, axes)).parameters()) == 43_008


@pytest.mark.parametrize(("out", "in_", "num_axes"), [(4096, 4096, 4), (4096, 11008, 4), (4096, 4096, 3), (24, 44, 4)])
def test_axes_of_the_default_configuration(out: int, in_: int, num_axes: int):
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Linear(in_, out, bias=False)})
    config = QuantaConfig(num_axes=num_axes, target_modules=["layer"])
    update = get_peft_model(model, config).base_model.model.layer.updates["default"]
    out_axes, in_axes = axes_of(out, num_axes), axes_of(in_, num_axes)
    assert [tuple(deviation.shape) for deviation in update.deviations()] == expected_shapes(out_axes, in_axes)
    if (out, num_axes) == (4096, 4):
        assert out_axes == [16, 8, 8, 4]
        assert QuantaConfig(target_modules=["layer"]).num_axes == 4


@over_routes
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@over_models
def test_starts_as_the_base_bit_for_bit_in_training(model: Model, precision: str, route: float):
    base = model.fresh().to(torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
    config = QuantaConfig(num_axes=3, target_modules=model.targets)
    peft_model = take(route, get_peft_model(copy.deepcopy(base), config)).train()
    outputs = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        for each in (base, peft_model):
            torch.manual_seed(4)  # of the dropout
            outputs.append(each(input_ids=tokens()).logits)
    assert torch.equal(*outputs)
    outputs[1].float().square().sum().backward()
    for name, tensors in trained(peft_model).items():
        for key, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            assert not tensor.any()
            assert tensor.grad.abs().max() > 0, (name, key)


@pytest.mark.parametrize("is_autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("scale", [1e-5, 1e-4, 1e-2])
@pytest.mark.parametrize("axes", [((8, 4, 4), (8, 4, 4)), ((4, 4, 8), (8, 4, 2))], ids=str)
def test_small_updates_survive_in_bfloat16(axes, scale: float, is_autocast: bool):
    """The states differ from x by less than bfloat16 can tell: a circuit run in it would return noise."""
    update = random_circuit(*axes, scale, torch.float32)
    expected_of = oracle(update, *axes).T
    x = torch.randn(64, prod(axes[1]), generator=torch.Generator().manual_seed(7)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        result = apply_circuit(x.float() if is_autocast else x, update.deviations(), update.shapes)
    expected = x.double() @ expected_of
    assert result.dtype == torch.bfloat16
    assert (result.double() - expected).norm() < 1e-2 * expected.norm()
    result.sum().backward()
    for tensor, parameter in zip(expected_gradients(update, x, axes), update.parameters(), strict=True):
        assert (parameter.grad.double() - tensor).norm() < 1e-2 * tensor.norm()


def expected_gradients(update: CircuitUpdate, x: Tensor, axes) -> list[Tensor]:
    """The gradients of the sum of the outputs by the oracle, in float64."""
    deviations = [parameter.detach().double().requires_grad_() for parameter in update.parameters()]
    return list(torch.autograd.grad((x.double() @ quanta_update(deviations, *axes, torch).T).sum(), deviations))


@over_circuits
def test_more_rows_never_make_the_circuit_cheaper(out_axes, in_axes):
    update = CircuitUpdate(circuit_shapes(out_axes, in_axes))
    cheaper = [update.is_cheaper_apart(rows) for rows in (1, 2, 5, 10, 100, 10**3, 10**4, 10**6)]
    assert cheaper == sorted(cheaper, reverse=True)


def test_few_rows_of_a_large_weight_go_through_the_circuit():
    assert CircuitUpdate(circuit_shapes((16, 8, 8, 4), (16, 8, 8, 4))).is_cheaper_apart(128)


def test_the_rule_is_asked_for_the_rows_of_the_batch(calls_apart: list[int]):
    rows, outputs = tokens().numel(), []
    peft_model = adapt(LLAMA, 3).double().train()
    for route, expected in ((rows, [rows] * 10), (rows - 1, [])):
        calls_apart.clear()
        outputs.append(logits(take(route, peft_model)))  # training, though nothing asks for gradients
        assert calls_apart == expected
    torch.testing.assert_close(*outputs, rtol=0, atol=TOLERANCE)


def test_two_adapters_at_once_are_both_added_where_one_is_cheaper_apart(calls_apart: list[int]):
    peft_model, base = adapt(LLAMA, 3), LLAMA.fresh().double()
    peft_model.add_adapter("second", QuantaConfig(num_axes=2, init_weights=False, target_modules=["q_proj", "up_proj"]))
    peft_model.base_model.set_adapter(["default", "second"])
    layers = {n: m for n, m in take(inf, peft_model.double()).named_modules() if hasattr(m, "get_delta_weight")}
    for name, layer in layers.items():
        for adapter, update in layer.updates.items():
            base.get_submodule(name.removeprefix("base_model.model.")).weight.data += layer.get_delta_weight(adapter)
            update.max_rows_apart = 0 if adapter == "second" and "q_proj" in name else inf
    torch.testing.assert_close(logits(peft_model.train()), logits(base), rtol=0, atol=TOLERANCE)
    assert len(calls_apart) == 6 + 2 * 2  # k, v and down; both of up
    torch.testing.assert_close(logits(peft_model.eval()), logits(base), rtol=0, atol=TOLERANCE)


@over_models
def test_evaluation_adds_the_circuit_to_the_weight_whatever_the_rule_says(model: Model, calls_apart: list[int]):
    peft_model = take(inf, adapt(model, 3))
    torch.testing.assert_close(logits(peft_model), logits(copy.deepcopy(peft_model).merge_and_unload()))
    layers = [layer for layer in peft_model.modules() if hasattr(layer, "get_delta_weight")]
    assert len(layers) == 2 * len(model.targets)
    for layer in layers:
        x, update = torch.randn(5, layer.in_features), layer.updates["default"]
        weight = effective_weight(layer.read_base_weight(), [update.cut()], torch.float32)
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, weight, layer.get_base_layer().bias))
    assert calls_apart == []


def test_evaluation_follows_a_change_of_a_tensor():
    peft_model = adapt(LLAMA, 3)
    before = logits(peft_model)
    perturb(peft_model)
    after = logits(peft_model)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, peft_model(input_ids=tokens()).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_reloaded_bit_for_bit(low_cpu_mem_usage: bool, tmp_path):
    modes = {24: [2, 3, 4], 44: [11, 1, 4]}
    peft_model = adapt(LLAMA, 3, modes=modes)
    perturb(peft_model)
    for name, tensors in trained(peft_model).items():
        axes = [modes.get(size, axes_of(size, 3)) for size in LLAMA.fresh().get_submodule(name).weight.shape]
        assert [tuple(tensor.shape) for tensor in tensors.values()] == expected_shapes(*axes)
    peft_model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).modes == modes  # JSON's keys are strings
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        f"base_model.model.{name}.quanta_update.{key}": tensor
        for name, tensors in trained(peft_model).items()
        for key, tensor in tensors.items()
    }
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == {
        k: tuple(t.shape) for k, t in expected.items()
    }
    assert {key.rpartition(".")[2] for key in saved} == {"tensor_1", "tensor_2", "tensor_3"}  # no copy of the start
    loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded_tensors = trained(PeftModel.from_pretrained(LLAMA.fresh(), tmp_path, is_trainable=True))
    for name, tensors in trained(peft_model).items():
        assert all(torch.equal(tensor, loaded_tensors[name][key]) for key, tensor in tensors.items())
    assert torch.equal(logits(loaded.eval()), logits(peft_model))
    for route in ROUTES.values():
        outputs = [logits(take(route, each).train()) for each in (peft_model, loaded)]
        assert torch.equal(*outputs)


def test_modes_are_taken_in_the_order_given():
    peft_model = adapt(LLAMA, 3, modes={24: [2, 3, 4], 44: [11, 1, 4]}).double()
    name = "model.layers.1.mlp.up_proj"  # 24 -> 44
    deviations = [tensor.detach().numpy() for tensor in trained(peft_model)[name].values()]
    actual = peft_model.base_model.model.get_submodule(name).get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(actual, quanta_update(deviations, [11, 1, 4], [2, 3, 4]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_axes", value) for value in (1, 0, -3, True, 2.5, "4", None)]
    + [("modes", value) for value in ({24: [2, 3, 2, 3]}, {24: [2, 3, 4]}, {24: [24]}, {24: []}, {24: 24}, [2, 3])]
    + [("modes", value) for value in ({24: [-2, -3, 4, 1]}, {24: [2.0, 3, 4, 1]}, {24: [2, 3, 4, 1, 1]})]
    + [("init_weights", "random"), ("init_weights", 1)],
    ids=str,
)
def test_impossible_configuration(field: str, value: Any):
    with pytest.raises(ValueError, match=rf"^{field}\b"):
        QuantaConfig(target_modules=["q_proj"], **{field: value})


@over_models
def test_merged_logits_are_the_adapter_s_and_unmerging_restores_the_base(model: Model):
    peft_model = adapt(model, 3).double()
    expected, base = logits(peft_model), {name: t.clone() for name, t in peft_model.state_dict().items()}
    peft_model.merge_adapter()
    with peft_model.disable_adapter():
        torch.testing.assert_close(logits(peft_model), logits(model.fresh().double()), rtol=0, atol=0)
    peft_model.merge_adapter()
    torch.testing.assert_close(logits(peft_model), expected, rtol=0, atol=TOLERANCE)
    assert any(not torch.equal(tensor, base[name]) for name, tensor in peft_model.state_dict().items())
    peft_model.unmerge_adapter()
    assert all(torch.equal(tensor, base[name]) for name, tensor in peft_model.state_dict().items())
    assert torch.equal(logits(peft_model), expected)
    torch.testing.assert_close(logits(peft_model.merge_and_unload(safe_merge=True)), expected, rtol=0, atol=TOLERANCE)


@over_routes
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool, route: float):
    gradients = []
    for is_checkpointed in (False, True):
        peft_model = take(route, adapt(LLAMA, 3).double()).train()
        if is_checkpointed:
            peft_model.enable_input_require_grads()
            peft_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        peft_model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([tensor.grad for tensors in trained(peft_model).values() for tensor in tensors.values()])
    assert max(gradient.abs().max() for gradient in gradients[0]) > 1e-3
    torch.testing.assert_close(*gradients, rtol=0, atol=TOLERANCE)


@over_routes
@over_models
def test_training_reduces_the_loss(model: Model, route: float):
    peft_model = take(route, get_peft_model(model.fresh(), QuantaConfig(num_axes=3, target_modules=model.targets)))
    labels = tokens() if model.task_type == "CAUSAL_LM" else torch.tensor([0, 1, 2])
    optimizer, losses = torch.optim.AdamW(peft_model.parameters(), lr=3e-2), []
    for _ in range(12):
        loss = peft_model(input_ids=tokens(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - (0.3 if model.task_type == "CAUSAL_LM" else 0.01)


@pytest.mark.parametrize(
    "train", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["training", "evaluation"]
)
def test_it_compiles_as_one_graph(train: bool):
    model = get_peft_model(LLAMA.fresh(), QuantaConfig(num_axes=3, target_modules=["q_proj", "down_proj"]))
    perturb(model)
    model.train(train)
    expected = model(input_ids=tokens()).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(train):
        actual = compiled(input_ids=tokens()).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    if train:
        actual.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_circuit_larger_than_its_weight_is_refused():
    with (
        pytest.warns(UserWarning, match="prime"),
        pytest.raises(ValueError, match=r"^0: the axes .* more than the weight's 961.*exclude_modules"),
    ):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(31, 31)), QuantaConfig(target_modules=["0"]))
