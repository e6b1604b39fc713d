"""Models as llama.cpp computes them: its names of their tensors, how it stores these, and what it must be told."""

from __future__ import annotations

from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_TENSOR, TENSOR_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tensorpeft.export.llama_cpp import ARCHITECTURES

# Of Gemma 3: every sixth layer attends to all tokens, the others' rotary embedding has this base.
_WINDOW_PERIOD, _WINDOW_ROPE_BASE = 6, 10_000.0


class LlamaCppModel:
    """One model's tensors and settings in llama.cpp's form.

    Args:
        model_class: name of the model's class.
        config: of the model.

    Raises:
        ValueError: llama.cpp's form of this class is not known here, or it would not compute what the configuration
            says.
    """

    def __init__(self, model_class: str, config: PretrainedConfig) -> None:
        if model_class not in ARCHITECTURES:
            raise ValueError(
                f"{model_class}: no GGUF file of this class is written, only of {', '.join(ARCHITECTURES)}. Write the "
                "adapter with `tensorpeft export lora`, or merged with `export dense`, and give that to llama.cpp's "
                "convert_lora_to_gguf.py or convert_hf_to_gguf.py."
            )
        self.config: Any = config
        self._architecture = ARCHITECTURES[model_class]
        self._names = get_tensor_name_map(MODEL_ARCH[self.name.upper()], config.num_hidden_layers)
        expected = dict(self._architecture.fixed)
        if self._architecture.has_window:
            layers = range(1, config.num_hidden_layers + 1)
            expected["layer_types"] = ["sliding_attention" if k % _WINDOW_PERIOD else "full_attention" for k in layers]
            expected["query_pre_attn_scalar"] = config.head_dim
            rope = config.rope_parameters["sliding_attention"]
            self._require({"rope_theta": _WINDOW_ROPE_BASE, "rope_type": "default"}, rope, "of sliding_attention")
        self._require(expected, config.to_dict(), "in the configuration")
        if (kind := self._rope["rope_type"]) not in ("default", "linear", "llama3"):
            raise ValueError(
                f"rope_type={kind!r}: a rotary embedding of this type is not written to a GGUF file. Write the merged "
                "model with `tensorpeft export dense`, and give that to llama.cpp's convert_hf_to_gguf.py."
            )

    def _require(self, expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
        for key, value in expected.items():
            if found.get(key, value) != value:
                raise ValueError(
                    f"{key}={found[key]!r} {where}: llama.cpp's {self.name} computes as with {value!r}. It cannot run "
                    "this model; serve it with another engine (`tensorpeft export lora` or `export dense`)."
                )

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        return self._architecture.name

    @property
    def _rope(self) -> dict[str, Any]:
        parameters = self.config.rope_parameters
        return parameters.get("full_attention", parameters)

    def stored_name(self, key: str) -> str:
        """llama.cpp's name of a weight or bias.

        Raises:
            ValueError: it has no such tensor.
        """
        name = self._names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{key}: llama.cpp's {self.name} has no such tensor. Leave this layer out.")
        return name

    def stored(
        self,
        key: str,
        tensor: Tensor,  # of a weight, of a bias, or a factor with the weight's rows
    ) -> Tensor:  # of the same shape
        """A tensor as llama.cpp stores it."""
        layer = key.rpartition(".")[0]
        if self._architecture.turns_neighbours and layer.endswith(("q_proj", "k_proj")):
            config = self.config
            heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
            return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if self._architecture.norm_offset and layer.endswith("norm"):
            return tensor + self._architecture.norm_offset
        return tensor

    def extra_tensors(self) -> dict[str, Tensor]:
        """Tensors of llama.cpp's model that transformers computes from the configuration."""
        if self._rope["rope_type"] != "llama3":
            return {}
        # Llama 3.1 slows down its low frequencies: by what factor each is divided.
        dim = self.config.head_dim
        plain = 1.0 / self._rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        return {f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight": plain / scaled}

    def add_settings(self, writer: GGUFWriter) -> None:
        """Write what an engine must know of the model to run it."""
        config, rope = self.config, self._rope
        writer.add_vocab_size(config.vocab_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        if self._architecture.has_window:
            writer.add_sliding_window(config.sliding_window)
            writer.add_float32(f"{self.name}.rope.freq_base_swa", _WINDOW_ROPE_BASE)
