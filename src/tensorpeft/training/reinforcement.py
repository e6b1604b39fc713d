"""TRL's GRPO trainer, told what its validation is for."""

from typing import Any

import torch
from trl.trainer.grpo_trainer import GRPOTrainer


class RewardTrainer(GRPOTrainer):
    """A `trl.GRPOTrainer` whose validation loss is minus the mean reward of the validation rows.

    The loss of GRPO is of advantages, whose mean within a group is zero: how good the model is it does not say, and
    neither the best checkpoint nor the best learning rate can be chosen by it. The reward does.
    """

    # Trainer's loop sets it. A step outside of one, such as those that a comparison times, has to find it too.
    current_gradient_accumulation_steps = 1

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        """Trainer's metrics. Answers are drawn with the same seed each time, apart from the training's draws."""
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            return super().evaluate(*arguments, **more)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL's; of a validation batch, whose rewards it notes down by their mean, that weighs as much as its rows."""
        scored = super()._generate_and_score_completions(inputs)
        model: Any = self.model
        if not model.training:
            for name, means in self._metrics["eval"].items():
                if name.startswith("reward"):
                    means.extend(means[-1:] * (len(inputs) - 1))
        return scored

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and put the reward where the validation loss is looked for."""
        if "eval_loss" in logs and (rewards := self._metrics["eval"]["reward"]):
            logs["eval_loss"] = -sum(rewards) / len(rewards)
        super().log(logs, start_time)
