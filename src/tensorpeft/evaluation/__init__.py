"""Models, adapted or not, evaluated on tasks."""

from tensorpeft.evaluation.evaluate import Evaluation, evaluate_task
from tensorpeft.evaluation.options import EvaluationOptions

__all__ = ["Evaluation", "EvaluationOptions", "evaluate_task"]
