"""The docstrings of Python's standard library by area: a real classification task that is on every machine.

The rows are read from the installed library's source with ``ast``; nothing is imported. What a row is, and what keeps
its label from leaking:

- The text is the docstring's first paragraph. The words of the module's own dotted name are masked in it
  (``email.header`` masks "email" and "header"), because a module belongs to exactly one area.
- A module's top-level class, with all its methods, or top-level function is one group, and a group lies in one split.
  Its docstrings repeat each other's words; so that no group dominates a split, only its first few count.
- A row whose words nearly all occur in another row (of any area) is dropped, whatever the split.

Groups are dealt to the splits in the order of a SHA-256, so that one Python version gives one task. Another version
has other docstrings, and gives a slightly different task.
"""

import ast
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from sklearn.metrics import accuracy_score

from tensorpeft.tasks.records import Record
from tensorpeft.tasks.stdlib import SPLITS, digest, find_library, find_split, read_modules
from tensorpeft.tasks.task import LabelledText, LabelTask

# Area -> its modules and packages. A name that a Python version lacks is passed over: modules come and go.
AREAS = {
    "network and web": "cgi ftplib http ipaddress nntplib selectors socket socketserver ssl telnetlib urllib"
    " webbrowser wsgiref xmlrpc",
    "mail": "email imaplib mailbox mailcap mimetypes poplib quopri smtpd smtplib uu",
    "concurrency": "_threading_local asynchat asyncio asyncore concurrent multiprocessing queue sched subprocess"
    " threading",
    "numbers and time": "_pydatetime _pydecimal _strptime calendar datetime fractions numbers random statistics"
    " zoneinfo",
    "files and system": "_pyio filecmp fileinput fnmatch genericpath glob io linecache ntpath os pathlib platform"
    " posixpath pty shutil stat tempfile tty",
    "data formats": "_compression _markupbase aifc base64 bz2 chunk compression configparser copyreg csv dbm gzip"
    " html json lzma netrc pickle pickletools plistlib shelve sqlite3 sunau tarfile tomllib wave xdrlib xml zipfile",
    "text and terminal": "_pyrepl argparse cmd codecs curses difflib getopt getpass gettext locale optparse pprint re"
    " reprlib rlcompleter shlex string stringprep textwrap",
    "tests and debugging": "bdb cProfile doctest logging pdb profile pstats timeit trace traceback tracemalloc"
    " unittest warnings",
    "compiler and import": "ast code codeop compileall dis importlib inspect lib2to3 modulefinder opcode pkgutil"
    " py_compile pyclbr pydoc runpy symtable sysconfig tokenize zipimport",
    "types and collections": "_collections_abc _py_abc _weakrefset abc bisect collections contextlib copy dataclasses"
    " enum functools graphlib heapq operator types typing weakref",
}
_MASK = "…"
_MIN_WORDS = 5
_ROWS_PER_GROUP = 12
# Rows of each area: exactly so many for the test and validation splits, at most so many for training.
_TEST_ROWS, _VALIDATION_ROWS, _TRAIN_ROWS = 60, 40, 220
_MIN_TRAIN_ROWS = 60
# Two rows with this share of common words (of all their words) count as the same text.
_NEAR_DUPLICATE = 0.75

Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Group = tuple[str, list[str]]  # (dotted name, its texts)


def load_docstrings(
    library: str | Path | None = None,  # folder of the standard library; None: this Python's
) -> dict[str, tuple[LabelledText, ...]]:  # "train", "validation" and "test"
    """The rows of every split.

    Every area has the same number of validation and of test rows. The rows of a split are in the order of a digest,
    areas mixed, so that any first n rows are a fair sample.

    Raises:
        FileNotFoundError: the library's source is not installed as files.
        ValueError: an area has too few docstrings to fill its splits.
    """
    root = find_library(library)
    near_duplicates = _NearDuplicates()
    splits: dict[str, list[LabelledText]] = {split: [] for split in SPLITS}
    for label, (area, names) in enumerate(AREAS.items()):
        groups = [group for name in names.split() for group in _read_groups(root, name)]
        for split, texts in _deal(area, groups, near_duplicates).items():
            splits[split] += [LabelledText((text,), label) for text in texts]
    return {split: tuple(sorted(rows, key=lambda row: digest(row.texts[0]))) for split, rows in splits.items()}


@cache
def _load_own_library() -> dict[str, tuple[LabelledText, ...]]:
    return load_docstrings()


def read_stdlib(
    path: Path,  # "stdlib:train", "stdlib:validation" or "stdlib:test"
) -> Iterator[Record]:
    """The rows of a split of this Python's own standard library: a source for recipes that needs no file.

    Raises:
        FileNotFoundError: see `load_docstrings`.
        ValueError: no such split.
    """
    for index, row in enumerate(_load_own_library()[find_split(path, DOCSTRINGS.name)]):
        yield Record({"text": row.texts[0], "label": row.label}, f"{path}, row {index}")


def parse_docstring(
    record: Record,  # fields ``text`` and ``label``, an index into `AREAS`
) -> Sequence[LabelledText]:
    """The labelled docstring of a row.

    Raises:
        ValueError: a field is missing or malformed.
    """
    return [LabelledText((record.text("text"),), record.choice("label", {i: i for i in range(len(AREAS))}))]


DOCSTRINGS = LabelTask(
    name="docstrings",
    description="Which area of Python's standard library is a docstring from? Accuracy.",
    read=read_stdlib,
    parse=parse_docstring,
    metrics={"accuracy": lambda labels, predictions: float(accuracy_score(labels, predictions))},
    label_names=tuple(AREAS),
)
TASKS = (DOCSTRINGS,)


def _read_groups(root: Path, name: str) -> Iterator[Group]:
    """The groups of a module or of all modules of a package; none where this Python lacks it."""
    for parts, module in read_modules(root, name):
        yield from _module_groups(module, parts)


def _module_groups(module: ast.Module, parts: tuple[str, ...]) -> Iterator[Group]:
    """The module's own docstring, then every top-level statement that holds docstrings."""
    own_words = re.compile(r"\b(" + "|".join(re.escape(part.strip("_")) for part in parts) + r")\b", re.IGNORECASE)
    dotted = ".".join(parts)
    for index, statement in enumerate([module, *module.body]):
        nodes = [module] if isinstance(statement, ast.Module) else _documented_nodes(statement)
        paragraphs = [_first_paragraph(ast.get_docstring(node) or "") for node in nodes]
        texts = [own_words.sub(_MASK, paragraph) for paragraph in paragraphs]
        texts = [text for text in texts if len(_words(text)) >= _MIN_WORDS]
        if texts:
            yield f"{dotted}:{getattr(statement, 'name', index)}", texts


def _documented_nodes(statement: ast.AST) -> Iterator[Documented]:
    """The classes and functions in a statement, itself included; expressions, most of a tree, are not entered."""
    if isinstance(statement, Documented):
        yield statement
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, (ast.stmt, ast.excepthandler)):
            yield from _documented_nodes(child)


def _first_paragraph(docstring: str) -> str:
    return " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def _deal(area: str, groups: list[Group], near_duplicates: "_NearDuplicates") -> dict[str, list[str]]:
    """The texts of an area by split: whole groups in the order of their digests fill test, validation, train.

    The group that fills a split may hold more than there is room for; what is left of it is dropped.
    """
    room = {"test": _TEST_ROWS, "validation": _VALIDATION_ROWS, "train": _TRAIN_ROWS}
    dealt: dict[str, list[str]] = {split: [] for split in room}
    for _, texts in sorted(groups, key=lambda group: digest(group[0])):
        split = next((split for split in room if len(dealt[split]) < room[split]), None)
        if split is None:
            break
        new = [text for text in sorted(texts, key=digest)[:_ROWS_PER_GROUP] if near_duplicates.add(text)]
        dealt[split] = (dealt[split] + new)[: room[split]]
    if len(dealt["train"]) < _MIN_TRAIN_ROWS:
        found, needed = sum(map(len, dealt.values())), _TEST_ROWS + _VALIDATION_ROWS + _MIN_TRAIN_ROWS
        raise ValueError(
            f"area {area!r}: {found} usable docstrings in this Python's standard library, expected at least {needed}. "
            "Install the complete library (on Debian: libpython3-stdlib), or another task."
        )
    return dealt


class _NearDuplicates:
    """The word sets seen so far, searched without comparing every pair.

    Two sets with a share t of common words have one of their n − ⌈t n⌉ + 1 last words in common, in any fixed order of
    words. The order here puts long words last: they are rare, so few candidates are compared.
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[frozenset[str]]] = {}

    def add(self, text: str) -> bool:
        """True, and the text is remembered, unless it is nearly a text that was remembered before."""
        words = _words(text)
        num_probes = len(words) - math.ceil(_NEAR_DUPLICATE * len(words)) + 1
        probes = sorted(words, key=lambda word: (len(word), word))[-num_probes:]
        candidates = Counter(other for probe in probes for other in self._seen.get(probe, ()))
        if any(len(words & other) >= _NEAR_DUPLICATE * len(words | other) for other in candidates):
            return False
        for probe in probes:
            self._seen.setdefault(probe, []).append(words)
        return True
