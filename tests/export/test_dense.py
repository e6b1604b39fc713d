"""An adapter and its base as one plain model, from the folders alone."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from cases import MODELS, Model, logits, over_models, perturb, tiny_llama, tokens
from evaluation.evaluated import word_tokenizer
from tensorpeft import DotaConfig, LortaConfig
from tensorpeft.export import to_delta, to_dense, to_lora
from tensorpeft_cli import main


def config_of(model: Model) -> DotaConfig:
    return DotaConfig(r=6, num_cores=3, target_modules=model.targets, task_type=model.task_type)


def saved(model: Model, config, folder, quantised: bool) -> torch.Tensor:
    """Save a base and a trained adapter of it; the adapted model's output."""
    base = model.fresh()
    if quantised:
        from tensorpeft.quantization import quantize_residual

        base = quantize_residual(base, config_of(model))
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    adapted = get_peft_model(base, config).eval()
    perturb(adapted)
    adapted.save_pretrained(folder / "adapter")
    return logits(adapted)


@over_models
def test_a_residual_base_and_its_adapter_become_one_plain_model(model: Model, tmp_path):
    pytest.importorskip("bitsandbytes")
    expected = saved(model, config_of(model), tmp_path, quantised=True)
    to_dense(tmp_path / "adapter", tmp_path / "dense", torch.float32)
    dense = type(model.fresh()).from_pretrained(tmp_path / "dense").eval()
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in model.fresh().named_parameters()]
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float32}
    assert torch.allclose(logits(dense), expected, atol=2e-6)
    assert not hasattr(dense.config, "quantization_config")


@pytest.mark.parametrize("config", [LortaConfig, LoraConfig])
def test_other_methods_on_a_plain_base(config, tmp_path):
    model = MODELS[0]
    expected = saved(model, config(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path, quantised=False)
    to_dense(tmp_path / "adapter", tmp_path / "dense", torch.float32)
    dense = type(model.fresh()).from_pretrained(tmp_path / "dense").eval()
    assert torch.allclose(logits(dense), expected, atol=2e-6)


def test_the_command_writes_sixteen_bits(tmp_path, capsys):
    model = MODELS[0]
    saved(model, config_of(model), tmp_path, quantised=False)
    assert main(["export", "dense", str(tmp_path / "adapter"), str(tmp_path / "dense")]) == 0
    dense = type(model.fresh()).from_pretrained(tmp_path / "dense")
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}
    assert "bfloat16 written to" in capsys.readouterr().out


def test_an_adapter_of_another_base_is_refused(tmp_path):
    model = MODELS[0]
    saved(model, config_of(model), tmp_path, quantised=False)
    torch.manual_seed(5)
    model.build().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another base model"):
        to_dense(tmp_path / "adapter", tmp_path / "dense", base=str(tmp_path / "other"))
    assert not (tmp_path / "dense").exists()


def test_an_adapter_that_names_no_base_is_refused(tmp_path):
    model = MODELS[0]
    adapted = get_peft_model(model.fresh(), LortaConfig(target_modules=["q_proj"]))
    assert isinstance(adapted, PeftModel)
    adapted.peft_config["default"].base_model_name_or_path = None
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="names no base model"):
        to_dense(tmp_path / "adapter", tmp_path / "dense")


@pytest.mark.parametrize("config", [LortaConfig, LoraConfig])
@pytest.mark.parametrize("has_residual", [False, True], ids=["nf4", "residual"])
def test_another_method_is_not_quantised_with_the_base_again(config, has_residual, tmp_path):
    pytest.importorskip("bitsandbytes")
    from tensorpeft.quantization import quantize_residual

    model = MODELS[0]
    base = quantize_residual(model.fresh(), config_of(model) if has_residual else None)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base").eval()
    before = logits(base)
    adapted = get_peft_model(base, config(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")).eval()
    perturb(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    to_dense(tmp_path / "adapter", tmp_path / "dense", torch.float32)
    dense = type(base).from_pretrained(tmp_path / "dense").eval()
    effect, error = (logits(adapted) - before).norm(), (logits(dense) - logits(adapted)).norm()
    assert effect > 0.02
    assert error < 1e-4 * effect


def test_an_adapter_of_the_base_class_is_not_lost_in_one_with_a_head(tmp_path):
    """The folder's own class has other names for the same layers."""
    model = MODELS[2]
    model.fresh().save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base").eval()
    adapted = get_peft_model(base, DotaConfig(r=6, num_cores=3, target_modules=model.targets)).eval()
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    to_dense(tmp_path / "adapter", tmp_path / "dense", torch.float32)
    dense = AutoModel.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        expected, found = (each(input_ids=tokens()).last_hidden_state for each in (adapted, dense))
    assert torch.allclose(found, expected, atol=2e-6)


def test_a_base_that_lacks_weights_is_refused_and_an_adapter_s_own_head_is_none_of_them(tmp_path):
    model = MODELS[0]
    saved(model, config_of(model), tmp_path, quantised=False)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"base: no weights model.layers.1.mlp.down_proj.weight in its files"):
        to_dense(tmp_path / "adapter", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    bert = MODELS[2]
    expected = saved(bert, config_of(bert), tmp_path / "bert", quantised=False)
    file = tmp_path / "bert" / "base" / "model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(file).items() if not key.startswith("classifier")}
    save_file(tensors, file, metadata={"format": "pt"})
    dense = to_dense(tmp_path / "bert" / "adapter", tmp_path / "bert" / "dense", torch.float32)
    assert torch.allclose(logits(dense.eval()), expected, atol=2e-6)


def quantised(folder, **how):
    """A base that transformers itself has quantised, saved and loaded again."""
    torch.manual_seed(0)
    # Sizes that bitsandbytes can repack, as it does on a CPU with AVX-512 BF16: multiples of a block of 64.
    tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(folder / "plain")
    how = BitsAndBytesConfig(**how)
    base = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=how, device_map="cpu")
    base.save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def test_a_base_that_transformers_saved_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = quantised(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    adapted = get_peft_model(base, LortaConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")).eval()
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    to_dense(tmp_path / "adapter", tmp_path / "dense", torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert dense.dtype == torch.float32
    torch.testing.assert_close(logits(dense), logits(adapted).float(), atol=3e-2, rtol=3e-2)


def test_a_base_in_8_bits_is_refused_before_anything_of_it_is_changed(tmp_path):
    pytest.importorskip("bitsandbytes")
    from tensorpeft.quantization import dequantize

    base = quantised(tmp_path, load_in_8bit=True)
    adapted = get_peft_model(base, LortaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Bnb8BitHfQuantizer \(bitsandbytes\).*Load the base without quantisation"):
        to_dense(tmp_path / "adapter", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    with pytest.raises(ValueError, match="expected bitsandbytes' 4 bits"):
        dequantize(plain := adapted.unload(), torch.float32)
    assert plain.config.quantization_config.load_in_8bit
    assert plain.hf_quantizer is not None


def rows(folder, template=None) -> None:
    """A tokenizer beside an adapter or a model."""
    tokenizer = word_tokenizer(bos=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def test_no_form_is_written_where_another_is_nor_over_what_it_is_made_of(tmp_path):
    model = MODELS[0]
    adapted = get_peft_model(model.fresh(), config_of(model)).eval()
    saved(model, config_of(model), tmp_path, quantised=False)
    adapter, base, out = tmp_path / "adapter", tmp_path / "base", tmp_path / "out"
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    forms = {
        "lora": lambda source, out: to_lora(source, out, 2),
        "delta": to_delta,
        "dense": lambda source, out: to_dense(adapter, out, torch.float32),
    }
    for form, export in forms.items():
        for own, message in ((adapter, r"an adapter \(DOTA\)"), (base, "a model")):
            for source in (adapter, adapted):
                before = {path.name: path.read_bytes() for path in own.iterdir()}
                with pytest.raises(ValueError, match=f"{own.name} holds {message}, which would be written over"):
                    export(source, own)
                assert {path.name: path.read_bytes() for path in own.iterdir()} == before
        export(adapter, out / form)
        export(adapter, out / form)  # the same form again
    kinds = {"lora": r"an adapter \(LORA\)", "delta": "a delta", "dense": "a model"}
    for form, export in forms.items():
        for other in kinds.keys() - {form}:
            with pytest.raises(ValueError, match=f"{other} holds {kinds[other]}, which would be written over"):
                export(adapter, out / other)


def test_a_base_in_32_bits_is_rounded_once(tmp_path):
    model = MODELS[0]
    saved(model, LortaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path, quantised=False)
    to_dense(tmp_path / "adapter", tmp_path / "exact", torch.float32)
    to_dense(tmp_path / "adapter", tmp_path / "dense", torch.bfloat16)
    exact, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "dense"))
    assert exact.keys() == dense.keys()
    for key, tensor in exact.items():
        assert torch.equal(dense[key], tensor.to(torch.bfloat16)), key


def test_what_transformers_keeps_in_float32_is_not_rounded(tmp_path):
    sizes = {"vocab_size": 96, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    more = {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 6, "moe_intermediate_size": 16, "n_group": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 1, "topk_group": 1, "first_k_dense_replace": 1}
    base = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **more, **experts))
    bias = torch.tensor([3.001, 3.002, 3.003, 3.004])
    base.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").copy_(bias)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    get_peft_model(base, LortaConfig(target_modules=["o_proj"])).save_pretrained(tmp_path / "adapter")
    to_dense(tmp_path / "adapter", tmp_path / "dense", torch.bfloat16)
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert torch.equal(tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias"), bias)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_of_an_earlier_tokenizer_nothing_is_left(tmp_path):
    model = MODELS[0]
    saved(model, config_of(model), tmp_path, quantised=False)
    for template in ({"default": "{{ 'OLD' }}", "tool": "{{ 'TOOL' }}"}, "{{ 'OLD' }}", None):
        shutil.rmtree(tmp_path / "adapter" / "additional_chat_templates", ignore_errors=True)
        (tmp_path / "adapter" / "chat_template.jinja").unlink(missing_ok=True)
        rows(tmp_path / "adapter", template)
        for name, export in (("dense", to_dense), ("lora", lambda adapter, out: to_lora(adapter, out, 2))):
            export(tmp_path / "adapter", tmp_path / name)
            assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == template


def test_a_damaged_tokenizer_beside_the_adapter_is_not_replaced_by_the_base_s(tmp_path):
    model = MODELS[0]
    saved(model, config_of(model), tmp_path, quantised=False)
    rows(tmp_path / "base")
    to_dense(tmp_path / "adapter", tmp_path / "dense")
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    rows(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("{")
    for export in (to_dense, lambda adapter, out: to_lora(adapter, out, 2)):
        with pytest.raises(ValueError, match="adapter: its tokenizer cannot be loaded"):
            export(tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
