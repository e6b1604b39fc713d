"""The six tasks of GLUE that the LoRTA paper fine-tunes RoBERTa on, from GLUE's TSV files or from nyu-mll/glue.

- CoLA has no header: source, label, the author's mark, sentence.
- SST-2, QNLI, RTE and STS-B name their columns in the first line.
- MRPC (msr_paraphrase_train.txt and _test.txt of Microsoft, or GLUE's train.tsv and dev.tsv) does so too, after a byte
  order mark.

Labels have the order of the Hub, so that a classifier trained on one source fits the other. GLUE withholds the labels
of its test files, hence papers, LoRTA's among them, report the validation split (dev.tsv).

Sources: Wang et al., "GLUE", arXiv 1804.07461, which names the metrics; the tasks are those of Table 2 of LoRTA, arXiv
2410.04060. That table has one number per task and does not name it. For MRPC, its VeRA rows repeat VeRA's accuracy.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from tensorpeft.tasks.records import Record, read_lines, read_tsv
from tensorpeft.tasks.task import LabelledText, LabelTask

# As published, then as on the Hub.
_DIGITS = {"0": 0, "1": 1, 0: 0, 1: 1}
_ENTAILMENT = {"entailment": 0, "not_entailment": 1, 0: 0, 1: 1}
_ENTAILMENT_NAMES = ("entailment", "not_entailment")
_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_COLA_TEST_HEADER = "index\tsentence"
_HIGHEST_SIMILARITY = 5


def accuracy(labels: Sequence[float], predictions: Sequence[float]) -> float:
    """The share of predictions that are the label."""
    return float(accuracy_score(labels, predictions))


def f1(labels: Sequence[float], predictions: Sequence[float]) -> float:
    """The harmonic mean of precision and recall of class 1; 0.0 where nobody has it."""
    return float(f1_score(labels, predictions, zero_division=0.0))  # pyright: ignore[reportArgumentType]


def matthews(labels: Sequence[float], predictions: Sequence[float]) -> float:
    """Matthews' correlation of two classes; by definition 0.0 where labels or predictions are constant."""
    if _is_constant(labels) or _is_constant(predictions):
        return 0.0  # scikit-learn says the same, with a warning
    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: Sequence[float], predictions: Sequence[float]) -> float:
    """The linear correlation; 0.0 where labels or predictions are constant, which leaves it undefined.

    Raises:
        ValueError: a prediction is not finite.
    """
    return _correlation(pearsonr, labels, predictions)


def spearman(labels: Sequence[float], predictions: Sequence[float]) -> float:
    """The correlation of the ranks; 0.0 where labels or predictions are constant, which leaves it undefined.

    Raises:
        ValueError: a prediction is not finite.
    """
    return _correlation(spearmanr, labels, predictions)


def read_cola(path: Path) -> Iterator[Record]:
    """The rows of a file of CoLA, which has no header.

    Raises:
        ValueError: it is GLUE's test file, which does have one, but no labels; or a row does not have four fields.
    """
    place, first = next(read_lines(path))
    if first == _COLA_TEST_HEADER:
        raise _withheld(place, "label", "nothing")
    return read_tsv(path, _COLA_COLUMNS)


def parse_sentence(record: Record) -> tuple[LabelledText]:
    """The sentence and the class of a row of CoLA or SST-2, without the white space around the sentence.

    Raises:
        ValueError: the sentence is missing or blank; the label is withheld, or neither 0 nor 1.
    """
    return (LabelledText((record.text("sentence").strip(),), _class_of(record, "label", _DIGITS)),)


def parse_rte(record: Record) -> tuple[LabelledText]:
    """The premise with its hypothesis, and the class, of a row of RTE.

    Raises:
        ValueError: a sentence is missing or blank; the label is withheld or unknown.
    """
    return (LabelledText(_pair(record, "sentence1", "sentence2"), _class_of(record, "label", _ENTAILMENT)),)


def parse_qnli(record: Record) -> tuple[LabelledText]:
    """The question with the sentence that may answer it, and the class, of a row of QNLI.

    Raises:
        ValueError: question or sentence is missing or blank; the label is withheld or unknown.
    """
    return (LabelledText(_pair(record, "question", "sentence"), _class_of(record, "label", _ENTAILMENT)),)


def parse_mrpc(record: Record) -> tuple[LabelledText]:
    """The two sentences and the class of a row of MRPC.

    Raises:
        ValueError: a sentence is missing or blank; the label is withheld, or neither 0 nor 1.
    """
    if record.has("#1 String"):
        return (LabelledText(_pair(record, "#1 String", "#2 String"), _class_of(record, "Quality", _DIGITS)),)
    return (LabelledText(_pair(record, "sentence1", "sentence2"), _class_of(record, "label", _DIGITS)),)


def parse_stsb(record: Record) -> tuple[LabelledText]:
    """The two sentences and their similarity, 0 to 5, of a row of STS-B.

    Raises:
        ValueError: a sentence is missing or blank; the score is withheld, or no number from 0 to 5.
    """
    texts = _pair(record, "sentence1", "sentence2")
    field = "label" if record.has("label") else "score"
    _require_label(record, field)
    score = record.number(field)
    if not 0 <= score <= _HIGHEST_SIMILARITY:
        raise record.error(field, f"a number from 0 to {_HIGHEST_SIMILARITY}")
    return (LabelledText(texts, score),)


def _pair(record: Record, first: str, second: str) -> tuple[str, str]:
    return record.text(first), record.text(second)


def _class_of(record: Record, field: str, classes: Mapping[Any, int]) -> int:
    _require_label(record, field)
    return record.choice(field, classes)


def _require_label(record: Record, field: str) -> None:
    """Raises where the row has the place of a label only (-1 on the Hub), or not even that (the test files)."""
    if record.fields.get(field, -1) in (-1, "-1"):
        raise _withheld(record.place, field, repr(record.fields[field]) if field in record.fields else "nothing")


def _withheld(place: str, field: str, got: str) -> ValueError:
    return ValueError(
        f"{place}, field {field!r}: got {got}, expected a label. GLUE withholds the labels of its test split: pass "
        "the training or the validation split (train.tsv, dev.tsv)."
    )


def _correlation(
    function: Callable[..., Any],  # of scipy
    labels: Sequence[float],
    predictions: Sequence[float],
) -> float:
    for index, value in enumerate(predictions):
        if not math.isfinite(value):
            raise ValueError(
                f"prediction {index} is {value}, expected a finite number: the model has diverged. "
                "Lower the learning rate."
            )
    # scipy would answer with NaN.
    if _is_constant(labels) or _is_constant(predictions):
        return 0.0
    return float(function(labels, predictions).statistic)


def _is_constant(values: Sequence[float]) -> bool:
    return len(set(values)) < 2


COLA = LabelTask(
    name="cola",
    description="CoLA (GLUE): is an English sentence grammatically acceptable?",
    read=read_cola,
    parse=parse_sentence,
    metrics={"Matthews": matthews, "accuracy": accuracy},
    label_names=("unacceptable", "acceptable"),
)
TASKS: tuple[LabelTask, ...] = (
    COLA,
    LabelTask(
        name="sst2",
        description="SST-2 (GLUE): is a phrase of a film review positive?",
        read=read_tsv,
        parse=parse_sentence,
        metrics={"accuracy": accuracy},
        label_names=("negative", "positive"),
    ),
    LabelTask(
        name="mrpc",
        description="MRPC (GLUE): do two sentences of the news say the same?",
        read=read_tsv,
        parse=parse_mrpc,
        metrics={"F1": f1, "accuracy": accuracy},
        label_names=("not_equivalent", "equivalent"),
    ),
    LabelTask(
        name="qnli",
        description="QNLI (GLUE): does a sentence of Wikipedia hold the answer to a question?",
        read=read_tsv,
        parse=parse_qnli,
        metrics={"accuracy": accuracy},
        label_names=_ENTAILMENT_NAMES,
    ),
    LabelTask(
        name="rte",
        description="RTE (GLUE): does a text entail a hypothesis?",
        read=read_tsv,
        parse=parse_rte,
        metrics={"accuracy": accuracy},
        label_names=_ENTAILMENT_NAMES,
    ),
    LabelTask(
        name="stsb",
        description="STS-B (GLUE): how similar are two sentences, from 0 to 5?",
        read=read_tsv,
        parse=parse_stsb,
        metrics={"Pearson": pearson, "Spearman": spearman},
    ),
)
