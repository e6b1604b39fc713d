"""A model that is only tested: as its training rows are not looked at, few of them are prepared."""

import dataclasses
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from rich.console import Console

from evaluation.evaluated import WORDS
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.training import seed, splits
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.models import load_tokenizer
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.results import SeedResult

LONG = 20


@pytest.fixture
def score(place, tmp_path, monkeypatch):
    """What a function finds with all rows, and with two, and how many of both kinds its trainers had."""
    prompts = [*6 * [""], *3 * [" ".join(WORDS[:LONG]) + " "], " ".join(WORDS[:4]) + " "]
    sizes = []

    def counted(make, *arguments):
        trainer = make(*arguments)
        sizes.append((len(trainer.train_dataset), len(trainer.eval_dataset)))
        return trainer

    monkeypatch.setattr(seed, "make_trainer", functools.partial(counted, seed.make_trainer))

    def score(function):
        more = [
            f"data.validation={place / 'rows.jsonl'}",
            f"trainer.max_length={LONG // 2}",
            "trainer.learning_rate=1e-2",
        ]
        recipe = load_recipe(place / "sft.yaml", [f"output={tmp_path}", "trainer.bf16=false", *more])
        found = splits.load_splits(recipe)
        train = [dataclasses.replace(found.train[0], prompt=prompt) for prompt in prompts]
        found, results = dataclasses.replace(found, train=train), []
        for few in (len(prompts) + 30, 2):
            monkeypatch.setattr(splits.shortest, "__defaults__", (few,))
            folder = tmp_path / f"few-{few}" / "seed-0"
            arguments = make_arguments(recipe.trainer, found.task, folder, 0)
            results.append(function(recipe, found, arguments, EvaluationOptions(), Console(quiet=True)))
        return results, sizes

    return score


def test_the_untrained_model_is_validated_on_all_rows_with_the_same_loss(score):
    (whole, few), sizes = score(seed.score_untrained)
    assert few == whole
    assert sizes == [(7, 40), (1, 40)]


def test_a_saved_model_is_tested_the_same(score):
    def trained_and_scored(recipe, found, arguments, options, console):
        trainer = seed.make_trainer(recipe, found, load_tokenizer(recipe, found.task), arguments)
        folder = Path(arguments.output_dir)
        trainer.save_model(str(folder / "adapter"))
        SeedResult(0, (), {}, None, 0, {}, 0, 0).write(folder / seed.RESULTS)
        return seed.score_seed(recipe, found, arguments, options, console)

    (whole, few), sizes = score(trained_and_scored)
    assert whole.tests
    assert few == whole
    assert sizes == [(7, 40), (7, 40), (7, 40), (1, 2)]


def test_rows_with_the_shortest_prompts_are_chosen_before_those_without():
    @dataclasses.dataclass
    class Row:
        prompt: str

    rows = [Row(""), Row("abc"), Row("a"), Row("ab")]
    assert [row.prompt for row in splits.shortest(rows, 2)] == ["a", "ab"]
    assert [row.prompt for row in splits.shortest(rows)] == ["a", "ab", "abc", ""]
    assert splits.shortest(range(3), 2) == [0, 1]


def test_seeds_that_run_at_the_same_time_write_the_recipe_once(place, tmp_path, monkeypatch):
    recipe, write, written = load_recipe(place / "sft.yaml"), seed.write_lines, []

    def write_slowly(*given):
        written.append(given)
        time.sleep(0.2)
        write(*given)

    monkeypatch.setattr(seed, "write_lines", write_slowly)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: seed._claim(tmp_path / "run", recipe), range(2)))
    assert len(written) == 1
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
