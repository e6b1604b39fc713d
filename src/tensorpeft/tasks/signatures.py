"""Functions of Python's standard library as JSON: which arguments one needs, and what the others are by default.

    def wait(object_list, timeout=None)   ->   {"required": ["object_list"], "optional": {"timeout": null}}

It is on every machine, and what a small chat model gets wrong before fine-tuning and right after it. The rows are read
from the installed library's source with ``ast``; nothing is imported. What a row is, and what keeps the splits apart:

- The function, or method, has two to four arguments, some of them optional, whose defaults are constants that JSON
  has. ``self`` is no argument; class methods are left out, too few to learn from that ``cls`` is none either.
- A module, or a package with all its modules, is one group, and a group lies in one split.
- No answer is there twice, in whatever split: none of those held out can be learned by heart.

Groups are dealt to the splits in the order of a SHA-256, so that one Python version gives one task. Another version
has other functions, and gives a slightly different task.
"""

import ast
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tensorpeft.tasks.records import Record
from tensorpeft.tasks.stdlib import digest, find_library, find_split, read_modules
from tensorpeft.tasks.task import Generation, Question, QuestionTask, Scored

# Not on every machine, because systems have packages of their own for them, or no library.
_LEFT_OUT = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "venv"}
_NUM_ARGUMENTS = range(2, 5)
_MAX_CHARACTERS = 80  # of a signature and of an answer
# So many rows for the test and validation splits; training has all others.
_TEST_ROWS, _VALIDATION_ROWS, _MIN_TRAIN_ROWS = 96, 48, 150
_ROWS_PER_GROUP = 24  # so that no package fills a split
_PROMPT = "Write the arguments of this function as JSON with the keys required and optional.\n{signature}"

Function = ast.FunctionDef | ast.AsyncFunctionDef
Row = tuple[str, str]  # (signature, answer)


@cache
def load_signatures(
    library: str | Path | None = None,  # folder of the standard library; None: this Python's
) -> dict[str, list[Row]]:
    """The rows by split, each in the order of a digest: any first n of them are a fair sample.

    Raises:
        FileNotFoundError: the library's source is not installed as files.
        ValueError: it has too few functions to fill the splits.
    """
    root = find_library(library)
    room = {"test": _TEST_ROWS, "validation": _VALIDATION_ROWS, "train": sys.maxsize}
    dealt: dict[str, list[Row]] = {split: [] for split in room}
    seen: set[str] = set()
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT, key=digest):
        split = next(split for split in room if len(dealt[split]) < room[split])
        group: list[Row] = []
        for signature, answer in sorted(_read_rows(root, name), key=_digest_of_row):
            if answer not in seen and len(group) < _ROWS_PER_GROUP:
                seen.add(answer)
                group.append((signature, answer))
        dealt[split] += group[: room[split] - len(dealt[split])]
    if len(dealt["train"]) < _MIN_TRAIN_ROWS:
        needed = _TEST_ROWS + _VALIDATION_ROWS + _MIN_TRAIN_ROWS
        raise ValueError(
            f"{root}: {sum(map(len, dealt.values()))} usable functions in this Python's standard library, expected at "
            f"least {needed}. Install the complete library (on Debian: libpython3-stdlib)."
        )
    return {split: sorted(rows, key=_digest_of_row) for split, rows in dealt.items()}


def read_stdlib(
    path: Path,  # "stdlib:train", "stdlib:validation" or "stdlib:test"
) -> Iterator[Record]:
    """The rows of a split of this Python's own standard library: a source for recipes that needs no file.

    Raises:
        FileNotFoundError: see `load_signatures`.
        ValueError: no such split.
    """
    rows = load_signatures()[find_split(path, "signatures")]
    for index, (signature, answer) in enumerate(rows):
        yield Record({"signature": signature, "answer": answer}, f"{path}, row {index}")


def parse_signature(
    record: Record,  # fields ``signature``, and ``answer`` as JSON
) -> Sequence[Question]:
    """The question of a row.

    Raises:
        ValueError: a field is missing, or no text.
    """
    prompt, answer = _PROMPT.format(signature=record.text("signature")), record.text("answer")
    return [Question(prompt, f"\n{answer}", (answer,), key=record.place)]


def score_json(text: str, question: Question) -> Scored:
    """Whether the whole of a text is the right JSON, whatever its white space and the order of its keys."""
    try:
        found = _sorted_json(text)
    except (RecursionError, ValueError):  # what a model writes may be nested without an end
        return Scored(None, {"exact match": 0.0})
    return Scored(found, {"exact match": float(any(found == _sorted_json(answer) for answer in question.answers))})


def _sorted_json(text: str) -> str:
    # Compared as text: in Python 1 == True.
    return json.dumps(json.loads(text), sort_keys=True)


def _read_rows(root: Path, name: str) -> Iterator[Row]:
    for _, module in read_modules(root, name):
        for node in ast.walk(module):
            if isinstance(node, Function) and not node.name.startswith("_") and (row := _make_row(node)):
                yield row


def _make_row(function: Function) -> Row | None:
    """The row of a function; None where it has too few arguments or too many, or a default that JSON has not."""
    arguments = function.args
    if arguments.vararg or arguments.kwarg:
        return None
    positional = [*arguments.posonlyargs, *arguments.args]
    without_default = len(positional) - len(arguments.defaults)
    names = [argument.arg for argument in (*positional, *arguments.kwonlyargs)]
    values = [*[None] * without_default, *arguments.defaults, *arguments.kw_defaults]
    defaults: dict[str, ast.expr | None] = dict(zip(names, values, strict=True))
    if names[:1] == ["self"]:
        del defaults["self"]
    required = [name for name, default in defaults.items() if default is None]
    optional = {name: default.value for name, default in defaults.items() if isinstance(default, ast.Constant)}
    signature = f"def {function.name}({ast.unparse(arguments)})"
    is_json = all(value is None or isinstance(value, bool | int | float | str) for value in optional.values())
    if not optional or not is_json or len(required) + len(optional) < len(defaults) or "cls" in required[:1]:
        return None
    answer = json.dumps({"required": required, "optional": optional}, ensure_ascii=False)
    suits = len(defaults) in _NUM_ARGUMENTS and max(len(signature), len(answer)) <= _MAX_CHARACTERS
    return (signature, answer) if suits else None


def _digest_of_row(row: Row) -> str:
    return digest(row[0])


TASKS = (
    QuestionTask(
        name="signatures",
        description="The arguments of a function of Python's standard library as JSON. Exact match.",
        read=read_stdlib,
        parse=parse_signature,
        generation=Generation(max_new_tokens=48),
        score=score_json,
    ),
)
