"""Frozen frames in a file of their own: many adapters of a model, exact, with one copy on disk and in memory."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cases import MODELS, Case, logits, over_cases, perturb, tiny_llama, tokens
from tensorpeft import FactConfig, FloraConfig, LortaConfig, LotrConfig, initialize_from_gradients, save_frames
from tensorpeft.export import to_lora
from tensorpeft.plugin import kept_frames
from tensorpeft.plugin.layer import TensorLayer

LLAMA = MODELS[0]
FREEZING: list[tuple[type[PeftConfig], dict[str, Any]]] = [
    (LotrConfig, {"r": 4}),
    (FactConfig, {"r": 4}),
    (FactConfig, {"r": 4, "core": "tk"}),
    (FloraConfig, {"r": 4}),
]
over_freezing = pytest.mark.parametrize(("kind", "fields"), FREEZING, ids=["lotr", "fact-tt", "fact-tk", "flora"])


def config_of(kind: type[PeftConfig], fields: dict[str, Any], **more: Any) -> PeftConfig:
    return kind(**{"train": "cores", "target_modules": LLAMA.targets, "task_type": "CAUSAL_LM", **fields, **more})


def with_frames(kind: type[PeftConfig], fields: dict[str, Any], folder: Path | None = None, seed: int = 5) -> Any:
    """A model with a trained adapter between frames of its data's gradient, which are kept in the folder."""
    torch.manual_seed(seed)
    model = get_peft_model(LLAMA.fresh(), config_of(kind, fields))
    rows = tokens(seed=seed)
    initialize_from_gradients(model, [{"input_ids": rows, "labels": rows}])
    perturb(model, seed)
    if folder is not None:
        save_frames(model, folder)
    return model.eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@over_freezing
def test_an_adapter_is_the_same_with_its_frames_in_a_file(kind, fields, tmp_path):
    model = with_frames(kind, fields)
    expected = logits(model)
    model.save_pretrained(tmp_path / "whole")
    save_frames(model, tmp_path / "frames")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "own")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = tensors_of(tmp_path / "own")
    assert sum(tensor.numel() for tensor in saved.values() if tensor.is_floating_point()) == trained
    kept = sum(tensor.numel() for tensor in load_file(tmp_path / "frames" / "frames.safetensors").values())
    assert sum(tensor.numel() for tensor in tensors_of(tmp_path / "whole").values()) == trained + kept
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "own", low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), expected)
        assert loaded.peft_config["default"].frames == str(tmp_path / "frames")
    del model, loaded
    gc.collect()  # nothing is left in memory
    loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "own").eval()
    assert torch.equal(logits(loaded), expected)
    to_lora(loaded, tmp_path / "lora")
    exported = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


@over_freezing
def test_a_new_adapter_starts_between_kept_frames_as_the_base_and_shares_their_memory(kind, fields, tmp_path):
    model = with_frames(kind, fields, tmp_path)
    first = logits(model)
    model.add_adapter("second", config_of(kind, fields, frames=str(tmp_path)))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(LLAMA.fresh()))
    buffers = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if "_update." in name and not name.endswith("digest"):
            buffers.setdefault(name.replace(".second", ".default"), []).append(buffer)
    assert buffers
    assert all(len(pair) == 2 and pair[0] is pair[1] for pair in buffers.values())
    perturb(model, seed=9)
    second = logits(model)
    assert not torch.equal(second, first)
    rows = logits(model, tokens(batch=2), adapter_names=["default", "second"])
    torch.testing.assert_close(rows[0], first[0], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "both")
    for name, expected in (("default", first), ("second", second)):
        folder = tmp_path / "both" / ("" if name == "default" else name)
        assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.fresh(), folder).eval()), expected)


@over_freezing
@pytest.mark.parametrize(
    "move", [lambda model: model._apply(torch.clone), lambda model: model.double()], ids=["moved", "cast"]
)
def test_adapters_share_their_frames_when_the_model_has_moved(kind, fields, move, tmp_path):
    model = with_frames(kind, fields, tmp_path)
    names = ["default", "second", "third"]
    for name in names[1:]:
        model.add_adapter(name, config_of(kind, fields, frames=str(tmp_path)))
    kept = [frames_by_name(model, name) for name in names]
    before = {key: frame.clone() for key, frame in kept[0].items()}
    del kept
    move(model)
    after = [frames_by_name(model, name) for name in names]
    for key, frame in before.items():
        assert torch.equal(after[0][key], frame.to(after[0][key].dtype))
        assert all(frames[key] is after[0][key] for frames in after)
    if after[0].popitem()[1].dtype == torch.float32:
        model.add_adapter("next", config_of(kind, fields, frames=str(tmp_path)))
        assert all(frame is after[1][key] for key, frame in frames_by_name(model, "next").items())


def frames_by_name(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    buffers = model.named_buffers(remove_duplicate=False)
    ours = {key: buffer for key, buffer in buffers if f".{adapter_name}." in key and not key.endswith("digest")}
    assert ours
    return {key.replace(f".{adapter_name}.", "."): buffer for key, buffer in ours.items()}


def test_training_between_kept_frames_resumes_exactly(tmp_path):
    from transformers import Trainer, TrainingArguments

    with_frames(LotrConfig, {"r": 4}, tmp_path / "frames")
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]

    def train(output: str, resume: bool = False) -> Any:
        torch.manual_seed(3)
        config = config_of(LotrConfig, {"r": 4}, frames=str(tmp_path / "frames"))
        model = get_peft_model(LLAMA.fresh(), config)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / output), max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resume else None)
        return model.eval()

    whole = train("run")
    assert torch.equal(logits(train("again", resume=True)), logits(whole))
    assert not torch.equal(logits(whole), logits(LLAMA.fresh()))


def test_other_ways_of_loading(tmp_path):
    model = with_frames(LotrConfig, {"r": 4}, tmp_path / "frames")
    expected = logits(model)
    model.save_pretrained(tmp_path / "own")
    of_transformers = LLAMA.fresh()
    of_transformers.load_adapter(str(tmp_path / "own"))
    assert torch.equal(logits(of_transformers.eval()), expected)
    mixed = PeftMixedModel.from_pretrained(LLAMA.fresh(), tmp_path / "own").eval()
    assert torch.equal(logits(mixed), expected)


def test_a_weighted_sum_has_frames_of_its_own(tmp_path):
    model = with_frames(LotrConfig, {"r": 4}, tmp_path / "frames")
    model.add_adapter("second", config_of(LotrConfig, {"r": 4}, frames=str(tmp_path / "frames")))
    model.set_adapter("second")
    perturb(model, seed=9)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum")
    assert model.peft_config["sum"].frames is None
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    updates = model.get_submodule(name).updates
    with torch.no_grad():
        expected = 0.5 * updates["default"].matrix() + 2.0 * updates["second"].matrix()
        torch.testing.assert_close(updates["sum"].matrix(), expected)


def test_frames_that_adapters_refer_to_are_never_replaced(tmp_path):
    model = with_frames(LotrConfig, {"r": 4}, tmp_path)
    save_frames(model, tmp_path)  # the same ones
    before = (tmp_path / "frames.safetensors").read_bytes()
    other = with_frames(LotrConfig, {"r": 4}, seed=8)
    with pytest.raises(FileExistsError, match=r"frames.safetensors holds other frames"):
        save_frames(other, tmp_path)
    assert other.peft_config["default"].frames is None
    assert (tmp_path / "frames.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["frames.safetensors"]
    with pytest.raises(ValueError, match=r"default: its frames are kept in '.*' for all adapters"):
        initialize_from_gradients(model, [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LotrConfig(r=4, frames="x"), r"frames='x': this adapter trains its frames"),
        (lambda: LortaConfig(r=4, frames="x"), r"frames='x': this adapter trains its frames"),
        (lambda: LotrConfig(r=4, train="core", frames="x"), r"train='core': expected"),
        (lambda: FloraConfig(r=4, train="cores", frames=[1]), r"frames=\[1\]: expected str \| None"),
    ],
)
def test_a_configuration_that_cannot_share_frames(make: Callable[[], PeftConfig], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_frozen_frames_can_be_kept(tmp_path):
    for config in (LotrConfig(r=4, target_modules=LLAMA.targets), LortaConfig(r=4)):
        model = get_peft_model(LLAMA.fresh(), config)
        with pytest.raises(ValueError, match=r"'default': expected an adapter whose frames are frozen"):
            save_frames(model, tmp_path / "frames")
        with pytest.raises(ValueError, match=r"'other': expected one of \['default'\]"):
            save_frames(model, tmp_path / "frames", "other")
    assert not (tmp_path / "frames").exists()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def other_rank(file: Path) -> None:
    with_frames(LotrConfig, {"r": 3}, file.parent / "others")
    (file.parent / "others" / file.name).replace(file)


def change(file: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "message", "of_new"),
    [
        (lambda file: shutil.rmtree(file.parent), r"expected a folder with frames.safetensors", True),
        (lambda file: file.unlink(), r"is no complete safetensors file", True),
        (truncate, r"is no complete safetensors file", True),
        (other_rank, r"is \(24, 3\) there, expected \(24, 4\)|is \(\d+, 3\) there", True),
        (change, r"it was trained between other frames: their SHA-256 is \w{12}…, that of the frames here", False),
    ],
)
def test_what_is_wrong_with_frames_is_told_and_changes_nothing(damage, message, of_new, tmp_path):
    frames = tmp_path / "frames"
    model = with_frames(LotrConfig, {"r": 4}, frames)
    model.save_pretrained(tmp_path / "own")
    del model
    gc.collect()
    damage(frames / "frames.safetensors")
    base = LLAMA.fresh()
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path / "own")
    assert [name for name, _ in base.named_modules()] == modules
    if of_new:
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, config_of(LotrConfig, {"r": 4}, frames=str(frames)))
        assert [name for name, _ in base.named_modules()] == modules


def test_frames_may_move_with_the_configuration(tmp_path):
    model = with_frames(LotrConfig, {"r": 4}, tmp_path / "frames")
    expected = logits(model)
    model.save_pretrained(tmp_path / "own")
    del model
    gc.collect()
    (tmp_path / "frames").rename(tmp_path / "moved")
    path = tmp_path / "own" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "frames": str(tmp_path / "moved")}))
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "own").eval()), expected)
    with safe_open(tmp_path / "moved" / "frames.safetensors", "pt") as file:
        assert sorted(key[-1] for key in file.keys()) == ["U"] * 4 + ["V"] * 4  # noqa: SIM118


@pytest.fixture
def two(tmp_path) -> tuple[Any, Any]:
    """Models with adapters between different kept frames; those of the first are saved in "own"."""
    first = with_frames(LotrConfig, {"r": 4}, tmp_path / "A")
    first.save_pretrained(tmp_path / "own")
    return first, with_frames(LotrConfig, {"r": 4}, tmp_path / "B", seed=8)


def test_an_adapter_meets_no_other_frames_than_its_own(two, tmp_path):
    first, second = two
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    with pytest.raises(ValueError, match="trained between other frames"):
        second.load_adapter(tmp_path / "own", "default")
    with pytest.raises(ValueError, match="trained between other frames"):
        set_peft_model_state_dict(second, get_peft_model_state_dict(first))
    with pytest.raises(ValueError, match="trained between other frames"):
        second.load_state_dict(first.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in second.state_dict().items())
    config = config_of(LotrConfig, {"r": 4}, frames=str(tmp_path / "B"))
    with pytest.raises(ValueError, match="trained between other frames"):
        PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "own", config=config)


def test_the_state_of_an_adapter_with_kept_frames_is_none_of_one_with_its_own(two):
    state_dict = get_peft_model_state_dict(two[0])
    own = with_frames(LotrConfig, {"r": 4})
    before = logits(own)
    for tensors in (state_dict, {key: value for key, value in state_dict.items() if not key.endswith("digest")}):
        with pytest.raises(ValueError, match=r"was made with another configuration"):
            set_peft_model_state_dict(own, tensors)
        own_names = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
        injected = inject_adapter_in_model(config_of(LotrConfig, {"r": 4}), LLAMA.fresh(), state_dict=own_names)
        with pytest.raises(ValueError, match=r"was made with another configuration"):
            set_peft_model_state_dict(injected, own_names)
    assert torch.equal(logits(own), before)


def test_a_configuration_that_several_adapters_were_made_with_stays_theirs(tmp_path):
    config = config_of(LotrConfig, {"r": 4})
    first, second = get_peft_model(LLAMA.fresh(), config), get_peft_model(LLAMA.fresh(), config)
    save_frames(first, tmp_path / "A")
    save_frames(second, tmp_path / "B")
    assert config.frames is None
    for model, folder in ((first, "A"), (second, "B")):
        perturb(model)
        model.save_pretrained(tmp_path / folder)
        loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / folder)
        assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_what_is_done_to_one_model_changes_no_others_frames(two, tmp_path):
    first = two[0]
    config = config_of(LotrConfig, {"r": 4}, frames=str(tmp_path / "A"))
    other = get_peft_model(LLAMA.fresh(), config)
    perturb(other)
    expected = logits(other.eval())
    first.to(torch.bfloat16)
    first.add_adapter("ref", first.peft_config["default"])
    assert torch.equal(logits(other), expected)
    third = get_peft_model(LLAMA.fresh(), config_of(LotrConfig, {"r": 4}, frames=str(tmp_path / "A")))
    perturb(third)
    assert torch.equal(logits(third.eval()), expected)
    with torch.inference_mode():
        PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "own")
    assert torch.equal(logits(third), expected)


def test_frames_are_those_of_the_dtype_that_the_base_has(tmp_path):
    torch.manual_seed(5)
    in_double = {"autocast_adapter_dtype": False}
    model = get_peft_model(LLAMA.fresh().double(), config_of(LotrConfig, {"r": 4}), **in_double)
    for buffer in model.buffers():
        if buffer.shape[-1:] == (4,):
            buffer += 1e-12 * torch.randn_like(buffer)
    perturb(model)
    expected = logits(model.eval())
    save_frames(model, tmp_path / "frames")
    model.save_pretrained(tmp_path / "own")
    loaded = PeftModel.from_pretrained(LLAMA.fresh().double(), tmp_path / "own", **in_double).eval()
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(ValueError, match=r"there is float64, with numbers that float32"):
        PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "own")


def test_writers_at_the_same_time_leave_the_frames_of_one_of_them(tmp_path):
    models = [with_frames(LotrConfig, {"r": 4}, seed=seed) for seed in range(4)]

    def write(model: Any) -> bool:
        try:
            save_frames(model, tmp_path)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(write, [*models, *models]))
    assert sum(written) == 2  # one model, twice
    assert [path.name for path in tmp_path.iterdir()] == ["frames.safetensors"]
    kept = models[written.index(True)]
    kept.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "own").eval()), logits(kept))


def test_names_in_the_file_are_the_base_models(tmp_path):
    model = with_frames(FloraConfig, {"r": 4})
    save_frames(torch.compile(model), tmp_path)
    names = load_file(tmp_path / "frames.safetensors")
    assert all(name.startswith("model.layers.") for name in names)
    with pytest.raises(ValueError, match=r"is \(\d+, 4\) there, expected none of this name"):
        get_peft_model(LLAMA.fresh(), config_of(FloraConfig, {"r": 4}, target_modules=["q_proj"], frames=str(tmp_path)))


@pytest.mark.parametrize("assign", [False, True])
def test_an_adapter_made_on_the_meta_device_takes_its_frames_when_it_is_loaded(assign, two, tmp_path):
    first = two[0]
    with torch.device("meta"):
        model = get_peft_model(tiny_llama(), config_of(LotrConfig, {"r": 4}, frames=str(tmp_path / "A")))
    if not assign:
        model.to_empty(device="cpu")
    rotary = dict(first.named_buffers())
    model.load_state_dict(first.state_dict(), assign=assign)
    for name in dict(model.named_buffers()):  # transformers' own, which are in no state dict
        if "rotary" in name:
            module, _, key = name.rpartition(".")
            model.get_submodule(module).register_buffer(key, rotary[name], persistent=False)
    assert torch.equal(logits(model.eval()), logits(first))


@pytest.fixture
def on_meta(tmp_path, monkeypatch) -> tuple[Any, Any, list[int]]:
    """An adapter with frames in every layer; one that was made on the meta device; the sizes of files that are read."""
    first = with_frames(FloraConfig, {"r": 4}, tmp_path / "A")
    with torch.device("meta"):
        model = get_peft_model(tiny_llama(), config_of(FloraConfig, {"r": 4}, frames=str(tmp_path / "A")))
    read: list[int] = []
    load = kept_frames.load
    monkeypatch.setattr(kept_frames, "load", lambda content: read.append(len(content)) or load(content))
    return first, model.to_empty(device="cpu"), read


def frames_of(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": buffer
        for name, module in model.named_modules()
        if isinstance(module, TensorLayer)
        for key, buffer in module.updates["default"].named_buffers()
        if buffer.is_floating_point()
    }


def test_layers_on_the_meta_device_read_their_file_once_and_do_not_keep_it(on_meta):
    first, model, read = on_meta
    layers = [module for module in model.modules() if isinstance(module, TensorLayer)]
    awaited = weakref.ref(vars(layers[0].updates["default"])["_awaited_frames"][0])
    model.load_state_dict(first.state_dict())
    assert len(layers) > 1
    assert len(read) == 1
    assert awaited() is None
    found = frames_of(model)
    assert found
    assert all(found[name] is frame for name, frame in frames_of(first).items())  # one copy in memory


def test_layers_on_the_meta_device_read_a_file_that_was_put_right(on_meta):
    first, model, read = on_meta
    state_dict, folder = first.state_dict(), Path(first.peft_config["default"].frames)
    names = [name for name, module in model.named_modules() if isinstance(module, TensorLayer)]
    assert len(names) > 1
    model.load_state_dict({other: state_dict[other] for other in state_dict if names[0] in other}, strict=False)
    good = (folder / "frames.safetensors").read_bytes()
    (folder / "frames.safetensors").write_bytes(good[:-8])
    with pytest.raises(ValueError, match="is no complete safetensors file"):
        model.load_state_dict(state_dict)
    (folder / "frames.safetensors").write_bytes(good)
    model.load_state_dict(state_dict)
    assert len(read) == 3
    found = frames_of(model)
    assert all(torch.equal(found[name], frame) for name, frame in frames_of(first).items())


def test_a_model_with_an_injected_adapter_meets_no_other_frames_either(two, tmp_path):
    def injected(frames: Path) -> Any:
        return inject_adapter_in_model(config_of(LotrConfig, {"r": 4}, frames=str(frames)), LLAMA.fresh()).eval()

    first = injected(tmp_path / "A")
    perturb(first)
    same, other = injected(tmp_path / "A"), injected(tmp_path / "B")
    same.load_state_dict(first.state_dict())
    assert torch.equal(logits(same), logits(first))
    with pytest.raises(ValueError, match=r"shared_lotr.lotr_update.default: it was trained between other frames"):
        other.load_state_dict(first.state_dict())
    mixed = [
        get_peft_model(LLAMA.fresh(), config_of(LotrConfig, {"r": 4}, frames=str(tmp_path / name)), mixed=True)
        for name in "AB"
    ]
    with pytest.raises(ValueError, match="trained between other frames"):
        mixed[1].load_state_dict(mixed[0].state_dict())


def test_frames_are_not_rounded_to_the_dtype_of_the_base(two, tmp_path):
    config = config_of(LotrConfig, {"r": 4}, frames=str(tmp_path / "A"))
    base = LLAMA.fresh().bfloat16()
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="autocast_adapter_dtype=False: in bfloat16"):
        PeftModel.from_pretrained(base, tmp_path / "own", config=config, autocast_adapter_dtype=False)
    assert [name for name, _ in base.named_modules()] == modules


def test_a_disk_without_links_keeps_frames_too(monkeypatch, tmp_path):
    def refuse(*args: Any) -> None:
        raise PermissionError

    monkeypatch.setattr("os.link", refuse)
    model = with_frames(LotrConfig, {"r": 4}, tmp_path)
    with pytest.raises(FileExistsError, match="holds other frames"):
        with_frames(LotrConfig, {"r": 4}, tmp_path, seed=8)
    assert [path.name for path in tmp_path.iterdir()] == ["frames.safetensors"]
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "own").eval()), logits(model))


@over_cases
def test_adapters_of_one_configuration_object_start_as_the_base(case: Case):
    """Also where the first one is trained, and has changed the base in between."""
    if not (case.starts_at_identity and case.merges):
        pytest.skip("no such start")
    config = case.make(target_modules=LLAMA.targets)
    model = get_peft_model(LLAMA.fresh(), config).eval()
    perturb(model)
    model.merge_adapter()
    model.add_adapter("second", config)
    updates = [module.updates["second"] for module in model.modules() if isinstance(module, TensorLayer)]
    with torch.no_grad():
        assert updates
        assert not any(update.matrix().any() for update in updates)


def test_a_configuration_may_be_changed_between_the_adapters_it_makes():
    config = config_of(LotrConfig, {"r": 4})
    model = get_peft_model(LLAMA.fresh(), config)
    for name, change in (
        ("rank", {"r": 5}),
        ("targets", {"target_modules": {"o_proj", "q_proj"}}),
        ("all", {"train": "all"}),
    ):
        for field, value in change.items():
            setattr(config, field, value)
        model.add_adapter(name, config)
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(LLAMA.fresh()))
