"""A checkpoint that is not all of the adapter, and nothing else, is refused; then all is bit for bit as it was."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cases import CASES, MODELS, Case, logits, over_cases, perturb
from tensorpeft import LortaConfig
from tensorpeft.plugin.config import own_fields
from tensorpeft.plugin.loading import own_key

LLAMA = MODELS[0]
WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, Tensor]


def trained(case: Case, seed: int = 2, **more) -> PeftModel:
    peft_model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets, **more)).eval()
    perturb(peft_model, seed)
    return peft_model


def saved(case: Case, folder: Path, **more) -> Path:
    trained(case, seed=3, **more).save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """The checkpoint, with its tensors changed in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def key_in(tensors: Tensors) -> str:
    """That of a trained tensor of a layer, or of what the layers share."""
    return next(key for key in sorted(tensors) if "_update." in key)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the model has the very modules, tensors, flags and configurations that it had, and their values."""

    def look():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return (
            [(name, id(module), module.training) for name, module in model.named_modules()],
            [(name, id(tensor), tensor.dtype, tensor.device, tensor.requires_grad) for name, tensor in tensors],
            [{**getattr(module, "peft_config", {})} for module in model.modules()],
            [getattr(module, "active_adapters", None) for module in model.modules()],
        )

    before, values, output = look(), {key: value.clone() for key, value in model.state_dict().items()}, logits(model)
    yield
    assert look() == before
    found = model.state_dict()
    assert list(found) == list(values)
    assert all(torch.equal(found[key], value) for key, value in values.items())
    assert torch.equal(logits(model), output)


def assert_refused(folder: Path, case: Case, message: str) -> None:
    """Wherever it is loaded: on a fresh model, beside earlier adapters, over one of them, into what was injected."""
    fresh, adapted = LLAMA.fresh(), trained(case)
    adapted.add_adapter("other", case.make(target_modules=["q_proj", "down_proj"]))
    tensors = load_file(folder / WEIGHTS)
    loads = [
        *((fresh, partial(PeftModel.from_pretrained, fresh, folder, low_cpu_mem_usage=low)) for low in (False, True)),
        *((adapted, partial(adapted.load_adapter, folder, "second", low_cpu_mem_usage=low)) for low in (False, True)),
        (fresh, partial(fresh.load_adapter, str(folder))),
        (adapted, partial(adapted.load_adapter, folder, "default")),
        (adapted, partial(set_peft_model_state_dict, adapted, tensors, "default")),
    ]
    for model, load in loads:
        with unchanged(model), pytest.raises(ValueError, match=message):
            load()


def first_for_all(name: str, values: list) -> pytest.MarkDecorator:
    """`make test` takes the first value, `make thorough` the others."""
    params = [pytest.param(value, id=str(value)) for value in values[:1]]
    params += [pytest.param(value, id=str(value), marks=pytest.mark.thorough) for value in values[1:]]
    return pytest.mark.parametrize(name, params)


@over_cases
def test_one_key_that_names_an_earlier_adapter(case: Case, tmp_path: Path):
    def rename(tensors: Tensors) -> None:
        stem, _, name = (key := key_in(tensors)).rpartition(".")
        tensors[f"{stem}.default.{name}"] = tensors.pop(key)

    edit(saved(case, tmp_path), rename)
    assert_refused(tmp_path, case, r"has default\..*, expected a tensor's name without an adapter's")


@over_cases
def test_all_keys_name_an_earlier_adapter(case: Case, tmp_path: Path):
    def rename(tensors: Tensors) -> None:
        for key in list(tensors):
            stem, _, name = key.rpartition(".")
            tensors[f"{stem}.default.{name}"] = tensors.pop(key)

    edit(saved(case, tmp_path), rename)
    assert_refused(tmp_path, case, r"has default\..*, expected a tensor's name without an adapter's")


@over_cases
@first_for_all("kept", ["all-but-a-layer", "all-but-one", "half"])
def test_incomplete_checkpoint(case: Case, kept: str, tmp_path: Path):
    def drop(tensors: Tensors) -> None:
        stem = key_in(tensors).rpartition(".")[0]
        lost = {"all-but-one": [key_in(tensors)], "half": sorted(tensors)[::2]}
        for key in lost.get(kept, [key for key in tensors if key.startswith(f"{stem}.")]):
            del tensors[key]

    edit(saved(case, tmp_path), drop)
    if not load_file(tmp_path / WEIGHTS):
        pytest.skip("all of the adapter is shared: test_checkpoint_without_tensors")
    assert_refused(tmp_path, case, r"the checkpoint has \[.*\] but not \[.*incomplete")


@over_cases
def test_checkpoint_without_tensors(case: Case, tmp_path: Path):
    edit(saved(case, tmp_path), dict.clear)
    for load in (
        lambda model: PeftModel.from_pretrained(model, tmp_path),
        lambda model: PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=True),
    ):
        fresh = LLAMA.fresh()
        with unchanged(fresh), pytest.raises(ValueError, match=rf"{WEIGHTS}: there is no tensor in this file"):
            load(fresh)
    peft_model = trained(case)
    with unchanged(peft_model), pytest.raises(ValueError, match="no tensor in this file"):
        peft_model.load_adapter(tmp_path, "default")
    with unchanged(peft_model), pytest.raises(ValueError, match=r"the checkpoint has \[\] but not"):
        set_peft_model_state_dict(peft_model, {})


@over_cases
@first_for_all(
    "key",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.norm.weight",
        "base_model.model.no_such_layer.weight",
    ],
)
def test_tensor_of_the_base_in_a_checkpoint(case: Case, key: str, tmp_path: Path):
    shape = (96, 24) if "lm_head" in key else (24,) if "norm" in key else (24, 24)
    edit(saved(case, tmp_path), lambda tensors: tensors.update({key: torch.full(shape, 7.0)}))
    assert_refused(tmp_path, case, rf"{own_key(key)}: the checkpoint has this tensor, which is not one of the adapter")


@over_cases
def test_tensors_of_a_layer_that_the_adapter_is_not_on(case: Case, tmp_path: Path):
    def add(tensors: Tensors) -> None:
        attribute = key_in(tensors).split(".")[-2]
        tensors[f"base_model.model.lm_head.{attribute}.core_1"] = torch.ones(2)

    edit(saved(case, tmp_path), add)
    assert_refused(tmp_path, case, r"lm_head: the checkpoint has core_1 .*adds nothing")


@over_cases
@first_for_all("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool, torch.complex64])
def test_numbers_that_are_not_those_that_were_trained(case: Case, dtype: torch.dtype, tmp_path: Path):
    def cast(tensors: Tensors) -> None:
        tensors[key_in(tensors)] = tensors[key_in(tensors)].to(dtype)

    edit(saved(case, tmp_path), cast)
    key = own_key(key_in(load_file(tmp_path / WEIGHTS)))
    assert_refused(tmp_path, case, rf"{key} is {str(dtype).removeprefix('torch.')} in the checkpoint, expected float32")


@over_cases
@first_for_all("value", [float("nan"), float("inf"), float("-inf")])
def test_number_that_is_not_finite(case: Case, value: float, tmp_path: Path):
    def spoil(tensors: Tensors) -> None:
        tensors[key_in(tensors)].view(-1)[-1] = value

    edit(saved(case, tmp_path), spoil)
    assert_refused(tmp_path, case, rf"{own_key(key_in(load_file(tmp_path / WEIGHTS)))}: not all numbers .* are finite")


@over_cases
@first_for_all("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_other_floats_are_held_in_float32(case: Case, dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path):
    edit(saved(case, tmp_path), lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()}))
    loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    expected = trained(case)
    tensors = {key: tensor.float() for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    set_peft_model_state_dict(expected, tensors)
    assert {t.dtype for name, t in loaded.named_parameters() if "_update." in name} == {torch.float32}
    assert torch.equal(logits(loaded), logits(expected))


@over_cases
def test_double_numbers_that_would_be_rounded(case: Case, tmp_path: Path):
    def cast(tensors: Tensors) -> None:
        tensors[key_in(tensors)] = tensors[key_in(tensors)].double() + 1e-12

    edit(saved(case, tmp_path), cast)
    peft_model = trained(case)
    with unchanged(peft_model), pytest.raises(ValueError, match="float64 in the checkpoint"):
        peft_model.load_adapter(tmp_path, "second")


@over_cases
def test_modules_trained_in_full_are_loaded_whole_or_not(case: Case, tmp_path: Path):
    expected = trained(case, 3, modules_to_save=["lm_head"])
    with torch.no_grad():
        expected.get_submodule("base_model.model.lm_head.modules_to_save.default").weight.mul_(2)
    expected.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.fresh(), tmp_path).eval()), logits(expected))
    second = trained(case)
    second.load_adapter(tmp_path, "second")
    second.set_adapter("second")
    assert torch.equal(logits(second), logits(expected))
    edit(tmp_path, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(95, 24)}))
    peft_model = trained(case)
    with unchanged(peft_model), pytest.raises(ValueError, match=r"lm_head.*\(95, 24\).*expected \(96, 24\)"):
        peft_model.load_adapter(tmp_path, "second")
    edit(tmp_path, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    with unchanged(peft_model), pytest.raises(ValueError, match=r"lacks .*lm_head.weight"):
        peft_model.load_adapter(tmp_path, "second")


@over_cases
@pytest.mark.parametrize("adapted", [False, True])
def test_embeddings_saved_beside_the_adapter_are_loaded(case: Case, adapted: bool, tmp_path: Path):
    if adapted and case.config is LortaConfig:
        pytest.skip("its tensor has a mode for the layers, and the output embeddings are in none")
    targets = [*LLAMA.targets, *(["lm_head"] if adapted else [])]
    base = LLAMA.fresh()
    base.resize_token_embeddings(100)
    expected = get_peft_model(base, case.make(target_modules=targets)).eval()
    perturb(expected)
    expected.save_pretrained(tmp_path, save_embedding_layers=True)
    other = LLAMA.fresh()
    torch.manual_seed(5)
    other.resize_token_embeddings(100)
    if adapted:  # PEFT saves what is under the adapter alone, and the start is a part of it
        other.get_input_embeddings().weight.data.copy_(base.get_input_embeddings().weight)
        other.lm_head.weight.data[:96] = LLAMA.fresh().lm_head.weight
    loaded = PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(logits(loaded), logits(expected))


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def sizes_of(case: Case) -> list[str]:
    """The fields of a method that say how large something is."""
    fields = {name: getattr(case.make(), name) for name in own_fields(case.make())}
    return [name for name, value in fields.items() if type(value) is int and name not in ("seed", "alpha", "budget")]


@over_cases
@first_for_all("size", [10**9, 10**4, 2**20, 10**18])
def test_configuration_of_a_huge_adapter(case: Case, size: int, tmp_path: Path):
    saved(case, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    peak = getrusage(RUSAGE_SELF).ru_maxrss
    for name in sizes_of(case):
        edit_config(tmp_path, **{**content, name: size})
        fresh, adapted = LLAMA.fresh(), trained(case)
        for low_cpu_mem_usage in (False, True):
            with unchanged(fresh), pytest.raises(ValueError, match=r"=|\(.*\) in the checkpoint, expected \(|but not"):
                PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            with unchanged(adapted), pytest.raises(ValueError, match=str(tmp_path)):
                adapted.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert getrusage(RUSAGE_SELF).ru_maxrss - peak < 100 * 1024  # KiB


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda path: path.mkdir(), f"{WEIGHTS}: a folder, expected a safetensors file"),
        (lambda path: path.symlink_to(path), f"{WEIGHTS}: a link to no file"),
        (lambda path: path.symlink_to("gone"), f"{WEIGHTS}: a link to no file"),
        (lambda path: path.write_bytes(b""), rf"{WEIGHTS}: not a complete safetensors file \(0 bytes"),
        (lambda path: None, f"{WEIGHTS}: there is no such file"),
    ],
    ids=["folder", "link-loop", "dangling-link", "empty-file", "no-file"],
)
def test_weights_that_are_no_file(put, message: str, tmp_path: Path):
    (saved(CASES[0], tmp_path) / WEIGHTS).unlink()
    put(tmp_path / WEIGHTS)
    fresh, adapted = LLAMA.fresh(), trained(CASES[0])
    for low_cpu_mem_usage in (False, True):
        with unchanged(fresh), pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for name in ("default", "second"):
        with unchanged(adapted), pytest.raises(ValueError, match=message):
            adapted.load_adapter(tmp_path, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "adapter_config.json: peft_type=None"),
        ("{}", "adapter_config.json: peft_type=None"),
        ('{"peft_type": "NO"}', "adapter_config.json: peft_type='NO': expected the name of a method"),
        ('{"peft_type": ["LORA"]}', r"adapter_config.json: peft_type=\['LORA'\]"),
        ("{", "adapter_config.json: not a JSON file"),
        ("[" * 100_000, "adapter_config.json: not a JSON file"),
    ],
    ids=["list", "empty", "unknown-method", "list-of-methods", "cut", "deep"],
)
def test_configuration_file_of_no_method(text: str, message: str, tmp_path: Path):
    (saved(CASES[0], tmp_path) / "adapter_config.json").write_text(text)
    fresh, adapted = LLAMA.fresh(), trained(CASES[0])
    with unchanged(fresh), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(fresh, tmp_path)
    with unchanged(adapted), pytest.raises(ValueError, match=message):
        adapted.load_adapter(tmp_path, "second")


@over_cases
def test_configuration_with_a_list_where_something_else_belongs(case: Case, tmp_path: Path):
    content = json.loads((saved(case, tmp_path) / "adapter_config.json").read_text())
    fresh, adapted = LLAMA.fresh(), trained(case)
    lists = {"target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "layers_to_transform"}
    for name in ["auto_mapping", "base_model_name_or_path", "task_type", *lists, *own_fields(case.make())]:
        for value in ([[1]], {"a": 1}) if name in lists else ([1], ["a"]):
            edit_config(tmp_path, **{**content, name: value})
            with unchanged(fresh), pytest.raises(ValueError, match=rf"{tmp_path}: .*{name}"):
                PeftModel.from_pretrained(fresh, tmp_path)
            with unchanged(adapted), pytest.raises(ValueError, match=rf"{tmp_path}: .*{name}"):
                adapted.load_adapter(tmp_path, "second")
