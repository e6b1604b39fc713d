"""An exported LoRA trained for some steps to say what the adapter says, which a cut by singular values does not see."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tensorpeft.export.text import batches, read_rows
from tensorpeft.loading.adapters import base_of, load_adapter_config, load_model

_MAX_LENGTH, _BATCH_SIZE = 256, 4


def distil(
    adapter: str | os.PathLike[str],
    lora: str | os.PathLike[str],
    text: Path,
    base: str | None = None,
    steps: int = 60,
    learning_rate: float = 1e-3,
    on_step: Callable[[float], object] = lambda loss: None,
) -> None:
    """Train the factors of an exported LoRA towards the adapter's distributions over the next token, and save them.

    The loss is the mean over tokens of KL(adapter ‖ export), in nats; AdamW without decay, its rate falling linearly.
    Base, adapter and LoRA are in memory, the base once. The result is the same in every call on one machine.

    Args:
        adapter: folder of the saved adapter.
        lora: folder of its export, whose weights are replaced.
        text: as `check_export` has it; four rows a step, from the start again when they are through.
        base: name of the base model (`tensorpeft.loading.names.resolve`); None: what the adapter's configuration names.
        steps: how many.
        learning_rate: at the first step.
        on_step: called with the loss of every step.

    Raises:
        ValueError: the adapter names no base, or one that is gone or does not belong to it; no text in the file.
    """
    base = base or base_of(load_adapter_config(adapter), adapter)
    teacher: Any
    teacher, tokenizer = load_model(base, str(adapter), None)
    plain = teacher.get_base_model()
    rows = batches(read_rows(text, tokenizer, steps * _BATCH_SIZE, _MAX_LENGTH), _BATCH_SIZE)
    # The same weights, not a copy of them.
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    student: Any = PeftModel.from_pretrained(
        copy.deepcopy(teacher, shared).unload(), str(lora), is_trainable=True, autocast_adapter_dtype=True
    ).eval()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, steps)
    for step in range(steps):
        tokens, is_predicted = (tensor.to(trained[0].device) for tensor in rows[step % len(rows)])
        is_predicted = is_predicted[:, 1:]
        with torch.no_grad():
            wanted = teacher(input_ids=tokens, use_cache=False).logits[:, :-1][is_predicted].float().log_softmax(-1)
        found = student(input_ids=tokens, use_cache=False).logits[:, :-1][is_predicted].float().log_softmax(-1)
        loss = F.kl_div(found, wanted, log_target=True, reduction="sum") / is_predicted.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(loss.item())
    file = Path(lora, SAFETENSORS_WEIGHTS_NAME)
    saved, state = load_file(file), get_peft_model_state_dict(student)
    save_file(
        {key: state[key].to(tensor.dtype).cpu().contiguous() for key, tensor in saved.items()},
        file,
        metadata={"format": "pt"},
    )
