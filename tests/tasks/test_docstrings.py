import ast
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.feature_extraction.text import CountVectorizer

import tensorpeft
from tensorpeft.tasks import docstrings
from tensorpeft.tasks.docstrings import AREAS, load_docstrings
from tensorpeft.tasks.registry import find_task
from tensorpeft.tasks.sources import load_examples

SMALL = {area: AREAS[area] for area in ("mail", "numbers and time")}


@pytest.fixture(scope="module")
def splits():
    return load_docstrings()


def texts_of(*rows):
    return [row.texts[0] for split in rows for row in split]


def words(text):
    return docstrings._words(text)


def test_every_area_is_equally_frequent_in_validation_and_test(splits):
    assert find_task("docstrings").label_names == tuple(AREAS)
    for split, per_area in (("test", 60), ("validation", 40)):
        assert Counter(row.label for row in splits[split]) == dict.fromkeys(range(len(AREAS)), per_area)
    trained = Counter(row.label for row in splits["train"])
    assert set(trained) == set(range(len(AREAS)))
    assert 60 <= min(trained.values()) <= max(trained.values()) <= 220


def test_no_two_rows_say_nearly_the_same(splits):
    texts = texts_of(splits["test"], splits["validation"], splits["train"])
    contains = CountVectorizer(binary=True, analyzer=words, dtype="int32").fit_transform(texts)
    common = (contains[:1000] @ contains.T).toarray()  # test and validation against everything
    sizes = np.asarray(contains.sum(axis=1)).ravel()
    share = common / (sizes[:1000, None] + sizes[None, :] - common)
    share[range(1000), range(1000)] = 0
    assert share.max() < 0.75


def test_rows_are_long_enough_and_one_line(splits):
    for text in texts_of(*splits.values()):
        assert len(words(text)) >= 5
        assert "\n" not in text


def test_areas_name_each_module_once():
    names = " ".join(AREAS.values()).split()
    assert len(names) == len(set(names))


def test_the_rows_do_not_depend_on_the_process(monkeypatch):
    monkeypatch.setattr(docstrings, "AREAS", SMALL)
    # A bare package in place of ours, whose import takes seconds for nothing here.
    script = (
        "import sys, types\n"
        "sys.modules['tensorpeft'] = package = types.ModuleType('tensorpeft')\n"
        f"package.__path__ = {list(tensorpeft.__path__)}\n"
        "from tensorpeft.tasks import docstrings\n"
        f"docstrings.AREAS = {SMALL}\n"
        "rows = docstrings.load_docstrings()\n"
        "print({split: [(row.texts[0], row.label) for row in rows[split]] for split in rows})"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    here = load_docstrings()
    assert ast.literal_eval(other.stdout) == {
        split: [(row.texts[0], row.label) for row in rows] for split, rows in here.items()
    }


MODULE = '''"""Tools of sample.mail that read and write messages.

This second paragraph is not part of the row.
"""
class Reader:
    """Read the messages of one Mail folder from disk."""
    def next(self):
        """Return the following message, or None at the end."""
    def short(self):
        """Too short."""
if True:
    def helper():
        """Help a reader along with a lock held."""
'''


def test_a_class_and_its_methods_are_one_group_and_names_are_masked(tmp_path):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "mail.py").write_text(MODULE)
    groups = [texts for _, texts in docstrings._read_groups(tmp_path, "sample")]
    assert groups == [
        ["Tools of ….… that read and write messages."],
        ["Read the messages of one … folder from disk.", "Return the following message, or None at the end."],
        ["Help a reader along with a lock held."],
    ]


def test_a_group_never_spans_two_splits(splits):
    split_of = {text: name for name, split in splits.items() for text in texts_of(split)}
    root = Path(sysconfig.get_path("stdlib"))
    groups = [texts for name in AREAS["mail"].split() for _, texts in docstrings._read_groups(root, name)]
    owners = Counter(text for texts in groups for text in set(texts))
    # A text that two groups share says nothing about either.
    found = [{split_of[text] for text in texts if text in split_of and owners[text] == 1} for texts in groups]
    assert max(map(len, found)) == 1
    assert set.union(*found) == set(splits)


def test_a_library_without_source_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"zipped or not at all.*installed with its source"):
        load_docstrings(tmp_path)


def test_an_incomplete_library_names_the_area(tmp_path):
    (tmp_path / "ftplib.py").write_text(MODULE)
    with pytest.raises(ValueError, match=r"area 'network and web': 4 usable docstrings.*at least 160"):
        load_docstrings(tmp_path)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_recipe_reads_the_same_rows(splits, split):
    assert load_examples(find_task("docstrings"), f"stdlib:{split}") == list(splits[split])


@pytest.mark.parametrize("source", ["stdlib:all", "lib:train", "rows.tsv"])
def test_another_source_is_refused(source):
    with pytest.raises(ValueError, match="stdlib:validation"):
        load_examples(find_task("docstrings"), source)
