"""How a model is evaluated on a task."""

import math
from dataclasses import dataclass

MODES = ("generate", "likelihood", "loss")


@dataclass(frozen=True)
class EvaluationOptions:
    """How a model is evaluated.

    Args:
        mode: of questions: "generate" and score the text, "likelihood" of the choices, "loss" of the response; None:
            "generate" where the task can score a text, else "loss", or as the task says. Other tasks have one way.
        batch_size: rows of a forward pass.
        max_new_tokens: longest generated answer; None: the task's.
        num_beams: 1 is greedy; None: the task's.
        max_length: tokens of a row, or of the prompt where an answer is generated; None: all that the model reads.
            Prompts of answers and of choices lose their beginning, all others their end.
        beta: of the DPO loss.
        chat: ask questions in the model's chat template, as a user's first turn.
    """

    mode: str | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    num_beams: int | None = None
    max_length: int | None = None
    beta: float = 0.1
    chat: bool = False

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: expected {', '.join(MODES)}, or None for what suits the task.")
        for name in ("batch_size", "max_new_tokens", "num_beams", "max_length"):
            value, optional = getattr(self, name), name != "batch_size"
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not is_count and not (optional and value is None):
                raise ValueError(f"{name}={value!r}: expected a whole number, at least 1{', or None' * optional}.")
        is_number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        if not is_number or not math.isfinite(self.beta) or self.beta <= 0:
            raise ValueError(f"beta={self.beta!r}: expected a number above 0, such as 0.1.")
        if not isinstance(self.chat, bool):
            raise ValueError(f"chat={self.chat!r}: expected true or false.")
