"""What a task is: how its published files become examples, and how answers to them are scored.

There are four kinds, by what an example is: a labelled text, a question, a pair of responses, a protein structure.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tensorpeft.tasks.records import Record

Metric = Callable[[Sequence[float], Sequence[float]], float]  # (labels, predictions) -> a number, larger is better


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of texts, and what it is.

    Args:
        texts: one or two.
        label: an index into the task's ``label_names``, or a number where the task has none.
    """

    texts: tuple[str, ...]
    label: int | float


@dataclass(frozen=True)
class Question:
    """What a language model is given and what it should write.

    Args:
        prompt: what the model is given.
        response: what it learns to write after the prompt; begins with what separates the two, such as a space.
        answers: what counts as right, in the form the task compares; none where there is no right answer.
        choices: responses of which one is right, for scoring by likelihood; ``response`` may be another wording.
        gold: index of the right choice.
        key: the published identifier, or the place of the row.
        also_gold: indices of further right choices, such as other names of what is asked for.
    """

    prompt: str
    response: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    gold: int | None = None
    key: str = ""
    also_gold: tuple[int, ...] = ()


@dataclass(frozen=True)
class Preference:
    """A prompt, and two responses of which the first is preferred."""

    prompt: str
    chosen: str
    rejected: str
    key: str = ""


@dataclass(frozen=True)
class Structure:
    """A chain of a protein.

    Args:
        sequence: a letter per residue.
        positions: (residues, 3, 3) float32, Å: the atoms N, Cα and C of every residue; NaN where one is not resolved.
        key: entry and chain, such as "1A8O:A".
    """

    sequence: str
    positions: np.ndarray
    key: str = ""


@dataclass(frozen=True)
class Scored:
    """A generated text, judged.

    Args:
        answer: what was found in the text; None: nothing.
        metrics: value in [0, 1] by name; a report has their means.
    """

    answer: str | None
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Generation:
    """How a task's answers are generated.

    Args:
        max_new_tokens: longest answer.
        num_beams: 1 is greedy.
        stop: texts after which the answer ends.
    """

    max_new_tokens: int
    num_beams: int = 1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelTask:
    """Texts to classify, or to give a number.

    Args:
        name: as a recipe calls it.
        description: one sentence, for reports.
        read: the rows of a published file.
        parse: the examples in a row of a published file, or of the same data set on the Hub.
        metrics: function by name, in the order of a report; the first one is the task's main metric.
        label_names: name of each class; none: the label is a number.
    """

    name: str
    description: str
    read: Callable[[Path], Iterable[Record]]
    parse: Callable[[Record], Sequence[LabelledText]]
    metrics: Mapping[str, Metric]
    label_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionTask:
    """Prompts to answer in words.

    Args:
        name: as a recipe calls it.
        description: one sentence, for reports.
        read: the rows of a published file.
        parse: the examples in a row of a published file, or of the same data set on the Hub.
        generation: how answers are generated, by default.
        score: judges what was generated after the prompt; None: no text is judged.
        mode: how it is evaluated by default, one of `tensorpeft.evaluation.options.MODES`; None: "generate" where it
            can score a text, else "loss".
    """

    name: str
    description: str
    read: Callable[[Path], Iterable[Record]]
    parse: Callable[[Record], Sequence[Question]]
    generation: Generation = field(default_factory=lambda: Generation(max_new_tokens=256))
    score: Callable[[str, Question], Scored] | None = None
    mode: str | None = None


@dataclass(frozen=True)
class PreferenceTask:
    """Pairs of responses, for preference optimisation.

    Args:
        name: as a recipe calls it.
        description: one sentence, for reports.
        read: the rows of a published file.
        parse: the examples in a row of a published file, or of the same data set on the Hub.
    """

    name: str
    description: str
    read: Callable[[Path], Iterable[Record]]
    parse: Callable[[Record], Sequence[Preference]]


@dataclass(frozen=True)
class StructureTask:
    """Protein chains, whose sequence is folded.

    Args:
        name: as a recipe calls it.
        description: one sentence, for reports.
        load: the chains in a published file.
    """

    name: str
    description: str
    load: Callable[[Path], Sequence[Structure]]


Task = LabelTask | QuestionTask | PreferenceTask | StructureTask
Example = LabelledText | Question | Preference | Structure


def loss_unit(task: Task) -> str:
    """What the loss of a model that is trained on a task is in, or is."""
    if isinstance(task, StructureTask):
        return "structure loss"
    return "squared error" if isinstance(task, LabelTask) and not task.label_names else "nats"
