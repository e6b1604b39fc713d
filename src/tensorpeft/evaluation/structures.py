"""Protein chains: fold the sequence, compare with the true structure."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tensorpeft.evaluation.tokens import base_model
from tensorpeft.tasks.structures import lddt_ca
from tensorpeft.tasks.task import Structure, StructureTask

_CA = 1  # of N, Cα, C


def evaluate_structures(
    model: nn.Module,
    task: StructureTask,
    examples: Sequence[Structure],
    on_row: Callable[[int], object],
) -> tuple[dict[str, float], list[dict[str, Any]]]:  # metrics, rows
    """The mean over the chains of LDDT-Cα, from 0 to 1.

    The model has ``fold(structure)``, which looks at the sequence only and gives positions in Å: (residues, 3) of the
    Cα, or (residues, 3, 3) of N, Cα and C. Chains are folded one by one.

    Raises:
        ValueError: the model cannot fold, gives positions of another shape, or a chain cannot be scored.
    """
    fold = getattr(base_model(model), "fold", None)
    if not callable(fold):
        raise ValueError(
            f"task {task.name}: a {type(base_model(model)).__name__} has no method fold(structure), which gives the "
            "positions of a chain's residues. Pass a model that folds proteins."
        )
    rows = []
    for example in examples:
        with torch.no_grad():
            found = fold(example)
        found = found.float().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        try:
            score = lddt_ca(found[:, _CA] if found.ndim == 3 else found, example.positions[:, _CA])
        except ValueError as error:
            raise ValueError(f"task {task.name}, chain {example.key!r}: {error}") from None
        rows.append({"key": example.key, "sequence": example.sequence, "metrics": {"LDDT-Cα": score}})
        on_row(1)
    return {"LDDT-Cα": sum(row["metrics"]["LDDT-Cα"] for row in rows) / len(rows)}, rows
