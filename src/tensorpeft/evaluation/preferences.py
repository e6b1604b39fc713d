"""Pairs of responses: the DPO loss of an adapted model against its base.

Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv 2305.18290, eq. 7. Tokens and sums are those of TRL's `DPOTrainer`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from tensorpeft.evaluation.batches import map_batches
from tensorpeft.evaluation.log_probs import make_log_probs
from tensorpeft.evaluation.options import EvaluationOptions
from tensorpeft.evaluation.tokens import TokenRow, cut_end, encode_responses, find_limit, with_end
from tensorpeft.tasks.task import Preference, PreferenceTask

_Pair = Sequence[TokenRow]  # chosen, rejected


def evaluate_preferences(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: PreferenceTask,
    examples: Sequence[Preference],
    options: EvaluationOptions,
    on_row: Callable[[int], object],
) -> tuple[dict[str, float], list[dict[str, Any]]]:  # metrics, rows
    """The DPO loss, the mean margin between the rewards, and the share of pairs whose chosen response has the larger.

    The reward of a response is  β (log p(response | prompt) - log p_ref(response | prompt)), the reference being the
    model with its adapter disabled; the loss of a pair is  -log σ(reward of chosen - reward of rejected), in nats. A
    pair of which ``max_length`` leaves no token of a response is marked ``left_out``.

    Raises:
        ValueError: the model has no adapter, or all pairs are left out.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"task {task.name}: the DPO loss compares a model with its base, and a {type(model).__name__} without an "
            "adapter is its own base. Pass a PeftModel, or the folder of a saved adapter."
        )
    limit = find_limit(model, tokenizer, options.max_length)
    responses = [[with_end(tokenizer, text) for text in (example.chosen, example.rejected)] for example in examples]
    groups = encode_responses(tokenizer, [example.prompt for example in examples], responses)
    pairs: list[_Pair] = [[cut_end(row, limit) for row in group] for group in groups]
    lengths = [max(len(row.ids) for row in pair) for pair in pairs]
    compute = _make_rewards(model, tokenizer, options.beta)
    rewards = map_batches(compute, pairs, lengths, options.batch_size, lambda indices: on_row(len(indices)))
    described = [_describe(*parts) for parts in zip(examples, pairs, rewards, strict=True)]
    counted = [row["metrics"] for row in described if not row.get("left_out")]
    if not counted:
        raise ValueError(
            f"task {task.name}: no pair has both responses within max_length={limit}. Allow more, or use a model that "
            "reads more."
        )
    return {name: sum(metrics[name] for metrics in counted) / len(counted) for name in counted[0]}, described


def _make_rewards(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, beta: float
) -> Callable[[list[_Pair]], list[tuple[float, ...] | None]]:
    """A function of a batch: the two rewards of every pair; None where nothing is left of a response."""
    log_probs = make_log_probs(model, tokenizer)

    def compute(batch: list[_Pair]) -> list[tuple[float, ...] | None]:
        rows = [row for pair in batch for row in pair]
        policy = log_probs(rows)
        with model.disable_adapter():
            reference = log_probs(rows)
        rewards = [beta * (p - q) for p, q in zip(policy, reference, strict=True)]
        return [
            tuple(rewards[2 * index : 2 * index + 2]) if all(row.num_tokens for row in pair) else None
            for index, pair in enumerate(batch)
        ]

    return compute


def _describe(example: Preference, pair: _Pair, rewards: tuple[float, ...] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"key": example.key, "prompt": example.prompt}
    row |= {"chosen": example.chosen, "rejected": example.rejected}
    if any(response.cut for response in pair):
        row["cut"] = True
    if rewards is None:
        return row | {"left_out": True}
    chosen, rejected = rewards
    margin = chosen - rejected
    metrics = {"loss": _softplus(-margin), "reward margin": margin, "accuracy": float(chosen > rejected)}
    return row | {"reward_of_chosen": chosen, "reward_of_rejected": rejected, "metrics": metrics}


def _softplus(x: float) -> float:
    """log(1 + exp(x)), which is  -log σ(-x), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
