import json
import os
import re
from pathlib import Path

import pytest

from tensorpeft.tasks.texts import TASKS

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data"
STORIES, WIKITEXT, LINES = TASKS
SEPARATOR = "<|endoftext|>"


def needs(folder):
    return pytest.mark.skipif(
        not (DATA / folder).is_dir(),
        reason=f"no {folder} in {DATA}; set TENSORPEFT_DATA to the folder that holds data/",
    )


def examples(task, path):
    return [question for record in task.read(path) for question in task.parse(record)]


def write(folder, text, name="texts.txt"):
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def texts_and_lines(task, path):
    """The (text, line number) of every example, whose key is "path, line n"."""
    found = examples(task, path)
    assert {question.prompt for question in found} == {""}
    return [(question.response, int(question.key.removeprefix(f"{path}, line "))) for question in found]


def test_names():
    assert [task.name for task in TASKS] == ["stories", "wikitext", "lines"]


@needs("tinystories")
@pytest.mark.parametrize(("name", "count"), [("tinystories_2MiB.txt", 2316 + 1), ("tinystories_sample.txt", 5)])
def test_the_published_stories(name, count):
    path = DATA / "tinystories" / name
    found = texts_and_lines(STORIES, path)
    assert len(found) == count
    # Line by line, which is how these files are written: the number of lines that are just the separator.
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(found) == lines.count(SEPARATOR) + (lines[-1] != "")
    # Nothing but white space and separators is lost, and each story begins on the line that its key names.
    words = [word for line in lines if line != SEPARATOR for word in line.split()]
    assert [word for story, _ in found for word in story.split()] == words
    assert [story.split("\n")[0].strip() for story, _ in found] == [lines[line - 1].strip() for _, line in found]


@needs("tinystories")
def test_the_story_that_is_cut_at_the_end_of_the_sample_is_kept():
    found = examples(STORIES, DATA / "tinystories" / "tinystories_2MiB.txt")
    assert found[0].response.startswith("One day, a little girl named Lily found a needle in her room.")
    assert found[-1].response.endswith("She had a box in her hands. She said it was")


@needs("wikitext2")
def test_the_published_articles():
    path = DATA / "wikitext2" / "valid.txt"
    found = texts_and_lines(WIKITEXT, path)
    assert len(found) == 60  # Merity et al., table 1: articles of the validation split
    assert sum(len(article.split()) for article, _ in found) == 213886  # words of the whole file
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [line for _, line in found] == [
        number for number, line in enumerate(lines, 1) if line[:3] == " = " and line[3] != "="
    ]
    assert found[0][0].startswith(" = Homarus gammarus = \n \n Homarus gammarus , known as the European lobster")
    assert found[-1][0].startswith(" = <unk> <unk> = \n")


def test_stories_lose_the_white_space_around_them_and_keep_that_inside(tmp_path):
    path = write(tmp_path, f"\nOnce.\n\n Twice.\n{SEPARATOR}\n\nBen{SEPARATOR}Lily {SEPARATOR}\n")
    assert texts_and_lines(STORIES, path) == [("Once.\n\n Twice.", 2), ("Ben", 7), ("Lily", 7)]
    path = write(tmp_path, f"Once.\r\nTwice.\r\n{SEPARATOR}\r\nBen sat")
    assert texts_and_lines(STORIES, path) == [("Once.\nTwice.", 1), ("Ben sat", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no <.endoftext.> in it.*task 'lines'"),
        ("Once upon a time.\n", "no <.endoftext.> in it"),
        (f"Ben.\n{SEPARATOR}\n\n{SEPARATOR}\nLily.\n", "line 2: no story before <.endoftext.>"),
        (f"{SEPARATOR}\n", "line 1: no story before"),
    ],
)
def test_a_file_without_stories(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"texts\.txt[:,] ?{message}"):
        examples(STORIES, write(tmp_path, text))


ARTICLES = " \n = A = \n \n Text . \n = B = \n \n = = Section = = \n \n More . \n \n = C ( song ) = \n \n Sung . \n"


def test_an_article_goes_to_the_next_title_between_empty_lines(tmp_path):
    # " = B = " stands right after a paragraph, and " = = Section = = " is a section's title.
    expected = [
        (" = A = \n \n Text . \n = B = \n \n = = Section = = \n \n More .", 2),
        (" = C ( song ) = \n \n Sung .", 11),
    ]
    assert texts_and_lines(WIKITEXT, write(tmp_path, ARTICLES)) == expected
    assert texts_and_lines(WIKITEXT, write(tmp_path, ARTICLES, "wiki.train.tokens")) == expected
    assert texts_and_lines(WIKITEXT, write(tmp_path, ARTICLES.replace("\n", "\r\n"))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: got '', expected a title"),
        (" \n \n", "line 1: got ' ', expected a title"),
        (" \n Text . \n \n = A = \n", "line 2: got ' Text . ', expected a title"),
        (" = = Section = = \n \n Text . \n", "line 1: got ' = = Section = = ', expected a title"),
    ],
)
def test_a_file_that_does_not_begin_with_an_article(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape("texts.txt, ") + message + ".*task 'lines'"):
        examples(WIKITEXT, write(tmp_path, text))


def test_lines_are_texts_as_they_stand(tmp_path):
    path = write(tmp_path, 'One.\n Two\u2028"2".\r\n{"text": 3}\n')
    assert texts_and_lines(LINES, path) == [("One.", 1), (' Two\u2028"2".', 2), ('{"text": 3}', 3)]


def test_an_empty_line_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"texts\.txt, line 2, field 'text': got ' ', expected a text that is not"):
        examples(LINES, write(tmp_path, "One.\n \nThree.\n"))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_rows_of_json_have_a_text(tmp_path, task):
    texts = [" = A = \n \n Text .", "\n = B = \n \n More ."]
    path = write(tmp_path, "".join(json.dumps({"text": text}) + "\n" for text in texts), "texts.jsonl")
    assert texts_and_lines(task, path) == [(texts[0], 1), (texts[1], 2)]
    path = write(tmp_path, json.dumps([{"text": text} for text in texts], indent=1), "texts.json")
    assert [text for text, _ in texts_and_lines(task, path)] == texts


def test_a_page_of_the_hub_is_an_article(tmp_path):
    path = write(tmp_path, json.dumps({"page": " = A = \n \n Text . \n"}), "pages.jsonl")
    assert texts_and_lines(WIKITEXT, path) == [(" = A = \n \n Text . \n", 1)]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (LINES, {"texts": "x"}, "field 'text': got nothing"),
        (STORIES, {"text": ""}, "field 'text': got '', expected a text that is not empty"),
        (STORIES, {"text": 7}, "field 'text': got 7, expected a text"),
        (WIKITEXT, {"text": None}, "field 'text': got None, expected a text"),
        (WIKITEXT, {"text": ""}, "field 'text': got '', expected an article.*EleutherAI/wikitext_document_level"),
        (WIKITEXT, {"text": " Text . \n"}, "field 'text': got ' Text .*expected an article"),
        (WIKITEXT, {"text": " = = Section = = \n"}, "field 'text': got ' = = .*expected an article"),
        (WIKITEXT, {"page": " "}, "field 'page': got ' ', expected a text that is not empty"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(tmp_path, task, row, message):
    path = write(tmp_path, json.dumps({"text": " = A = \n \n x"}) + "\n" + json.dumps(row), "texts.jsonl")
    with pytest.raises(ValueError, match=rf"texts\.jsonl, line 2, {message}"):
        examples(task, path)
