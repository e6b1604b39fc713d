"""vLLM's own HTTP server with the plug-in, on a CPU, on the small decoder (make serve-test)."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cases import perturb, tiny_llama
from loading.tiny_gguf import tensors, write
from tensorpeft import DotaConfig, FactConfig, LortaConfig, LotrConfig
from tensorpeft.loading.names import resolve

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from engines import VllmServer, greedy
from serving import EXACT, MERGED, TOTAL, equal, measure

PYTHON = os.environ.get("SERVE_PYTHON", "")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
PROMPTS = [[5, 9, 40, 7, 77], [3, 60, 61, 62], [100, 20, 33, 200, 41, 8], [250, 12]]
CONFIGS = {
    "lorta": LortaConfig(r=6, target_modules=TARGETS[:4]),
    "lotr": LotrConfig(r=6, target_modules=TARGETS),
    "fact": FactConfig(r=6, target_modules=TARGETS),
    "wide": LortaConfig(r=40, target_modules=TARGETS[:4]),
    "dota": DotaConfig(r=4, num_cores=3, target_modules=TARGETS),
}
pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not PYTHON, reason="SERVE_PYTHON: the Python of an environment with vLLM (make serve-test)"),
]
Told = dict[str, list[list[int]]]  # by adapter: tokens of every text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def base(folder) -> str:
    """A small decoder; its heads are of 32, the smallest that vLLM's attention on a CPU has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORPEFT_CACHE", str(folder / "tokens"))
        tokenizer = AutoTokenizer.from_pretrained(resolve(write(folder / "tokens.gguf", tensors(tied=True))))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 272, "initializer_range": 0.3}
    tiny_llama(**sizes).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return str(folder / "base")


@pytest.fixture(scope="module")
def expected(folder, base) -> Told:
    """What PEFT says, after saving the adapters."""
    told = Told()
    for name, config in CONFIGS.items():
        config.task_type = "CAUSAL_LM"
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
        perturb(model, scale=0.3 if name in ("dota", "wide") else 2.0)
        model.save_pretrained(folder / "adapters" / name)
        told[name] = [greedy(model, ids, 32) for ids in PROMPTS]
        told.setdefault("base", [greedy(model.unload(), ids, 32) for ids in PROMPTS])
    assert all(told[name][0] != told["base"][0] for name in ("lorta", "lotr", "fact"))
    tiny_llama().save_pretrained(folder / "other")
    other = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "other"), LortaConfig(r=2, target_modules=["q_proj"])
    )
    other.save_pretrained(folder / "adapters" / "other")
    (folder / "adapters" / "link").symlink_to(folder / "other")
    shutil.copytree(folder / "adapters" / "lorta", folder / "outside")
    shutil.copytree(folder / "adapters" / "fact", folder / "adapters" / "cut")
    os.truncate(folder / "adapters" / "cut" / "adapter_model.safetensors", 300)
    return told


@pytest.fixture(scope="module")
def server(folder, base, expected):
    environment = {"TENSORPEFT_CACHE": str(folder / "cache")}
    with VllmServer(PYTHON, base, folder / "adapters", folder / "log", environment=environment) as running:
        yield running


@pytest.fixture
def goes_on(server, expected, folder):
    """After the test the server still says what it should, and its cache holds nothing half-written."""
    yield
    assert server.process.poll() is None
    assert server.greedy("lorta", PROMPTS[0], 32) == expected["lorta"][0]
    assert not list((folder / "cache").rglob("*.unfinished"))


def test_two_adapters_in_one_batch_tell_what_peft_does(server, expected):
    asked = [(name, k) for k in range(len(PROMPTS)) for name in ("lorta", "lotr")]
    for name, k in asked[:2]:  # until they are expanded, nobody waits with them
        assert server.greedy(name, PROMPTS[k], 32) == expected[name][k]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda job: server.greedy(job[0], PROMPTS[job[1]], 32), asked))
    assert found == [expected[name][k] for name, k in asked]
    # The server's own word that both were in one batch.
    running = [line for line in server.metrics().splitlines() if line.startswith("vllm:lora_requests_info")]
    assert any("lorta,lotr" in line or "lotr,lorta" in line for line in running), running


def test_the_base_is_served_as_before(server, base, expected):
    assert [server.greedy(base, ids, 32) for ids in PROMPTS] == expected["base"]


@pytest.mark.usefixtures("goes_on")
@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "..",
        ".",
        "lorta/../lorta",
        "{adapters}/lorta",
        "{adapters}",
        "lor\0ta",
        "a" * 5000,
        "none",
        "lorta/",
    ],
)
def test_a_name_that_is_a_path_is_not_found(name, server, folder):
    assert server.refusal(name.format(adapters=folder / "adapters"))[0] == 404


@pytest.mark.usefixtures("goes_on")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("other", "this server has"),
        ("dota", "tensorpeft export lora --rank"),
        ("link", "leaves the folder of adapters"),
        ("cut", "not a complete safetensors file"),
        ("wide", "could not be loaded"),  # vLLM's own: its rank is above --max-lora-rank
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(name, reason, server):
    status, message = server.refusal(name)
    assert (status, reason in message) == (400, True), message


@pytest.mark.usefixtures("goes_on")
def test_a_half_written_entry_is_made_anew(server, expected, folder):
    assert server.greedy("fact", PROMPTS[0], 32) == expected["fact"][0]
    server.post("/v1/unload_lora_adapter", lora_name="fact")
    for file in (folder / "cache").rglob("adapter_model.safetensors"):
        os.truncate(file, 1000)
    (folder / "cache" / "served" / ("0" * 32 + ".unfinished")).mkdir()
    assert server.greedy("fact", PROMPTS[1], 32) == expected["fact"][1]


@pytest.mark.usefixtures("goes_on")
def test_a_full_disk_is_an_error_of_the_server(server, folder):
    """A disk of its own, smaller than the adapter, under what is left of the cache."""
    served, away = folder / "cache" / "served", folder / "away"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder / "other")]).returncode != 0:
        pytest.skip("this user may not mount a disk")
    try:
        served.rename(away)
        served.symlink_to(folder / "other")
        server.post("/v1/unload_lora_adapter", lora_name="lotr")
        status, message = server.refusal("lotr")
        assert (status, message) == (500, "adapter 'lotr' could not be expanded: see the server's log.")
        assert {path.name for path in served.iterdir()} <= {".lock", ".users"}
    finally:
        served.unlink()
        away.rename(served)
        subprocess.run(["umount", "-l", str(folder / "other")], check=True)
    assert len(server.greedy("lotr", [1], 4)) == 4
    assert "No space left on device" in (folder / "log").read_text()
    assert json.loads((folder / "adapters" / "lotr" / "adapter_config.json").read_text())["peft_type"] == "LOTR"


@pytest.mark.timeout(7200)
def test_trained_adapters_of_a_real_model_tell_the_same_everywhere(tmp_path):
    """SERVE_WORK: a folder of an earlier run, to go on there."""
    told = measure(Path(os.environ.get("SERVE_WORK", tmp_path)), PYTHON)
    for key in ("base", *EXACT, MERGED):
        for engine in ("llama.cpp f32", "vllm"):
            assert equal(told[engine][key], told["peft"][key]) == TOTAL, (engine, key)
        assert (equal(told["peft"][key], told["peft"]["base"]) < TOTAL) is (key != "base"), key
