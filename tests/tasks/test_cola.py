import os
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
from tensorpeft.tasks.cola import load_cola

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data" / "glue_cola"
GOOD = "".join(f"gj04\t{i % 2}\t{'*' if i % 2 == 0 else ''}\tSentence number {i} is here.\n" for i in range(200))


def write(folder, train=GOOD, dev=GOOD):
    (folder / "train.tsv").write_text(train, encoding="utf-8")
    (folder / "dev.tsv").write_text(dev, encoding="utf-8")
    return folder


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no CoLA in {DATA}; set TENSORPEFT_DATA to the folder that holds data/")
def test_the_published_files():
    task = load_cola(DATA)
    assert len(task.train) + len(task.validation) == 8551
    assert len(task.test) == 1043
    assert 400 < len(task.validation) < 650
    assert sum(task.test.labels) == 721  # acceptable sentences in dev.tsv
    assert not set(task.train.texts) & set(task.validation.texts)
    sailors = task.test.texts.index("The sailors rode the breeze clear of the rocks.")
    assert task.label_names[task.test.labels[sailors]] == "acceptable"


def test_every_row_is_in_one_split_and_keeps_its_label(tmp_path):
    task = load_cola(write(tmp_path))
    rows = list(zip(task.train.texts + task.validation.texts, task.train.labels + task.validation.labels, strict=True))
    assert sorted(rows) == sorted((f"Sentence number {i} is here.", i % 2) for i in range(200))
    assert 0 < len(task.validation) < 40
    assert load_cola(tmp_path) == task


def test_the_split_of_a_sentence_does_not_depend_on_the_others(tmp_path):
    whole = load_cola(write(tmp_path))
    half = load_cola(write(tmp_path, train="".join(GOOD.splitlines(keepends=True)[:100])))
    assert set(half.validation.texts) <= set(whole.validation.texts)
    assert set(half.train.texts) <= set(whole.train.texts)


def test_matthews_is_zero_for_a_constant_answer_and_one_for_the_truth(tmp_path):
    matthews = load_cola(write(tmp_path)).metrics["Matthews"]
    assert matthews([0, 1, 1, 0], [1, 1, 1, 1]) == 0
    assert matthews([0, 1, 1, 0], [0, 1, 1, 0]) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("gj04\t1\tA sentence without a mark.", r"line 201: 3 fields, expected 4"),
        ("gj04\tyes\t\tA sentence.", r"line 201, field 'label': got 'yes', expected one of '0', '1'"),
        ("gj04\t1\t\t ", r"line 201, field 'sentence': got ' ', expected a text that is not empty"),
        ("", r"line 201: 1 fields"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(tmp_path, row, message):
    write(tmp_path, dev=f"{GOOD}{row}\n{GOOD}")
    with pytest.raises(ValueError, match=rf"dev\.tsv, {message}"):
        load_cola(tmp_path)


def test_a_missing_file_is_named_with_the_option(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.tsv.*--data DIR"):
        load_cola(tmp_path)
