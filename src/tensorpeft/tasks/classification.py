"""What a classification task hands to a study: texts and labels in three splits, label names and metrics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Metric = Callable[[Sequence[int], Sequence[int]], float]  # (labels, predictions) -> a number, larger is better


@dataclass(frozen=True)
class Split:
    """One split: ``labels[i]`` is the class of ``texts[i]``.

    Args:
        texts: one string per row.
        labels: one index into the task's ``label_names`` per row.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.labels), f"{len(self.texts)} texts, {len(self.labels)} labels"

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, num_rows: int) -> "Split":
        """The first ``num_rows`` rows (all rows where there are fewer)."""
        return Split(self.texts[:num_rows], self.labels[:num_rows])


@dataclass(frozen=True)
class ClassificationTask:
    """A text classification task, complete in memory.

    Args:
        name: short name, as given to ``tensorpeft demo --task``.
        description: one sentence for the report.
        label_names: name of each class; a label is an index into it.
        train: rows to train on.
        validation: rows that choose the learning rate.
        test: rows that are scored once, at the end.
        metrics: function by name, in the order of a report; "accuracy" is one of them.
    """

    name: str
    description: str
    label_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    metrics: dict[str, Metric]
