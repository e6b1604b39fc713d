"""What must be equal bit for bit in float32: start, disabling, reloading, unmerging, a second adapter."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from cases import (
    CASES,
    MODELS,
    Case,
    Model,
    logits,
    over_cases,
    over_identity_cases,
    over_merging_cases,
    over_models,
    over_pairs,
    perturb,
    tiny_llama,
    tokens,
)
from tensorpeft.networks.update import AbstractFusedUpdate
from tensorpeft.plugin.layer import TensorLayer

MERGED_TOLERANCE = 2e-6  # absolute, of float32 logits of order one


def adapted(model: Model, case: Case, **more) -> PeftModel:
    return get_peft_model(
        model.fresh(), case.make(target_modules=model.targets, task_type=model.task_type, **more)
    ).eval()


@over_models
@over_identity_cases
def test_start_is_the_base_model(model: Model, case: Case):
    peft_model = adapted(model, case)
    expected = logits(model.fresh())
    assert torch.equal(logits(peft_model), expected)  # the cached weight
    assert torch.equal(peft_model(input_ids=tokens()).logits, expected)  # the fused map, with gradients
    outputs = []
    for trained in (peft_model.train(), model.fresh().train()):
        torch.manual_seed(0)  # of the model's dropout
        outputs.append(trained(input_ids=tokens()).logits)
    assert torch.equal(*outputs)


@over_models
def test_start_without_a_start_is_not_the_base_model(model: Model):
    case = next(case for case in CASES if not case.starts_at_identity)
    assert not torch.allclose(logits(adapted(model, case)), logits(model.fresh()))


@over_models
@over_cases
def test_disabled_is_the_base_model_after_training(model: Model, case: Case):
    peft_model, expected = adapted(model, case), logits(model.fresh())
    perturb(peft_model)
    assert not torch.allclose(logits(peft_model), expected)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), expected)


@over_models
@over_merging_cases
def test_disabled_is_the_base_model_after_merging(model: Model, case: Case):
    peft_model, expected = adapted(model, case), logits(model.fresh())
    perturb(peft_model)
    peft_model.merge_adapter()
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), expected)


@over_pairs(MODELS, CASES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reloaded_adapter_is_the_saved_one(model: Model, case: Case, low_cpu_mem_usage: bool, tmp_path):
    peft_model = adapted(model, case)
    perturb(peft_model)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.fresh(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), logits(peft_model))


@over_cases
@pytest.mark.parametrize("key_value_heads", [3, pytest.param(1, marks=pytest.mark.thorough)])
def test_what_was_trained_and_what_is_loaded_for_inference_have_the_same_bits(
    case: Case, key_value_heads: int, tmp_path
):
    """Of odd ranks and sizes: which product torch takes for a tensor of three axes may depend on `requires_grad`."""
    sizes = {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": key_value_heads}
    model = Model("odd-llama", lambda: tiny_llama(**sizes), MODELS[0].targets, "CAUSAL_LM")
    peft_model = adapted(model, case, **({"r": 5} if isinstance(case.arguments.get("r"), int) else {}))
    perturb(peft_model)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.fresh(), tmp_path, is_trainable=False).eval()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits(loaded), logits(peft_model))
    if case.merges:
        pairs = list(zip(layers(loaded), layers(peft_model), strict=True))
        assert pairs
        for one, other in pairs:
            assert torch.equal(one.get_delta_weight("default"), other.get_delta_weight("default"))
            assert torch.equal(one.merged_weight(["default"]), other.merged_weight(["default"]))
    names = ["default", "__base__", "default"]
    assert torch.equal(logits(loaded, adapter_names=names), logits(peft_model, adapter_names=names))
    assert torch.equal(logits(loaded.train()), logits(peft_model.train()))


def layers(model: nn.Module) -> list[TensorLayer]:
    return [module for module in model.modules() if isinstance(module, TensorLayer)]


@over_models
@over_merging_cases
def test_merging_keeps_the_output_and_unmerging_the_base(model: Model, case: Case):
    peft_model = adapted(model, case)
    perturb(peft_model)
    before, weights = logits(peft_model), {k: v.clone() for k, v in peft_model.state_dict().items()}
    peft_model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(peft_model), before, atol=MERGED_TOLERANCE)
    peft_model.unmerge_adapter()
    assert all(torch.equal(value, weights[key]) for key, value in peft_model.state_dict().items())
    unloaded = peft_model.merge_and_unload()
    assert torch.allclose(logits(unloaded), before, atol=MERGED_TOLERANCE)
    assert [name for name, _ in unloaded.named_parameters()] == [name for name, _ in model.fresh().named_parameters()]


@over_models
@over_cases
def test_unloading_without_merging_gives_the_base_back(model: Model, case: Case):
    peft_model = adapted(model, case)
    perturb(peft_model)
    if case.merges:
        peft_model.merge_adapter()
    assert torch.equal(logits(peft_model.unload()), logits(model.fresh()))


@over_models
@over_cases
def test_two_adapters_do_not_touch_each_other(model: Model, case: Case):
    peft_model = adapted(model, case)
    perturb(peft_model)
    first = logits(peft_model)
    peft_model.add_adapter("second", case.make(target_modules=model.targets[:1], task_type=model.task_type))
    assert torch.equal(logits(peft_model), first)
    peft_model.set_adapter("second")
    perturb(peft_model, seed=5)
    second = logits(peft_model)
    assert not torch.allclose(second, first)
    peft_model.set_adapter("default")
    assert torch.equal(logits(peft_model), first)
    peft_model.delete_adapter("default")
    peft_model.set_adapter("second")
    assert torch.equal(logits(peft_model), second)


@over_merging_cases
def test_several_active_adapters_add_up(case: Case):
    model = MODELS[0]
    peft_model = adapted(model, case)
    peft_model.add_adapter("second", case.make(target_modules=model.targets))
    peft_model.base_model.set_adapter(["default", "second"])
    perturb(peft_model)
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, layer.in_features)
    expected = layer.base_layer(x) + sum(x @ layer.get_delta_weight(name).T for name in ("default", "second"))
    assert torch.allclose(layer(x), expected, atol=1e-5)
    peft_model.merge_adapter()
    assert torch.allclose(layer(x), expected, atol=1e-5)


@over_cases
def test_the_cached_weight_follows_every_change(case: Case):
    model = MODELS[0]
    peft_model = adapted(model, case)
    reference = adapted(model, case)
    reference.load_state_dict(peft_model.state_dict())
    logits(peft_model)  # fills the cache
    for change in (
        perturb,
        lambda m: m.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer.weight.data.copy_(
            torch.ones(44, 24)
        ),
        lambda m: m.eval(),
        lambda m: m.double(),
    ):
        change(peft_model)
        change(reference)
        fresh = copy.deepcopy(reference).eval()  # eval() drops what deepcopy took along
        assert torch.equal(logits(peft_model.eval()), logits(fresh))


def test_the_cache_sees_an_optimiser_step_without_leaving_evaluation():
    peft_model = adapted(MODELS[0], CASES[0])
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=1.0)
    before = logits(peft_model)
    peft_model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    with_cache = logits(peft_model)
    assert not torch.equal(with_cache, before)
    assert torch.equal(with_cache, logits(peft_model.train().eval()))


@over_models
@over_cases
def test_copies_are_independent(model: Model, case: Case):
    peft_model = adapted(model, case)
    perturb(peft_model)
    before = logits(peft_model)
    copied = copy.deepcopy(peft_model)
    unpickled = pickle.loads(pickle.dumps(peft_model))
    assert torch.equal(logits(copied), before)
    assert torch.equal(logits(unpickled), before)
    perturb(copied, seed=9)
    assert torch.equal(logits(peft_model), before)
    assert not torch.equal(logits(copied), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@over_identity_cases
def test_half_precision_bases_start_exactly_too(case: Case, dtype: torch.dtype):
    model = MODELS[0]
    expected = logits(model.fresh().to(dtype))
    config = case.make(target_modules=model.targets)
    peft_model = get_peft_model(model.fresh().to(dtype), config).eval()
    assert torch.equal(logits(peft_model), expected)
    trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    perturb(peft_model)
    if not case.merges:
        return
    before = logits(peft_model)
    peft_model.merge_adapter()
    if any(isinstance(module, AbstractFusedUpdate) for module in peft_model.modules()):
        assert torch.equal(logits(peft_model), before)  # the very weight that was cached
    else:
        torch.testing.assert_close(logits(peft_model), before, atol=2e-2, rtol=2e-2)


@over_identity_cases
def test_start_is_exact_under_autocast(case: Case):
    model = MODELS[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model.fresh())
        peft_model = adapted(model, case)
        assert torch.equal(logits(peft_model), expected)
        assert torch.equal(peft_model.train()(input_ids=tokens()).logits, expected)


@over_merging_cases
def test_a_cast_of_the_whole_model_leaves_updates_what_they_are(case: Case):
    """An update that is a difference of two networks, of numbers rounded apart, would be none."""
    peft_model = adapted(MODELS[0], case)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1e-4 * torch.randn_like(parameter))
    layers = [layer for layer in peft_model.modules() if isinstance(layer, TensorLayer)]
    before = [layer.get_delta_weight("default").double() for layer in layers]
    peft_model.to(torch.bfloat16)
    for layer, update in zip(layers, before, strict=True):
        assert (layer.get_delta_weight("default").double() - update).norm() <= 0.02 * update.norm()
    peft_model.double()
    assert all(parameter.dtype == torch.float64 for parameter in peft_model.parameters())


@over_cases
def test_hooked_base_layers_run_their_own_forward(case: Case):
    """Offloading and DeepSpeed work through hooks: the base layer must be called, not read."""
    model = MODELS[0]
    peft_model = adapted(model, case)
    perturb(peft_model)
    expected = logits(peft_model)
    calls = []
    for module in peft_model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(logits(peft_model), expected, atol=MERGED_TOLERANCE)
    assert len(calls) == 2 * 7 + 1  # all linear layers of two blocks, and the head


def test_an_adapter_on_top_of_lora_reads_the_innermost_weight():
    model = MODELS[0]
    lora = get_peft_model(model.fresh(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    stacked = get_peft_model(lora.base_model.model, CASES[0].make(target_modules=["k_proj"]))
    assert torch.equal(logits(stacked.eval()), logits(lora.eval()))


@over_identity_cases
def test_what_is_rounded_at_its_start_is_put_back_when_training_begins(case: Case, tmp_path):
    """TRL rounds whatever is trained on a base in 4 or 8 bits, before the first step."""
    peft_model = adapted(MODELS[0], case)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    peft_model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    for parameter in trained:
        parameter.data.add_(0.1 * parameter.grad)  # pyright: ignore[reportArgumentType]
    expected = logits(peft_model.eval())
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS[0].fresh(), tmp_path).eval()
    moved = (expected - logits(MODELS[0].fresh())).norm()
    assert (logits(loaded) - expected).norm() <= 0.02 * moved


def test_what_was_trained_and_is_rounded_then_is_told():
    peft_model = adapted(MODELS[0], next(case for case in CASES if case.name == "dota"))
    perturb(peft_model)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="were rounded to bfloat16.*load a trained one after the trainer"):
        peft_model.train()


@over_identity_cases
def test_half_precision_that_is_asked_for_is_what_is_saved(case: Case, tmp_path):
    base = MODELS[0].fresh().to(torch.bfloat16)
    peft_model = get_peft_model(base, case.make(target_modules=MODELS[0].targets), autocast_adapter_dtype=False).eval()
    expected = logits(peft_model.train().eval())
    assert torch.equal(expected, logits(MODELS[0].fresh().to(torch.bfloat16)))
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS[0].fresh().to(torch.bfloat16), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
