"""CoLA, complete in memory and in three splits: what ``tensorpeft demo`` trains on.

The labels of GLUE's own test file are withheld, so ``dev.tsv`` is the test split here and the validation split is cut
out of ``train.tsv``. Rows and metrics are those of the task in `tensorpeft.tasks.glue`.

Source: Warstadt, Singh and Bowman, "Neural Network Acceptability Judgments", arXiv 1805.12471.
"""

import hashlib
from pathlib import Path

from tensorpeft.tasks.classification import ClassificationTask, Split
from tensorpeft.tasks.glue import COLA

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
        name=COLA.name,
        description="CoLA: is an English sentence grammatically acceptable? (GLUE's dev.tsv is the test split)",
        label_names=COLA.label_names,
        train=_as_split(train),
        validation=_as_split(validation),
        test=_as_split(test),
        metrics=dict(COLA.metrics),
    )


def _read_rows(path: Path) -> list[tuple[str, int]]:
    """The (sentence, label) of every line of a CoLA file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}: CoLA needs train.tsv and dev.tsv in one folder. Pass that folder as --data DIR."
        )
    examples = [example for record in COLA.read(path) for example in COLA.parse(record)]
    return [(example.texts[0], int(example.label)) for example in examples]


def _digest(row: tuple[str, int]) -> int:
    return int.from_bytes(hashlib.sha256(row[0].encode()).digest()[:8], "big")


def _as_split(rows: list[tuple[str, int]]) -> Split:
    return Split(tuple(sentence for sentence, _ in rows), tuple(label for _, label in rows))
