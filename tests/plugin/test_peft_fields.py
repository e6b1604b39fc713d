"""PEFT's further fields and functions: as LoRA takes them, or refused with the name of what to use instead."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from cases import CASES, MODELS, SHARING_CASES, Case, logits, perturb, tiny_bert, tiny_llama
from tensorpeft import LotrConfig, TensLoraConfig
from tensorpeft.export import to_lora
from tensorpeft.plugin.layer import TensorLayer

LLAMA = MODELS[0]
FIRST_OF_EACH = list({case.config: case for case in reversed(CASES)}.values())
over_summable = pytest.mark.parametrize("case", SHARING_CASES, ids=lambda case: case.name)
IN_FULL: dict[str, dict[str, Any]] = {
    "tokens": {"trainable_token_indices": [3, 5]},
    "tokens-by-layer": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    "tokens-tied": {"trainable_token_indices": [3, 5], "ensure_weight_tying": True},
    "output-tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}


def fresh(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(tie_word_embeddings=True, **more).eval()


def trained(case: Case, **more: Any) -> PeftModel:
    model = get_peft_model(fresh(), case.make(target_modules=["q_proj", "v_proj"], **more))
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "_update." not in name:
                parameter += 0.2
    return model.eval()


@pytest.mark.parametrize("name", IN_FULL)
@pytest.mark.parametrize("case", FIRST_OF_EACH, ids=lambda case: case.name)
def test_what_is_trained_beside_the_layers_is_saved_loaded_and_merged(case: Case, name: str, tmp_path):
    model = trained(case, **IN_FULL[name])
    expected = logits(model)
    assert not torch.allclose(expected, logits(trained(case)), atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), tmp_path).eval()), expected)
    if case.merges:
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
        assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()


def test_tokens_are_loaded_by_transformers_and_exported(tmp_path):
    model = trained(SHARING_CASES[0], trainable_token_indices=[3, 5])
    expected = logits(model)
    model.save_pretrained(tmp_path / "ours")
    loaded = fresh()
    loaded.load_adapter(str(tmp_path / "ours"))
    assert torch.equal(logits(loaded), expected)
    with pytest.warns(UserWarning, match=r"trainable_token_indices=.* are exported as they are"):
        to_lora(model, tmp_path / "lora")
    found = logits(PeftModel.from_pretrained(fresh(), tmp_path / "lora").eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_tied_layer_as_a_target_is_refused():
    base = fresh()
    keys = base.state_dict().keys()
    with pytest.raises(ValueError, match=r"ensure_weight_tying=True.*lm_head.*modules_to_save"):
        get_peft_model(base, LotrConfig(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True))
    assert base.state_dict().keys() == keys


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            {"shared_lotr": [1]},
            "'shared_lotr' names .*shared_lotr, a LotrSharedHolder; expected the name of an embedding",
        ),
        ({"layers": [1]}, "'layers' names model.layers, a ModuleList"),
        ({"embed_tokens": 1}, "trainable_token_indices=1 of .*embed_tokens: expected a list of tokens, from 0 to 95"),
        ({"embed_tokens": []}, r"trainable_token_indices=\[\] of .*embed_tokens"),
        ([1, 96], r"trainable_token_indices=\[1, 96\] of .*embed_tokens"),
        ([True], r"trainable_token_indices=\[True\]"),
    ],
)
def test_what_is_no_token_of_an_embedding_is_refused(tokens, message):
    model = get_peft_model(fresh(), LotrConfig(target_modules=["q_proj"]))
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", LotrConfig(target_modules=["q_proj"], trainable_token_indices=tokens))
    assert model.state_dict().keys() == keys


@pytest.mark.parametrize("pattern", [None, [], "layers", ["h", "layers"], "blocks"])
@pytest.mark.parametrize("indices", [0, [1], [0, 1]])
def test_layers_are_counted_as_lora_counts_them(pattern: Any, indices: Any):
    def adapted(config_cls: Callable[..., Any]) -> list[str] | str:
        config = config_cls(target_modules=["q_proj"], layers_to_transform=indices, layers_pattern=pattern)
        try:
            return get_peft_model(fresh(), config).base_model.targeted_module_names
        except ValueError as error:
            return type(error).__name__

    assert adapted(LotrConfig) == adapted(LoraConfig)


@pytest.mark.parametrize("case", FIRST_OF_EACH, ids=lambda case: case.name)
def test_sizes_that_do_not_match_are_not_passed_over(case: Case, tmp_path):
    model = get_peft_model(tiny_bert(), case.make(target_modules=["query"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    base = tiny_bert()
    keys = base.state_dict().keys()
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True),
        lambda: model.load_adapter(tmp_path, "again", ignore_mismatched_sizes=True),
        lambda: model.load_adapter(tmp_path, "default", ignore_mismatched_sizes=True),
    ):
        with pytest.raises(ValueError, match="ignore_mismatched_sizes=True would leave tensors at random"):
            load()
    assert base.state_dict().keys() == keys
    assert list(model.peft_config) == ["default"]


def two_adapters(case: Case) -> PeftModel:
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets), "a")
    model.add_adapter("b", case.make(target_modules=LLAMA.targets, r=3))
    for seed, name in enumerate("ab"):
        model.set_adapter(name)
        perturb(model, seed)
    return model.eval()


def deltas(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    layers = {key: module for key, module in model.named_modules() if isinstance(module, TensorLayer)}
    return {key: layer.get_delta_weight(name) for key, layer in layers.items() if name in layer.updates}


@over_summable
def test_a_weighted_sum_of_adapters_is_exact(case: Case, tmp_path):
    model = two_adapters(case)
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "sum")
    first, second, found = (deltas(model, name) for name in ("a", "b", "sum"))
    assert found.keys() == first.keys()
    for key, delta in found.items():
        torch.testing.assert_close(delta, 0.7 * first[key] - 1.5 * second[key], rtol=1e-4, atol=1e-6)
    assert model.active_adapters == ["b"]
    model.set_adapter("sum", inference_mode=True)
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "sum").eval()), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


@over_summable
def test_a_weighted_sum_of_adapters_in_half_precision_is_exact(case: Case):
    torch.manual_seed(0)
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets), "a")
    perturb(model)
    for update in (module for module in model.modules() if type(module).__name__.endswith("Update")):
        (update.shared if update.shared is not None else update).bfloat16()
    model.add_adapter("b", case.make(target_modules=LLAMA.targets))
    model.set_adapter("b")
    perturb(model, 3)
    for names in (["a", "b"], ["b", "a"]):
        exact = copy.deepcopy(model).double()
        weights, parts = [0.3, -0.7], [deltas(exact, name) for name in names]
        model.add_weighted_adapter(names, weights, "sum")
        for key, found in deltas(model, "sum").items():
            expected = sum(weight * part[key] for weight, part in zip(weights, parts, strict=True))
            assert (found - expected).norm() <= 1e-5 * expected.norm()
        model.delete_adapter("sum")


def test_a_weighted_sum_of_tensors_with_a_rank_for_each_mode_is_no_larger_than_both():
    torch.manual_seed(0)
    model = get_peft_model(LLAMA.fresh(), TensLoraConfig(r=[4, 3, 2, 1], target_modules=LLAMA.targets), "a")
    perturb(model)
    model.add_adapter("b", TensLoraConfig(r=2, scale=3.0, target_modules=LLAMA.targets))
    model.set_adapter("b")
    perturb(model, 3)
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "sum")
    assert (model.peft_config["sum"].r, model.peft_config["sum"].scale) == ([6, 5, 4, 3], 1.0)
    first, second, found = (deltas(model, name) for name in ("a", "b", "sum"))
    for key, delta in found.items():
        torch.testing.assert_close(delta, 0.7 * first[key] - 1.5 * second[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [case for case in FIRST_OF_EACH if case.config not in {s.config for s in SHARING_CASES}],
    ids=lambda c: c.name,
)
def test_where_a_sum_has_another_form_it_is_refused(case: Case):
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets), "a")
    model.add_adapter("b", case.make(target_modules=LLAMA.targets))
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"a weighted sum of .* adapters is not one itself: .*to_lora"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    assert model.state_dict().keys() == keys
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "c"], [1.0, 1.0], "sum"), "adapters of \\['a', 'b', 'fewer', 'head'\\]"),
        ((["a", "b"], [1.0], "sum"), "expected one weight for each"),
        ((["a", "b"], [1.0, float("nan")], "sum"), r"weights=\[1.0, nan\]: expected finite numbers"),
        ((["a", "b"], ["1", "2"], "sum"), "expected finite numbers"),
        ((["a", "b"], [1.0, 1.0], "b"), "adapter_name='b': there is an adapter"),
        ((["a", "b"], [1.0, 1.0], "sum", "svd"), "combination_type='svd': expected \"cat\""),
        ((["a", "fewer"], [1.0, 1.0], "sum"), "k_proj: only one of the adapters 'a' and 'fewer'"),
        ((["a", "head"], [1.0, 1.0], "sum"), "head: this adapter trains modules in full"),
    ],
)
def test_adapters_that_cannot_be_combined(arguments: tuple[Any, ...], message: str):
    model = two_adapters(SHARING_CASES[0])
    model.add_adapter("fewer", SHARING_CASES[0].make(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    model.add_adapter("head", SHARING_CASES[0].make(target_modules=LLAMA.targets, modules_to_save=["lm_head"]))
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert model.state_dict().keys() == keys


@pytest.mark.parametrize("case", FIRST_OF_EACH, ids=lambda case: case.name)
def test_a_mixture_of_experts_whose_layers_transformers_has_renamed(case: Case):
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    base = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    model = get_peft_model(base, case.make(target_modules=["q_proj", "v_proj"]))
    x = torch.arange(3, 15).view(2, 6)
    model(input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
