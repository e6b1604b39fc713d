"""The held-out loss: how surprising the responses of questions, or plain texts, are."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tensorpeft.evaluation.batches import map_batches
from tensorpeft.evaluation.log_probs import make_log_probs
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.tokens import TokenRow, cut_end, encode_responses, find_limit, with_end
from tensorpeft.tasks.task import Question, QuestionTask

# exp of more has no double.
_LARGEST_EXPONENT = 709.0


def evaluate_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: QuestionTask,
    examples: Sequence[Question],
    options: EvaluationOptions,
    on_row: Callable[[int], object],
) -> tuple[dict[str, float], list[dict[str, Any]]]:  # metrics, rows
    """The mean of  -log p(token | all tokens before it)  over all tokens of all responses, and its exponential.

    A response ends with the end-of-sequence token, as in TRL's training: the loss is that of `SFTTrainer` with
    ``completion_only_loss``, every token weighing the same. A row whose prompt alone fills ``max_length`` has no
    loss and is marked ``left_out``.

    Raises:
        ValueError: all rows are left out.
    """
    limit = find_limit(model, tokenizer, options.max_length)
    responses = [[with_end(tokenizer, example.response)] for example in examples]
    groups = encode_responses(tokenizer, [example.prompt for example in examples], responses)
    rows = [cut_end(group[0], limit) for group in groups]
    num_tokens = sum(row.num_tokens for row in rows)
    if not num_tokens:
        raise ValueError(
            f"task {task.name}: no row has a token of its response within max_length={limit}. Allow more, or use a "
            "model that reads more."
        )
    sums = map_batches(
        make_log_probs(model, tokenizer),
        rows,
        [len(row.ids) for row in rows],
        options.batch_size,
        lambda indices: on_row(len(indices)),
    )
    loss = -sum(sums) / num_tokens
    perplexity = math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf
    described = [_describe(*parts) for parts in zip(examples, rows, sums, strict=True)]
    return {"loss": loss, "perplexity": perplexity}, described


def _describe(example: Question, row: TokenRow, log_prob: float) -> dict[str, Any]:
    described = {"key": example.key, "prompt": example.prompt, "response": example.response, "tokens": row.num_tokens}
    described |= {"loss": -log_prob / row.num_tokens} if row.num_tokens else {"loss": None, "left_out": True}
    return described | ({"cut": True} if row.cut else {})
