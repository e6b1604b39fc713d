import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("omegaconf")
from tensorpeft.tasks.task import LabelledText, Question
from tensorpeft.training.recipe import DataRecipe, Recipe
from tensorpeft.training.splits import Leak, describe_source, load_splits

HEADER = "index\tsentence1\tsentence2\tlabel\n"


def write(folder, name, sentences):
    """The path of a file of RTE's with these premises."""
    path = folder / name
    rows = "".join(f"{i}\t{sentence}\tIt holds.\tentailment\n" for i, sentence in enumerate(sentences))
    path.write_text(HEADER + rows, encoding="utf-8")
    return str(path)


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path, "train.tsv", [f"Sentence {i}." for i in range(50)])


def load(seeds=(0,), task="rte", **data):
    return load_splits(Recipe(model="m", task=task, data=DataRecipe(**data), seeds=seeds))


def texts(examples):
    return [example.texts[0] for example in examples]


def test_validation_rows_are_drawn_without_overlap_and_none_is_lost(rows):
    splits = load(train=rows, validation=15)
    train, validation = texts(splits.train), texts(splits.validation)
    assert (len(train), len(validation)) == (35, 15)
    assert sorted(train + validation) == sorted(f"Sentence {i}." for i in range(50))
    assert validation != [f"Sentence {i}." for i in range(15)]
    assert (splits.test, splits.leaks) == ({}, ())


def test_the_rows_are_those_of_the_datas_seed_not_of_the_runs(rows):
    first = load(train=rows, validation=15, train_rows=20, seeds=(0, 1))
    assert load(train=rows, validation=15, train_rows=20, seeds=(7,)) == first
    other = load(train=rows, validation=15, train_rows=20, seed=1)
    assert set(texts(other.train)) != set(texts(first.train))
    assert set(texts(other.validation)) != set(texts(first.validation))


def test_fewer_training_rows_are_a_part_of_more_and_leave_validation_as_it_is(rows):
    whole, part = load(train=rows, validation=15), load(train=rows, validation=15, train_rows=20)
    assert part.train == whole.train[:20]
    assert part.validation == whole.validation
    assert len(load(train=rows, validation=15, train_rows=35).train) == 35
    assert len(load(train=rows, validation=49).train) == 1


def test_a_source_of_validation_and_of_tests_is_read_in_its_order(rows, tmp_path):
    other = write(tmp_path, "dev.tsv", "abcdef")
    splits = load(train=rows, validation=other, test=other)
    assert len(splits.train) == 50
    assert texts(splits.validation) == list("abcdef")
    assert [(name, task.name, texts(examples)) for name, (task, examples) in splits.test.items()] == [
        ("rte", "rte", list("abcdef"))
    ]
    splits = load(train=rows, validation=other, validation_rows=2, test=other, test_rows=3, train_rows=4)
    assert (len(splits.train), texts(splits.validation), texts(splits.test["rte"][1])) == (4, ["a", "b"], list("abc"))
    splits = load(train=rows, validation=other, validation_rows=99, test=other, test_rows=99)
    assert (len(splits.validation), len(splits.test["rte"][1])) == (6, 6)


def test_tests_by_name(rows, tmp_path):
    first, second = write(tmp_path, "a.tsv", "ab"), write(tmp_path, "b.tsv", "cd")
    qnli = tmp_path / "qnli.tsv"
    qnli.write_text("index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n")
    splits = load(train=rows, validation=5, test={"qnli": str(qnli), "rte": [first, second]}, test_rows=3)
    assert list(splits.test) == ["qnli", "rte"]
    assert splits.test["qnli"][0].name == "qnli"
    assert splits.test["qnli"][1] == [LabelledText(("Who?", "He."), 0)]
    assert texts(splits.test["rte"][1]) == ["a", "b", "c"]
    assert load(train=rows, validation=5, test={}).test == {}


def test_a_language_model_may_be_tested_on_any_task_of_language(tmp_path):
    texts, pairs = tmp_path / "texts.jsonl", tmp_path / "pairs.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Text {i}."}) + "\n" for i in range(9)))
    pairs.write_text(json.dumps({"prompt": "Why?", "chosen": "a", "rejected": "b"}))
    splits = load(task="lines", train=str(texts), validation=2, test={"preferences": str(pairs), "lines": str(texts)})
    assert [(name, len(examples)) for name, (_, examples) in splits.test.items()] == [("preferences", 1), ("lines", 9)]
    assert isinstance(splits.train[0], Question)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"rte": None}, "task rte: None is no source of data"),
        ({"rt": "a.tsv"}, r"no task 'rt'\. Did you mean rte\?"),
        ({"rte": "a.tsv", "qqp": "b.tsv"}, "no task 'qqp'"),
        ({"name": "rte", "split": "train"}, "no task 'name'"),
        ([], r"task rte: \[\] is no source of data"),
        ({"cola": "a.tsv"}, r"data\.test\.cola: a model for rte has no head for cola\. Leave it out"),
        ({"stsb": "a.tsv"}, r"data\.test\.stsb: a model for rte has no head for stsb"),
        ({"squad": "a.json"}, r"data\.test\.squad: a model for rte has no head for squad"),
        ({"folding": "a.cif"}, r"data\.test\.folding: a model for rte has no head for folding"),
    ],
)
def test_wrong_tests(rows, tmp_path, monkeypatch, test, message):
    write(tmp_path, "a.tsv", "ab")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(train=rows, validation=5, test=test)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"validation": 50}, r"data\.validation=50: expected at least 51 rows, got 50\. Ask for fewer"),
        ({"validation": 100}, "expected at least 101 rows, got 50"),
        ({"validation": 15, "train_rows": 36}, r"data\.train_rows=36: expected at least 36 rows, got 35"),
    ],
)
def test_too_few_rows(rows, data, message):
    with pytest.raises(ValueError, match=message):
        load(train=rows, **data)


def test_missing_files(rows, tmp_path):
    for data in ({"train": "x"}, {"validation": "x"}, {"test": "x"}):
        with pytest.raises(FileNotFoundError, match="no file x"):
            load(**{"train": rows, "validation": 5, **data})


def test_leaks_of_every_split_are_found(rows, tmp_path):
    dev = write(tmp_path, "dev.tsv", ["New.", "SENTENCE  3.", "sentence 40.", "Sentence 99."])
    splits = load(train=rows, validation=dev, test={"rte": [dev, dev]})
    assert splits.leaks == (Leak("validation", 4, (1, 2)), Leak("test (rte)", 8, (1, 2, 5, 6)))
    # What is not trained on does not leak.
    splits = load(train=rows, validation=rows, train_rows=2)
    numbers = sorted(int(text.removeprefix("Sentence ").removesuffix(".")) for text in texts(splits.train))
    assert splits.leaks == (Leak("validation", 50, tuple(numbers)),)


def test_rows_that_a_file_has_twice_leak_into_validation(tmp_path):
    twice = write(tmp_path, "twice.tsv", ["Same."] * 10)
    assert load(train=twice, validation=4).leaks == (Leak("validation", 4, (0, 1, 2, 3)),)


def test_a_leak_is_told_in_a_sentence():
    assert str(Leak("test (rte)", 9, (2, 4))) == "2 of 9 test (rte) rows are training rows, too (rows 2, 4)"
    assert str(Leak("validation", 99, tuple(range(7)))).endswith("(rows 0, 1, 2, 3, 4, …)")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/b/c.tsv", "b/c.tsv"),
        ("c.tsv", "c.tsv"),
        ("/c.tsv", "c.tsv"),
        ({"hub": "glue", "name": "rte", "split": "train", "drop": {}}, "glue rte train"),
        (
            {"rte": "a/b/c.tsv", "mrpc": ["d.tsv", {"hub": "glue", "split": "test"}]},
            "rte: b/c.tsv; mrpc: d.tsv, glue test",
        ),
        (15, "the training source, drawn before the training rows"),
    ],
)
def test_a_source_as_a_report_calls_it(source, name):
    assert describe_source(source) == name
