"""The log-probabilities that a causal language model gives to responses."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tensorpeft.evaluation.tokens import TokenRow, base_model, device_of, pad_tokens


def make_log_probs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[Sequence[TokenRow]], list[float]]:
    """A function of a batch: for every row the sum over its response of  log p(token | all tokens before it), in nats.

    A row without a token of its response has 0.
    """
    peft_config = getattr(model, "active_peft_config", None)
    has_virtual_tokens = getattr(peft_config, "is_prompt_learning", False)
    accepts = inspect.signature(base_model(model).forward).parameters
    selects = "logits_to_keep" in accepts and not has_virtual_tokens
    device = device_of(model)

    @torch.no_grad()
    def log_probs(rows: Sequence[TokenRow]) -> list[float]:
        batch = pad_tokens(rows, tokenizer, device)
        width = batch["input_ids"].shape[1]
        # The logits of long prompts and large vocabularies would fill the memory: only those that are needed.
        first = min(min(row.start for row in rows), width) - 1 if selects else 0
        more = {"logits_to_keep": torch.arange(first, width, device=device)} if selects else {}
        logits = model(**batch, **more, use_cache=False).logits[:, first - width :]
        sums = []
        for row, ids, row_logits in zip(rows, batch["input_ids"], logits, strict=True):
            end = len(row.ids)
            of_all = row_logits[row.start - 1 - first : end - 1 - first].float().log_softmax(-1)
            sums.append(of_all.gather(-1, ids[row.start : end, None]).double().sum())
        return torch.stack(sums).tolist()

    return log_probs
