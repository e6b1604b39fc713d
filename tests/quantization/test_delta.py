"""Updates in 8 or 4 bits, added to a base's weights: against an oracle in numpy, and all or nothing."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from cases import MODELS, logits, over_merging_cases, over_models, perturb, tiny_llama
from tensorpeft import DotaConfig, FloraConfig, LortaConfig, load_delta
from tensorpeft.export import to_delta
from tensorpeft.networks.rounded_blocks import Blocks, from_blocks, to_blocks
from tensorpeft.quantization.delta import digest_of


def oracle(matrix: np.ndarray, bits: int) -> np.ndarray:
    """The matrix as `bits` keep it, number by number; bfloat16 by its definition, the upper half of a float32."""
    largest, numbers = 2 ** (bits - 1) - 1, matrix.astype(np.float32).ravel()
    kept = np.zeros_like(numbers)
    for k in range(0, len(numbers), 32):
        block = numbers[k : k + 32]
        whole = np.float32(np.abs(block).max() / np.float32(largest)).view(np.uint32)
        whole = np.uint32((int(whole) + 0x7FFF + ((int(whole) >> 16) & 1)) & 0xFFFF0000)  # nearest, halves to even
        scale = whole.view(np.float32)
        if scale > 0:
            kept[k : k + 32] = np.clip(np.rint(block / scale), -largest, largest) * scale
    return kept.reshape(matrix.shape)


def adapted(model=MODELS[0], config=None, scale: float = 0.3) -> PeftModel:
    config = config or DotaConfig(r=6, num_cores=3, target_modules=model.targets)
    adapted = get_peft_model(model.fresh(), config).eval()
    perturb(adapted, scale=scale)
    return adapted


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(5, 7), (3, 64), (1, 1), (24, 44)])
def test_blocks_are_the_oracle_s(shape, bits):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(-12, 0, shape[1])
    matrix[:, : shape[1] // 2] *= torch.rand(shape[0], shape[1] // 2) < 0.5
    blocks = to_blocks(matrix, bits)
    assert torch.equal(from_blocks(blocks, shape, bits), torch.from_numpy(oracle(matrix.numpy(), bits)))
    assert blocks.values.nbytes == (matrix.numel() * bits + 7) // 8
    assert blocks.scales.nbytes == 2 * ((matrix.numel() + 31) // 32)


def test_a_matrix_of_zeros_and_one_of_the_smallest_numbers_stay_finite():
    for matrix in (torch.zeros(4, 40), torch.full((4, 40), 1e-44), torch.full((4, 40), 3e38)):
        for bits in (8, 4):
            kept = from_blocks(to_blocks(matrix, bits), (4, 40), bits)
            assert kept.isfinite().all()
            assert (kept - matrix).abs().max() <= max(matrix.max() / 100, 1e-38)


@pytest.mark.parametrize("bits", [8, 4])
@over_merging_cases
def test_a_loaded_delta_is_base_and_quantised_update(case, bits, tmp_path):
    model = MODELS[0]
    adapter = adapted(model, case.make(target_modules=model.targets))
    updates = {
        name: layer.get_delta_weight("default").detach().numpy()
        for name, layer in adapter.get_base_model().named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    layers = to_delta(adapter, tmp_path / "delta", bits)
    assert [layer.name for layer in layers] == list(updates)
    base = model.fresh()
    before = weights_of(base)
    assert load_delta(base, tmp_path / "delta") is base
    for layer in layers:
        update = updates[layer.name]
        kept = oracle(update, bits)
        assert layer.error == pytest.approx(np.linalg.norm(kept - update) / np.linalg.norm(update), rel=1e-4)
        expected = before.pop(f"{layer.name}.weight") + torch.from_numpy(kept)
        assert torch.equal(base.get_submodule(layer.name).weight, expected)
    after = base.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (logits(base) - logits(adapter)).abs().max() < (0.02 if bits == 8 else 0.4)


@over_models
def test_every_kind_of_layer_computes_what_the_adapter_does(model, tmp_path):
    adapter = adapted(model)
    to_delta(adapter, tmp_path)
    effect = (logits(model.fresh()) - logits(adapter)).norm()
    assert (logits(load_delta(model.fresh(), tmp_path)) - logits(adapter)).norm() < 0.02 * effect


def test_a_convolution(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last), nn.Linear(6, 5))

    adapter = get_peft_model(build(), FloraConfig(r=3, target_modules=["0", "1"])).eval()
    perturb(adapter)
    to_delta(adapter, tmp_path)
    x = torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        expected, found, plain = (
            each[0](x) for each in (adapter.merge_and_unload(), load_delta(build(), tmp_path), build())
        )
    assert (found - expected).norm() < 0.02 * (plain - expected).norm()


def test_experts_that_are_one_parameter(tmp_path):
    def build():
        torch.manual_seed(0)
        sizes = {"vocab_size": 96, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
        return MixtralForCausalLM(MixtralConfig(**sizes)).eval()

    config = DotaConfig(r=4, num_cores=3, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    adapter = get_peft_model(build(), config).eval()
    perturb(adapter)
    assert len(to_delta(adapter, tmp_path)) == 4
    effect = (logits(build()) - logits(adapter)).norm()
    assert (logits(load_delta(build(), tmp_path)) - logits(adapter)).norm() < 0.02 * effect


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_of_another_dtype_keeps_it_and_no_small_update_is_lost(dtype, tmp_path):
    adapter = adapted(scale=3e-4)  # below a unit in the last place of most weights
    layers = to_delta(adapter, tmp_path)
    base, moved, size = load_delta(MODELS[0].fresh().to(dtype), tmp_path), 0.0, 0.0
    for name in (layer.name for layer in layers):
        before, after = (model.get_submodule(name).weight.detach() for model in (MODELS[0].fresh().to(dtype), base))
        assert after.dtype == dtype
        update = adapter.get_base_model().get_submodule(name).get_delta_weight("default").detach().double()
        moved += ((after.double() - before.double()) * update).sum().item()
        size += update.square().sum().item()
    assert moved / size == pytest.approx(1, abs=0.2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "delta"
    to_delta(adapted(), folder, bits=4)
    return folder


def damage_config(folder: Path, **changes):
    path = folder / "delta_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_tensors(folder: Path, change):
    tensors = load_file(folder / "delta.safetensors")
    change(tensors)
    save_file(tensors, folder / "delta.safetensors")
    damage_config(folder, sha256=digest_of(folder / "delta.safetensors"))


def damage_shapes(folder: Path, change):
    shapes = json.loads((folder / "delta_config.json").read_text())["shapes"]
    change(shapes)
    damage_config(folder, shapes=shapes)


LAST = "model.layers.1.mlp.down_proj"
DAMAGES = {
    "no configuration": (lambda folder: (folder / "delta_config.json").unlink(), "no configuration of a delta"),
    "no json": (lambda folder: (folder / "delta_config.json").write_text("{"), "no configuration of a delta"),
    "a list": (lambda folder: (folder / "delta_config.json").write_text("[]"), "no configuration of a delta"),
    "a newer format": (lambda folder: damage_config(folder, format_version=2), "Install a newer one"),
    "other bits": (lambda folder: damage_config(folder, bits=8), r"expected \(576,\) of torch.int8"),
    "no bits": (lambda folder: damage_config(folder, bits=3), "bits 8 or 4"),
    "no shapes": (lambda folder: damage_config(folder, shapes={}), "a digest and shapes"),
    "odd shapes": (lambda folder: damage_config(folder, shapes={"a": 3}), "no configuration of a delta"),
    "no tensors": (lambda folder: (folder / "delta.safetensors").unlink(), "not a complete safetensors file"),
    "truncated": (
        lambda folder: (folder / "delta.safetensors").write_bytes((folder / "delta.safetensors").read_bytes()[:-9]),
        "not a complete safetensors file",
    ),
    "a bit": (
        lambda folder: (folder / "delta.safetensors").write_bytes(
            (folder / "delta.safetensors").read_bytes()[:-1] + b"!"
        ),
        "its SHA-256 is",
    ),
    "one tensor less": (
        lambda folder: damage_tensors(folder, lambda tensors: tensors.pop(f"{LAST}.scales")),
        f"such as {LAST}.scales",
    ),
    "one too short": (
        lambda folder: damage_tensors(folder, lambda t: t.update({f"{LAST}.scales": t[f"{LAST}.scales"][:-1].clone()})),
        r"scales is \(32,\)",
    ),
    "an infinite scale": (
        lambda folder: damage_tensors(folder, lambda tensors: tensors[f"{LAST}.scales"].fill_(torch.inf)),
        "W . ΔW is not finite",
    ),
    "another name": (
        lambda folder: damage_shapes(folder, lambda shapes: shapes.update(nowhere=shapes.pop(LAST))),
        "has no layer nowhere",
    ),
    "another shape": (
        lambda folder: damage_shapes(folder, lambda shapes: shapes.update({LAST: [44, 24]})),
        r"its weight is \(24, 44\), and the delta's \(44, 24\)",
    ),
    "a name of no layer": (
        lambda folder: damage_shapes(folder, lambda shapes: shapes.update({"model.norm": [1, 24]})),
        "model.norm: a LlamaRMSNorm, expected a linear layer",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_for_another_model_changes_nothing(damage, saved, tmp_path):
    change, message = DAMAGES[damage]
    folder = tmp_path / "delta"
    shutil.copytree(saved, folder)
    change(folder)
    model = MODELS[0].fresh()
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        load_delta(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    load_delta(model, saved)  # and it can be loaded still


def test_a_delta_is_not_added_twice(saved):
    model = load_delta(MODELS[0].fresh(), saved)
    for again in (model, copy.deepcopy(model)):
        before = weights_of(again)
        with pytest.raises(ValueError, match=r"has been added to this model already. Load the base anew"):
            load_delta(again, saved)
        assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_models_that_no_delta_is_added_to(saved, tmp_path):
    model = get_peft_model(MODELS[0].fresh(), LortaConfig(r=2, target_modules=["o_proj"]))
    for each in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="the model has adapters"):
            load_delta(each, saved)
    with torch.device("meta"), pytest.raises(ValueError, match="on the meta device"):
        load_delta(tiny_llama(), saved)
    with pytest.raises(ValueError, match="has no layer"):
        load_delta(nn.Sequential(nn.Linear(3, 3)), saved)
    tied = DotaConfig(r=4, num_cores=3, target_modules=["lm_head"])
    untied = get_peft_model(tiny_llama(), tied)
    perturb(untied)
    to_delta(untied, tmp_path / "head")
    with pytest.raises(ValueError, match=r"its weight is that of .*embed_tokens.*merge_and_unload"):
        load_delta(tiny_llama(tie_word_embeddings=True), tmp_path / "head")
    # Nor is one written that could not be added.
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(model).from_pretrained(tmp_path / "base"), tied)
    model.save_pretrained(tmp_path / "adapter")
    for source in (model, tmp_path / "adapter"):
        with pytest.raises(ValueError, match=r"lm_head: its weight is that of the embedding too.*merge_and_unload"):
            to_delta(source, tmp_path / "tied")
        assert not (tmp_path / "tied").exists()


def test_a_base_in_4_bits_is_dequantised_first(tmp_path):
    pytest.importorskip("bitsandbytes")
    from tensorpeft.quantization import dequantize, quantize_residual

    config = DotaConfig(r=4, num_cores=3, target_modules=MODELS[0].targets)
    base = quantize_residual(MODELS[0].fresh(), config)
    plain = copy.deepcopy(base)
    adapter = get_peft_model(base, config).eval()
    perturb(adapter)
    to_delta(adapter, tmp_path)
    with pytest.raises(ValueError, match="Load the base without quantisation"):
        load_delta(plain, tmp_path)
    found = logits(load_delta(dequantize(plain, torch.float32), tmp_path))
    with adapter.disable_adapter():
        effect = (logits(adapter) - found).norm()
    assert (found - logits(adapter)).norm() < 0.02 * effect


def test_what_has_no_delta_is_refused_before_a_file_is_written(tmp_path):
    out = tmp_path / "delta"
    with pytest.raises(ValueError, match="bits=3: expected 8 or 4"):
        to_delta(adapted(), out, bits=3)
    for fields in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}):
        model = get_peft_model(tiny_llama(), LortaConfig(r=2, target_modules=["q_proj"], **fields))
        with pytest.raises(ValueError, match=rf"{next(iter(fields))}=.*a delta has nothing but layers' updates.*dense"):
            to_delta(model, out)
    broken = adapted()
    next(p for p in broken.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="its update is not finite"):
        to_delta(broken, out)
    assert not out.exists()


def test_the_files_say_what_they_are(saved):
    config = json.loads((saved / "delta_config.json").read_text())
    assert {key: config[key] for key in ("format_version", "method", "bits", "block_size")} == {
        "format_version": 1,
        "method": "DOTA",
        "bits": 4,
        "block_size": 32,
    }
    with safe_open(saved / "delta.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"{name}.{part}" for name in config["shapes"] for part in Blocks._fields}
