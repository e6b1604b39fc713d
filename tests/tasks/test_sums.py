import pytest

from tensorpeft.tasks.registry import find_task
from tensorpeft.tasks.sources import load_examples

TASK = find_task("sums")


def test_every_pair_of_digits_is_in_one_split_with_its_sum():
    rows = [row for split in ("train", "validation", "test") for row in load_examples(TASK, f"sums:{split}")]
    assert len({row.prompt for row in rows}) == len(rows) == 81
    for row in rows:
        assert row.prompt.startswith("What is ")
        assert row.prompt.endswith("? Answer:")
        first, second = map(int, row.prompt.removeprefix("What is ").removesuffix("? Answer:").split(" + "))
        assert row.answers == (str(first + second),)
        assert TASK.score(row.response, row).metrics == {"accuracy": 1}


@pytest.mark.parametrize(
    ("text", "right"), [(" 7", True), ("\n 7.\n\nWhat", True), (" 7 + 1", False), (" seven", False)]
)
def test_the_last_number_counts(text, right):
    row = next(row for row in load_examples(TASK, "sums:train") if row.answers == ("7",))
    assert TASK.score(text, row).metrics == {"accuracy": float(right)}


@pytest.mark.parametrize("source", ["sums", "sums:all", "stdlib:train", "train.jsonl"])
def test_what_is_no_split_is_refused(source):
    with pytest.raises(ValueError, match="Expected one of sums:test, sums:validation, sums:train"):
        load_examples(TASK, source)
