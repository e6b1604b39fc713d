"""Derivatives beyond a backward pass, in float64: those of `torch.func`, of forward mode, and second ones."""

from collections.abc import Callable, Mapping

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from cases import Case, over_cases, perturb

EXACT = {"rtol": 1e-9, "atol": 1e-12}
Parameters = Mapping[str, Tensor]


class Net(nn.Module):
    """Two layers of one shape, and one of another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12, bias=False)
        self.last = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh()).tanh()


def adapted(case: Case, seed: int = 2) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"budget": 250} if "budget" in case.arguments else {}
    model = get_peft_model(Net(), case.make(target_modules=["first", "second", "last"], **arguments)).double()
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    perturb(model, seed)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in trained(model).items()}


def rows(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module) -> Callable[[Parameters, Tensor], Tensor]:
    return lambda parameters, x: functional_call(model, dict(parameters), (x,)).square().sum()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By a backward pass."""
    named = trained(model)
    return dict(zip(named, torch.autograd.grad(model(x).square().sum(), list(named.values())), strict=True))


def directions(tensors: Parameters) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(t.shape, dtype=t.dtype, generator=generator) for name, t in tensors.items()}


@over_cases
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_gradients(case: Case, mode: bool):
    model = adapted(case).train(mode)
    found = grad(loss_of(model))(detached(model), rows())
    torch.testing.assert_close(found, gradients(model, rows()), **EXACT)


@over_cases
def test_gradients_of_every_row(case: Case):
    model = adapted(case)
    found = vmap(grad(loss_of(model)), in_dims=(None, 0))(detached(model), rows())
    for k, row in enumerate(rows()):
        expected = gradients(model, row)
        torch.testing.assert_close({name: each[k] for name, each in found.items()}, expected, **EXACT)


@over_cases
def test_an_ensemble(case: Case):
    models = [adapted(case, seed) for seed in (2, 3, 4)]
    parameters, buffers = stack_module_state(models)
    x = rows()
    with torch.no_grad():
        found = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
        expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(found, expected, **EXACT)


@over_cases
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_derivatives_along_a_direction(case: Case, mode: bool):
    """In evaluation without gradients too, where something is kept."""
    model = adapted(case).train(mode)
    values, tangents = detached(model), directions(detached(model))
    expected = sum((gradient * tangents[name]).sum() for name, gradient in gradients(model, rows()).items())
    with torch.no_grad():
        model(rows())
        _, found = jvp(lambda p: loss_of(model)(p, rows()), (values,), (tangents,))
    torch.testing.assert_close(found, expected, **EXACT)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(value, tangents[name]) for name, value in values.items()}
        found = forward_ad.unpack_dual(loss_of(model)(duals, rows())).tangent
    torch.testing.assert_close(found, expected, **EXACT)


def along(model: nn.Module, x: Tensor, tangents: Parameters) -> dict[str, Tensor]:
    """The Hessian, of the trained parameters and x, times a direction: by two backward passes."""
    inputs = {**trained(model), "x": x.requires_grad_()}
    first = torch.autograd.grad(model(x).square().sum(), list(inputs.values()), create_graph=True)
    product = sum((each * tangents[name]).sum() for name, each in zip(inputs, first, strict=True))
    return dict(zip(inputs, torch.autograd.grad(product, list(inputs.values())), strict=True))


@over_cases
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_second_derivatives_are_differences_of_first_ones(case: Case, mode: bool):
    model, x, step = adapted(case).train(mode), rows(), 1e-6
    tangents = directions({**detached(model), "x": x})
    found = along(model, x, tangents)
    sides = []
    for sign in (1, -1):
        moved = adapted(case).train(mode)
        with torch.no_grad():
            for name, parameter in trained(moved).items():
                parameter += sign * step * tangents[name]
        inputs = [*trained(moved).values(), (rows() + sign * step * tangents["x"]).requires_grad_()]
        sides.append(torch.autograd.grad(moved(inputs[-1]).square().sum(), inputs))
    for each, above, below in zip(found.values(), *sides, strict=True):
        torch.testing.assert_close(each, (above - below) / (2 * step), rtol=1e-5, atol=1e-6)


@over_cases
def test_second_derivatives_of_both_kinds_agree(case: Case):
    model, x = adapted(case), rows()
    tangents = directions({**detached(model), "x": x})

    def gradient(inputs: Parameters) -> Parameters:
        return grad(lambda i: loss_of(model)({k: v for k, v in i.items() if k != "x"}, i["x"]))(inputs)

    _, forward = jvp(gradient, ({**detached(model), "x": x.detach()},), (tangents,))
    torch.testing.assert_close(along(model, x, tangents), forward, **EXACT)


@over_cases
def test_a_gradient_that_is_to_be_differentiated_is_the_gradient(case: Case):
    model = adapted(case)
    named = trained(model)
    found = torch.autograd.grad(model(rows()).square().sum(), list(named.values()), create_graph=True)
    torch.testing.assert_close(dict(zip(named, found, strict=True)), gradients(model, rows()), **EXACT)
