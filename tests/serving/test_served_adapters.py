"""What a server's clients can ask for by a name, and what they cannot. No engine is needed."""

import asyncio
import contextlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

import tensorpeft_vllm
from cases import logits, named, over_cases, perturb, tiny_llama
from tensorpeft.export import has_exact_lora
from tensorpeft.serving.adapters import ServedAdapters
from tensorpeft.serving.cache import BoundedCache
from tensorpeft.serving.resolver import TensorResolver, adapters_of

TARGETS = ["q_proj", "v_proj", "o_proj"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def served(folder, tmp_path) -> ServedAdapters:
    return ServedAdapters(folder, BoundedCache(tmp_path / "cache", 10**9))


def case_of(name: str):
    return named(name)[0]


def save(base: str, folder: Path, case=None, **more) -> PeftModel:
    config = (case or case_of("lorta")).make(task_type="CAUSAL_LM", **more)
    if config.target_modules is None:
        config.target_modules = None if case is not None and not case.merges else TARGETS
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    perturb(model)
    model.save_pretrained(folder)
    return model


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.endswith(".lock"))


def edit(adapter: Path, **fields) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | fields))


@over_cases
def test_an_adapter_is_served_exactly_or_refused_with_what_to_do(case, base, folder, served, tmp_path):
    model = save(base, folder / "mine", case)
    if not case.merges or not has_exact_lora(model):
        with pytest.raises(ValueError, match=r"adapter 'mine'.* tensorpeft export dense|not linear"):
            served.find("mine", base)
        assert entries(tmp_path / "cache") == []
        return
    found = served.find("mine", base)
    assert found is not None
    assert not {"tokenizer.json", ".lock", ".unfinished"} & {path.name for path in found.iterdir()}
    config = json.loads((found / CONFIG).read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", base)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(found)).eval()
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    assert served.find("mine", base) == found
    assert entries(tmp_path / "cache") == [found]


def test_the_base_s_weights_are_not_read(base, folder, served, tmp_path):
    save(base, folder / "mine")
    (tmp_path / "bare").mkdir()
    shutil.copy(Path(base, "config.json"), tmp_path / "bare")
    edit(folder / "mine", base_model_name_or_path=str(tmp_path / "bare"))
    assert served.find("mine", str(tmp_path / "bare")) is not None


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../outside", "mine/../mine", "/etc", "mine/", ".hidden", "mi\0ne", "mi\\ne", "a" * 300, "mine\n"],
)
def test_a_name_is_no_path(name, base, folder, served):
    save(base, folder / "mine")
    for other in (folder.parent / "outside", folder / ".hidden"):
        shutil.copytree(folder / "mine", other)
    assert served.find(name, base) is None
    absolute = str(folder / "mine")
    assert served.find(absolute, base) is None


def test_links_stay_in_the_folder(base, folder, served):
    save(base, folder.parent / "outside")
    save(base, folder / "mine")
    (folder / "alias").symlink_to("mine")
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "file").mkdir()
    (folder / "file" / CONFIG).symlink_to(folder / "mine" / CONFIG)
    (folder / "file" / WEIGHTS).symlink_to(folder.parent / "outside" / WEIGHTS)
    (folder / "circle").symlink_to("circle")
    assert served.find("alias", base) == served.find("mine", base)
    for name in ("link", "file"):
        with pytest.raises(ValueError, match=f"adapter '{name}': .* is a link that leaves the folder of adapters"):
            served.find(name, base)
    with contextlib.suppress(ValueError, OSError):  # as this Python has it
        assert served.find("circle", base) is None


def test_what_is_not_ours_is_left_to_others(base, folder, served):
    assert served.find("nothing", base) is None
    (folder / "empty").mkdir()
    assert served.find("empty", base) is None
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=TARGETS))
    plain.save_pretrained(folder / "plain")
    assert served.find("plain", base) is None


def test_an_adapter_of_another_base_is_refused(base, folder, served, tmp_path):
    torch.manual_seed(1)
    tiny_llama(hidden_size=32).save_pretrained(tmp_path / "other")
    save(str(tmp_path / "other"), folder / "mine")
    with pytest.raises(ValueError, match=f"'mine' was trained on {tmp_path}/other, but this server has {base}"):
        served.find("mine", base)
    # Even if it is said to be the same one.
    edit(folder / "mine", base_model_name_or_path=base)
    with pytest.raises(ValueError, match="adapter 'mine'"):
        served.find("mine", base)
    edit(folder / "mine", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not say which base"):
        served.find("mine", base)
    assert entries(tmp_path / "cache") == []


def test_the_base_may_have_other_names(base, folder, tmp_path, monkeypatch):
    save(base, folder / "mine")
    edit(folder / "mine", base_model_name_or_path="owner/name")
    monkeypatch.setenv("TENSORPEFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="TENSORPEFT_BASE_NAMES=owner/name"):
        adapters_of(folder).find("mine", base)
    monkeypatch.setenv("TENSORPEFT_BASE_NAMES", "another, owner/name")
    found = adapters_of(folder).find("mine", base)
    assert found is not None
    assert json.loads((found / CONFIG).read_text())["base_model_name_or_path"] == base
    (tmp_path / "link").symlink_to(base)
    edit(folder / "mine", base_model_name_or_path=str(tmp_path / "link"))
    assert adapters_of(folder).find("mine", base) is not None


def test_damaged_adapters_are_refused_without_a_path_of_the_server(base, folder, served, tmp_path):
    save(base, folder / "whole")
    weights = (folder / "whole" / WEIGHTS).read_bytes()
    for name, file, content in [
        ("cut", WEIGHTS, weights[: len(weights) // 2]),
        ("bare", WEIGHTS, None),
        ("text", CONFIG, b"{"),
        ("type", CONFIG, b'{"peft_type": "NONE"}'),
        ("list", CONFIG, b"[]"),
    ]:
        shutil.copytree(folder / "whole", folder / name)
        path = folder / name / file
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=f"adapter '{name}'") as caught:
            served.find(name, base)
        assert "/tmp" not in str(caught.value).replace(base, "")
        assert str(folder) not in str(caught.value)
    assert served.find("whole", base) is not None


def test_modules_that_were_trained_in_full_are_refused(base, folder, served):
    save(base, folder / "mine", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\].* export dense"):
        served.find("mine", base)


def test_embeddings_that_no_field_names_are_refused(base, folder, served):
    model = save(base, folder / "mine")
    model.save_pretrained(folder / "mine", save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"'mine': embeddings=\['embed_tokens', 'lm_head'\]: .* export dense"):
        served.find("mine", base)


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", None])
def test_an_adapter_of_another_class_is_not_served_as_the_bare_base(task, base, folder, served, tmp_path):
    """Its layers are called otherwise, and vLLM would find none of them, without a word."""
    config = case_of("lorta").make(target_modules=TARGETS, task_type=task)
    get_peft_model(AutoModel.from_pretrained(base), config).save_pretrained(folder / "mine")
    with pytest.raises(ValueError, match=r"'mine' was trained on a LlamaModel, but .* is served as a LlamaForCausalLM"):
        served.find("mine", base)
    assert not (tmp_path / "cache").exists()
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / "other")
    if task is None:  # it says what it was trained on
        assert served.find("other", base) is not None


def test_a_changed_adapter_is_expanded_anew_and_an_equal_one_is_not(base, folder, served):
    save(base, folder / "mine")
    shutil.copytree(folder / "mine", folder / "twin")
    first = served.find("mine", base)
    assert served.find("twin", base) == first
    save(base, folder / "mine", case_of("lotr"))
    assert served.find("mine", base) != first


def test_a_full_disk_leaves_nothing(base, folder, served, tmp_path):
    """The kernel's own refusal to write more."""
    save(base, folder / "mine", r=16)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (folder / "mine" / WEIGHTS).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        with pytest.raises(Exception, match="large"):
            served.find("mine", base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path / "cache") == []
    assert served.find("mine", base) is not None


class Answers:
    """The resolver in a process that has a vLLM of these names."""

    def __init__(self, monkeypatch, adapters) -> None:
        request = ModuleType("vllm.lora.request")
        request.LoRARequest = lambda **fields: SimpleNamespace(**fields)  # type: ignore[attr-defined]
        for name in ("vllm", "vllm.lora"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
        self._resolver = TensorResolver(adapters)

    def __call__(self, base: str, name: str):
        return asyncio.run(self._resolver.resolve_lora(base, name))


def test_the_resolver_answers_with_a_request_nothing_or_a_reason(base, folder, served, monkeypatch, caplog):
    ask = Answers(monkeypatch, served)
    save(base, folder / "mine")
    save(base, folder / "dota", case_of("dota"))
    request = ask(base, "mine")
    assert (request.lora_name, Path(request.lora_path)) == ("mine", served.find("mine", base))
    assert request.lora_int_id > 0
    assert ask(base, "../mine") is None
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="tensorpeft export lora"):
        ask(base, "dota")
    assert "Refused: adapter 'dota'" in caplog.text
    monkeypatch.setattr(served, "find", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "/secret")))
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="see the server's log") as caught:
        ask(base, "mine")
    assert "secret" not in str(caught.value)
    assert "/secret" in caplog.text


def test_other_tasks_go_on_while_an_adapter_is_expanded(base, folder, served, monkeypatch):
    Answers(monkeypatch, served)
    save(base, folder / "mine")

    async def both() -> int:
        asked, ticks = asyncio.create_task(TensorResolver(served).resolve_lora(base, "mine")), 0
        while not asked.done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert await asked is not None
        return ticks

    assert asyncio.run(both()) > 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TENSORPEFT_ADAPTERS", "/no/such/folder"),
        *(("TENSORPEFT_SERVING_CACHE_GB", v) for v in ("many", "0", "-1", "nan", "inf")),
    ],
)
def test_a_server_does_not_start_with_a_wrong_setting(name, value, folder, monkeypatch):
    monkeypatch.setenv(name, value)
    given = Path(value) if name == "TENSORPEFT_ADAPTERS" else folder
    with pytest.raises(ValueError, match=f"{name}={value}"):
        adapters_of(given)


def test_without_a_folder_vllm_s_processes_import_nothing_of_ours():
    """In a process of its own: this one has all of it."""
    code = "import sys, tensorpeft_vllm as t; t.register(); print(*(name for name in sys.modules if 'peft' in name))"
    environment = {key: value for key, value in os.environ.items() if key != "TENSORPEFT_ADAPTERS"}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True).split() == ["tensorpeft_vllm"]


def test_with_a_folder_vllm_knows_the_resolver(folder, monkeypatch):
    class LoRAResolver(ABC):
        @abstractmethod
        async def resolve_lora(self, base_model_name, lora_name): ...

    registered = {}
    resolver = ModuleType("vllm.lora.resolver")
    resolver.LoRAResolver = LoRAResolver  # type: ignore[attr-defined]
    resolver.LoRAResolverRegistry = SimpleNamespace(register_resolver=registered.__setitem__)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", resolver)
    monkeypatch.setenv("TENSORPEFT_ADAPTERS", str(folder))
    tensorpeft_vllm.register()
    assert isinstance(registered["tensorpeft"], LoRAResolver)


def test_the_entry_point_is_the_plug_in():
    text = Path(tensorpeft_vllm.__file__).parents[1].joinpath("pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\ntensorpeft = "tensorpeft_vllm:register"' in text
