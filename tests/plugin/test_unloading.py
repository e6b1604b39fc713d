"""Merging into the base and unloading give the plain model back or, after an error, have changed nothing."""

from collections.abc import Callable

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from cases import CASES, MODELS, Case, logits, over_cases, over_merging_cases, perturb
from tensorpeft import LotrConfig
from tensorpeft.plugin.layer import TensorLayer

SIZES = {"vocab_size": 96, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 4}
# Their heads are modules without a weight of their own.
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**SIZES, num_labels=3, pad_token_id=0)
    ),
    "electra": lambda: transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(**SIZES, embedding_size=24, num_labels=3, pad_token_id=0)
    ),
}
LLAMA = MODELS[0]


def classifier(case: Case, name: str) -> PeftModel:
    torch.manual_seed(0)
    base = CLASSIFIERS[name]().eval()
    model = get_peft_model(base, case.make(target_modules=["query", "value"], task_type="SEQ_CLS")).eval()
    perturb(model)
    with torch.no_grad():
        for parameter in model.get_base_model().classifier.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    return model


def has_wrappers(model: nn.Module) -> bool:
    return any("peft" in type(module).__module__ or isinstance(module, TensorLayer) for module in model.modules())


@over_merging_cases
@pytest.mark.parametrize("name", ["roberta", pytest.param("electra", marks=pytest.mark.thorough)])
def test_a_classifier_whose_head_has_no_weight_of_its_own_is_merged(case: Case, name: str):
    model = classifier(case, name)
    expected = logits(model)
    plain = model.merge_and_unload()
    assert not has_wrappers(plain)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)


@over_cases
@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
def test_a_classifier_whose_head_has_no_weight_of_its_own_is_unloaded(case: Case, merged: bool):
    model = classifier(case, "roberta")
    if merged and case.merges:
        model.merge_adapter()
    head = model.get_base_model().classifier.modules_to_save["default"]
    plain = model.unload()
    torch.manual_seed(0)
    expected = CLASSIFIERS["roberta"]().eval()
    expected.classifier = head
    assert not has_wrappers(plain)
    assert plain.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(logits(plain), logits(expected))


def _that_fails(*args: object, **kwargs: object) -> None:
    raise RuntimeError("not this layer")


@over_merging_cases
@pytest.mark.parametrize("place", ["weight", pytest.param("head", marks=pytest.mark.thorough)])
def test_merging_that_fails_in_the_middle_changes_nothing(case: Case, place: str, monkeypatch: pytest.MonkeyPatch):
    model = classifier(case, "roberta")
    if place == "weight":
        last = [module for module in model.modules() if isinstance(module, TensorLayer)][-1]
        monkeypatch.setattr(last, "merged_weight", _that_fails)
    else:
        head = model.get_base_model().classifier
        monkeypatch.setattr(head, "unload_and_optionally_merge_module", _that_fails)
    expected, state = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="not this layer"):
        model.merge_and_unload()
    assert model.state_dict().keys() == state.keys()
    assert not any(getattr(module, "merged_adapters", None) for module in model.modules())
    if place == "weight":
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        with pytest.raises(RuntimeError, match="not this layer"):
            model.merge_adapter()
        assert torch.equal(logits(model), expected)
    else:  # the weights had been merged, and nobody keeps a second copy of them
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_unloading_that_fails_leaves_what_was_merged_merged(monkeypatch: pytest.MonkeyPatch):
    model = classifier(CASES[0], "roberta")
    model.merge_adapter()
    expected = logits(model)
    monkeypatch.setattr(model.get_base_model().classifier, "unload_and_optionally_merge_module", _that_fails)
    with pytest.raises(RuntimeError, match="not this layer"):
        model.unload()
    assert torch.equal(logits(model), expected)
    assert {len(module.merged_adapters) for module in model.modules() if isinstance(module, TensorLayer)} == {1}


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_mixed_model_that_fails_in_the_middle_changes_nothing(merge: str, monkeypatch: pytest.MonkeyPatch):
    mixed = get_peft_model(LLAMA.fresh(), LotrConfig(target_modules=["q_proj", "v_proj"]), "lotr", mixed=True)
    mixed.add_adapter("lora", LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    mixed.set_adapter(["lotr", "lora"])
    mixed.eval()
    perturb(mixed)
    expected, keys = logits(mixed), mixed.state_dict().keys()
    lora = [module for module in mixed.modules() if hasattr(module, "lora_A") and hasattr(module, "merge")]
    monkeypatch.setattr(lora[-1], "merge", _that_fails)
    with pytest.raises(RuntimeError, match="not this layer"):
        getattr(mixed, merge)()
    assert mixed.state_dict().keys() == keys
    torch.testing.assert_close(logits(mixed), expected, rtol=1e-5, atol=1e-5)
    assert not any(getattr(module, "merged_adapters", None) for module in mixed.modules())


def test_no_copy_of_the_base_is_kept_while_unloading(monkeypatch: pytest.MonkeyPatch):
    """A copy would take the model's memory once more."""
    model = get_peft_model(LLAMA.fresh(), CASES[0].make(target_modules=LLAMA.targets)).eval()
    kept = []
    merge = TensorLayer.merge

    def merge_and_look(self: TensorLayer, *args: object, **kwargs: object) -> None:
        merge(self, *args, **kwargs)  # type: ignore[arg-type]
        kept.append(self._unmerged)

    monkeypatch.setattr(TensorLayer, "merge", merge_and_look)
    model.merge_and_unload()
    assert kept == [None] * len(kept) != []


@over_cases
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_an_adapter_that_is_not_there_is_not_merged(case: Case, merge: str):
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=["q_proj"]))
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"no adapter typo; loaded are \['default'\]"):
        getattr(model, merge)(adapter_names=["typo"])
    assert model.state_dict().keys() == keys


@pytest.mark.parametrize("merge", [False, True])
def test_a_mixed_model_with_trained_tokens_is_unloaded(merge: bool):
    config = LotrConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5])
    mixed = get_peft_model(LLAMA.fresh(), config, "a", mixed=True).eval()
    with torch.no_grad():
        for parameter in mixed.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    expected = logits(mixed) if merge else logits(LLAMA.fresh())
    plain = mixed.merge_and_unload() if merge else mixed.unload()
    assert not has_wrappers(plain)
    assert plain.state_dict().keys() == LLAMA.fresh().state_dict().keys()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
