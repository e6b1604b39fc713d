import csv
import os
import warnings
from collections import Counter
from math import sqrt
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
from tensorpeft.tasks.glue import TASKS
from tensorpeft.tasks.records import Record
from tensorpeft.tasks.task import LabelledText

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data"
BY_NAME = {task.name: task for task in TASKS}
ENTAILMENT = {"entailment": 0, "not_entailment": 1}
DIGITS = {"0": 0, "1": 1}

# task, file, column of the label and its classes, lines above the rows, rows per label as `cut | sort | uniq -c` counts
PUBLISHED = [
    ("cola", "glue_cola/train.tsv", 1, DIGITS, 0, {0: 2528, 1: 6023}),
    ("cola", "glue_cola/dev.tsv", 1, DIGITS, 0, {0: 322, 1: 721}),
    ("sst2", "glue_sst2/train.tsv", 1, DIGITS, 1, {0: 29780, 1: 37569}),
    ("sst2", "glue_sst2/dev.tsv", 1, DIGITS, 1, {0: 428, 1: 444}),
    ("qnli", "glue_qnli/dev.tsv", 3, ENTAILMENT, 1, {0: 2702, 1: 2761}),
    ("rte", "glue_rte/train.tsv", 3, ENTAILMENT, 1, {0: 1249, 1: 1241}),
    ("rte", "glue_rte/dev.tsv", 3, ENTAILMENT, 1, {0: 146, 1: 131}),
]
MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
STSB_TEST_HEADER = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
STSB_HEADER = f"{STSB_TEST_HEADER}\tscore"
STSB_START = "0\tnews\tours\t2012\t4\tnone\tnone"


def examples(name, path):
    task = BY_NAME[name]
    return [example for record in task.read(path) for example in task.parse(record)]


def write(folder, text, name="dev.tsv"):
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_names_and_classes_are_those_of_the_hub():
    assert {task.name: task.label_names for task in TASKS} == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
        "stsb": (),
    }
    assert {task.name: tuple(task.metrics) for task in TASKS} == {
        "cola": ("Matthews", "accuracy"),
        "sst2": ("accuracy",),
        "mrpc": ("F1", "accuracy"),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "stsb": ("Pearson", "Spearman"),
    }


@pytest.mark.parametrize(("name", "file", "column", "classes", "num_headers", "counts"), PUBLISHED)
def test_the_published_files(name, file, column, classes, num_headers, counts):
    path = DATA / file
    if not path.is_file():
        pytest.skip(f"no {path}; set TENSORPEFT_DATA to the folder that holds data/")
    found = examples(name, path)
    assert Counter(example.label for example in found) == counts

    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[num_headers:]
    assert [example.label for example in found] == [classes[row[column]] for row in rows]
    match name:
        case "cola":
            texts = [(row[3].strip(),) for row in rows]
        case "sst2":
            texts = [(row[0].strip(),) for row in rows]
        case _:
            texts = [(row[1], row[2]) for row in rows]
    assert [example.texts for example in found] == texts

    labels = [example.label for example in found]
    assert {metric(labels, labels) for metric in BY_NAME[name].metrics.values()} == {1.0}


def test_mrpc_as_microsoft_publishes_it(tmp_path):
    path = write(
        tmp_path,
        f"\ufeff{MRPC_HEADER}\r\n"
        '1\t11\t12\tThe bank "won" .\tThe "bank won .\r\n'
        "0\t13\t14\tA cat sat .\tA dog ran .\r\n",
        name="msr_paraphrase_train.txt",
    )
    assert examples("mrpc", path) == [
        LabelledText(('The bank "won" .', 'The "bank won .'), 1),
        LabelledText(("A cat sat .", "A dog ran ."), 0),
    ]


def test_stsb_as_glue_publishes_it(tmp_path):
    rows = [("A plane lands.", "A plane is landing.", "4.750"), ("A cat.", "A tax.", "0.000"), ("Up.", "Up.", "5")]
    path = write(tmp_path, "\n".join([STSB_HEADER, *("\t".join([STSB_START, *row]) for row in rows)]) + "\n")
    assert examples("stsb", path) == [
        LabelledText(("A plane lands.", "A plane is landing."), 4.75),
        LabelledText(("A cat.", "A tax."), 0.0),
        LabelledText(("Up.", "Up."), 5.0),
    ]


@pytest.mark.parametrize(
    ("name", "row", "texts", "label"),
    [
        ("cola", {"sentence": " He left.\n", "label": 1, "idx": 0}, ("He left.",), 1),
        ("sst2", {"sentence": "dull and slow ", "label": 0, "idx": 0}, ("dull and slow",), 0),
        ("mrpc", {"sentence1": "It rose .", "sentence2": "It fell .", "label": 0, "idx": 0}, None, 0),
        ("qnli", {"question": "Who?", "sentence": "He did.", "label": 1, "idx": 0}, ("Who?", "He did."), 1),
        (
            "rte",
            {"sentence1": "All left.", "sentence2": "He left.", "label": 0, "idx": 0},
            ("All left.", "He left."),
            0,
        ),
        ("stsb", {"sentence1": "Up.", "sentence2": "Down.", "label": 1.2, "idx": 0}, ("Up.", "Down."), 1.2),
    ],
)
def test_a_row_of_the_hub(name, row, texts, label):
    parse = BY_NAME[name].parse
    assert list(parse(Record(row, "row 0"))) == [LabelledText(texts or ("It rose .", "It fell ."), label)]
    withheld = {**row, "label": type(label)(-1)}
    with pytest.raises(ValueError, match=r"row 7, field 'label': got -1.*GLUE withholds the labels of its test split"):
        parse(Record(withheld, "row 7"))
    for column in set(row) - {"label", "idx"}:
        for bad, expected in [("  ", "a text that is not empty"), (None, "a text"), (3, "a text")]:
            with pytest.raises(ValueError, match=rf"row 7, field '{column}': got {bad!r}, expected {expected}"):
                parse(Record({**row, column: bad}, "row 7"))
        with pytest.raises(ValueError, match=rf"row 7, field '{column}': got nothing"):
            parse(Record({key: value for key, value in row.items() if key != column}, "row 7"))
    for bad in (True, 7, "yes", None):
        with pytest.raises(ValueError, match=rf"row 7, field 'label': got {bad!r}, expected"):
            parse(Record({**row, "label": bad}, "row 7"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cola", "index\tsentence\n0\tHe left.\n", r"line 1, field 'label'"),
        ("sst2", "index\tsentence\n0\tslow\n", r"line 2, field 'label'"),
        ("mrpc", "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tUp .\tDown .\n", r"line 2, field 'Quality'"),
        ("qnli", "index\tquestion\tsentence\n0\tWho?\tHe did.\n", r"line 2, field 'label'"),
        ("rte", "index\tsentence1\tsentence2\n0\tAll left.\tHe left.\n", r"line 2, field 'label'"),
        ("stsb", f"{STSB_TEST_HEADER}\n{STSB_START}\tUp.\tDown.\n", r"line 2, field 'score'"),
    ],
)
def test_a_test_file_of_glue_has_no_labels(tmp_path, name, text, message):
    path = write(tmp_path, text, name="test.tsv")
    with pytest.raises(ValueError, match=rf"test\.tsv, {message}: got nothing.*withholds the labels.*dev\.tsv"):
        examples(name, path)


@pytest.mark.parametrize(
    ("name", "header", "row", "message"),
    [
        ("cola", "gj04\t1\t\tHe left.", "gj04\t1\tHe left.", r"3 fields, expected 4"),
        (
            "cola",
            "gj04\t1\t\tHe left.",
            "gj04\tyes\t*\tHe left.",
            r"field 'label': got 'yes', expected one of '0', '1'",
        ),
        (
            "cola",
            "gj04\t1\t\tHe left.",
            "gj04\t1\t\t ",
            r"field 'sentence': got ' ', expected a text that is not empty",
        ),
        ("sst2", "sentence\tlabel", "slow\t2", r"field 'label': got '2', expected one of '0', '1'"),
        ("sst2", "sentence\tlabel", "slow", r"1 fields, expected 2"),
        ("sst2", "sentence\tlabel", "", r"1 fields, expected 2"),
        ("sst2", "sentence\tlabel", " \t1", r"field 'sentence': got ' '"),
        ("rte", "index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tmaybe", r"field 'label': got 'maybe'.*'not_entailm"),
        ("rte", "index\tsentence1\tsentence2\tlabel", "0\tA.\t\tentailment", r"field 'sentence2': got ''"),
        ("rte", "index\tquestion\tsentence\tlabel", "0\tA?\tB.\tentailment", r"field 'sentence1': got nothing"),
        ("qnli", "index\tquestion\tsentence\tlabel", "0\tA?\tB.\t", r"field 'label': got ''.*'not_entailment'"),
        ("qnli", "index\tquestion\tsentence\tlabel", "0\t\tB.\tentailment", r"field 'question': got ''"),
        ("mrpc", MRPC_HEADER, "3\t1\t2\tUp .\tDown .", r"field 'Quality': got '3', expected one of '0', '1'"),
        ("mrpc", MRPC_HEADER, "1\t1\t2\tUp .\t", r"field '#2 String': got ''"),
        ("mrpc", MRPC_HEADER, "1\t1\t2\tUp .", r"4 fields, expected 5"),
        ("stsb", STSB_HEADER, f"{STSB_START}\tUp.\tDown.\thigh", r"field 'score': got 'high', expected a number"),
        (
            "stsb",
            STSB_HEADER,
            f"{STSB_START}\tUp.\tDown.\t5.1",
            r"field 'score': got '5.1', expected a number from 0 to 5",
        ),
        ("stsb", STSB_HEADER, f"{STSB_START}\tUp.\tDown.\t-0.5", r"field 'score': got '-0.5', expected a number from"),
        ("stsb", STSB_HEADER, f"{STSB_START}\tUp.\tDown.\tnan", r"field 'score': got 'nan', expected a finite number"),
        ("stsb", STSB_HEADER, f"{STSB_START}\t\tDown.\t2", r"field 'sentence1': got ''"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(tmp_path, name, header, row, message):
    path = write(tmp_path, f"{header}\n{row}\n")
    with pytest.raises(ValueError, match=rf"dev\.tsv, line 2(, |: ){message}"):
        examples(name, path)


@pytest.mark.parametrize(
    ("name", "metric", "labels", "predictions", "expected"),
    [
        # 2 of 3 right in either class: (2·2 − 1·1) / √(3·3·3·3)
        ("cola", "Matthews", [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1], 1 / 3),
        ("cola", "Matthews", [1, 0], [0, 1], -1),
        ("cola", "accuracy", [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1], 2 / 3),
        ("sst2", "accuracy", [1, 0, 0, 0], [0, 0, 0, 1], 1 / 2),
        ("qnli", "accuracy", [1, 0, 0, 0], [1, 0, 0, 1], 3 / 4),
        ("rte", "accuracy", [1, 0, 0, 0], [0, 1, 1, 1], 0),
        # of class 1: two found, one missed, one false: 2·2 / (2·2 + 1 + 1); of class 0 it would be 0
        ("mrpc", "F1", [1, 1, 1, 0], [1, 1, 0, 1], 2 / 3),
        ("mrpc", "accuracy", [1, 1, 1, 0], [1, 1, 0, 1], 1 / 2),
        # deviations (−1, 0, 1) and (−2, −1, 3): 5 / √(2·14)
        ("stsb", "Pearson", [1.0, 2.0, 3.0], [1.0, 2.0, 6.0], 5 / sqrt(28)),
        ("stsb", "Spearman", [1.0, 2.0, 3.0], [1.0, 2.0, 6.0], 1),
        # ranks differ by (0, 1, 1, 0): 1 − 6·2 / (4·15)
        ("stsb", "Spearman", [1.0, 2.0, 3.0, 4.0], [1.0, 30.0, 2.0, 31.0], 0.8),
    ],
)
def test_metrics_against_hand_computed_values(name, metric, labels, predictions, expected):
    value = BY_NAME[name].metrics[metric](labels, predictions)
    assert type(value) is float
    assert value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "metric", "labels", "predictions"),
    [
        ("cola", "Matthews", [0, 1, 1, 0], [1, 1, 1, 1]),
        ("cola", "Matthews", [1, 1], [1, 1]),
        ("mrpc", "F1", [0, 1, 1], [0, 0, 0]),
        ("mrpc", "F1", [0, 0], [0, 0]),
        ("stsb", "Pearson", [0.0, 1.0, 5.0], [2.5, 2.5, 2.5]),
        ("stsb", "Spearman", [0.0, 1.0, 5.0], [2.5, 2.5, 2.5]),
        ("stsb", "Pearson", [2.0, 2.0], [1.0, 3.0]),
        ("stsb", "Pearson", [2.0], [1.0]),
    ],
)
def test_constant_values_score_zero_without_a_warning(name, metric, labels, predictions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BY_NAME[name].metrics[metric](labels, predictions) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("metric", ["Pearson", "Spearman"])
def test_a_diverged_model_is_an_error_not_a_nan(metric, value):
    with pytest.raises(ValueError, match=r"prediction 1 is (nan|inf).*diverged"):
        BY_NAME["stsb"].metrics[metric]([0.0, 1.0, 2.0], [0.0, value, 2.0])
