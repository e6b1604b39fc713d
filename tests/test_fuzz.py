"""Damaged checkpoints and configurations: each is loaded exactly, or refused by name, and a refusal changes nothing."""

import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from cases import CASES, MODELS, Case, logits, named, perturb

LLAMA = MODELS[0]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BATCH = 20  # cases in a test
DTYPES = [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int32]
Tensors = dict[str, Tensor]


@dataclass
class Host:
    """A model with an earlier adapter, and all that a refusal must leave as it is."""

    model: PeftModel

    def __post_init__(self):
        self.before, self.output = self.look(), logits(self.model)
        self.values = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}

    def look(self):
        return (
            [(name, id(module), module.training) for name, module in self.model.named_modules()],
            [(name, id(p), p.requires_grad) for name, p in self.model.named_parameters()],
            dict(self.model.peft_config),
        )

    def assert_unchanged(self):
        assert self.look() == self.before
        found = self.model.state_dict()
        assert list(found) == list(self.values)
        assert all(torch.equal(found[key], value) for key, value in self.values.items())
        assert torch.equal(logits(self.model), self.output)


def adapted(case: Case, seed: int) -> PeftModel:
    more = {"modules_to_save": ["lm_head"]} if case.name.endswith("no-start") else {}
    peft_model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets, **more)).eval()
    perturb(peft_model, seed)
    return peft_model


@cache
def sound(name: str, folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """A checkpoint and a configuration that load."""
    case = named(name)[0]
    adapted(case, seed=3).save_pretrained(folder / name)
    return load_file(folder / name / WEIGHTS), json.loads((folder / name / CONFIG).read_text())


def drop(tensors: Tensors, draw: random.Random) -> str:
    key = draw.choice(sorted(tensors))
    del tensors[key]
    return key


def drop_many(tensors: Tensors, draw: random.Random) -> str:
    lost = draw.sample(sorted(tensors), draw.randint(1, len(tensors)))
    for key in lost:
        del tensors[key]
    return ""


def rename(tensors: Tensors, draw: random.Random) -> str:
    key = draw.choice(sorted(tensors))
    stem, _, name = key.rpartition(".")
    others = [f"{stem}.{other}.{name}" for other in ("default", "second", "x", "base_layer", "")]
    others += [key.replace("layers.0", "layers.7"), key.replace("self_attn", "attn"), key.upper(), name]
    others += [f"{key}.weight", key.removeprefix("base_model.model."), f"base_model.model.{key}", f"{stem}.core_99"]
    others.append(draw.choice(sorted(tensors)))
    tensors[draw.choice(others)] = tensors.pop(key)
    return ""


def add(tensors: Tensors, draw: random.Random) -> str:
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "x", "model.layers.0.mlp.up_proj.bias"]
    names += ["model.layers.0.self_attn.q_proj.base_layer.weight", "model.layers.0.self_attn.q_proj.weight"]
    shape = draw.choice([(96, 24), (24, 24), (24,), (), (0,)])
    key = draw.choice(["base_model.model.", ""]) + draw.choice(names)
    tensors[key] = torch.ones(shape)
    return ""


def reshape(tensors: Tensors, draw: random.Random) -> str:
    key = draw.choice(sorted(tensors))
    tensor = tensors[key]
    changed = draw.choice(
        [tensor.flatten(), tensor[None], tensor[:0], tensor[:1], tensor.mT if tensor.ndim > 1 else tensor]
    )
    tensors[key] = draw.choice([changed, torch.cat([tensor, tensor]), tensor.sum()]).clone().contiguous()
    return key


def cast(tensors: Tensors, draw: random.Random) -> str:
    key = draw.choice(sorted(tensors))
    tensors[key] = tensors[key].to(draw.choice(DTYPES))
    return key


def spoil(tensors: Tensors, draw: random.Random) -> str:
    key = draw.choice(sorted(tensors))
    flat = tensors[key].view(-1)
    flat[draw.randrange(len(flat))] = draw.choice([float("nan"), float("inf"), -float("inf"), 0.0, 1e30, -1.0])
    return key


def swap(tensors: Tensors, draw: random.Random) -> str:
    first, second = draw.choices(sorted(tensors), k=2)
    tensors[first], tensors[second] = tensors[second], tensors[first]
    return ""


def edit_field(config: dict[str, Any], draw: random.Random) -> str:
    name = draw.choice([key for key in sorted(config) if key != "peft_type"])
    values: list[Any] = [None, True, False, 0, -1, 1, 7, 64, 10**9, 10**18, 0.5, 1e300, "", "a", "[", "q_proj", [], [1]]
    values += [
        ["q_proj"],
        ["no_such"],
        ["q_proj", "embed_tokens"],
        ["lm_head"],
        {},
        {"a": 1},
        {"24": [4, 6]},
        [None],
        [[]],
    ]
    config[name] = draw.choice(values)
    return ""


def drop_field(config: dict[str, Any], draw: random.Random) -> str:
    del config[draw.choice([key for key in sorted(config) if key != "peft_type"])]
    return ""


def add_field(config: dict[str, Any], draw: random.Random) -> str:
    config[draw.choice(["lora_alpha", "x", "runtime_config", "bias", "num_layers"])] = draw.choice([1, "a", None, {}])
    return ""


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(min(len(content), 400))
    return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]


def insert(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + draw.randbytes(draw.randint(1, 9)) + content[place:]


OF_TENSORS: list[Callable[[Tensors, random.Random], str]] = [drop, drop_many, rename, add, reshape, cast, spoil, swap]
OF_CONFIG: list[Callable[[dict[str, Any], random.Random], str]] = [edit_field, edit_field, drop_field, add_field]
OF_BYTES: list[Callable[[bytes, random.Random], bytes]] = [cut, flip, flip, insert]


def write_damaged(folder: Path, case: Case, sources: Path, draw: random.Random) -> tuple[str, str]:
    """Put a checkpoint with one or two faults into the folder; what was done, and the tensor it was done to."""
    tensors, config = sound(case.name, sources)
    tensors, config = {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(json.dumps(config))
    done, key = [], ""
    kind = draw.choice(["tensors", "tensors", "tensors", "config", "both", "bytes"])
    if kind in ("tensors", "both"):
        change = draw.choice(OF_TENSORS)
        key = change(tensors, draw) if kind == "tensors" else (change(tensors, draw), "")[1]
        done.append(change.__name__)
    if kind in ("config", "both"):
        change = draw.choice(OF_CONFIG)
        change(config, draw)
        done.append(change.__name__)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    if kind == "bytes":
        change, name = draw.choice(OF_BYTES), draw.choice([WEIGHTS, WEIGHTS, CONFIG])
        (folder / name).write_bytes(change((folder / name).read_bytes(), draw))
        done.append(f"{change.__name__} {name}")
    return " and ".join(done), key


def assert_exact_or_refused(folder: Path, host: Host, key: str, low_cpu_mem_usage: bool) -> bool:
    """Whether it was loaded, and then with the very numbers in the file."""
    try:
        host.model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    except ValueError as error:
        message = str(error)
        assert message.startswith(str(folder)), message
        # Its own name, or that of its layer and its last part.
        layer, _, name = key.removeprefix("base_model.model.").rpartition(".")
        assert layer.rpartition(".")[0] in message, (key, message)
        assert name in message or "another base model" in message, (key, message)
        host.assert_unchanged()
        return False
    found = get_peft_model_state_dict(host.model, adapter_name="second")
    for name, tensor in load_file(folder / WEIGHTS).items():
        held = found[name if name in found else f"base_model.model.{name}"]
        assert not held.is_meta
        assert torch.equal(held.to(tensor.dtype), tensor)
        assert torch.equal(held, tensor.to(held.dtype))
    return True


def fuzz(seed: int, folder: Path) -> None:
    hosts: dict[str, Host] = {}
    (folder / "sound").mkdir()
    for number in range(BATCH):
        draw = random.Random(seed * BATCH + number)
        case = CASES[(seed * BATCH + number) % len(CASES)]
        if case.name not in hosts:
            hosts[case.name] = Host(adapted(case, seed=2))
        damaged = folder / f"{number}"
        damaged.mkdir()
        done, key = write_damaged(damaged, case, folder / "sound", draw)
        try:
            if assert_exact_or_refused(damaged, hosts[case.name], key, draw.random() < 0.5):
                del hosts[case.name]
        except Exception as error:
            raise AssertionError(f"{case.name}, seed {seed}, number {number}: {done} {key}") from error


# With those of tests/test_fuzz_commands.py 5,450 in all.
@pytest.mark.parametrize(
    "seed",
    [
        *range(15),
        *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(15, 55)),
        *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(55, 175)),
    ],
)
def test_damaged_checkpoint(seed: int, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz(seed, tmp_path)
