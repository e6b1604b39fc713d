"""CoLA, the acceptability task of GLUE, read from the published TSV files.

Columns, without a header: source, label (1 acceptable, 0 not), the author's mark, sentence. The labels of GLUE's own
test file are withheld, so ``dev.tsv`` is the test split here and the validation split is cut out of ``train.tsv``.

Source: Warstadt, Singh and Bowman, "Neural Network Acceptability Judgments", arXiv 1805.12471.
"""

import hashlib
from pathlib import Path

from sklearn.metrics import accuracy_score, matthews_corrcoef

from tensorpeft.tasks.classification import ClassificationTask, Split

_FIELDS = ("source", "label", "mark", "sentence")
_LABEL_NAMES = ("unacceptable", "acceptable")
# One training sentence in this many is a validation sentence.
_VALIDATION_SHARE = 16


def load_cola(
    folder: str | Path,  # holds train.tsv and dev.tsv
) -> ClassificationTask:
    """The CoLA task with accuracy and Matthews correlation as its metrics.

    A sentence of ``train.tsv`` is in the validation split when its SHA-256 says so: the same sentences on every
    machine, and two copies of one sentence always on the same side. Both splits are in the order of the digests,
    because the file is sorted by source: any first n rows are a fair sample.

    Raises:
        FileNotFoundError: ``folder`` lacks one of the two files.
        ValueError: a row does not have four fields, a 0/1 label and a sentence; names file, line and field.
    """
    folder = Path(folder)
    train, validation = [], []
    for row in sorted(_read_rows(folder / "train.tsv"), key=_digest):
        (validation if _digest(row) % _VALIDATION_SHARE == 0 else train).append(row)
    test = sorted(_read_rows(folder / "dev.tsv"), key=_digest)
    return ClassificationTask(
        name="cola",
        description="CoLA: is an English sentence grammatically acceptable? (GLUE's dev.tsv is the test split)",
        label_names=_LABEL_NAMES,
        train=_as_split(train),
        validation=_as_split(validation),
        test=_as_split(test),
        metrics={"Matthews": matthews_corrcoef, "accuracy": accuracy_score},
    )


def _read_rows(path: Path) -> list[tuple[str, int]]:
    """The (sentence, label) of every line of a CoLA file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}: CoLA needs train.tsv and dev.tsv in one folder. Pass that folder as --data DIR."
        )
    # Not csv: quotation marks in CoLA are text, and splitlines() would cut at characters that are no line ends.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return [_parse_row(line.removesuffix("\r"), f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parse_row(line: str, place: str) -> tuple[str, int]:
    fields = line.split("\t")
    if len(fields) != len(_FIELDS):
        raise ValueError(
            f"{place}: {len(fields)} fields, expected {len(_FIELDS)} separated by tabs ({', '.join(_FIELDS)}). "
            "Use the TSV files of GLUE without a header."
        )
    row = dict(zip(_FIELDS, fields, strict=True))
    if row["label"] not in ("0", "1"):
        raise ValueError(f"{place}, field 'label': got {row['label']!r}, expected 0 or 1. Correct or remove the line.")
    if not row["sentence"].strip():
        raise ValueError(f"{place}, field 'sentence': it is empty, expected a sentence. Correct or remove the line.")
    return row["sentence"].strip(), int(row["label"])


def _digest(row: tuple[str, int]) -> int:
    return int.from_bytes(hashlib.sha256(row[0].encode()).digest()[:8], "big")


def _as_split(rows: list[tuple[str, int]]) -> Split:
    return Split(tuple(sentence for sentence, _ in rows), tuple(label for _, label in rows))
