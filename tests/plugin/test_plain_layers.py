"""Layers in a module that is no transformer: what a `nn.Linear` may be asked, an adapted one may, too."""

import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from cases import Case, named, over_cases, over_identity_cases, over_merging_cases, perturb

SHAPES = [(24,), (5, 24), (2, 5, 24), (2, 3, 2, 24)]


def adapted(case: Case, *, in_place: bool = False, dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(24, 44), nn.ReLU(inplace=in_place), nn.Linear(44, 24), nn.ReLU(inplace=in_place))
    return get_peft_model(mlp.to(dtype), case.make(target_modules=["0", "2"]))


def gradients(model: PeftModel, x: Tensor) -> list[Tensor]:
    model(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@over_cases
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_activation_may_write_into_the_output(case: Case, shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    beside, within = (adapted(case, in_place=in_place).train() for in_place in (False, True))
    for model in (beside, within):
        perturb(model)
    expected, found = gradients(beside, x), gradients(within, x)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert torch.equal(within.eval()(x), beside.eval()(x))


@over_cases
@pytest.mark.parametrize("shape", [(0, 24), (0, 5, 24), (2, 0, 24)], ids=str)
def test_there_may_be_no_rows(case: Case, shape: tuple[int, ...]):
    model = adapted(case)
    x = torch.zeros(shape, requires_grad=True)
    model.train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    with torch.no_grad():
        assert model.eval()(x).shape == shape


@over_identity_cases
@pytest.mark.parametrize("axes", [(1, 0, 2, 3), (0, 2, 1, 3)], ids=str)
def test_the_start_is_exact_for_rows_that_lie_apart(case: Case, axes: tuple[int, ...]):
    """Of the same numbers in other strides torch's product has other bits."""
    model = adapted(case)
    base = model.get_base_model()
    apart = torch.randn(5, 2, 3, 24, generator=torch.Generator().manual_seed(1)).permute(axes)
    for x in (apart, apart[0].transpose(0, 1)):
        with model.disable_adapter():
            expected = base(x)
        assert torch.equal(model.train()(x), expected)
        assert torch.equal(model.eval()(x), expected)


@over_cases
def test_float64_stays_float64_under_autocast(case: Case):
    """As torch's autocast leaves it; the factors, in float32, are multiplied in bfloat16, as LoRA's are."""
    model = adapted(case, dtype=torch.float64)
    perturb(model)
    x = torch.randn(3, 24, dtype=torch.float64)
    expected = model.train()(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@over_merging_cases
def test_what_is_put_aside_while_merged_is_cast_with_the_model(case: Case):
    model = adapted(case)
    perturb(model)
    expected = {
        name: tensor.bfloat16() for name, tensor in model.get_base_model().state_dict().items() if "base" in name
    }
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    found = model.get_base_model().state_dict()
    assert expected
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor)


@over_cases
def test_a_pickle_holds_nothing_that_is_kept(case: Case):
    model = adapted(case).eval()
    size = len(pickle.dumps(model))
    with torch.no_grad():
        expected = model(torch.ones(2, 24))
    written = pickle.dumps(model)
    assert len(written) <= size
    with torch.no_grad():
        assert torch.equal(pickle.loads(written)(torch.ones(2, 24)), expected)


# One for every way to an output, and DoTA without a start.
@pytest.mark.parametrize(
    "case",
    named("dota", "dota-random", "lorta", "quanta", "superlora"),
    ids=lambda case: case.name,
)
def test_an_evaluation_is_compiled_to_one_graph(case: Case):
    model = adapted(case).eval()
    perturb(model)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
