"""Experts that a module holds as one parameter (experts, out, in): every method adapts each as a weight of its own."""

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from cases import CASES, MERGING_CASES, Case, Model, logits, named, over_merging_cases, over_pairs, perturb, tokens
from tensorpeft import DotaConfig, LorettaAdapterConfig, print_tensor_map
from tensorpeft.export import to_lora
from tensorpeft.plugin.experts import ExpertsLayer
from tensorpeft.plugin.layer import TensorLayer, diagonals
from tensorpeft.plugin.routes import without_kept_sums
from tensorpeft.quantization import quantize_residual

SIZES = {
    "vocab_size": 96,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=3)
    )


def tiny_qwen3_moe() -> nn.Module:
    """Experts that are narrower than the hidden states, and a dense layer."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=8, intermediate_size=8, num_experts=4, head_dim=6, mlp_only_layers=[1]
    )
    return transformers.Qwen3MoeForCausalLM(config)


def tiny_gpt_oss() -> nn.Module:
    """Weights stored as (experts, in, out), and biases."""
    config = transformers.GptOssConfig(**SIZES, intermediate_size=16, num_local_experts=3, head_dim=6)
    return transformers.GptOssForCausalLM(config)


TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
MODELS = [
    Model("mixtral", tiny_mixtral, ["q_proj", "v_proj"], "CAUSAL_LM"),
    Model("qwen3-moe", tiny_qwen3_moe, ["q_proj", "v_proj"], "CAUSAL_LM"),
    Model("gpt-oss", tiny_gpt_oss, ["q_proj", "v_proj"], "CAUSAL_LM"),
]
over_model_cases = over_pairs(MODELS, MERGING_CASES, everywhere=("dota", "lorta", "lotr"))
MERGED_TOLERANCE = 2e-6


def configured(case: Case, model: Model, **more) -> PeftConfig:
    fields = {"target_modules": model.targets, "target_parameters": TARGETS, "task_type": model.task_type}
    return case.make(**{**fields, **more})


def adapted(case: Case, model: Model, **more) -> PeftModel:
    return get_peft_model(model.fresh(), configured(case, model, **more)).eval()


@over_model_cases
def test_experts_start_train_merge_and_come_back(model: Model, case: Case, tmp_path):
    base = logits(model.fresh())
    peft_model = adapted(case, model)
    if case.starts_at_identity:
        assert torch.equal(logits(peft_model), base)
        assert torch.equal(peft_model.train()(input_ids=tokens()).logits, base)
    perturb(peft_model.eval())
    trained = logits(peft_model)
    assert not torch.allclose(trained, base)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), base)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.fresh(), tmp_path).eval()
    assert torch.equal(logits(loaded), trained)
    weights = {key: tensor.clone() for key, tensor in peft_model.state_dict().items()}
    peft_model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(peft_model), trained, atol=MERGED_TOLERANCE)
    peft_model.unmerge_adapter()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in peft_model.state_dict().items())
    merged = copy.deepcopy(peft_model).merge_and_unload()
    assert torch.allclose(logits(merged), trained, atol=MERGED_TOLERANCE)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in model.fresh().named_parameters()]
    assert torch.equal(logits(peft_model.unload()), base)


def test_a_stack_with_updates_is_kept_but_where_memory_has_no_room():
    peft_model = adapted(named("lorta")[0], MODELS[0])
    with without_kept_sums():
        expected = logits(peft_model)
    assert not kept_sums(peft_model)
    assert torch.equal(logits(peft_model), expected)
    assert len(kept_sums(peft_model)) == 4


def kept_sums(model: nn.Module) -> list[tuple]:
    """What is kept of every parameter of experts: a key, what was compared, and the sum."""
    kept = [each for m in model.modules() if isinstance(m, ExpertsLayer) for each in m._kept.values()]
    return [each._entry for each in kept if each._entry is not None]


def turn_off(model: PeftModel) -> None:
    model.add_adapter("second", configured(named("lorta")[0], MODELS[0], target_parameters=None))
    model.set_adapter("second")
    logits(model)


def delete(model: PeftModel) -> None:
    model.add_adapter("second", configured(named("lorta")[0], MODELS[0], target_parameters=None))
    model.delete_adapter("default")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.get_submodule("base_model.model").double(),
        delete,
        turn_off,
        lambda model: model.train().eval(),
    ],
    ids=["merged", "cast", "deleted", "another is active", "trained"],
)
def test_a_kept_stack_goes_with_what_it_is_the_sum_of(change: Callable[[PeftModel], object]):
    model = adapted(named("lorta")[0], MODELS[0])
    logits(model)
    assert kept_sums(model)
    change(model)
    assert not kept_sums(model)


def test_a_kept_stack_is_that_of_the_active_adapter_among_those_of_equal_numbers():
    case = named("flora")[0]
    model = adapted(case, MODELS[0])
    perturb(model)
    model.add_adapter("second", configured(case, MODELS[0], alpha=2 * case.arguments["alpha"]))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for key, tensor in tensors.items():
            if ".second." in key:
                tensor.copy_(tensors[key.replace(".second.", ".default.")])
    logits(model)
    model.set_adapter("second")
    found = logits(model)
    assert torch.equal(found, logits(model.train().eval()))


def test_a_kept_stack_outlives_a_look_at_the_base():
    model = adapted(named("lorta")[0], MODELS[0])
    logits(model)
    before = kept_sums(model)
    with model.disable_adapter():
        logits(model)
    assert all(now is then for now, then in zip(kept_sums(model), before, strict=True))


@pytest.mark.parametrize("case", named("dota", "lotr", "superlora", "lora-pt", "tcur-lora"), ids=lambda case: case.name)
def test_factors_that_experts_share_are_not_compared_by_each(case: Case):
    model = adapted(case, MODELS[0])
    logits(model)
    experts = [module for module in model.modules() if isinstance(module, ExpertsLayer)]
    updates = [x.updates["default"] for e in experts for name in e._kept for x in e.layers(name)]
    own = sum(tensor.numel() for update in updates for tensor in (*update.parameters(), *update.buffers()))
    entries = kept_sums(model)
    samples = sum(matrix.numel() for entry in entries for part in diagonals(entry[2]) for matrix in part)
    assert sum(tensor.numel() for entry in entries for tensor in entry[1]) <= own + samples


@over_model_cases
def test_gradients_are_those_of_a_dense_twin(model: Model, case: Case):
    """In float64, but for what transformers computes in float32; and the same with checkpointed blocks."""
    peft_model = adapted(case, model).double().train()
    peft_model.set_experts_implementation("eager")  # the others know no float64
    perturb(peft_model)
    twin = copy.deepcopy(peft_model).merge_and_unload().requires_grad_(True)
    batch = {"input_ids": tokens(), "labels": tokens()}
    twin(**batch).loss.backward()
    layers = {name: module for name, module in peft_model.base_model.model.named_modules() if is_adapted(module)}
    assert len([name for name in layers if "experts" in name]) >= 8
    products = [(layers[name].get_delta_weight("default") * gradient_at(twin, name)).sum() for name in layers]
    sum(products).backward()
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad.clone() for parameter in parameters]
    peft_model.zero_grad()
    peft_model(**batch).loss.backward()
    for parameter, gradient in zip(parameters, gradients):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())
    if case.name not in ("dota", "lorta"):
        return
    gradients = [parameter.grad.clone() for parameter in parameters]
    peft_model.enable_input_require_grads()
    for use_reentrant in (False, True):
        peft_model.zero_grad()
        peft_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        peft_model(**batch).loss.backward()
        for parameter, gradient in zip(parameters, gradients):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, TensorLayer)


def gradient_at(twin: nn.Module, name: str) -> torch.Tensor:  # (out, in)
    """The gradient of a weight of a model without adapters: of a layer, or of an expert by its layer's name."""
    if ".experts." not in name:
        return twin.get_submodule(name).weight.grad
    module, index, parameter = name.rsplit(".", 2)
    experts = twin.get_submodule(module)
    gradient = getattr(experts, parameter).grad[int(index)]
    return gradient.T if experts.is_transposed else gradient


@over_merging_cases
def test_several_adapters_add_up_and_do_not_touch_each_other(case: Case):
    model = MODELS[1]
    peft_model = adapted(case, model)
    perturb(peft_model)
    first = logits(peft_model)
    peft_model.add_adapter("second", configured(case, model, target_modules=[], target_parameters=TARGETS[1:]))
    assert torch.equal(logits(peft_model), first)
    peft_model.set_adapter("second")
    perturb(peft_model, seed=5)
    second = logits(peft_model)
    assert not torch.allclose(second, first)
    peft_model.base_model.set_adapter(["default", "second"])
    both = logits(peft_model)
    experts = peft_model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    weight = experts.base_layer.down_proj.detach().clone()
    for index, layer in enumerate(experts.layers("down_proj")):
        weight[index] += layer.get_delta_weight("default") + layer.get_delta_weight("second")
    peft_model.merge_adapter()
    assert torch.allclose(experts.base_layer.down_proj, weight, atol=1e-5)
    assert torch.allclose(logits(peft_model), both, atol=MERGED_TOLERANCE)
    peft_model.unmerge_adapter()
    peft_model.set_adapter("default")
    assert torch.equal(logits(peft_model), first)
    peft_model.delete_adapter("default")
    peft_model.set_adapter("second")
    assert torch.equal(logits(peft_model), second)


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=lambda case: case.name)
def test_the_kept_sum_follows_every_change(case: Case):
    peft_model = adapted(case, MODELS[0])
    peft_model.set_experts_implementation("eager")  # the others know no float64
    logits(peft_model)
    for change in (
        perturb,
        lambda m: nn.init.ones_(m.get_submodule("base_model.model.model.layers.1.mlp.experts").base_layer.down_proj),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
    ):
        change(peft_model)
        kept = logits(peft_model)
        assert torch.equal(logits(peft_model), kept)
        assert torch.equal(logits(copy.deepcopy(peft_model).train().eval()), kept)


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=lambda case: case.name)
def test_half_precision_experts_start_exactly_and_merge_to_the_same_bits(case: Case):
    model = MODELS[0]
    expected = logits(model.fresh().bfloat16())
    config = configured(case, model, target_modules=[])
    peft_model = get_peft_model(model.fresh().bfloat16(), config).eval()
    assert torch.equal(logits(peft_model), expected)
    perturb(peft_model)
    before = logits(peft_model)
    assert torch.equal(peft_model(input_ids=tokens()).logits, before)  # with gradients
    peft_model.merge_adapter()
    assert torch.equal(logits(peft_model), before)


def test_a_mixed_batch_is_refused_where_experts_are_adapted():
    peft_model = adapted(CASES[0], MODELS[0])
    peft_model.add_adapter("layers", configured(CASES[0], MODELS[0], target_parameters=None))
    with pytest.raises(ValueError, match="adapter_names` with default: experts see tokens"):
        logits(peft_model, adapter_names=["default", "layers", "__base__"])
    logits(peft_model, adapter_names=["layers", "layers", "__base__"])
    assert torch.equal(logits(peft_model, adapter_names=["__base__"] * 3), logits(MODELS[0].fresh()))
    alone = adapted(CASES[0], MODELS[0], target_modules=[])
    alone.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        logits(alone, adapter_names=["__base__"] * 3)


def test_keys_name_the_experts(tmp_path):
    peft_model = adapted(CASES[0], MODELS[1], target_modules=[], target_parameters=["experts.down_proj"])
    keys = {key.rpartition(".dota_update.")[0] for key, p in peft_model.named_parameters() if p.requires_grad}
    assert keys == {f"base_model.model.model.layers.0.mlp.experts.{k}.down_proj" for k in range(4)}
    loaded = MODELS[1].fresh()
    peft_model.save_pretrained(tmp_path)
    perturb(peft_model)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded.eval()), logits(MODELS[1].fresh()))


def test_all_linear_says_what_it_leaves_out():
    model = MODELS[1].fresh()
    size = 4 * (16 * 24 + 24 * 8)
    with pytest.warns(UserWarning, match=rf"leaves out 2 parameters of experts with {size:,} numbers: {TARGETS[0]}"):
        get_peft_model(model, DotaConfig(r=2, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(MODELS[1].fresh(), DotaConfig(r=2, target_modules="all-linear", target_parameters=TARGETS))


@pytest.mark.parametrize("names", [["q_proj", "gate_proj", "up_proj", "down_proj"], ["q_proj", "experts.w1"]])
def test_names_of_layers_that_experts_had_say_what_they_leave_out(names: list[str]):
    """PEFT makes parameters of them, for LoRA alone."""
    model = MODELS[1].fresh()
    old = ", ".join(sorted(set(names) - {"q_proj"}))
    with pytest.warns(UserWarning, match=rf"target_modules={old} adapts linear layers, which leaves out 2 parameters"):
        get_peft_model(model, DotaConfig(r=2, target_modules=names))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(MODELS[1].fresh(), DotaConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["experts.gate_proj"],
            "no parameter of the model is called 'experts.gate_proj'; its experts' are experts.dow",
        ),
        (["gate.weight"], r"mlp.gate.weight is a Parameter \(3, 24\).*expected a plain parameter"),
        (["q_proj.weight"], "The weight of a layer is adapted with target_modules"),
    ],
)
def test_what_is_no_stack_of_weights_is_refused_by_name(targets: list[str], message: str):
    model = MODELS[0].fresh()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, DotaConfig(r=2, target_modules=["q_proj"], target_parameters=targets))
    assert [name for name, _ in model.named_modules()] == before


def test_experts_of_8_bits_are_refused():
    """Their scales are somewhere else: what lies there is no weight."""
    model = MODELS[0].fresh()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"experts\.down_proj is a Parameter .* of torch.float8_e4m3fn"):
        get_peft_model(model, configured(CASES[0], MODELS[0]))


def test_a_network_behind_a_layer_has_no_experts():
    model = MODELS[0].fresh()
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj: LorettaAdapterConfig puts a network behind a layer"):
        get_peft_model(model, LorettaAdapterConfig(target_modules=[], target_parameters=["experts.down_proj"]))
    assert torch.equal(logits(model), logits(MODELS[0].fresh()))


def test_layers_and_names_can_be_left_out():
    model = MODELS[0]
    for fields in ({"layers_to_transform": [1]}, {"exclude_modules": ["0.mlp.experts"]}):
        peft_model = adapted(CASES[0], model, target_modules=[], target_parameters=TARGETS[1:], **fields)
        names = {name.split(".")[4] for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
        assert names == {"1"}


def test_narrow_experts_are_projections_of_the_hidden_states():
    """Qwen3-MoE's experts are narrower than its hidden states: the hidden layer is not the wider side."""
    peft_model = adapted(named("lorta")[0], MODELS[1])
    shared = peft_model.base_model.model.shared_lorta.updates["default"]
    assert shared.sizes["mlp"] == {"A": 24, "B": 8, "C_L": 4, "C_M": 3}


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=lambda case: case.name)
def test_a_full_state_dict_goes_over_a_fresh_base(case: Case):
    peft_model = adapted(case, MODELS[0])
    perturb(peft_model)
    torch.manual_seed(9)
    restored = get_peft_model(MODELS[0].build(), configured(case, MODELS[0])).eval()
    restored.load_state_dict(peft_model.state_dict())
    assert torch.equal(logits(restored), logits(peft_model))
    if case.name == "dota":  # whose start shows which base it is for
        other = {k: t for k, t in peft_model.state_dict().items() if not k.endswith("base_layer.down_proj")}
        with pytest.raises(ValueError, match="this adapter was started from another base model"):
            get_peft_model(MODELS[0].build(), configured(case, MODELS[0])).load_state_dict(other, strict=False)


def test_what_knows_layers_alone_says_so(tmp_path):
    model = MODELS[0]
    with pytest.raises(ValueError, match=r"experts\.0\.gate_up_proj: an expert that is a part of a parameter"):
        to_lora(adapted(CASES[7], model, target_modules=[]), tmp_path)
    config = configured(CASES[0], model)
    with pytest.raises(ValueError, match="a residual base is made of linear layers"):
        quantize_residual(model.fresh(), config)
    with pytest.raises(ValueError, match="a PeftMixedModel adapts layers alone"):
        get_peft_model(model.fresh(), config, mixed=True)


def test_another_adapter_around_the_experts_is_named():
    lora = get_peft_model(MODELS[0].fresh(), LoraConfig(target_modules=[], target_parameters=TARGETS, lora_dropout=0))
    with pytest.raises(ValueError, match=r"mlp\.experts is wrapped by another adapter \(ParamWrapper\) already"):
        get_peft_model(lora.base_model.model, configured(CASES[0], MODELS[0]))


def test_the_map_names_every_expert(capsys):
    print_tensor_map(MODELS[1].fresh(), configured(CASES[7], MODELS[1], target_modules=[]))
    shown = capsys.readouterr().out
    assert "LOTR: 2 tensors, 8 weights" in shown
    assert "model.layers.0.mlp.experts.3.down_proj" in shown


def test_rows_of_gate_and_up_alternate_where_the_model_says_so():
    """GPT-OSS stores them so: what is one projection's must not reach the other's rows."""
    case = named("lorta-no-start")[0]
    for model, rows in ((MODELS[2], slice(1, None, 2)), (MODELS[0], slice(48, None))):
        peft_model = adapted(case, model)
        shared = peft_model.base_model.model.shared_lorta.updates["default"]
        nn.init.zeros_(shared.mlp_C_M[1])  # of the up-projections
        delta = peft_model.get_submodule("base_model.model.model.layers.1.mlp.experts.2.gate_up_proj").get_delta_weight(
            "default"
        )
        zero = (delta == 0).all(1)
        assert zero[rows].all()
        assert zero.sum() == len(delta) // 2


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=lambda case: case.name)
def test_forwards_in_several_threads_do_not_mix_up_the_parameters(case: Case):
    peft_model = adapted(case, MODELS[0])
    perturb(peft_model)
    rows = [tokens(seed=seed) for seed in range(4)]
    wanted = [logits(peft_model, part) for part in rows]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            peft_model.train()  # what evaluation keeps is freed
            peft_model.eval()
            assert all(map(torch.equal, threads.map(lambda part: logits(peft_model, part), rows), wanted))
    names = [name for name, _ in peft_model.named_parameters() if name.endswith("experts.base_layer.down_proj")]
    assert len(names) == 2
