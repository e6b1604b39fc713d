"""Models that are built, named, compiled or merged in ways of their own."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import prune

from cases import (
    MODELS,
    Case,
    logits,
    named,
    over_cases,
    over_identity_cases,
    over_merging_cases,
    perturb,
    tokens,
)

LLAMA = MODELS[0]
# What is asked of the layer, not of the method: a few of different kinds.
over_some_cases = pytest.mark.parametrize(
    "case",
    named("dota", "lorta", "flora", "quanta", "superlora"),
    ids=lambda case: case.name,
)


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


class Centred(nn.Linear):
    """Its input is centred."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Residual(nn.Linear):
    """It multiplies by its weight, and adds what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Dropping(nn.Linear):
    """It drops outputs in training."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Buffered(nn.Linear):
    """Its weight is a buffer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


class OfThreeAxes(nn.Linear):
    """It takes nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return super().forward(x).view(batch, length, self.out_features)


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


class Table(nn.Module):
    """A head that has the weight of the model's own table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(30, 24)), nn.Linear(24, 30, bias=False)
        self.head.weight = self.table

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table[tokens])


class TwoNames(nn.Module):
    """A block that is a child of the model twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(24, 24), nn.Tanh())
        self.again = self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.block(x))


def halve(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


@over_cases
def test_layers_may_be_named_as_peft_s_wrappers_are(case: Case, tmp_path):
    model = get_peft_model(Wrapped(), case.make(target_modules=LLAMA.targets))
    perturb(model)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Wrapped(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens()), model(input_ids=tokens()))


@pytest.mark.parametrize("case", named("dota", "lorta"), ids=lambda c: c.name)
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
        (Tied, ["first", "second"], "first and second"),
        (Tied, ["second"], "first and second"),  # the other one has no adapter
        (Twice, ["first"], "first and second"),
        (TiedHead, ["head"], "embeddings and head"),
        (Table, ["head"], "head and the model itself"),
    ],
    ids=["both", "one", "one layer under two names", "head", "a parameter of the model"],
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
def test_a_head_is_merged_where_a_copy_of_its_embeddings_is_trained(case: Case):
    torch.manual_seed(0)
    config = case.make(target_modules=["head"], modules_to_save=["embeddings"])
    model = get_peft_model(TiedHead(), config).eval()
    perturb(model)
    tokens_ = torch.arange(12).view(3, 4)
    expected = model(tokens_)
    torch.testing.assert_close(model.merge_and_unload()(tokens_), expected, atol=1e-4, rtol=1e-4)


@over_merging_cases
@pytest.mark.parametrize("is_first", [False, True], ids=["over LoRA", "under LoRA"])
def test_an_adapter_is_merged_beside_a_lora(case: Case, is_first: bool):
    torch.manual_seed(0)
    lora, ours = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), case.make(target_modules=["0"])
    configs = {"ours": ours, "lora": lora} if is_first else {"lora": lora, "ours": ours}
    (name, first), (other, second) = configs.items()
    model: Any = get_peft_model(nn.Sequential(nn.Linear(24, 24)), first, adapter_name=name, mixed=True)
    model.add_adapter(other, second)
    model.set_adapter([name, other])
    perturb(model)
    x = torch.randn(5, 24)
    expected = model.eval()(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-4, rtol=1e-4)


@over_some_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [Scaled, Centred], ids=lambda make: make.__name__)
def test_what_multiplies_by_something_else_than_its_weight_is_not_merged(case: Case, dtype: torch.dtype, make: Any):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(make(192, 96).to(dtype)), case.make(target_modules=["0"])).eval()
    perturb(model)
    x = torch.randn(2, 5, 192, dtype=dtype)
    expected = model(x)
    with pytest.raises(ValueError, match=rf"^0: a {make.__name__} does not multiply by its weight"):
        model.merge_and_unload()
    assert torch.equal(model(x), expected)


@over_some_cases
@pytest.mark.parametrize("make", [Residual, Dropping, Buffered, OfThreeAxes], ids=lambda make: make.__name__)
def test_a_class_that_multiplies_by_its_weight_is_merged(case: Case, make: Any):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(make(24, 24)), case.make(target_modules=["0"])).train()
    perturb(model)
    x = torch.randn(2, 5, 24)
    expected = model.eval()(x)
    torch.testing.assert_close(model.train().merge_and_unload().eval()(x), expected, atol=1e-4, rtol=1e-4)


@over_some_cases
@pytest.mark.parametrize(
    "compute", [utils.parametrizations.weight_norm, utils.weight_norm, halve], ids=["parametrized", "normed", "pruned"]
)
def test_a_weight_that_is_computed_is_not_merged_into(case: Case, compute: Any):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 24)), case.make(target_modules=["0"])).eval()
    perturb(model)
    compute(model.base_model.model[0].base_layer)
    with pytest.raises(ValueError, match=r"^0: its weight is computed from other parameters"):
        model.merge_and_unload()
