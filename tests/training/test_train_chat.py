"""What is trained where a recipe says ``data.chat``, and how it is tested."""

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from evaluation.evaluated import LLAMA
from evaluation.test_evaluate_chat import QUESTIONS, chat_tokenizer, ids_of, over_beginnings, turns
from tensorpeft.tasks.registry import find_task
from tensorpeft.training.arguments import make_arguments
from tensorpeft.training.models import load_tokenizer
from tensorpeft.training.recipe import DataRecipe, Recipe
from tensorpeft.training.run import check_recipe
from tensorpeft.training.splits import Splits
from tensorpeft.training.trainers import make_trainer

TASK = find_task("instructions")


def recipe_of(model, **data):
    return Recipe(str(model), "instructions", DataRecipe(train="a", validation="b", **data), {"method": "lora"})


@over_beginnings
@pytest.mark.parametrize("end", ["</s>", "w6"])
@pytest.mark.parametrize("loss_on", ["response", "text"])
def test_the_tokens_trained_are_those_of_the_conversation(bos, end, loss_on, tmp_path):
    LLAMA.fresh().save_pretrained(tmp_path)
    chat_tokenizer(bos, end).save_pretrained(tmp_path)
    recipe = recipe_of(tmp_path, chat=True, loss_on=loss_on)
    arguments = make_arguments({"bf16": False}, TASK, tmp_path / "run", seed=0)
    tokenizer = load_tokenizer(recipe, TASK)
    trainer = make_trainer(recipe, Splits(TASK, QUESTIONS, QUESTIONS, {}, ()), tokenizer, arguments)
    for row, question in zip(trainer.train_dataset, QUESTIONS, strict=True):
        whole = ids_of(tokenizer, turns(question, question.response))
        whole += [] if end == "</s>" else [tokenizer.eos_token_id]  # TRL's, after the end of the turn
        assert row["input_ids"] == whole
        start = len(ids_of(tokenizer, turns(question), add_generation_prompt=True))
        trained = whole if loss_on == "text" else whole[start:]
        assert [token for token in row["labels"] if token != -100] == trained


def test_it_is_tested_as_it_was_trained(tmp_path):
    arguments = make_arguments({"bf16": False}, TASK, tmp_path, seed=0)
    assert check_recipe(recipe_of("m", chat=True), arguments).chat
    assert not check_recipe(recipe_of("m"), arguments).chat


def test_labels_are_asked_in_no_chat(tmp_path):
    recipe = Recipe("m", "docstrings", DataRecipe(train="a", validation="b", chat=True), None)
    arguments = make_arguments({}, find_task("docstrings"), tmp_path, seed=0)
    with pytest.raises(ValueError, match=r"data\.chat: only questions are asked in a chat, docstrings has none"):
        check_recipe(recipe, arguments)
