import ast
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from importlib import import_module

import pytest

import tensorpeft
from tensorpeft.tasks import signatures
from tensorpeft.tasks.records import Record
from tensorpeft.tasks.registry import find_task
from tensorpeft.tasks.signatures import load_signatures, score_json
from tensorpeft.tasks.sources import find_leaks, load_examples
from tensorpeft.tasks.task import Question

SPLITS = ("train", "validation", "test")
TASK = find_task("signatures")
WAIT = Question("", "", ('{"required": ["fs"], "optional": {"timeout": null, "strict": true}}',))


def examples(split):
    return load_examples(TASK, f"stdlib:{split}")


def test_the_splits_are_as_large_as_they_should_be():
    sizes = {split: len(examples(split)) for split in SPLITS}
    assert (sizes["test"], sizes["validation"]) == (96, 48)
    assert sizes["train"] >= 150


def test_an_answer_is_what_python_itself_says_of_the_signature():
    for example in [row for split in SPLITS for row in examples(split)]:
        definition = example.prompt.splitlines()[-1]
        namespace = {}
        # The defaults are constants, so that nothing else is evaluated.
        exec(f"from __future__ import annotations\n{definition}: pass", namespace)
        name = ast.parse(f"{definition}: pass").body[0].name
        parameters = dict(inspect.signature(namespace[name]).parameters)
        if next(iter(parameters)) == "self":
            del parameters["self"]
        defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
        expected = {"required": [key for key in parameters if key not in defaults], "optional": defaults}
        assert json.loads(example.answers[0]) == expected
        assert example.response.strip() == example.answers[0]
        assert defaults
        assert 2 <= len(parameters) <= 4


def test_well_known_functions_are_among_the_rows():
    definitions = {row.prompt.splitlines()[-1]: row.answers[0] for split in SPLITS for row in examples(split)}
    found = [d for d in definitions if d.startswith(("def urljoin(", "def quantiles(", "def b64decode("))]
    assert len(found) >= 2
    for definition in found:
        name = definition.removeprefix("def ").partition("(")[0]
        module = {"urljoin": "urllib.parse", "quantiles": "statistics", "b64decode": "base64"}[name]
        assert str(inspect.signature(getattr(import_module(module), name))) in definition


def test_nothing_held_out_is_trained_on():
    answers = Counter(example.answers[0] for split in SPLITS for example in examples(split))
    assert max(answers.values()) == 1
    for split in ("validation", "test"):
        assert not find_leaks(examples("train"), examples(split))


def test_a_module_lies_in_one_split(tmp_path, monkeypatch):
    names = [f"module{k}" for k in range(40)]
    for k, name in enumerate(names):
        functions = [f"def work{k}_{i}(self, data{i}, limit{k}={i}):\n    pass\n" for i in range(12)]
        (tmp_path / f"{name}.py").write_text("".join(functions), encoding="utf-8")
    monkeypatch.setattr(signatures.sys, "stdlib_module_names", frozenset(names))
    rows = load_signatures(tmp_path)
    modules = {split: {signature.partition("_")[0] for signature, _ in rows[split]} for split in SPLITS}
    assert [len(rows[split]) for split in ("test", "validation")] == [96, 48]
    assert sum(map(len, modules.values())) == len(set.union(*modules.values())) == 40


def test_what_a_row_is(tmp_path):
    (tmp_path / "sample.py").write_text(
        "def take(x, /, y, *, z, w=-1): pass\n"  # -1 is no constant to Python
        "def keep(x, /, y, *, z, w='a\"b'): pass\n"
        "class Reader:\n"
        "    async def read(self, size=None, *, strict=True): pass\n"
        "    @classmethod\n"
        "    def make(cls, a, b=1): pass\n"
        "    def _hidden(self, a, b=1): pass\n"
        "    def one(self, a=1): pass\n"
        "    def any(self, a, b=1, **more): pass\n"
        "    def many(self, a, b, c, d, e=1): pass\n"
        "    def needed(self, a, b): pass\n"
        "    def binary(self, a, b=b''): pass\n",
        encoding="utf-8",
    )
    assert list(signatures._read_rows(tmp_path, "sample")) == [
        ("def keep(x, /, y, *, z, w='a\"b')", r'{"required": ["x", "y", "z"], "optional": {"w": "a\"b"}}'),
        ("def read(self, size=None, *, strict=True)", '{"required": [], "optional": {"size": null, "strict": true}}'),
    ]


def test_the_rows_do_not_depend_on_the_process():
    # A bare package in place of ours, whose import takes seconds for nothing here.
    script = (
        "import sys, types\n"
        "sys.modules['tensorpeft'] = package = types.ModuleType('tensorpeft')\n"
        f"package.__path__ = {list(tensorpeft.__path__)}\n"
        "from tensorpeft.tasks.signatures import load_signatures\n"
        "print(load_signatures())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert ast.literal_eval(other.stdout) == load_signatures()


def test_a_rows_own_answer_scores_one_and_anothers_nothing():
    rows = examples("test")
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        assert score_json(row.response, row).metrics == {"exact match": 1.0}
        assert score_json(other.response, row).metrics == {"exact match": 0.0}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (WAIT.answers[0], 1.0),
        (' {"optional":{"strict":true,"timeout":null},"required":["fs"]}\n', 1.0),
        (WAIT.answers[0].replace("true", "1"), 0.0),
        (WAIT.answers[0].replace('"fs"', '"self", "fs"'), 0.0),
        (f"```json\n{WAIT.answers[0]}\n```", 0.0),
        (f"{WAIT.answers[0]} It needs one argument.", 0.0),
        ("The function takes three arguments.", 0.0),
        ("", 0.0),
        ("null", 0.0),
        (100_000 * "[", 0.0),
    ],
)
def test_the_whole_text_must_be_the_right_json(text, right):
    assert score_json(text, WAIT).metrics == {"exact match": right}


@pytest.mark.parametrize("source", ["stdlib:all", "lib:train", "rows.jsonl"])
def test_another_source_is_refused(source):
    with pytest.raises(ValueError, match=r"the task signatures reads.*stdlib:validation"):
        load_examples(TASK, source)


def test_a_malformed_row_is_named():
    with pytest.raises(ValueError, match="row 3, field 'answer'"):
        TASK.parse(Record({"signature": "def f(a, b=1)"}, "row 3"))


def test_a_library_without_source_or_with_little_of_it_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"zipped or not at all.*installed with its source"):
        load_signatures(tmp_path)
    (tmp_path / "json.py").write_text("def dump(obj, file, indent=None): pass\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"1 usable functions.*at least 294.*libpython3-stdlib"):
        load_signatures(tmp_path)
