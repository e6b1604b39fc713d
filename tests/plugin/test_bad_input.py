"""Every wrong input ends in an error that names the place, the value and the remedy, and leaves the model as it was."""

import json
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from cases import CASES, MODELS, logits, perturb, tiny_llama
from tensorpeft import DotaConfig

LLAMA = MODELS[0]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def model() -> nn.Module:
    return LLAMA.fresh()


@pytest.fixture
def unchanged(model: nn.Module):
    """After the test: the model runs as before, with the modules, trainability and attributes it had."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    trainable = [(name, p.requires_grad) for name, p in model.named_parameters()]
    yield
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in trainable]
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model), logits(LLAMA.fresh()))


@pytest.fixture
def saved(tmp_path):
    """A folder with a trained adapter for the tiny Llama."""
    peft_model = get_peft_model(LLAMA.fresh(), CASES[0].make(target_modules=LLAMA.targets))
    perturb(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, r"r=0: expected a whole number of at least 1"),
        ({"r": -3}, r"r=-3"),
        ({"r": 2.5}, r"r=2.5"),
        ({"num_cores": 1}, r"num_cores=1: expected a whole number of at least 2"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"init_weights": "svd"}, r"init_weights='svd': expected True, \"balanced\", \"random\" or False"),
        ({"num_cores": 2, "modes": {24: [5, 5]}}, r"modes\[24\]=\[5, 5\]: expected 2 modes.*product 24.*product 25"),
        ({"num_cores": 3, "modes": {24: [4, 6]}}, r"modes\[24\]=\[4, 6\]: expected 3 modes.*got 2"),
        ({"layers_pattern": "layers", "target_modules": ["q_proj"]}, r"layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, r"regular expression"),
        ({"target_modules": "["}, r"target_modules='\[': expected a regular expression, but unterminated"),
    ],
)
def test_impossible_configuration(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DotaConfig(**arguments)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["no_such_layer"], NoMatchingPeftModuleError, "no_such_layer"),
        (
            ["embed_tokens", "q_proj"],
            ValueError,
            r"model.embed_tokens: cannot adapt a Embedding, expected a linear layer",
        ),
        (["q_proj", "mlp"], ValueError, r"layers.0.mlp: cannot adapt a LlamaMLP.*target_modules"),
        (["q_proj", "norm"], ValueError, r"norm: cannot adapt a LlamaRMSNorm"),
    ],
)
def test_impossible_target(model: nn.Module, targets: list[str], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        get_peft_model(model, DotaConfig(target_modules=targets))


@pytest.mark.usefixtures("unchanged")
def test_weight_that_is_not_finite(model: nn.Module):
    weight = model.get_submodule("model.layers.1.self_attn.q_proj").weight
    kept = weight.detach().clone()
    weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj: .*finite"):
        get_peft_model(model, DotaConfig(target_modules=["q_proj"]))
    weight.data.copy_(kept)


def test_attention_that_never_calls_its_projection():
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match=r"0.out_proj: .*MultiheadAttention"):
        get_peft_model(attention, DotaConfig(target_modules=["out_proj"], num_cores=2))


def test_unmatched_second_adapter_leaves_the_first(model: nn.Module):
    peft_model = get_peft_model(model, CASES[0].make(target_modules=LLAMA.targets)).eval()
    perturb(peft_model)
    before = logits(peft_model)
    with pytest.raises(ValueError, match="Embedding"):
        peft_model.add_adapter("second", CASES[0].make(target_modules=["q_proj", "embed_tokens"]))
    assert list(peft_model.peft_config) == ["default"]
    assert torch.equal(logits(peft_model), before)


@pytest.mark.usefixtures("unchanged")
def test_truncated_checkpoint(model: nn.Module, saved):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: not a complete safetensors file .*again"):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.usefixtures("unchanged")
def test_file_that_is_no_checkpoint(model: nn.Module, saved):
    (saved / WEIGHTS).write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.usefixtures("unchanged")
def test_pickle_is_never_loaded(model: nn.Module, saved):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    (saved / WEIGHTS).unlink()
    torch.save(Bomb(), saved / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle.*save_pretrained"):
        PeftModel.from_pretrained(model, saved)


def test_checkpoint_for_another_shape(saved):
    torch.manual_seed(0)
    wider = tiny_llama(hidden_size=32).eval()
    before = logits(wider)
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj: core_1 is .* in the checkpoint, expected .*r, num_cores"
    ):
        PeftModel.from_pretrained(wider, saved)
    assert torch.equal(logits(wider), before)
    assert not any("dota" in name for name, _ in wider.named_modules())


def test_checkpoint_of_another_base(saved):
    torch.manual_seed(123)
    other = tiny_llama().eval()
    before = logits(other)
    with pytest.raises(ValueError, match=r"q_proj: .*another base"):
        PeftModel.from_pretrained(other, saved)
    assert torch.equal(logits(other), before)
    assert not hasattr(other, "peft_config")


def test_checkpoint_of_another_nameless_module_is_told(tmp_path):
    config = {"target_modules": ["0"], "num_cores": 2, "r": 4}
    get_peft_model(nn.Sequential(nn.Linear(12, 12)), DotaConfig(**config)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="another base"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 12)), tmp_path)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("lost", ["core_2", "start_1"])
def test_incomplete_checkpoint(model: nn.Module, saved, lost: str):
    tensors = load_file(saved / WEIGHTS)
    key = next(key for key in tensors if "layers.1" in key and key.endswith(lost))
    del tensors[key]
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(ValueError, match=rf"layers.1.*not \['{lost}'\].*incomplete"):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.usefixtures("unchanged")
def test_checkpoint_with_more_than_its_configuration_says(model: nn.Module, saved):
    config = DotaConfig(**{**CASES[0].arguments, "init_weights": False}, target_modules=LLAMA.targets)
    config.save_pretrained(saved)
    with pytest.raises(ValueError, match=r"\['start_1', 'start_2', 'start_3'\].*another configuration"):
        PeftModel.from_pretrained(model, saved)


def test_refused_second_checkpoint_leaves_the_first(model: nn.Module, saved):
    peft_model = PeftModel.from_pretrained(model, saved).eval()
    before = logits(peft_model)
    tensors = load_file(saved / WEIGHTS)
    save_file({k: v[..., :1].contiguous() if k.endswith("core_2") else v for k, v in tensors.items()}, saved / WEIGHTS)
    with pytest.raises(ValueError, match="core_2 is"):
        peft_model.load_adapter(saved, "second")
    assert list(peft_model.peft_config) == ["default"]
    assert torch.equal(logits(peft_model), before)


def test_broken_adapter_is_not_merged(model: nn.Module):
    peft_model = get_peft_model(model, CASES[0].make(target_modules=LLAMA.targets)).eval()
    layer = peft_model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    next(iter(layer.updates["default"].parameters())).data[0] = float("nan")
    weights = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
            merge(safe_merge=True)
        found = dict(model.named_parameters())
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
        assert not any(getattr(module, "merged_adapters", []) for module in model.modules())


def test_loading_without_the_import_says_so_in_the_model_card(saved):
    card = ModelCard.load(saved / "README.md")
    method = json.loads((saved / "adapter_config.json").read_text())["peft_type"].lower()
    assert {"tensorpeft", method} <= set(card.data.tags)
    assert "import tensorpeft" in card.text.split("# Model Card")[0]
    script = f"""
from peft import PeftConfig
try:
    PeftConfig.from_pretrained({str(saved)!r})
except Exception as error:
    print("without:", error)
import tensorpeft
print("with:", PeftConfig.from_pretrained({str(saved)!r}).peft_type)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"without: .*DOTA.*\nwith: .*DOTA", result.stdout, flags=re.DOTALL)


def test_the_card_that_a_trainer_writes_anew_says_so_too(tmp_path):
    model = get_peft_model(LLAMA.fresh(), CASES[0].make(target_modules=LLAMA.targets))
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))
    trainer.save_model()
    trainer.create_model_card()
    assert "import tensorpeft" in ModelCard.load(tmp_path / "README.md").text


def test_prime_sizes_are_told():
    model = nn.Sequential(nn.Linear(31, 12))
    with pytest.warns(UserWarning, match=r"31 is prime.*modes=\{31"):
        peft_model = get_peft_model(model, DotaConfig(target_modules=["0"]))
    assert torch.equal(peft_model(torch.ones(2, 31)), model[0].base_layer(torch.ones(2, 31)))
