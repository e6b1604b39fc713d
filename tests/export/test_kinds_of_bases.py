"""Exports of adapters whose base is no plain decoder, or not as its files have it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertForSequenceClassification,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from cases import logits, perturb, tiny_bert, tiny_llama, tokens
from evaluation.evaluated import word_tokenizer
from tensorpeft import DotaConfig, FloraConfig, LortaConfig, load_delta
from tensorpeft.export import start_commands, to_delta, to_dense, to_gguf_lora, to_lora
from tensorpeft.loading.adapters import load_model

IN_FULL = r"embeddings=\['embed_tokens', 'lm_head'\]: .* Merge the adapter into its base instead"


def save(model: nn.Module, config: PeftConfig, folder: Path) -> PeftModel:
    """A trained adapter, in evaluation mode, and its folder."""
    adapted = get_peft_model(model, config).eval()
    perturb(adapted)
    adapted.save_pretrained(folder)
    return adapted


def lines(adapter: Path, out: Path) -> dict[str, str]:
    """What is printed for every engine."""
    return dict(start_commands(to_lora(adapter, out), out, None, adapter))


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:.*embedding")
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_vocabulary_that_was_resized_comes_along(is_tied, tmp_path):
    tiny_llama(tie_word_embeddings=is_tied).save_pretrained(tmp_path / "base")
    word_tokenizer(bos=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(99)
    adapted = save(base, LortaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "adapter")
    text = torch.cat([tokens(), torch.full((3, 1), 98)], 1)
    expected, adapter = logits(adapted, text), tmp_path / "adapter"
    found = [
        load_model(str(tmp_path / "base"), str(adapter), None)[0],
        to_dense(adapter, tmp_path / "dense", torch.float32),
    ]
    found.append(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    with pytest.warns(UserWarning, match="embeddings=.* are exported as they are"):
        commands = lines(adapter, tmp_path / "lora")
    found.append(load_model(str(tmp_path / "base"), str(tmp_path / "lora"), None)[0])
    for model in found:
        torch.testing.assert_close(logits(model.eval(), text), expected, atol=1e-5, rtol=1e-5)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (embedding is head) == is_tied
    assert list(commands) == ["PEFT", "vLLM", "llama.cpp"]
    assert commands["vLLM"].startswith("refuses embeddings: serve the merged model, tensorpeft export dense")
    assert commands["llama.cpp"].endswith("--merged")
    pytest.importorskip("gguf")
    for source in (adapter, adapted):
        for export in (to_delta, to_gguf_lora):
            with pytest.raises(ValueError, match=IN_FULL):
                export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_class_gets_no_line_of_a_server(tmp_path):
    """It would serve the bare base, without a word."""
    tiny_llama().save_pretrained(tmp_path / "base")
    config = LortaConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    save(AutoModel.from_pretrained(tmp_path / "base"), config, tmp_path / "adapter")
    commands = lines(tmp_path / "adapter", tmp_path / "lora")
    assert list(commands) == ["PEFT", "vLLM"]
    assert commands["vLLM"] == "serves a LlamaForCausalLM, whose layers a LlamaModel's adapter does not fit"


def test_what_is_no_decoder_gets_no_line_of_a_server(tmp_path):
    t5 = T5Config(vocab_size=96, d_model=24, d_kv=6, d_ff=44, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    tiny_bert().bert.save_pretrained(tmp_path / "bert")
    for name, auto, layer in (("t5", AutoModelForSeq2SeqLM, "q"), ("bert", AutoModel, "query")):
        config = LortaConfig(r=2, target_modules=[layer])
        save(auto.from_pretrained(tmp_path / name), config, tmp_path / "adapter")
        commands = lines(tmp_path / "adapter", tmp_path / f"{name}-lora")
        assert list(commands) == ["PEFT", "vLLM"]
        assert re.match(r"adds no LoRA to a \w+, which is no decoder that writes text: serve", commands["vLLM"])


def test_the_line_for_an_adapted_head_that_is_the_embedding_merges(tmp_path):
    pytest.importorskip("gguf")
    for is_tied in (True, False):
        base = tmp_path / f"base-{is_tied}"
        tiny_llama(tie_word_embeddings=is_tied).save_pretrained(base)
        config = FloraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        save(AutoModelForCausalLM.from_pretrained(base), config, tmp_path / "adapter")
        command = lines(tmp_path / "adapter", tmp_path / "lora")["llama.cpp"]
        assert command.endswith(" --merged") == is_tied
        if is_tied:
            with pytest.raises(ValueError, match=r"lm_head: it is the embedding too.*\(--merged\)"):
                to_gguf_lora(tmp_path / "adapter", tmp_path / "out.gguf")
        else:
            to_gguf_lora(tmp_path / "adapter", tmp_path / "out.gguf")


def tiny_with_images() -> nn.Module:
    torch.manual_seed(0)
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    turns = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    marks = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": turns},
            vision_config={**vision, "fullatt_block_indexes": [0]},
            **marks,
        )
    )


OF_TEXT = r".*language_model.*\.(q_proj|v_proj)"


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_model_with_images_whatever_the_adapter_s_task_is_called(task_type, tmp_path):
    tiny_with_images().save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    expected = logits(save(base, LortaConfig(r=2, target_modules=OF_TEXT, task_type=task_type), adapter))
    commands = lines(adapter, tmp_path / "lora")
    assert commands["vLLM"].startswith("vllm serve")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "lora").eval()), expected)
    to_dense(adapter, tmp_path / "dense", torch.float32)
    dense = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(dense), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_a_residual_base_with_images_is_exported_from_its_folder(tmp_path):
    """Its layers are saved under other names than they have."""
    pytest.importorskip("bitsandbytes")
    from tensorpeft.quantization import dequantize, quantize_residual

    config = DotaConfig(r=4, num_cores=3, target_modules=OF_TEXT)
    quantize_residual(tiny_with_images(), config).save_pretrained(tmp_path / "base")
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted = save(base, config, tmp_path / "adapter")
    to_lora(tmp_path / "adapter", tmp_path / "lora", 32)
    to_delta(tmp_path / "adapter", tmp_path / "delta")
    plain = dequantize(Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "base")).eval()
    found = load_delta(plain, tmp_path / "delta")
    assert (logits(found) - logits(adapted)).norm() < 0.02 * (
        logits(base) - logits(adapted.unload().eval())
    ).norm() + 1e-2
    to_lora(adapted_again(tmp_path), tmp_path / "of-model", 32)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("of-model", "lora"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def adapted_again(folder: Path) -> Any:
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, folder / "adapter")


def test_a_classifier_has_the_labels_that_its_adapter_has(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "with a head of three")
    tiny_bert().bert.save_pretrained(tmp_path / "without a head")
    sizes = {"vocab_size": 96, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    more = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 44}
    BartForSequenceClassification(BartConfig(**sizes, **more)).save_pretrained(tmp_path / "with another kind of head")
    text = torch.cat([tokens(), torch.full((3, 1), 2)], 1)  # ends with what BART looks for
    for base in (path for path in tmp_path.iterdir() if path.name.startswith("with")):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True)
        is_bert = isinstance(model, BertForSequenceClassification)
        targets, heads = (["query"], None) if is_bert else (["q_proj"], ["classification_head"])
        config = LortaConfig(r=2, target_modules=targets, modules_to_save=heads, task_type="SEQ_CLS")
        expected = logits(save(model, config, tmp_path / "adapter"), text)
        with pytest.warns(UserWarning, match="modules_to_save"):
            to_lora(tmp_path / "adapter", tmp_path / "lora")
        to_dense(tmp_path / "adapter", tmp_path / "dense", torch.float32)
        dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
        torch.testing.assert_close(logits(dense, text), expected, atol=1e-5, rtol=1e-5)
    # A head that is not in the adapter stays the base's, of its size.
    base = AutoModel.from_pretrained(tmp_path / "without a head")
    save(base, LortaConfig(r=2, target_modules=["query"]), tmp_path / "headless")
    assert to_dense(tmp_path / "headless", tmp_path / "dense").config.num_labels == 3


def test_a_decoder_that_classifies_knows_its_padding(tmp_path):
    tiny_llama(pad_token_id=None).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    tokenizer = word_tokenizer(bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    config = LortaConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    expected = logits(save(model, config, tmp_path / "adapter"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    to_dense(tmp_path / "adapter", tmp_path / "dense", torch.float32)
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    assert dense.config.pad_token_id == tokenizer.pad_token_id
    torch.testing.assert_close(logits(dense), expected, atol=1e-5, rtol=1e-5)


def test_what_prepares_images_comes_along(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save(model, LortaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "adapter")
    processors = {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / "base" / file).write_text("{}")
    to_dense(tmp_path / "adapter", tmp_path / "dense")
    assert written(tmp_path / "dense") & processors == {"preprocessor_config.json", "video_preprocessor_config.json"}
    (tmp_path / "adapter" / "processor_config.json").write_text('{"of": "the adapter"}')
    to_dense(tmp_path / "adapter", tmp_path / "dense")
    assert written(tmp_path / "dense") & processors == {"processor_config.json"}
