"""What is trained in these tests: tiny models, rows and recipes."""

import json

import pytest


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with models, data and recipes."""
    from evaluation.evaluated import LLAMA, WORDS, tiny_bert, word_tokenizer

    folder = tmp_path_factory.mktemp("recipes")
    LLAMA.fresh().save_pretrained(folder / "llama")
    word_tokenizer(bos=True).save_pretrained(folder / "llama")
    tiny_bert().bert.save_pretrained(folder / "bert")
    word_tokenizer(pairs=True).save_pretrained(folder / "bert")
    rows = [{"prompt": " ".join(WORDS[k : k + 4]) + " ", "response": " ".join(WORDS[k + 4 : k + 7])} for k in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": r["response"][::-1]} for r in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    lines = [f"{' '.join(WORDS[k : k + 3])}\t{k % 2}\n" for k in range(60)]
    (folder / "labels.tsv").write_text("sentence\tlabel\n" + "".join(lines), encoding="utf-8")
    write(folder, "sft", "llama", "instructions", "rows.jsonl", "{method: dota, r: 4, num_cores: 3}")
    write(folder, "dpo", "llama", "preferences", "pairs.jsonl", "{method: lorta, r: 4}")
    write(folder, "labels", "bert", "sst2", "labels.tsv", "{method: lorta, r: 4, target_modules: [query, key, value]}")
    return folder


def write(folder, name, model, task, data, adapter):
    (folder / f"{name}.yaml").write_text(
        f"model: {folder / model}\ntask: {task}\nadapter: {adapter}\n"
        f"data: {{train: {folder / data}, validation: 8, test: {folder / data}, test_rows: 6}}\n"
        "trainer: {max_steps: 6, eval_steps: 2, logging_steps: 1, per_device_train_batch_size: 4}\n",
        encoding="utf-8",
    )
