"""Bases that walk, count or save their children: an adapter adds none to them."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cases import CASES, SHARING_CASES, Case, minilm, named, perturb

over_shared = pytest.mark.parametrize("case", SHARING_CASES, ids=lambda case: case.name)


class Walker(nn.Module):
    """No container by its class, but one by what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


BASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "sequential": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), ["0", "2"]),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Tanh(), nn.Linear(8, 8)),
        ["0.0", "2"],
    ),
    "linear-layers-alone": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ["0", "1"]),
    "walker": (Walker, ["first", "second"]),
}
over_bases = pytest.mark.parametrize("name", BASES)


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BASES[name][0]().eval()


def adapted(case: Case, name: str = "sequential") -> PeftModel:
    model = get_peft_model(fresh(name), case.make(target_modules=BASES[name][1])).eval()
    perturb(model)
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{name}-{case.name}")
        for name in BASES
        for case in CASES
        if name == "sequential" or case in SHARING_CASES
    ],
)
def test_the_output_is_the_merged_model_s(case: Case, name: str):
    if case.name == "dota-auto":
        case = Case(case.name, case.config, {**case.arguments, "budget": 100})
    if case.name == "loretta-adapter":
        case = Case(case.name, case.config, {"bottleneck": 4, "tt_rank": 2}, merges=False)
    model = adapted(case, name)
    changed = output(model)
    assert not torch.allclose(changed, output(fresh(name)), atol=1e-6)
    if case.merges:
        torch.testing.assert_close(output(copy.deepcopy(model).merge_and_unload()), changed)
    assert torch.equal(output(model.unload()), output(fresh(name)))


@over_shared
@pytest.mark.parametrize("name", ["sequential", "nested"])
def test_its_children_are_its_own(case: Case, name: str):
    base = adapted(case, name).get_base_model()
    assert [name for name, _ in base.named_children()] == [name for name, _ in fresh(name).named_children()]
    assert len(base) == 3  # type: ignore[arg-type]
    plain = adapted(case, name).unload()
    assert plain.state_dict().keys() == fresh(name).state_dict().keys()


@pytest.mark.parametrize("case", [*SHARING_CASES, *named("nola")], ids=lambda case: case.name)
@over_bases
def test_saved_and_loaded_beside_another_adapter(case: Case, name: str, tmp_path):
    model = adapted(case, name)
    expected = output(model)
    model.save_pretrained(tmp_path / "first")
    # The first adapter here has other layers, and so another first layer.
    other = get_peft_model(fresh(name), case.make(target_modules=BASES[name][1][1:]), "other").eval()
    other.load_adapter(tmp_path / "first", "first")
    other.set_adapter("first")
    assert torch.equal(output(other), expected)
    other.save_pretrained(tmp_path / "again", selected_adapters=["first"])
    for folder in ("first", "again/first"):
        assert torch.equal(output(PeftModel.from_pretrained(fresh(name), tmp_path / folder)), expected)
    other.delete_adapter("other")
    assert torch.equal(output(other), expected)
    twin = get_peft_model(fresh(name), case.make(target_modules=BASES[name][1])).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(output(twin), expected)


@over_shared
def test_a_checkpoint_that_names_the_factors_as_the_container_s_own_child_is_loaded(case: Case, tmp_path):
    model = adapted(case)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    older = {key.replace(".1.shared_", ".shared_"): tensor for key, tensor in load_file(file).items()}
    assert older.keys() != load_file(file).keys()
    save_file(older, file)
    assert torch.equal(output(PeftModel.from_pretrained(fresh("sequential"), tmp_path)), output(model))


@over_shared
def test_injected_by_the_keys_of_a_state_dict(case: Case):
    source = inject_adapter_in_model(case.make(target_modules=["0", "2"]), fresh("sequential"))
    perturb(source)
    saved = get_peft_model_state_dict(source)
    model = inject_adapter_in_model(case.make(target_modules=["0", "2"]), fresh("sequential"), state_dict=saved)
    model.load_state_dict(source.state_dict())
    assert torch.equal(output(model), output(source))


@pytest.mark.thorough
@over_shared
def test_a_sentence_transformer_encodes_and_is_saved(case: Case, tmp_path):
    from sentence_transformers import SentenceTransformer

    base = SentenceTransformer(str(minilm()), device="cpu")
    expected = base.encode(["a sentence"])
    model = get_peft_model(base, case.make(target_modules=["query", "value"])).eval()
    assert (model.get_base_model().encode(["a sentence"]) == expected).all()
    perturb(model)
    changed = model.get_base_model().encode(["a sentence"])
    assert abs(changed - expected).max() > 1e-4
    merged = model.merge_and_unload()
    assert abs(merged.encode(["a sentence"]) - changed).max() < 1e-5
    merged.save(str(tmp_path))
    assert abs(SentenceTransformer(str(tmp_path), device="cpu").encode(["a sentence"]) - changed).max() < 1e-5
