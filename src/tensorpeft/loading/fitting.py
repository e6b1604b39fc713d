"""A base made as large as a saved adapter says: as many labels, and as many tokens."""

import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_HEADS = re.compile(r"\.(classifier(\.\d+|\.out_proj)?|score|classification_head\.out_proj|logits_proj)\.weight$")


def labels_of(
    saved: Mapping[str, Tensor],  # by their names in the adapter's file
) -> int | None:
    """How many labels the head in an adapter's file tells apart; None: there is none."""
    return next((tensor.shape[0] for name, tensor in saved.items() if _HEADS.search(name)), None)


def fit_vocabulary(
    model: nn.Module,  # without adapters
    saved: Mapping[str, Tensor],  # by their names in the adapter's file
) -> None:
    """Resize the embedding and the head to the rows that an adapter's file has of them, in place.

    PEFT writes both beside an adapter whose base had another vocabulary than its files.
    """
    if not isinstance(model, PreTrainedModel):
        return
    modules = dict(model.named_modules())
    for key, tensor in saved.items():
        name = re.sub(r"(\.token_adapter)?(\.base_layer)?\.weight$", "", key.removeprefix(_PREFIX))
        module = modules.get(name)
        rows = getattr(module, "num_embeddings", None) or getattr(module, "out_features", None)
        if rows in (None, len(tensor)):
            continue
        if module is model.get_input_embeddings() or module is model.get_output_embeddings():
            model.resize_token_embeddings(len(tensor), mean_resizing=False)
            return


def has_whole_weights(
    model: nn.Module,  # without adapters
    saved: Mapping[str, Tensor],  # by their names in the adapter's file
) -> bool:
    """Whether an adapter's file has weights of the model itself, such as a head."""
    return any(f"{_PREFIX}{name}" in saved for name, _ in model.named_parameters(remove_duplicate=False))
