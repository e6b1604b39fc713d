import json

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("datasets")
import datasets

from tensorpeft.tasks.registry import _MODULES, TASKS, find_task
from tensorpeft.tasks.sources import digest, find_leaks, load_examples
from tensorpeft.tasks.task import LabelledText, Preference, Question, Structure, StructureTask

RTE, INSTRUCTIONS = TASKS["rte"], TASKS["instructions"]
ROWS = [{"sentence1": f"Premise {i}.", "sentence2": "Claim.", "label": i % 2, "origin": "ab"[i % 2]} for i in range(6)]
EXAMPLES = [LabelledText((row["sentence1"], "Claim."), row["label"]) for row in ROWS]
CHAINS = [Structure("MKV", np.zeros((3, 3, 3), np.float32), key) for key in ("1ABC:A", "1ABC:B")]
FOLDING = StructureTask("chains", "Chains.", load=lambda path: CHAINS if path.name == "full.cif" else [])


@pytest.fixture
def hub(monkeypatch):
    """The Hub with one data set of `ROWS`; what was asked of it."""
    asked = []

    def load_dataset(path, **arguments):
        asked.append({"path": path, **arguments})
        table = datasets.Dataset.from_list(ROWS)
        if arguments.get("split") is None:
            return datasets.DatasetDict({"train": table})
        return table.to_iterable_dataset() if arguments.get("streaming") else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def write(folder, rows, name="rows.json"):
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def alpaca(*numbers):
    return [{"instruction": f"Say {number}.", "output": f"{number}"} for number in numbers]


def test_a_file_and_a_list_of_files_in_their_order(tmp_path):
    first, second = write(tmp_path, alpaca(3, 1), "b.json"), write(tmp_path, alpaca(2), "a.json")
    assert [example.response for example in load_examples(INSTRUCTIONS, str(first))] == ["3", "1"]
    for source in ([first, str(second)], (str(first), [second])):
        assert [example.response for example in load_examples(INSTRUCTIONS, source)] == ["3", "1", "2"]


def test_the_rows_of_the_hub(hub):
    assert load_examples(RTE, {"hub": "nyu-mll/glue", "name": "rte", "split": "train"}) == EXAMPLES
    assert hub == [{"path": "nyu-mll/glue", "name": "rte", "split": "train"}]


def test_a_source_is_left_as_it_was(hub):
    source = {"hub": "glue", "split": "train", "rows": 2, "drop": {"origin": ["a"]}}
    assert load_examples(RTE, source) == load_examples(RTE, source) == EXAMPLES[1:2]
    assert source == {"hub": "glue", "split": "train", "rows": 2, "drop": {"origin": ["a"]}}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("rows", "number"), [(1, 1), (6, 6), (7, 6), (None, 6)])
def test_the_first_rows(hub, streaming, rows, number):
    source = {"hub": "glue", "split": "train", "rows": rows, "streaming": streaming}
    assert load_examples(RTE, source) == EXAMPLES[:number]


@pytest.mark.parametrize(
    ("drop", "kept"),
    [
        ({"origin": ["a"]}, [1, 3, 5]),
        ({"origin": ["a", "x"], "sentence1": ["Premise 1."]}, [3, 5]),
        ({"origin": []}, [0, 1, 2, 3, 4, 5]),
        ({}, [0, 1, 2, 3, 4, 5]),
        (None, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_rows_that_are_dropped_are_counted(hub, capsys, drop, kept):
    found = load_examples(RTE, {"hub": "glue", "split": "train", "drop": drop})
    assert found == [EXAMPLES[index] for index in kept]
    printed = capsys.readouterr().out
    assert (f"glue, split train: {6 - len(kept)} of 6 rows left out" in printed) == bool(drop)


def test_null_is_a_value_that_can_be_dropped(monkeypatch):
    rows = [{"instruction": "Say 1.", "output": "1", "score": 3.0}, {"instruction": "Say 2.", "output": None}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    source = {"hub": "alpaca", "split": "train"}
    with pytest.raises(ValueError, match=r"^alpaca, split train, row 1, field 'output': got None, expected a text"):
        load_examples(INSTRUCTIONS, source)
    assert len(load_examples(INSTRUCTIONS, {**source, "drop": {"score": [None, 1]}})) == 1
    assert len(load_examples(INSTRUCTIONS, {**source, "rows": 1})) == 1


def test_a_row_of_the_hub_is_named_by_its_place_before_others_were_dropped(monkeypatch):
    rows = [{**row, "sentence2": " " if index == 4 else "Claim."} for index, row in enumerate(ROWS)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    with pytest.raises(ValueError, match=r"^glue, split test, row 4, field 'sentence2': got ' '"):
        load_examples(RTE, {"hub": "glue", "split": "test", "drop": {"origin": ["b"]}})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"split": None}, r"{hub: glue}: the split is missing\. Add split: train"),
        ({"rows": 0}, "glue, split train: rows=0: expected a whole number, at least 1"),
        ({"rows": -1}, "rows=-1: expected a whole number"),
        ({"rows": True}, "rows=True: expected a whole number"),
        ({"rows": "2"}, "rows='2': expected a whole number"),
        ({"drop": {"origin": "ab"}}, r"drop={'origin': 'ab'}: expected a list of values by column"),
        ({"drop": ["origin"]}, r"drop=\['origin'\]: expected a list of values by column"),
        ({"drop": {"orgin": ["a"]}}, "drop has the column orgin; expected one of sentence1, sentence2, label, origin"),
        ({"drop": {"origin": ["a", "b"]}}, "it holds no rows of the task rte"),
    ],
)
def test_a_wrong_source_on_the_hub(hub, more, message):
    with pytest.raises(ValueError, match=message):
        load_examples(RTE, {"hub": "glue", "split": "train", **more})


def test_a_hub_source_without_a_split(hub):
    with pytest.raises(ValueError, match="the split is missing"):
        load_examples(RTE, {"hub": "glue", "name": "rte"})
    assert hub == []


@pytest.mark.parametrize("source", [None, 3, True, [], (), {}, {"name": "rte"}, [None], {"train": "rows.json"}])
def test_what_is_no_source(source):
    with pytest.raises(ValueError, match=r"^task rte: .* is no source of data\. Pass the path .* \{hub: NAME"):
        load_examples(RTE, source)


def test_files_without_rows_and_missing_ones(tmp_path):
    header = tmp_path / "dev.tsv"
    header.write_text("index\tsentence1\tsentence2\tlabel\n")
    with pytest.raises(ValueError, match=r"dev\.tsv: it holds no rows of the task rte"):
        load_examples(RTE, header)
    # One empty part of a list is not hidden by the others.
    full, empty = write(tmp_path, alpaca(1), "full.json"), write(tmp_path, [], "empty.json")
    with pytest.raises(ValueError, match=r"empty\.json: it holds no rows"):
        load_examples(INSTRUCTIONS, [full, empty])
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.json"):
        load_examples(INSTRUCTIONS, [full, tmp_path / "none.json"])


def test_structures_come_from_files_only(hub):
    assert load_examples(FOLDING, ["full.cif", "full.cif"]) == CHAINS * 2
    with pytest.raises(ValueError, match=r"empty\.cif: it holds no rows"):
        load_examples(FOLDING, "empty.cif")
    with pytest.raises(ValueError, match=r"is no source of data\. Pass the path of a published file, or a list of"):
        load_examples(FOLDING, {"hub": "proteins", "split": "train"})
    assert hub == []


def test_leaks_are_texts_that_differ_in_case_and_white_space_at_most():
    train = [LabelledText(("A  Cat sat.", "Weiße Straße"), 0), LabelledText(("One text.",), 1)]
    test = [
        LabelledText(("a cat\tsat. ", "WEISSE STRASSE"), 1),
        LabelledText(("Weiße Straße", "A cat sat."), 0),
        LabelledText(("A cat sat, too.", "Weiße Straße"), 0),
        LabelledText(("ONE\u00a0TEXT.\n",), 1),
        LabelledText(("One", "text."), 1),
    ]
    assert find_leaks(train, test) == [0, 3]
    assert find_leaks([], test) == find_leaks(train, []) == []


def test_leaks_are_of_what_the_model_is_given():
    asked = [Question("Why?", " So."), Question("", "A story.")]
    assert find_leaks(asked, [Question("why?", " Not so."), Question("How?", " So."), Question("", "a  Story.")]) == [
        0,
        2,
    ]
    assert find_leaks(
        [Preference("Why?", "a", "b")], [Preference("How?", "a", "b"), Preference(" why?", "c", "d")]
    ) == [1]
    assert find_leaks(CHAINS[:1], [CHAINS[1], Structure("MK", np.zeros((2, 3, 3)))]) == [0]


def test_every_task_has_a_name_of_its_own():
    assert len(TASKS) == sum(len(module.TASKS) for module in _MODULES)
    assert all(find_task(name).name == name for name in TASKS)


@pytest.mark.parametrize(("name", "hint"), [("sts-b", "Did you mean stsb?"), ("RTE", "Known are"), ("", "Known are")])
def test_an_unknown_task(name, hint):
    with pytest.raises(ValueError, match=f"^no task '{name}'. {hint.replace('?', '[?]')}"):
        find_task(name)


def test_a_digest_tells_rows_from_others_and_not_where_they_are_from():
    questions = [Question("one ", "two", ("two",), key="a.json, line 1"), Question("three ", "four")]
    there = [Question("one ", "two", ("two",), key="b.json, line 9"), questions[1]]
    assert digest(questions) == digest(there)
    others = [questions[::-1], questions[:1], [Question("one ", "two"), questions[1]], EXAMPLES, CHAINS]
    moved = [Structure("MKV", np.ones((3, 3, 3), np.float32), chain.key) for chain in CHAINS]
    assert len({digest(rows) for rows in (questions, *others, moved)}) == 7
