"""A residual base is what its digests say, or neither it nor an adapter on it is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from residual_bases import assert_same_state, base_of, state_of, trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from cases import MODELS, Model, logits, over_models

pytest.importorskip("bitsandbytes")

LLAMA = MODELS[0]


def target_of(tensors: dict[str, Tensor]) -> str:
    return next(key for key in tensors if key.endswith("start.digest")).removesuffix("start.digest")


def damaged(model: Model, folder: Path, damage: Callable[[dict[str, Tensor], str], object]) -> tuple[type, Path]:
    """The class and the folder of a saved base, whose tensors have been changed in place."""
    base = base_of(model)
    base.save_pretrained(folder / "base")
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    damage(tensors, target_of(tensors))
    save_file(tensors, path, metadata={"format": "pt"})
    return type(base), folder / "base"


def flip(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key].view(-1).view(torch.uint8)[-1] ^= 1


def swap(tensors: dict[str, Tensor], key: str, other: str) -> None:
    tensors[key], tensors[other] = tensors[other], tensors[key]


@over_models
@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, stem: flip(tensors, f"{stem}weight"),
        lambda tensors, stem: flip(tensors, f"{stem}weight.absmax"),
        lambda tensors, stem: flip(tensors, f"{stem}weight.nested_absmax"),
        lambda tensors, stem: flip(tensors, f"{stem}weight.quant_map"),
        lambda tensors, stem: flip(tensors, f"{stem}start.core_2"),
        lambda tensors, stem: swap(tensors, f"{stem}start.core_1", other_core(tensors, stem)),
    ],
    ids=["weight", "scales", "scales-of-scales", "code", "core", "swapped-cores"],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_is_not_loaded_on_a_damaged_base(model: Model, damage, low_cpu_mem_usage: bool, tmp_path: Path):
    trained(model).save_pretrained(tmp_path / "adapter")
    cls, folder = damaged(model, tmp_path, damage)
    base = cls.from_pretrained(folder)
    state = state_of(base)
    with pytest.raises(ValueError, match=r": this layer is not the residual base \w+… that it says it is"):
        PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_state(base, state)
    PeftModel.from_pretrained(base, tmp_path / "adapter", verify_base=False)


def other_core(tensors: dict[str, Tensor], stem: str) -> str:
    """The first core of another layer that has one of that shape."""
    core = tensors[f"{stem}start.core_1"]
    keys = [key for key in tensors if key.endswith("start.core_1") and not key.startswith(stem)]
    return next(key for key in keys if tensors[key].shape == core.shape)


@over_models
@pytest.mark.parametrize("lost", ["start.core_1", "start.core_3", "start.digest", "weight*"])
def test_base_that_lacks_a_tensor(model: Model, lost: str, tmp_path: Path):
    def drop(tensors: dict[str, Tensor], stem: str) -> None:
        for key in list(tensors):
            if key == f"{stem}{lost}" or (lost == "weight*" and key.startswith(f"{stem}weight")):
                del tensors[key]

    cls, folder = damaged(model, tmp_path, drop)
    with pytest.raises(ValueError, match=rf"{lost.removesuffix('*')}: the checkpoint of this residual base lacks it"):
        cls.from_pretrained(folder)


def test_second_adapter_on_a_base_that_changed_in_memory(tmp_path: Path):
    peft_model = trained(LLAMA)
    peft_model.save_pretrained(tmp_path)
    core = next(buffer for name, buffer in peft_model.named_buffers() if name.endswith("start.core_1"))
    core.view(-1)[0] += 1
    before = logits(peft_model)
    with pytest.raises(ValueError, match="this layer is not the residual base"):
        peft_model.load_adapter(tmp_path, "second")
    assert list(peft_model.peft_config) == ["default"]
    assert torch.equal(logits(peft_model), before)
