"""Which models llama.cpp knows, and what it makes of each: known without the library that writes its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A class of transformers as llama.cpp knows it.

    Args:
        name: llama.cpp's, `general.architecture`.
        turns_neighbours: whether its rotary embedding turns rows 2k and 2k + 1 of a head, where transformers' turns k
            and k + d/2: the rows of the query's and the key's projection are stored in that order.
        norm_offset: what transformers adds to the weight of a norm when it is used, and llama.cpp does not.
        fixed: what llama.cpp does whatever the configuration says; anything else would be computed wrongly.
        has_window: whether some layers attend to the last `sliding_window` tokens alone.
    """

    name: str
    turns_neighbours: bool = False
    norm_offset: float = 0.0
    fixed: dict[str, Any] = field(default_factory=dict)
    has_window: bool = False


_SILU = {"hidden_act": "silu"}
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", turns_neighbours=True, fixed=_SILU),
    "Qwen2ForCausalLM": Architecture("qwen2", fixed={**_SILU, "use_sliding_window": False}),
    "Qwen3ForCausalLM": Architecture("qwen3", fixed={**_SILU, "use_sliding_window": False, "attention_bias": False}),
    "Gemma3ForCausalLM": Architecture(
        "gemma3",
        norm_offset=1.0,
        fixed={
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
            "attention_bias": False,
        },
        has_window=True,
    ),
}
