"""An exported adapter is a LoRA like any other: read by a process that has never heard of us."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from cases import MODELS, logits, perturb, tiny_llama
from commanded import fill
from tensorpeft import DotaConfig, FactConfig, FloraConfig, LortaConfig, LotrConfig
from tensorpeft.export import ExportCheck, ExportedLayer, check_export, distil, start_commands, to_delta, to_lora
from tensorpeft_cli import main

STORIES = Path(os.environ.get("TENSORPEFT_DATA", "../shared")) / "models" / "stories260K"
LOW_RANK = {
    "lorta": lambda **more: LortaConfig(r=6, **more),
    "lotr": lambda **more: LotrConfig(r=6, **more),
    "fact-tt": lambda **more: FactConfig(r=6, **more),
    "fact-tk": lambda **more: FactConfig(r=6, core="tk", **more),
}
BASES = {
    "grouped-query-llama": (tiny_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    "gpt2": (MODELS[1].build, ["c_attn", "c_fc"]),
}
READER = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for base, adapter in zip(sys.argv[1::2], sys.argv[2::2]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        save_file({"logits": model(input_ids=torch.arange(3, 24).view(3, 7)).logits}, adapter + "/logits.safetensors")
assert not any(name.startswith("tensorpeft") for name in sys.modules)
"""
over_low_rank = pytest.mark.parametrize("method", LOW_RANK)


def saved_base(build, folder: Path) -> Path:
    torch.manual_seed(0)
    build().save_pretrained(folder)
    return folder


def adapted(base: Path, config) -> PeftModel:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    perturb(model)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """By base and method: the logits of our model, and those that a process of plain PEFT computed from the export."""
    folder = tmp_path_factory.mktemp("exported")
    places = {base: (saved_base(build, folder / base), targets) for base, (build, targets) in BASES.items()}
    if STORIES.is_dir():
        places["stories260K"] = (STORIES, ["q_proj", "v_proj", "o_proj", "up_proj"])
    inputs = torch.arange(3, 24).view(3, 7)
    expected, arguments = {}, []
    for (base, (path, targets)), (method, make) in product(places.items(), LOW_RANK.items()):
        model = adapted(path, make(target_modules=targets, task_type="CAUSAL_LM"))
        layers = to_lora(model, folder / base / method)
        assert all(layer.error == 0 for layer in layers)
        expected[base, method] = logits(model, inputs)
        assert (expected[base, method] - logits(model.unload(), inputs)).abs().max() > 1e-3  # it has an effect
        arguments += [str(path), str(folder / base / method)]
    command = [sys.executable, "-c", READER, *arguments]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return {
        key: (logits, load_file(folder.joinpath(*key) / "logits.safetensors")["logits"])
        for key, logits in expected.items()
    }


@over_low_rank
@pytest.mark.parametrize("base", [*BASES, "stories260K"])
def test_plain_peft_computes_the_same_logits(base: str, method: str, exported):
    if base == "stories260K" and not STORIES.is_dir():
        pytest.skip(f"no model at {STORIES} (TENSORPEFT_DATA)")
    expected, found = exported[base, method]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@over_low_rank
def test_a_saved_adapter_is_exported_without_its_base_s_weights(method: str, tmp_path: Path):
    path = saved_base(tiny_llama, tmp_path / "base")
    model = adapted(path, LOW_RANK[method](target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    to_lora(model, tmp_path / "from-model")
    (path / "model.safetensors").unlink()
    assert main(["export", "lora", str(tmp_path / "adapter"), str(tmp_path / "from-path")]) == 0
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("from-path", "from-model"))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_the_checkpoint_follows_the_servers_rules(tmp_path: Path):
    """What vLLM's PEFTHelper and LoRAModel, and llama.cpp's convert_lora_to_gguf, ask of a checkpoint."""
    model = adapted(
        saved_base(tiny_llama, tmp_path / "base"), LortaConfig(r=12, target_modules=["q_proj", "down_proj"])
    )
    to_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 12
    assert config["bias"] == "none"
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert not config["rank_pattern"]
    assert "base_model: " in (tmp_path / "lora" / "README.md").read_text()
    assert not config["alpha_pattern"]
    assert not config["layers_to_transform"]
    assert config["target_modules"] == ["down_proj", "q_proj"]  # names without a dot: vLLM compares the last part
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    shapes = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(model\.layers\.\d+\.\w+\.\w+)\.lora_([AB])\.weight", key)
        assert match, key
        shapes[match.groups()] = tensor.shape
    assert len(shapes) == 2 * 4
    for layer, _ in shapes:
        assert shapes[layer, "A"][0] == shapes[layer, "B"][1] == 12
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_layers_that_share_a_name_with_others_are_named_in_full(tmp_path: Path):
    path = saved_base(MODELS[2].build, tmp_path / "base")
    bert = MODELS[2].fresh()
    config = LotrConfig(r=3, target_modules=r".*attention\.output\.dense|.*layer\.1\.intermediate\.dense")
    model = get_peft_model(bert, config).eval()
    model.peft_config["default"].base_model_name_or_path = str(path)
    perturb(model)
    to_lora(model, tmp_path / "lora")
    found = PeftModel.from_pretrained(MODELS[2].fresh(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-5)
    adapted = {name for name, module in found.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 3


def test_saved_modules_come_along(tmp_path: Path):
    model = MODELS[2]
    peft_model = get_peft_model(
        model.fresh(), LotrConfig(r=3, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    ).eval()
    perturb(peft_model)
    with torch.no_grad():
        peft_model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    with pytest.warns(UserWarning, match="modules_to_save"):
        to_lora(peft_model, tmp_path)
    found = PeftModel.from_pretrained(model.fresh(), tmp_path).eval()
    torch.testing.assert_close(logits(found), logits(peft_model), atol=1e-5, rtol=1e-5)


def test_what_an_engine_refuses_is_said_instead_of_its_command(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for name, fields in (("in full", {"modules_to_save": ["lm_head"]}), ("tokens", {"trainable_token_indices": [5]})):
        base = AutoModelForCausalLM.from_pretrained("base")
        get_peft_model(base, LortaConfig(r=2, target_modules=["q_proj"], **fields)).save_pretrained(name)
        with pytest.warns(UserWarning, match=next(iter(fields))):
            assert main(["export", "lora", name, f"{name} out"]) == 0
        printed = capsys.readouterr().out
        assert f"vLLM      refuses {next(iter(fields))}: serve the merged model, tensorpeft export dense" in printed
        assert re.search(r"llama.cpp tensorpeft export gguf .* OUT.gguf --merged\n", printed)
        assert "vllm serve" not in printed
        for form in ("gguf", "delta"):
            assert main(["export", form, name, "nowhere"]) == 2
            assert re.search(rf"{next(iter(fields))}=.*[Mm]erge", capsys.readouterr().err)
        assert not Path("nowhere").exists()


def test_only_the_layers_to_transform_are_in_the_file(tmp_path: Path):
    model = adapted(
        saved_base(lambda: tiny_llama(num_hidden_layers=3), tmp_path / "base"),
        LotrConfig(r=3, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]),
    )
    to_lora(model, tmp_path / "lora")
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {int(re.findall(r"layers\.(\d+)", key)[0]) for key in keys} == {0, 2}
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-5)


def dota(base: nn.Module) -> PeftModel:
    model = get_peft_model(base, DotaConfig(r=6, num_cores=3, target_modules=MODELS[0].targets)).eval()
    perturb(model)
    return model


def test_dota_is_cut_to_a_rank_with_the_error_of_every_layer(tmp_path: Path, capsys):
    model = dota(MODELS[0].fresh())
    model.peft_config["default"].base_model_name_or_path = str(saved_base(tiny_llama, tmp_path / "base"))
    errors = {rank: [layer.error for layer in to_lora(model, tmp_path / str(rank), rank=rank)] for rank in (4, 16)}
    assert all(0 < low < high < 1 for high, low in zip(errors[4], errors[16], strict=True))
    # The best approximation of that rank, and the error that is really made.
    layer = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    weight = layer.get_delta_weight("default").double()
    values = torch.linalg.svdvals(weight)
    assert errors[4][0] == pytest.approx((values[4:].norm() / values.norm()).item(), rel=1e-4)
    found = PeftModel.from_pretrained(MODELS[0].fresh(), tmp_path / "4").get_base_model()
    lora = found.get_submodule("model.layers.0.self_attn.q_proj").get_delta_weight("default")
    assert ((lora - weight).norm() / weight.norm()).item() == pytest.approx(errors[4][0], rel=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    command = ["export", "lora", str(tmp_path / "adapter"), str(tmp_path / "cli"), "--rank", "4", "--no-check"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in printed
    assert f"{errors[4][0]:.2%}" in printed
    assert f"--max-lora-rank 8 --lora-modules cli={tmp_path / 'cli'}" in printed


def test_every_layer_has_the_least_rank_that_keeps_an_energy(tmp_path: Path):
    model = dota(MODELS[0].fresh())
    model.peft_config["default"].base_model_name_or_path = str(saved_base(tiny_llama, tmp_path / "base"))
    layers = to_lora(model, tmp_path / "lora", energy=0.8)
    assert len({layer.rank for layer in layers}) > 1
    for layer in layers:
        assert layer.error <= 0.2**0.5 + 1e-5
        delta = model.get_base_model().get_submodule(layer.name).get_delta_weight("default")
        kept = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
        assert layer.rank == int((kept < 0.8).sum()) + 1
    found = PeftModel.from_pretrained(MODELS[0].fresh(), tmp_path / "lora").get_base_model()
    for layer in layers:  # alpha / r is 1 in all of them
        adapted = found.get_submodule(layer.name)
        (down,), (up,) = (list(factors.values()) for factors in (adapted.lora_A, adapted.lora_B))
        torch.testing.assert_close(adapted.get_delta_weight("default"), up.weight @ down.weight)
        assert len(down.weight) == layer.rank


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float16), (torch.bfloat16, torch.bfloat16)])
def test_a_base_in_16_bits_gets_factors_in_16_bits_and_their_error_is_told(tmp_path: Path, dtype, expected):
    torch.manual_seed(0)
    base = tiny_llama().to(torch.bfloat16)
    base.config.dtype = torch.bfloat16
    model = get_peft_model(base, LortaConfig(r=5, target_modules=["q_proj", "down_proj"]))
    perturb(model)
    for parameter in model.parameters():  # factors of sizes far apart, as trained ones are
        parameter.data.mul_(1e-3 if parameter.requires_grad and parameter.shape[0] == 1 else 1.0)
    layers = to_lora(model, tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    for layer in layers:
        down, up = (tensors[f"base_model.model.{layer.name}.lora_{k}.weight"].double() for k in "AB")
        delta = model.get_base_model().get_submodule(layer.name).updates["default"].matrix().double()
        error = ((up @ down - delta).norm() / delta.norm()).item()
        assert layer.error == pytest.approx(error, rel=1e-2)
        assert 0 < layer.error < (1e-3 if expected is torch.float16 else 1e-2)


def test_an_update_of_nothing_in_16_bits_has_no_error(tmp_path: Path):
    base = tiny_llama().to(torch.bfloat16)
    base.config.dtype = torch.bfloat16
    model = get_peft_model(base, LortaConfig(r=5, target_modules=["q_proj"]))  # not trained yet
    assert [layer.error for layer in to_lora(model, tmp_path)] == [0.0, 0.0]


def test_a_module_without_a_configuration(tmp_path: Path):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), FloraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="does not say which base model"):
        (layer,) = to_lora(model, tmp_path)
    assert (layer.name, layer.rank, layer.error) == ("0", 2, 0)


def test_factors_that_a_dtype_does_not_hold_are_refused(tmp_path: Path):
    model = get_peft_model(tiny_llama(), LortaConfig(r=5, target_modules=["q_proj"]))
    perturb(model)
    next(p for p in model.parameters() if p.requires_grad).data.fill_(1e30)
    with pytest.raises(ValueError, match=r"q_proj: a factor is NaN, or not within what torch.float16 holds"):
        to_lora(model, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its tokenizer, a text, and DoTA adapters with and without a tokenizer beside them."""
    torch.manual_seed(0)
    folder = fill(tmp_path_factory.mktemp("place"))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        base.lm_head.weight.mul_(20)  # it knows what it says
    base.save_pretrained(folder / "base")
    model = dota(AutoModelForCausalLM.from_pretrained(folder / "base"))
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(folder / "dota")
    shutil.copytree(
        folder / "base", folder / "with_tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "config*")
    )
    shutil.copytree(folder / "dota", folder / "with_tokenizer", dirs_exist_ok=True)
    (folder / "text.txt").write_text("\n".join(f"w{k} w{k + 1} w5 w6 w{k}" for k in range(12)), encoding="utf-8")
    return folder


def test_what_an_export_lost_is_measured_on_text(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["export", "lora", "dota", "cut", "--rank", "24"]) == 0
    printed = capsys.readouterr().out
    check = check_export("dota", "cut")
    for text in (
        f"{check.base:.4f}",
        f"{check.adapter:.4f}",
        f"{check.export:.4f}",
        f"{check.kept:.1%} of the adapter's",
    ):
        assert text in printed
    assert 1000 < check.tokens <= 32 * 64  # some texts end
    assert check.adapter < check.base  # on text of its own
    # By hand, on a person's text.
    of_file = check_export("dota", "cut", text=Path("text.txt"))
    tokenizer = AutoTokenizer.from_pretrained("base")
    rows = [tokenizer(line, return_tensors="pt").input_ids for line in Path("text.txt").read_text().splitlines()]
    base = AutoModelForCausalLM.from_pretrained("base")
    models = {"base": base, "adapter": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "dota")}
    models["export"] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "cut")
    predicted = {}
    for name, model in models.items():
        log_probs = [model.eval()(input_ids=row).logits[0, :-1].log_softmax(-1) for row in rows]
        targets = torch.cat([row[0, 1:] for row in rows])
        loss = -torch.cat(log_probs)[torch.arange(len(targets)), targets].mean()
        assert getattr(of_file, name) == pytest.approx(loss.item(), rel=1e-5)
        predicted[name] = torch.cat(log_probs).argmax(-1)
    assert of_file.tokens == len(targets)
    agreement = (predicted["export"] == predicted["adapter"]).double().mean().item()
    assert of_file.export_agreement == pytest.approx(agreement)


def test_a_delta_is_measured_on_text_and_added_to_its_base(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["export", "delta", "dota", "delta", "--bits", "4"]) == 0
    printed = capsys.readouterr().out
    check = check_export("dota", "delta")
    assert f"{check.export:.4f}" in printed
    assert f"{check.kept:.1%} of the adapter's gain" in printed
    assert check.kept > 0.9
    assert f"load_delta(base, '{Path('delta').absolute()}')" in printed
    assert main(["export", "delta", "dota", "unmeasured", "--no-check"]) == 0
    assert "loss" not in capsys.readouterr().out
    assert main(["export", "delta", "dota", "odd", "--bits", "5"]) == 2
    assert main(["export", "delta", "dota", "odd", "--no-check", "--force"]) == 2
    assert not Path("odd").exists()


@pytest.mark.parametrize("words", [["lora", "--rank", "2"], ["delta", "--bits", "4"]], ids=["lora", "delta"])
def test_an_export_that_is_worse_than_its_base_is_refused_unless_forced(words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command, out = ["export", words[0], "dota", f"worse-{words[0]}", *words[1:]], Path(f"worse-{words[0]}")
    worse = ExportCheck(100, base=2.0, adapter=1.0, export=2.5, base_agreement=0.5, export_agreement=0.4)
    monkeypatch.setattr("tensorpeft.export.check_export", lambda *given: worse)
    assert main(command) == 1
    told = capsys.readouterr()
    assert "the export's loss is 2.5000, that of the base alone 2.0000" in told.err
    assert "-50.0% of the adapter's gain" in told.out
    assert not out.exists()
    assert main([*command, "--force"]) == 0
    assert list(out.glob("*.safetensors"))
    no_gain = ExportCheck(100, base=2.0, adapter=2.1, export=2.5, base_agreement=0.5, export_agreement=0.4)
    assert not no_gain.is_worse_than_base


def test_a_cut_export_is_distilled_towards_the_adapter(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["export", "lora", "dota", "cut", "--rank", "4", "--no-check", "--dtype", "float16"]) == 0
    shutil.copytree("cut", "distilled")
    losses = list[float]()
    distil("dota", "distilled", Path("text.txt"), steps=30, on_step=losses.append)
    assert losses[-1] < 0.7 * losses[0]
    before, after = (load_file(f"{name}/adapter_model.safetensors") for name in ("cut", "distilled"))
    assert {key: (t.shape, t.dtype) for key, t in before.items()} == {
        key: (t.shape, t.dtype) for key, t in after.items()
    }
    losses_after = list[float]()
    distil("dota", "distilled", Path("text.txt"), steps=1, on_step=losses_after.append)  # the first batch, as written
    assert losses_after[0] < 0.7 * losses[0]
    capsys.readouterr()
    assert main(["export", "lora", "dota", "again", "--rank", "4", "--distil", "text.txt", "--force"]) == 0
    assert "before --distil" in capsys.readouterr().out
    assert main(["export", "lora", "adapter", "exact", "--distil", "text.txt"]) == 2


def test_a_tokenizer_beside_the_adapter_comes_along(place, monkeypatch):
    monkeypatch.chdir(place)
    for name, has_tokenizer in (("dota", False), ("with_tokenizer", True)):
        to_lora(name, f"of_{name}", rank=2)
        assert Path(f"of_{name}/tokenizer_config.json").is_file() == has_tokenizer


def test_errors_say_what_to_do(tmp_path: Path, capsys):
    model = dota(MODELS[0].fresh())
    with pytest.raises(ValueError, match=r"q_proj: its update has a high rank.*--rank.*--energy"):
        to_lora(model, tmp_path / "out")
    with pytest.raises(ValueError, match="rank 513: expected 1 to 512"):
        to_lora(model, tmp_path / "out", rank=513)
    with pytest.raises(ValueError, match=r"rank=4 and energy=0.9: expected one of them"):
        to_lora(model, tmp_path / "out", rank=4, energy=0.9)
    with pytest.raises(ValueError, match=r"energy=1.5: expected a share"):
        to_lora(model, tmp_path / "out", energy=1.5)
    with pytest.raises(ValueError, match="no layer has an adapter 'other'"):
        to_lora(model, tmp_path / "out", adapter_name="other")
    lorta = get_peft_model(MODELS[0].fresh(), LortaConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="rank=8: this adapter has low rank"):
        to_lora(lorta, tmp_path / "out", rank=8)
    plain = get_peft_model(MODELS[0].fresh(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"'default' is an adapter of PEFT's own \(LORA\), expected one of tensorpeft"):
        to_lora(plain, tmp_path / "out")
    with pytest.raises(ValueError, match=r"energy=0\.5: this adapter has low rank"):
        to_lora(lorta, tmp_path / "out", energy=0.5)
    lorta.save_pretrained(tmp_path / "nameless")
    assert main(["export", "lora", str(tmp_path / "nameless"), str(tmp_path / "out")]) == 2
    assert "names no base model. Load the adapter on its model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_commands_that_are_printed_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    pytest.importorskip("gguf")
    Path("as_if_moved").symlink_to("base")
    for more in (["--rank", "3"], ["--energy", "0.4"], ["--rank", "3", "--base", "as_if_moved"]):
        assert main(["export", "lora", "dota", "printed", *more, "--no-check"]) == 0
        (line,) = re.findall(r"llama.cpp tensorpeft (.*)", capsys.readouterr().out)
        assert line.endswith(" ".join(more))
        assert main(line.split()) == 0
    assert Path("OUT.gguf").is_file()
    saved_base(MODELS[1].build, Path("gpt2"))
    gpt2 = AutoModelForCausalLM.from_pretrained("gpt2")
    get_peft_model(gpt2, LortaConfig(r=2, target_modules=["c_attn"])).save_pretrained("of_gpt2")
    capsys.readouterr()
    assert main(["export", "lora", "of_gpt2", "lora_of_gpt2"]) == 0
    assert "llama.cpp" not in capsys.readouterr().out


def test_distillation_trains_the_cut_factors_alone(place, monkeypatch):
    monkeypatch.chdir(place)
    config = DotaConfig(r=6, num_cores=3, target_modules=MODELS[0].targets, modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config).eval()
    perturb(model)
    model.save_pretrained("with_head")
    with pytest.warns(UserWarning, match="modules_to_save"):
        to_lora("with_head", "head_cut", 2)
    before = load_file("head_cut/adapter_model.safetensors")
    distil("with_head", "head_cut", Path("text.txt"), steps=2)
    after = load_file("head_cut/adapter_model.safetensors")
    assert {key for key, tensor in before.items() if not torch.equal(tensor, after[key])} == {
        key for key in before if "lora_" in key
    }
    assert "base_model.model.lm_head.weight" in before


def test_an_encoder_without_a_task_is_loaded_by_peft_s_auto_class_and_not_asked_for_tokens(tmp_path, capsys):
    saved_base(lambda: MODELS[2].build().bert, tmp_path / "bert")
    config = DotaConfig(r=4, num_cores=3, target_modules=["query"])
    model = get_peft_model(AutoModel.from_pretrained(tmp_path / "bert"), config).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    to_lora(model, tmp_path / "from-model", 4)
    adapter = str(tmp_path / "adapter")
    assert main(["export", "lora", adapter, str(tmp_path / "from-path"), "--rank", "4"]) == 0
    assert main(["export", "delta", adapter, str(tmp_path / "delta")]) == 0
    assert "loss" not in capsys.readouterr().out
    ids = torch.arange(3, 10)[None]
    for name in ("from-model", "from-path"):
        loaded = AutoPeftModel.from_pretrained(tmp_path / name).eval()
        assert type(loaded.get_base_model()) is type(model.get_base_model())
        assert loaded(input_ids=ids).last_hidden_state.isfinite().all()


def test_an_adapted_head_comes_without_the_base_s(tmp_path):
    path = saved_base(tiny_llama, tmp_path / "base")
    model = adapted(path, FloraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    for source in (model, tmp_path / "adapter"):
        to_lora(source, tmp_path / "lora")
        assert all(".lora_" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
        found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "lora").eval()
        torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-5)


def test_a_layer_whose_name_ends_another_s_keeps_its_own_rank(tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(fc=nn.Linear(16, 16), block=nn.Sequential(OrderedDict(fc=nn.Linear(16, 32)))))

    model = get_peft_model(net(), DotaConfig(r=4, num_cores=2, target_modules=["fc"])).eval()
    perturb(model)
    x = torch.randn(3, 16)
    for energy in (0.3, 0.6, 0.9):
        with pytest.warns(UserWarning, match="does not say which base model"):
            ranks = {layer.name: layer.rank for layer in to_lora(model, tmp_path, energy=energy)}
        found = PeftModel.from_pretrained(net(), tmp_path).eval()
        for name, rank in ranks.items():
            assert len(found.get_base_model().get_submodule(name).lora_A["default"].weight) == rank
        assert found(x).isfinite().all()
    assert len(set(ranks.values())) == 2


def test_the_base_s_revision_comes_along(place, monkeypatch):
    monkeypatch.chdir(place)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), LortaConfig(r=2), revision="v2")
    to_lora(model, "pinned")
    assert json.loads(Path("pinned/adapter_config.json").read_text())["revision"] == "v2"
    layers = [ExportedLayer("q_proj", 2, 0.0)]
    assert "vllm serve base --revision v2 --enable-lora" in dict(start_commands(layers, "pinned"))["vLLM"]
    for fields in ({"base_model_name_or_path": None}, {"auto_mapping": {"base_model_class": "Mystery"}}):
        written = json.loads(Path("pinned/adapter_config.json").read_text())
        shutil.copytree("pinned", "unknown", dirs_exist_ok=True)
        Path("unknown/adapter_config.json").write_text(json.dumps(written | fields))
        assert [engine for engine, _ in start_commands(layers, "unknown")] == ["PEFT", "vLLM", "SGLang"]
    model.save_pretrained("of_v2")
    to_lora("of_v2", "moved", base=str(place / "base"))  # which need not have that revision
    assert json.loads(Path("moved/adapter_config.json").read_text())["revision"] is None


def test_an_adapter_of_a_residual_base_is_exported_from_its_folder(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    from tensorpeft.quantization import quantize_residual

    config = DotaConfig(r=4, num_cores=3, target_modules=MODELS[0].targets, task_type="CAUSAL_LM")
    quantize_residual(tiny_llama(), config).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    model = adapted(tmp_path / "base", config)
    model.save_pretrained(tmp_path / "adapter")
    to_lora(model, tmp_path / "lora", 4)
    to_delta(model, tmp_path / "delta")
    for form, *more in (["lora", "--rank", "4"], ["delta"]):
        out = tmp_path / f"{form}-of-folder"
        assert main(["export", form, str(tmp_path / "adapter"), str(out), *more, "--no-check"]) == 0
        (file,) = out.glob("*.safetensors")
        expected, found = load_file(tmp_path / form / file.name), load_file(file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert "vllm" not in capsys.readouterr().out  # which has no such base
    quantize_residual(tiny_llama(), config, rounds=3).save_pretrained(tmp_path / "other")
    tiny_llama().save_pretrained(tmp_path / "plain")
    for base in ("other", "plain"):
        with pytest.raises(ValueError, match=r"q_proj: this adapter was trained on (the|a) residual base"):
            to_lora(tmp_path / "adapter", tmp_path / "out", 4, base=str(tmp_path / base))
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"start.core_1: the checkpoint of this residual base lacks it"):
        to_lora(tmp_path / "adapter", tmp_path / "out", 4)
