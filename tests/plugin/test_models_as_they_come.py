"""Models that are built, named, compiled or merged in ways of their own."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from cases import CASES, MODELS, Case, logits, over_cases, over_identity_cases, over_merging_cases, perturb, tokens

LLAMA = MODELS[0]


class Wrapped(nn.Module):
    """A user's reward model: its own child has the name that PEFT's wrappers have."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = LLAMA.fresh()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.base_model(input_ids=input_ids).logits


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Scaled(nn.Linear):
    """It multiplies by twice its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Residual(nn.Linear):
    """It multiplies by its weight, and adds what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Twice(nn.Module):
    """One layer with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class TiedHead(nn.Module):
    """A head that has the embeddings' weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.head = nn.Embedding(30, 24), nn.Linear(24, 30, bias=False)
        self.head.weight = self.embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embeddings(tokens))


class TwoNames(nn.Module):
    """A block that is a child of the model twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(24, 24), nn.Tanh())
        self.again = self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.block(x))


@over_cases
def test_layers_may_be_named_as_peft_s_wrappers_are(case: Case, tmp_path):
    model = get_peft_model(Wrapped(), case.make(target_modules=LLAMA.targets))
    perturb(model)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Wrapped(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens()), model(input_ids=tokens()))


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("dota", "lorta")], ids=lambda c: c.name)
def test_a_base_may_be_compiled_before_it_is_adapted(case: Case, tmp_path):
    def compiled() -> Any:
        return torch.compile(LLAMA.fresh(), backend="eager")

    model = get_peft_model(compiled(), case.make(target_modules=LLAMA.targets))
    perturb(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(compiled(), tmp_path).eval()), expected)


@over_cases
def test_a_layer_without_a_weight_yet_is_refused_until_the_model_has_run(case: Case):
    model = nn.Sequential(nn.LazyLinear(24))
    with pytest.raises(ValueError, match=r"^0: a LazyLinear has no weight yet\. Run the model once"):
        get_peft_model(model, case.make(target_modules=["0"]))
    model(torch.zeros(2, 24))
    get_peft_model(model, case.make(target_modules=["0"]))


@over_merging_cases
@pytest.mark.parametrize(
    ("make", "targets", "names"),
    [
        (Tied, ["first", "second"], "(first and second|second and first)"),
        (Tied, ["second"], "first and second"),  # the other one has no adapter
        (Twice, ["first"], "second and first"),
        (TiedHead, ["head"], "embeddings and head"),
    ],
    ids=["both", "one", "one layer under two names", "head"],
)
def test_a_weight_that_another_layer_has_is_not_merged(case: Case, make: Any, targets: list[str], names: str):
    torch.manual_seed(0)
    model = get_peft_model(make(), case.make(target_modules=targets)).eval()
    perturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"{names} are one weight"):
            merge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@over_merging_cases
def test_a_block_that_is_reached_by_two_names_is_merged(case: Case):
    torch.manual_seed(0)
    model = get_peft_model(TwoNames(), case.make(target_modules=["0"])).eval()
    perturb(model)
    x = torch.randn(5, 24)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-5, rtol=1e-5)


@over_merging_cases
def test_an_adapter_that_is_added_while_another_is_merged_is_the_base_s(case: Case, tmp_path):
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets))
    perturb(model, scale=2)
    model.merge_adapter()
    model.add_adapter("second", case.make(target_modules=LLAMA.targets))
    model.unmerge_adapter()
    model.set_adapter("second")
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "second").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))


@over_identity_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torch_s_default_may_be_half_precision(case: Case, dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        base = LLAMA.fresh()
        expected = logits(base)
        model = get_peft_model(base, case.make(target_modules=LLAMA.targets)).eval()
        trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert trained == {torch.float32}
        assert torch.equal(logits(model), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@over_cases
def test_peft_s_switch_for_casting_the_input_is_there(case: Case):
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets)).eval()
    perturb(model)
    expected = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), expected)


@over_merging_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_multiplies_by_something_else_than_its_weight_is_not_merged(case: Case, dtype: torch.dtype):
    def adapted(layer: nn.Module) -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(layer.to(dtype)), case.make(target_modules=["0"])).eval()
        perturb(model, scale=4)
        return model

    x = torch.randn(5, 24, dtype=dtype)
    model = adapted(Scaled(24, 24))
    expected = model(x)
    with pytest.raises(ValueError, match=r"^0: a Scaled does not multiply by its weight"):
        model.merge_and_unload()
    assert torch.equal(model(x), expected)
    model = adapted(Residual(24, 24))
    expected = model(x)
    error = (model.merge_and_unload()(x) - expected).float().norm() / expected.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
