"""A folder that every command finds something in: a tiny model, an adapter of it, rows and a recipe."""

import json
from pathlib import Path
from typing import Any

from peft import get_peft_model

from cases import perturb, tiny_llama
from evaluation.evaluated import word_tokenizer
from tensorpeft import LortaConfig

RECIPE: dict[str, Any] = {
    "model": "base",
    "task": "instructions",
    "description": "of a test",
    "adapter": {"method": "lorta", "r": 2, "target_modules": ["q_proj", "v_proj"]},
    "data": {"train": "rows.jsonl", "validation": 2, "test": "rows.jsonl", "test_rows": 1, "train_rows": 4, "seed": 0},
    "trainer": {"max_steps": 1, "learning_rate": 1e-3, "bf16": False, "per_device_train_batch_size": 1},
    "evaluate": {"batch_size": 1},
    "model_arguments": {"dtype": "float32"},
    "seeds": [0],
    "output": "out",
    "smoke": {"trainer": {"max_steps": 1}},
    "compare": {"seeds": 1, "methods": {"lora": {"rates": [1e-3], "adapter": {"r": 2}}}},
}

# The same adapter, rewarded for its answers.
REWARDED: dict[str, Any] = RECIPE | {
    "task": "gsm8k",
    "rewards": {"answer": 1, "format": 0.5},
    "data": RECIPE["data"] | {"train": "questions.jsonl", "test": "questions.jsonl"},
    "trainer": {
        **RECIPE["trainer"],
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 2,
    },
    "evaluate": {"batch_size": 1, "max_new_tokens": 2},
}


def fill(folder: Path) -> Path:
    """Write base, adapter, rows.jsonl and recipe.yaml into a folder; the names within are relative to it."""
    tiny_llama().save_pretrained(folder / "base")
    word_tokenizer(bos=True).save_pretrained(folder / "base")
    adapted = get_peft_model(tiny_llama(), LortaConfig(r=2))
    perturb(adapted)
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained(folder / "adapter")
    rows = [{"prompt": f"w{k} w5 ", "response": f"w6 w{k}"} for k in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    questions = [{"question": f"w{k} w5", "answer": f"w6 #### {k}"} for k in range(8)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")
    return folder
