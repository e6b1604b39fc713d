"""An exported LoRA trained for some steps to say what the adapter says, which a cut by singular values does not see."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from tensorpeft.export.text import batches, read_rows
from tensorpeft.loading.adapters import base_of, load_adapter_config, load_model
from tensorpeft.reports.files import write_whole

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

    The loss is the mean over tokens of KL(adapter ‖ export), in nats; transformers' `Trainer`: AdamW without decay, its
    rate falling linearly. Base, adapter and LoRA are in memory, the base once. The result is the same in every call on
    one machine.

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
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".lora_" in name)  # what was trained in full says what it should
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=1,  # of batches
            learning_rate=learning_rate,
            weight_decay=0.0,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=not torch.accelerator.is_available(),
        )
        # A row is a batch, and teacher and student share their base: one device, if it has several.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        teacher.to(arguments.device)
        with torch.random.fork_rng():  # the trainer sets a seed
            trainer = _Distiller(teacher, on_step, model=student, args=arguments, train_dataset=rows)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    file = Path(lora, SAFETENSORS_WEIGHTS_NAME)
    saved, state = load_file(file), get_peft_model_state_dict(student)
    trained = {key: state[key].to(tensor.dtype).cpu().contiguous() for key, tensor in saved.items()}
    with write_whole(file) as unfinished:
        save_file(trained, unfinished, metadata={"format": "pt"})


def _as_inputs(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    ((tokens, is_predicted),) = rows
    return {"input_ids": tokens, "is_predicted": is_predicted}


class _Distiller(Trainer):
    """Its rows are whole batches: tokens, and which of them are predicted."""

    def __init__(self, teacher: Any, on_step: Callable[[float], object], **arguments: Any):
        super().__init__(data_collator=_as_inputs, **arguments)
        self._teacher, self._on_step = teacher, on_step

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The mean of KL(teacher ‖ model) over the tokens, in nats."""
        tokens, is_predicted = inputs["input_ids"], inputs["is_predicted"][:, 1:]
        with torch.no_grad():
            wanted = self._teacher(input_ids=tokens, use_cache=False).logits[:, :-1][is_predicted].float()
        found = model(input_ids=tokens, use_cache=False).logits[:, :-1][is_predicted].float()
        given, log_probs = wanted.log_softmax(-1), found.log_softmax(-1)
        loss = F.kl_div(log_probs, given, log_target=True, reduction="sum") / is_predicted.sum()
        self._on_step(loss.item())
        return loss
