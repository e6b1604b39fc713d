"""What is compared in these tests: a tiny model, rows and a recipe."""

from pathlib import Path

import pytest

SECTION = """
compare:
  seeds: 2
  widenings: 0
  methods:
    full: {rates: [1e-4, 1e-3]}
    lora: {rates: [1e-3, 1e-2], adapter: {r: 2}}
    lorta: {rates: [1e-3, 1e-2], note: "a <note>"}
    broken: {rates: [1e-3, 1e-2], adapter: {method: dota, r: 4, num_cores: 3, target_modules: [nowhere]}}
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with a model, rows and a recipe, some.yaml."""
    from evaluation.evaluated import WORDS, tiny_bert, word_tokenizer

    folder = tmp_path_factory.mktemp("compared")
    tiny_bert().bert.save_pretrained(folder / "bert")
    word_tokenizer(pairs=True).save_pretrained(folder / "bert")
    lines = [f"{' '.join(WORDS[k : k + 3])}\t{k % 2}\n" for k in range(60)]
    (folder / "labels.tsv").write_text("sentence\tlabel\n" + "".join(lines), encoding="utf-8")
    (folder / "some.yaml").write_text(
        f"model: {folder / 'bert'}\ntask: sst2\n"
        "adapter: {method: lorta, r: 4, target_modules: [query, key, value]}\n"
        f"data: {{train: {folder / 'labels.tsv'}, validation: 8, test: {folder / 'labels.tsv'}, test_rows: 6}}\n"
        "trainer: {max_steps: 4, eval_steps: 2, logging_steps: 1, per_device_train_batch_size: 4, "
        "learning_rate: 1e-2}\n" + SECTION,
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="session")
def asked(tmp_path_factory) -> Path:
    """A folder with a tiny language model and a recipe of questions, asked.yaml."""
    from evaluation.evaluated import LLAMA, word_tokenizer

    folder = tmp_path_factory.mktemp("asked")
    LLAMA.fresh().save_pretrained(folder / "llama")
    word_tokenizer(bos=True).save_pretrained(folder / "llama")
    (folder / "asked.yaml").write_text(
        f"model: {folder / 'llama'}\ntask: signatures\n"
        "adapter: {method: lora, r: 2, target_modules: [q_proj, v_proj]}\n"
        "data: {train: 'stdlib:train', train_rows: 8, validation: 'stdlib:validation', validation_rows: 4, "
        "test: 'stdlib:test', test_rows: 5}\n"
        "evaluate: {max_new_tokens: 6}\n"
        "trainer: {max_steps: 2, eval_steps: 1, per_device_train_batch_size: 4, learning_rate: 1e-3, bf16: false}\n"
        "compare: {seeds: 1, methods: {lora: {rates: [1e-2]}, lorta: {rates: [1e-2], note: 'a note'}}}\n",
        encoding="utf-8",
    )
    return folder
