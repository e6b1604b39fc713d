"""GGUF files of adapters and merged models: as transformers reads them, and as llama.cpp runs them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cases import MODELS, logits, over_merging_cases, perturb, tiny_llama
from evaluation.evaluated import word_tokenizer
from loading.tiny_gguf import TEMPLATE, tensors, write
from tensorpeft import DotaConfig, FactConfig, FloraConfig, LortaConfig, LotrConfig
from tensorpeft.export import to_dense, to_gguf_lora, to_gguf_model, to_lora
from tensorpeft.loading.names import resolve
from tensorpeft.networks.update import AbstractFactoredUpdate
from tensorpeft.plugin.layer import TensorLayer
from tensorpeft.quantization import quantize_residual
from tensorpeft.reports.folders import sole_writer
from tensorpeft_cli import main

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from engines import LlamaCpp
from engines import greedy as greedy_but

STORIES = Path(os.environ.get("TENSORPEFT_DATA", "../shared")) / "models" / "stories260K"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ROPE = {"rope_theta": 500_000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama 3.1": (
        LlamaForCausalLM,
        LlamaConfig,
        {"head_dim": 32, "rope_parameters": ROPE | {"original_max_position_embeddings": 32}},
    ),
    "llama, linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 2.0}},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 128}),  # transformers reads files with no other
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    ),
}
pytestmark = pytest.mark.usefixtures("cache_folder")
TEXT = "hello world, 12 wolves held 345 hollow wells"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama as a GGUF file that was not written by what is tested."""
    return write(tmp_path_factory.mktemp("base") / "base.gguf", tensors(tied=True))


def adapted(base: str | Path, config, folder: Path, scale: float = 1.0) -> PeftModel:
    """A model with an adapter that changes much, saved too."""
    torch.manual_seed(0)  # the tolerances are for one adapter, whatever ran before
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    perturb(model, scale=scale)
    model.save_pretrained(folder)
    return model


def other_base(name: str, folder: Path) -> Path:
    model_class, config_class, more = ARCHITECTURES[name]
    tokenizer = AutoTokenizer.from_pretrained(resolve(write(folder / "tokens.gguf", tensors(tied=True))))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 256, "vocab_size": len(tokenizer) + 3}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = model_class(config_class(**sizes | more))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def read(file: Path) -> tuple[dict, dict]:
    """Fields and dequantised tensors."""
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {each.name: gguf.dequantize(each.data, each.tensor_type) for each in reader.tensors}


def neighbours(rows: int, heads: int) -> list[int]:
    """The rows of a projection in the order in which llama.cpp turns them by pairs."""
    dim = rows // heads
    return [head * dim + half * dim // 2 + k for head in range(heads) for k in range(dim // 2) for half in range(2)]


@over_merging_cases
def test_the_product_of_a_layer_s_factors_is_its_update(case, tmp_path):
    model = get_peft_model(tiny_llama(), case.make(target_modules=TARGETS))
    perturb(model)
    layers = {k: m for k, m in model.get_base_model().named_modules() if isinstance(m, TensorLayer)}
    is_exact = all(isinstance(layer.updates["default"], AbstractFactoredUpdate) for layer in layers.values())
    exported = to_gguf_lora(model, tmp_path / "lora.gguf", rank=None if is_exact else 16)
    assert [layer.name for layer in exported] == list(layers)
    fields, factors = read(tmp_path / "lora.gguf")
    assert (fields["general.architecture"], fields["general.type"]) == ("llama", "adapter")
    assert fields["adapter.type"] == "lora"
    names = dict(zip(TARGETS, ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"]))
    assert len(factors) == 2 * len(layers) == 2 * 2 * len(TARGETS)
    for layer in exported:
        _, _, number, _, projection = layer.name.split(".")
        stored = f"blk.{number}.{names[projection]}.weight"
        down, up = (torch.tensor(factors[f"{stored}.lora_{k}"]) for k in "ab")
        alpha = fields["adapter.lora.alpha"]
        product = up @ down * (alpha / len(down) if alpha else 1)  # llama.cpp's
        update = layers[layer.name].get_delta_weight("default").detach()
        if heads := {"q_proj": 4, "k_proj": 2}.get(projection):
            update = update[neighbours(len(update), heads)]
        assert ((product - update).norm() / update.norm()).item() == pytest.approx(layer.error, rel=1e-3, abs=1e-5)


def test_an_adapter_is_what_merging_it_adds_to_the_base_s_file(base, tmp_path):
    config = LortaConfig(r=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = adapted(resolve(base), config, tmp_path / "adapter")
    to_gguf_lora(tmp_path / "adapter", tmp_path / "lora.gguf")
    to_gguf_model(tmp_path / "adapter", tmp_path / "merged.gguf", outtype="f32")
    factors, merged, before = (read(path)[1] for path in (tmp_path / "lora.gguf", tmp_path / "merged.gguf", base))
    assert merged.keys() == before.keys()
    for name, weight in merged.items():
        pair = [factors.pop(f"{name}.lora_{k}", None) for k in "ba"]
        product = pair[0] @ pair[1] if pair[0] is not None else 0 * weight
        torch.testing.assert_close(torch.tensor(weight - before[name]), torch.tensor(product), atol=2e-6, rtol=1e-4)
    assert not factors
    read_again = AutoModelForCausalLM.from_pretrained(resolve(tmp_path / "merged.gguf")).eval()
    torch.testing.assert_close(logits(read_again), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name != "llama 3.1"]
)  # transformers does not read rope_freqs.weight
def test_transformers_reads_a_merged_file_as_the_merged_model(name, tmp_path):
    model = adapted(other_base(name, tmp_path), DotaConfig(r=4, num_cores=3, target_modules=TARGETS), tmp_path / "a")
    to_gguf_model(tmp_path / "a", tmp_path / "merged.gguf", outtype="f32")
    plain = resolve(tmp_path / "merged.gguf")
    found = AutoModelForCausalLM.from_pretrained(plain).eval()
    assert found.config.get_text_config().rope_parameters == model.config.rope_parameters or "linear" in name
    expected = to_dense(tmp_path / "a", tmp_path / "dense", torch.float32).state_dict()
    for key, weight in found.state_dict().items():
        torch.testing.assert_close(weight, expected[key], atol=1e-6, rtol=1e-6)
    tokenizer, original = (AutoTokenizer.from_pretrained(each) for each in (plain, tmp_path / "base"))
    if name != "gemma3":  # transformers takes every tokenizer of its files for one after sentencepiece
        assert tokenizer(TEXT).input_ids == original(TEXT).input_ids
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == original.eos_token


def test_a_base_in_four_bits_is_merged_in_full(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = DotaConfig(r=4, num_cores=3, target_modules=["down_proj"], task_type="CAUSAL_LM")
    plain = other_base("qwen2", tmp_path)
    model = quantize_residual(AutoModelForCausalLM.from_pretrained(plain), config)
    model.save_pretrained(plain)
    adapted(plain, config, tmp_path / "a")
    to_gguf_model(tmp_path / "a", tmp_path / "merged.gguf", outtype="f32")
    found, expected = read(tmp_path / "merged.gguf")[1], to_dense(tmp_path / "a", tmp_path / "dense", torch.float32)
    weights = {"ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj"}
    for name, layer in weights.items():
        weight = expected.get_submodule(f"model.layers.1.{layer}").weight.detach()
        assert torch.equal(torch.tensor(found[f"blk.1.{name}.weight"]), weight)


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_numbers_of_a_file_have_its_type(outtype, base, tmp_path):
    adapted(resolve(base), LortaConfig(r=6, target_modules=TARGETS, task_type="CAUSAL_LM"), tmp_path / "adapter")
    types = {}
    for name, more in (("lora", []), ("merged", ["--merged"])):
        for kind in ("f32", outtype):
            file = tmp_path / f"{name}-{kind}.gguf"
            assert main(["export", "gguf", str(tmp_path / "adapter"), str(file), "--outtype", kind, *more]) == 0
            types |= {each.name: each.tensor_type.name.lower() for each in gguf.GGUFReader(file).tensors}
        exact, rounded = (read(tmp_path / f"{name}-{kind}.gguf")[1] for kind in ("f32", outtype))
        for key in exact:
            assert abs(exact[key] - rounded[key]).max() <= abs(exact[key]).max() / 100
    assert types["blk.0.attn_norm.weight"] == "f32"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == outtype
    assert types["blk.0.attn_q.weight.lora_a"] == outtype
    assert types["blk.0.attn_q.weight.lora_b"] == ("f16" if outtype == "q8_0" else outtype)  # its rows are short
    fields = read(tmp_path / f"merged-{outtype}.gguf")[0]
    assert gguf.LlamaFileType(fields["general.file_type"]).name == f"MOSTLY_{outtype.upper()}"


def test_an_update_of_high_rank_is_cut(base, tmp_path, capsys):
    config = DotaConfig(r=6, num_cores=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = adapted(resolve(base), config, tmp_path / "adapter")
    command = ["export", "gguf", str(tmp_path / "adapter"), str(tmp_path / "lora.gguf")]
    assert main(command) == 2
    assert "q_proj: its update has a high rank" in capsys.readouterr().err
    assert main([*command, "--rank", "4"]) == 0
    printed = capsys.readouterr().out
    assert "|ΔW - BA| / |ΔW|" in printed
    assert "2 layers written to" in printed
    factors = read(tmp_path / "lora.gguf")[1]
    assert factors["blk.1.attn_q.weight.lora_a"].shape == (4, 32)
    layer = model.get_base_model().get_submodule("model.layers.1.self_attn.q_proj")
    product = torch.tensor(factors["blk.1.attn_q.weight.lora_b"] @ factors["blk.1.attn_q.weight.lora_a"])
    weight = layer.get_delta_weight("default")
    assert torch.linalg.norm(product) == pytest.approx(torch.linalg.svdvals(weight)[:4].norm().item(), rel=1e-4)


def refusals():
    """Configurations of a tiny Llama that llama.cpp would compute otherwise, and what is said."""
    yolo = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    return [({"hidden_act": "gelu"}, "hidden_act='gelu'.*with 'silu'"), ({"rope_parameters": yolo}, "rope_type='dyn")]


@pytest.mark.parametrize(("more", "message"), refusals())
def test_what_llama_cpp_would_compute_otherwise_is_refused(more, message, tmp_path):
    model = get_peft_model(tiny_llama(**more), LortaConfig(r=2))
    with pytest.raises(ValueError, match=message):
        to_gguf_lora(model, tmp_path / "deep" / "out.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_biases_that_llama_cpp_does_not_read_are_refused(name, tmp_path):
    model_class, config_class, more = ARCHITECTURES[name]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "vocab_size": 64, "attention_bias": True}
    model = get_peft_model(model_class(config_class(**more | sizes)), LortaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=f"attention_bias=True in the configuration: llama.cpp's {name} computes as"):
        to_gguf_lora(model, tmp_path / "out.gguf")


def test_a_base_may_have_moved_and_is_not_written_over(base, tmp_path):
    folder = shutil.copytree(resolve(base), tmp_path / "base")
    adapted(folder, LortaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "adapter")
    to_gguf_lora(tmp_path / "adapter", tmp_path / "first.gguf")
    folder.rename(tmp_path / "moved")
    command = ["export", "gguf", str(tmp_path / "adapter"), str(tmp_path / "second.gguf")]
    assert main(command) == 2
    assert main([*command, "--base", str(tmp_path / "moved")]) == 0
    (_, first), (_, second) = (read(tmp_path / f"{name}.gguf") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)
    file = Path(shutil.copy(base, tmp_path / "base.gguf"))
    for export in (to_gguf_lora, to_gguf_model):
        with pytest.raises(ValueError, match=r"base.gguf is the base, which would be written over"):
            export(tmp_path / "adapter", file, base=str(file))
    assert file.read_bytes() == base.read_bytes()


def test_other_architectures_and_other_weights_are_refused(tmp_path):
    out = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel: no GGUF file of this class.*export lora.*convert_lora_to"):
        to_gguf_lora(get_peft_model(MODELS[1].fresh(), LortaConfig(r=2, target_modules=["c_attn"])), out)
    model = get_peft_model(tiny_llama(), LortaConfig(r=2, modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\].*--merged"):
        to_gguf_lora(model, out)
    model = get_peft_model(tiny_llama(), LortaConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5]))
    with pytest.raises(ValueError, match=r"trainable_token_indices=\[5\].*--merged"):
        to_gguf_lora(model, out)
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), FloraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="lm_head: it is the embedding too"):
        to_gguf_lora(model, out)
    with pytest.raises(ValueError, match="it is a folder, expected the name of a file"):
        to_gguf_lora(model, tmp_path)
    with pytest.raises(ValueError, match="outtype='q4_0': expected f32, f16, bf16, q8_0"):
        to_gguf_lora(model, out, outtype="q4_0")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_older_file(base, tmp_path, capsys):
    adapted(resolve(base), LortaConfig(r=2, task_type="CAUSAL_LM"), tmp_path / "adapter")
    out = tmp_path / "out.gguf"
    out.write_text("older")
    command = ["export", "gguf", str(tmp_path / "adapter"), str(out)]
    word_tokenizer().save_pretrained(tmp_path / "adapter")
    assert main([*command, "--merged"]) == 2
    assert "the tokenizer is WordLevel, expected BPE" in capsys.readouterr().err
    assert main([*command, "--merged", "--rank", "2"]) == 2
    with sole_writer(tmp_path, out.name):
        assert main(command) == 2
        assert "out.gguf: another process is writing to this file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out.gguf"]
    assert out.read_text() == "older"
    assert main(command) == 0
    assert read(out)[0]["general.type"] == "adapter"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out.gguf"]


def test_the_missing_library_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tensorpeft.export.gguf.find_spec", lambda name: None)
    assert main(["export", "gguf", str(tmp_path), str(tmp_path / "out.gguf")]) == 2
    assert 'pip install "tensorpeft[gguf]"' in capsys.readouterr().err


def greedy(model, ids: list[int], count: int) -> list[int]:
    """As llama.cpp was asked: no token that it takes for an end is chosen."""
    return greedy_but(model, ids, count, never=[0, 2])


@pytest.fixture
def engine():
    pytest.importorskip("xllamacpp")
    return LlamaCpp


METHODS = {"lorta": LortaConfig, "lotr": LotrConfig, "fact-tt": FactConfig}


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_llama_cpp_with_the_adapter_tells_what_peft_does(method, base, engine, tmp_path):
    config = METHODS[method](r=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = adapted(resolve(base), config, tmp_path / "a", scale=4.0)
    ids = AutoTokenizer.from_pretrained(resolve(base))(TEXT).input_ids
    expected = greedy(model, ids, 32)
    to_gguf_lora(tmp_path / "a", tmp_path / "lora.gguf")
    assert engine(base, tmp_path / "lora.gguf").greedy(ids, 32) == expected
    assert engine(base).greedy(ids, 32) == greedy(model.unload(), ids, 32) != expected


@pytest.mark.thorough
def test_llama_cpp_takes_layers_of_different_ranks(base, engine, tmp_path):
    config = DotaConfig(r=6, num_cores=3, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = adapted(resolve(base), config, tmp_path / "a")
    ids = AutoTokenizer.from_pretrained(resolve(base))(TEXT).input_ids
    layers = to_gguf_lora(model, tmp_path / "lora.gguf", rank=32)
    assert {layer.rank for layer in layers} == {16, 32}  # all that keys have, and all that the others have
    assert engine(base, tmp_path / "lora.gguf").greedy(ids, 32) == greedy(model, ids, 32)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_tells_what_the_merged_model_does(name, engine, tmp_path):
    config = DotaConfig(r=4, num_cores=3, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = adapted(other_base(name, tmp_path), config, tmp_path / "a")
    to_gguf_model(tmp_path / "a", tmp_path / "merged.gguf", outtype="f32")
    ids = AutoTokenizer.from_pretrained(tmp_path / "base")(TEXT * 3).input_ids
    told = engine(tmp_path / "merged.gguf")
    assert told.tokens(TEXT * 3) == ids
    assert told.greedy(ids, 32) == greedy(model, ids, 32)


@pytest.mark.thorough
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES} (TENSORPEFT_DATA)")
def test_llama_cpp_tells_the_stories_of_a_real_model(engine, tmp_path):
    """With sentencepiece's tokens: the base's file is that of an adapter that does nothing yet."""
    get_peft_model(AutoModelForCausalLM.from_pretrained(STORIES), LortaConfig(r=2)).save_pretrained(tmp_path / "fresh")
    to_gguf_model(tmp_path / "fresh", tmp_path / "base.gguf", outtype="f32")
    text = "Once upon a time, there was a  little\ngirl named Zoë 🙂, and"
    ids = AutoTokenizer.from_pretrained(STORIES)(text).input_ids
    for name, config in {**METHODS, "dota": DotaConfig}.items():
        model = adapted(STORIES, config(r=6, target_modules=TARGETS, task_type="CAUSAL_LM"), tmp_path / name)
        file = tmp_path / f"{name}.gguf"
        if name == "dota":
            to_gguf_model(tmp_path / name, file, outtype="f32")
            told = engine(file)
        else:
            to_gguf_lora(tmp_path / name, file)
            told = engine(tmp_path / "base.gguf", file)
        assert told.tokens(text) == ids
        assert told.greedy(ids, 32) == greedy(model, ids, 32)
    model = adapted(STORIES, LortaConfig(r=6, target_modules=TARGETS, task_type="CAUSAL_LM"), tmp_path / "a", scale=0.3)
    for outtype in ("f16", "bf16", "q8_0"):
        to_gguf_lora(model, tmp_path / "lora.gguf", outtype=outtype)
        to_gguf_model(tmp_path / "a", tmp_path / "merged.gguf", outtype=outtype)
        for told in (engine(tmp_path / "base.gguf", tmp_path / "lora.gguf"), engine(tmp_path / "merged.gguf")):
            assert told.greedy(ids, 6) == greedy(model, ids, 6)


@pytest.mark.thorough
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP: the folder of llama.cpp's source")
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES} (TENSORPEFT_DATA)")
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_a_file_is_that_of_llama_cpp_s_converter(outtype, tmp_path):
    """All tensors to the byte; of the settings all but names, scores, and what is put around a text: tested above."""
    adapted(STORIES, LortaConfig(r=32, target_modules=TARGETS, task_type="CAUSAL_LM"), tmp_path / "adapter")
    to_lora(tmp_path / "adapter", tmp_path / "lora")
    to_dense(tmp_path / "adapter", tmp_path / "dense", torch.float32)
    to_gguf_lora(tmp_path / "adapter", tmp_path / "lora.gguf", outtype=outtype)
    to_gguf_model(tmp_path / "adapter", tmp_path / "dense.gguf", outtype=outtype)
    for script, name, more in (("lora", "lora", ["--base", STORIES]), ("hf", "dense", [])):
        command = [
            sys.executable,
            Path(os.environ["LLAMA_CPP"], f"convert_{script}_to_gguf.py"),
            tmp_path / name,
            *more,
        ]
        theirs = tmp_path / f"{name}-theirs.gguf"
        subprocess.run([*command, "--outfile", theirs, "--outtype", outtype], check=True, capture_output=True)
        ours, theirs = gguf.GGUFReader(tmp_path / f"{name}.gguf"), gguf.GGUFReader(theirs)
        expected = {each.name: (each.tensor_type, list(each.shape), each.data.tobytes()) for each in theirs.tensors}
        assert {
            each.name: (each.tensor_type, list(each.shape), each.data.tobytes()) for each in ours.tensors
        } == expected
        for key, field in theirs.fields.items():
            if not key.startswith(
                ("GGUF", "general.name", "general.size_label", "tokenizer.ggml.add_", "tokenizer.ggml.sc")
            ):
                assert (ours.fields[key].types, ours.fields[key].contents()) == (field.types, field.contents()), key


HARD = "It's  WE'LL\tdon't 1234567 3.14\n\n  x = a[10]; naïve Zoë 🙂 日本語!\r\n   end "
LEARNED = (Path(json.__file__).read_text(encoding="utf-8") + HARD * 9).replace("🙂", "").replace("日", "")
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(cuts: list[pre_tokenizers.PreTokenizer], ignore_merges: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(cuts), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([LEARNED], trainer)
    return backend


def after_sentencepiece(normalizer, pre_tokenizer) -> Tokenizer:
    """As transformers makes one: all pairs of tokens whose union is a token are merges, in the unions' order."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator([LEARNED], trainers.BpeTrainer(vocab_size=900))
    state = json.loads(learned.to_str())["model"]
    unions = dict.fromkeys(left + right for left, right in state["merges"])
    letters = [token for token in state["vocab"] if token not in unions]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256)), *letters, *unions]
    ids = {token: k for k, token in enumerate(vocabulary)}
    splits = [(token[:k], token[k:]) for token in unions for k in range(1, len(token))]
    merges = [split for split in splits if ids.keys() >= set(split)]
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def tokenizers() -> dict[str, Callable[[], Tokenizer]]:
    def isolated(digits: str) -> list[pre_tokenizers.PreTokenizer]:
        split = pre_tokenizers.Split(Regex(WORD % digits), "isolated")
        return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    words, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)
    replace = normalizers.Replace(" ", "▁")
    return {
        "gpt-2": lambda: byte_level([words]),
        "smollm": lambda: byte_level([digits, words]),
        "qwen2": lambda: byte_level(isolated("")),
        "llama-bpe": lambda: byte_level(isolated("{1,3}"), ignore_merges=True),
        "prepended": lambda: after_sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), replace]), None),
        "metaspace": lambda: after_sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        "gemma": lambda: after_sentencepiece(replace, pre_tokenizers.Split(" ", "merged_with_previous")),
    }


@pytest.mark.thorough
@pytest.mark.parametrize("name", tokenizers())
def test_llama_cpp_cuts_texts_into_the_model_s_tokens(name, engine, tmp_path):
    backend = tokenizers()[name]()
    own = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    own.add_tokens(["<note>"])
    get_peft_model(tiny_llama(vocab_size=len(own)), LortaConfig(r=2)).save_pretrained(tmp_path / "adapter")
    tiny_llama(vocab_size=len(own)).save_pretrained(tmp_path / "base")
    own.save_pretrained(tmp_path / "adapter")
    to_gguf_model(tmp_path / "adapter", tmp_path / "merged.gguf", base=str(tmp_path / "base"))
    fields = read(tmp_path / "merged.gguf")[0]
    assert fields["tokenizer.ggml.pre"] == (name if "tokenizer.ggml.merges" in fields else "default")
    told = engine(tmp_path / "merged.gguf")
    # Whether a space follows a token within a text, if sentencepiece's puts one first, versions do not agree on.
    for text in (HARD, "a  b</s>") if name in ("prepended", "metaspace") else (HARD, "<note>12", "a  b</s> c"):
        assert told.tokens(text) == own(text).input_ids, text
    assert len(own(HARD).input_ids) < 0.8 * len(HARD)  # there is something to merge
