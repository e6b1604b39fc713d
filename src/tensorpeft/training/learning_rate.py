"""The learning rate of a recipe that names none."""

from dataclasses import replace

from tensorpeft.tasks.registry import find_task
from tensorpeft.tasks.task import LabelTask, QuestionTask, StructureTask
from tensorpeft.training.recipe import Recipe
from tensorpeft.training.sharding import will_be_sharded

# Not too low for any method that was measured (docs/bounded_steps.md): steps that are too long for it are shortened.
BOUNDED_RATE, MAX_STEP_KL = 0.1, 0.01


def can_be_bounded(recipe: Recipe) -> bool:
    """Whether the divergence of a step (`tensorpeft.BoundedSteps`) tells what becomes of the model, at little cost."""
    has_new_head = isinstance(find_task(recipe.task), LabelTask | StructureTask)
    return recipe.adapter is not None and not has_new_head and not will_be_sharded(recipe)


def with_learning_rate(recipe: Recipe) -> Recipe:
    """The recipe, at a rate of 0.1 and with bounded steps if it names no rate and trains an adapter on texts.

    Those are responses, too. For all else (labels, structures, preferences, rewards, all weights, shards) the rate is
    that of the libraries.
    """
    if recipe.trainer.get("learning_rate") is not None or recipe.rewards is not None:
        return recipe
    if not isinstance(find_task(recipe.task), QuestionTask) or not can_be_bounded(recipe):
        return recipe
    return replace(
        recipe,
        trainer={**recipe.trainer, "learning_rate": BOUNDED_RATE},
        max_step_kl=MAX_STEP_KL if recipe.max_step_kl is None else recipe.max_step_kl,
    )
