"""The learning rate of a recipe that names none."""

from dataclasses import replace

from tensorpeft.tasks.registry import find_task
from tensorpeft.tasks.task import LabelTask, QuestionTask, StructureTask
from tensorpeft.training.recipe import Recipe

# Certainly not too low, for any adapter: steps that are too long for it are shortened.
_RATE, _MAX_STEP_KL = 0.1, 0.01


def can_be_bounded(recipe: Recipe) -> bool:
    """Whether the divergence of a step (`tensorpeft.BoundedSteps`) tells what becomes of the model, at little cost."""
    has_new_head = isinstance(find_task(recipe.task), LabelTask | StructureTask)
    is_sharded = bool(recipe.trainer.get("fsdp") or recipe.trainer.get("deepspeed"))
    return recipe.adapter is not None and not has_new_head and not is_sharded


def with_learning_rate(recipe: Recipe) -> Recipe:
    """The recipe, at a rate of 0.1 and with bounded steps if it names no rate and is one that this was measured for.

    That is an adapter that learns responses or texts. All others have the rate that the libraries give them.
    """
    if recipe.trainer.get("learning_rate") is not None or recipe.rewards is not None:
        return recipe
    if not isinstance(find_task(recipe.task), QuestionTask) or not can_be_bounded(recipe):
        return recipe
    return replace(
        recipe,
        trainer={**recipe.trainer, "learning_rate": _RATE},
        max_step_kl=_MAX_STEP_KL if recipe.max_step_kl is None else recipe.max_step_kl,
    )
