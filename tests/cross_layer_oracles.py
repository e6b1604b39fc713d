"""LoRTA, LoTR, FacT, MetaTT and TensLoRA in plain numpy and float64: dense tensors, and what each layer takes.

What the layers of each architecture are stands here by hand, from the sources of transformers; nothing is asked of the
library. Letters: l layer, m projection, h head, b head feature, a hidden feature, i intermediate feature, n weight of
one shape, o output and d input feature, k, p and q ranks. With `xp=torch` autograd differentiates the same formulas.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
import transformers
from torch import nn

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "lorta_updates",
    "over_layer_updates",
    "stacked_updates",
    "train_updates",
]

Array: TypeAlias = Any  # of numpy, or of torch where gradients are wanted
HEADS = 4


@dataclass(frozen=True)
class Architecture:
    """A tiny random model and what its layers are.

    Blocks and layers stand in the model's module order. `projections` says of every attention layer which of query,
    key, value and output it holds, `mlp_layers` whether the intermediate features are the weight's rows or columns, or
    its rows twice, the gate's above the up-projection's.
    """

    name: str
    build: Callable[[], nn.Module]
    attention: list[str]
    projections: dict[str, str]
    mlp: list[str]
    mlp_layers: dict[str, str]
    kv_heads: int = HEADS
    interleaved: bool = False  # rows of the fused layer: (head, projection, feature), not (projection, head, feature)
    has_decoder_input: bool = False

    @property
    def targets(self) -> list[str]:
        return [*self.projections, *self.mlp_layers]

    def fresh(self) -> nn.Module:
        """The same weights at every call, in evaluation mode and float64."""
        torch.manual_seed(0)
        return self.build().eval().double()


def lorta_attention(
    factors: dict[str, Array], scale: float, xp: ModuleType
) -> Array:  # (layers, projections, heads, head_dim, hidden)
    """The 5-way tensor s Σ_k A[a,k] B[b,k] C_H[h,k] C_L[l,k] C_M[m,k]."""
    operands = [factors[f"attention_{name}"] for name in ("A", "B", "C_H", "C_L", "C_M")]
    return scale * xp.einsum("ak,bk,hk,lk,mk->lmhba", *operands)


def lorta_mlp(
    factors: dict[str, Array], scale: float, xp: ModuleType
) -> Array:  # (layers, projections, intermediate, hidden)
    """The 4-way tensor s Σ_k A[a,k] B[i,k] C_L[l,k] C_M[m,k]."""
    return scale * xp.einsum("ak,ik,lk,mk->lmia", *[factors[f"mlp_{name}"] for name in ("A", "B", "C_L", "C_M")])


def attention_weight(
    parts: list[Array],  # each (heads, head_dim, hidden)
    letters: str,
    interleaved: bool,
    xp: ModuleType,
) -> Array:  # (out, in)
    """The heads as rows of query, key and value, one below the other where they are fused, and as columns of output."""
    hidden = parts[0].shape[-1]
    if letters == "o":
        return parts[0].reshape(-1, hidden).T
    heads = xp.stack(parts, 1) if interleaved else xp.concatenate(parts, 0)
    return heads.reshape(-1, hidden)


def attention_updates(
    architecture: Architecture,
    tensor: Array,  # (layers, projections, heads, head_dim, hidden)
    xp: ModuleType,
) -> dict[str, Array]:  # {layer: (out, in)}
    """Every layer's slice; the projection's place is that among the distinct ones."""
    updates, order = {}, "".join(architecture.projections.values())
    assert tensor.shape[:2] == (len(architecture.attention), len(order))
    num_heads = {"q": HEADS, "k": architecture.kv_heads, "v": architecture.kv_heads, "o": HEADS}
    for layer, block in enumerate(architecture.attention):
        for name, letters in architecture.projections.items():
            parts = [tensor[layer, order.index(letter)][: num_heads[letter]] for letter in letters]
            updates[f"{block}.{name}"] = attention_weight(parts, letters, architecture.interleaved, xp)
    return updates


def lorta_updates(
    architecture: Architecture,
    factors: dict[str, Array],
    scale: float,
    xp: ModuleType = np,
) -> dict[str, Array]:  # {layer: (out, in)}
    """Every layer's slice of the two tensors; the row of C_M is the place among the distinct projections."""
    updates = attention_updates(architecture, lorta_attention(factors, scale, xp), xp)
    tensor = lorta_mlp(factors, scale, xp)
    counts = [2 if side == "two rows" else 1 for side in architecture.mlp_layers.values()]
    assert tensor.shape[:2] == (len(architecture.mlp), sum(counts))
    for layer, block in enumerate(architecture.mlp):
        for k, (name, side) in enumerate(architecture.mlp_layers.items()):
            slices = tensor[layer, sum(counts[:k]) : sum(counts[: k + 1])]
            weight = slices.reshape(-1, slices.shape[-1])
            updates[f"{block}.{name}"] = weight.T if side == "columns" else weight
    return updates


def over_layer_updates(
    shapes: dict[str, tuple[int, int]],
    factors: dict[str, Array],
    scale: float,
    xp: ModuleType = np,
) -> dict[str, Array]:  # {layer: (out, in)}
    """LoTR and FacT: s U G_n Vᵀ over the layers of one shape; in FacT-TK G_n = Σ_k P[n,k] C[:,:,k].

    `shapes` holds every adapted layer's (out, in), in module order.
    """
    updates = {}
    for out_features, in_features in set(shapes.values()):
        names = [name for name, shape in shapes.items() if shape == (out_features, in_features)]
        own = {name: factors.get(f"{out_features}x{in_features}_{name}") for name in "UVGPC"}
        middle = own["G"] if own["G"] is not None else xp.einsum("nk,pqk->npq", own["P"], own["C"])
        tensor = scale * xp.einsum("op,npq,dq->nod", own["U"], middle, own["V"])
        updates |= dict(zip(names, tensor, strict=True))
    return updates


def roles(architecture: Architecture) -> dict[str, tuple[str, str]]:
    """{layer: (block, its name in the block)}."""
    blocks = [(architecture.attention, architecture.projections), (architecture.mlp, architecture.mlp_layers)]
    return {f"{block}.{name}": (block, name) for names, layers in blocks for block in names for name in layers}


def train_updates(
    architecture: Architecture,
    shapes: dict[str, tuple[int, int]],  # of every adapted layer, in module order
    factors: dict[str, Array],
    scale: float,
    has_heads: bool,
    xp: ModuleType = np,
) -> dict[str, Array]:  # {layer: (out, in)}
    """MetaTT: s G1 G2[l] G3[m] G4, transposed, over the layers of one shape; with heads s G1 G2[l] G3[m] G4[h] G5."""
    updates, places = {}, roles(architecture)
    if has_heads:
        heads = {name.rpartition("_")[2]: core for name, core in factors.items() if name.startswith("heads_")}
        cores = [heads[f"G{k}"] for k in range(1, 6)]
        updates = attention_updates(architecture, scale * xp.einsum("ap,lpq,mqt,htu,ub->lmhba", *cores), xp)
    rest = {name: shape for name, shape in shapes.items() if name not in updates}
    for out_features, in_features in set(rest.values()):
        names = [name for name, shape in rest.items() if shape == (out_features, in_features)]
        blocks, leaves = (list(dict.fromkeys(places[name][k] for name in names)) for k in (0, 1))
        cores = [factors[f"{out_features}x{in_features}_G{k}"] for k in range(1, 5)]
        tensor = scale * xp.einsum("ap,lpq,mqt,tb->lmba", *cores)
        assert tensor.shape[:2] == (len(blocks), len(leaves))
        updates |= {name: tensor[blocks.index(places[name][0]), leaves.index(places[name][1])] for name in names}
    return updates


def stacked_updates(
    architecture: Architecture,
    shapes: dict[str, tuple[int, int]],  # of every adapted layer, in module order
    factors: dict[str, Array],
    scale: float,
    arrangement: str,
    xp: ModuleType = np,
) -> dict[str, Array]:  # {layer: (out, in)}
    """TensLoRA: s Σ G[p,q,…] A[a,p] B[b,q] …, of the modes that are stacked; without G the sum is over one k."""
    stacked, places, updates = arrangement.split("_"), roles(architecture), {}
    tensors: dict[tuple[str, ...], list[str]] = {}
    for name, (out_features, in_features) in shapes.items():
        block, leaf = places[name]
        key = f"{out_features}x{in_features}"
        letters = architecture.projections.get(leaf) if block in architecture.attention else None
        if "Att" in stacked and letters is not None:
            counts = {"q": HEADS, "k": architecture.kv_heads, "v": architecture.kv_heads, "o": HEADS}
            heads = sum(counts[letter] for letter in letters)
            inner, outer = (in_features, out_features) if letters == "o" else (out_features, in_features)
            key = f"heads_{outer}x{heads}x{inner // heads}"
        own = [key, *([] if "QKV" in stacked else [leaf]), *([] if "Depth" in stacked else [block])]
        tensors.setdefault(tuple(own), []).append(name)
    # Tensors stand in the order of the first layer of each.
    stems = list(dict.fromkeys(re.sub(r"_(A|B|C_[HML]|G)$", "", name) for name in factors))
    for key, names in zip(stems, tensors.values(), strict=True):
        blocks, leaves = (list(dict.fromkeys(places[name][k] for name in names)) for k in (0, 1))
        modes = {"A": "ap", "B": "bq", "C_H": "hs", "C_M": "mt", "C_L": "lu"}
        present = {mode: factors[f"{key}_{mode}"] for mode in modes if f"{key}_{mode}" in factors}
        core = factors.get(f"{key}_G")
        axes = [modes[mode] if core is not None else modes[mode][0] + "k" for mode in present]
        operands = [] if core is None else [core]
        terms = ["".join(axis[1] for axis in axes)] * len(operands) + axes
        kept = "".join(letter for letter in "lmhba" if letter in "".join(axis[0] for axis in axes))
        tensor = scale * xp.einsum(f"{','.join(terms)}->{kept}", *operands, *present.values())
        for name in names:
            weight = tensor
            weight = weight[blocks.index(places[name][0])] if "l" in kept else weight
            weight = weight[leaves.index(places[name][1])] if "m" in kept else weight
            weight = weight.reshape(-1, weight.shape[-1])
            is_turned = "h" in kept and architecture.projections[places[name][1]] == "o"
            updates[name] = weight.T if is_turned else weight
    return updates


SIZES = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER_LAYERS = {
    "attention": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    "projections": {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"},
    "mlp": ["model.layers.0.mlp", "model.layers.1.mlp"],
    "mlp_layers": {"gate_proj": "rows", "up_proj": "rows", "down_proj": "columns"},
}
ENCODER_PROJECTIONS = {"self.query": "q", "self.key": "k", "self.value": "v", "output.dense": "o"}
ENCODER_MLP_LAYERS = {"intermediate.dense": "rows", "output.dense": "columns"}
FAIRSEQ_PROJECTIONS = {"k_proj": "k", "v_proj": "v", "q_proj": "q", "out_proj": "o"}  # not in the order q, k, v
FAIRSEQ_MLP_LAYERS = {"fc1": "rows", "fc2": "columns"}


def decoder(name: str, of: Callable[[], nn.Module], kv_heads: int) -> Architecture:
    """A model with the layer names of Llama."""
    return Architecture(name, of, kv_heads=kv_heads, **DECODER_LAYERS)


def encoder(name: str, of: Callable[[], nn.Module], root: str) -> Architecture:
    """A model with the layer names of BERT."""
    blocks = [f"{root}.encoder.layer.0", f"{root}.encoder.layer.1"]
    attention = [f"{block}.attention" for block in blocks]
    return Architecture(name, of, attention, ENCODER_PROJECTIONS, blocks, ENCODER_MLP_LAYERS)


def causal(name: str, **more: Any) -> Callable[[], nn.Module]:
    """Builds a causal language model whose configuration has the usual field names."""
    return lambda: getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{**SIZES, **more})
    )


def phi3(name: str, mlp_layers: dict[str, str]) -> Architecture:
    """Phi-3, whose output projection comes before the fused query, key and value."""
    layers = {**DECODER_LAYERS, "projections": {"o_proj": "o", "qkv_proj": "qkv"}, "mlp_layers": mlp_layers}
    return Architecture(name, causal("Phi3", num_key_value_heads=2), kv_heads=2, **layers)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=24, n_layer=2, n_head=HEADS, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, ffn_dim=44, word_embed_proj_dim=24))


def t5(feed_forward: str) -> Callable[[], nn.Module]:
    """A T5 whose heads are 5 wide, so that their sum is not the hidden size."""
    config = {"vocab_size": 96, "d_model": 24, "d_kv": 5, "d_ff": 44, "num_layers": 2, "num_heads": HEADS}
    config |= {"feed_forward_proj": feed_forward, "decoder_start_token_id": 0}
    return lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**config))


def bart() -> nn.Module:
    both = {"layers": 2, "attention_heads": HEADS, "ffn_dim": 44}
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in both.items()}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=96, d_model=24, **sizes))


T5_ATTENTION = [
    "encoder.block.0.layer.0.SelfAttention",
    "encoder.block.1.layer.0.SelfAttention",
    "decoder.block.0.layer.0.SelfAttention",
    "decoder.block.0.layer.1.EncDecAttention",
    "decoder.block.1.layer.0.SelfAttention",
    "decoder.block.1.layer.1.EncDecAttention",
]
T5_PROJECTIONS = {"q": "q", "k": "k", "v": "v", "o": "o"}
T5_MLP = [
    "encoder.block.0.layer.1.DenseReluDense",
    "encoder.block.1.layer.1.DenseReluDense",
    "decoder.block.0.layer.2.DenseReluDense",
    "decoder.block.1.layer.2.DenseReluDense",
]
BART_ATTENTION = [
    "model.encoder.layers.0.self_attn",
    "model.encoder.layers.1.self_attn",
    "model.decoder.layers.0.self_attn",
    "model.decoder.layers.0.encoder_attn",
    "model.decoder.layers.1.self_attn",
    "model.decoder.layers.1.encoder_attn",
]
BART_MLP = [
    "model.encoder.layers.0",
    "model.encoder.layers.1",
    "model.decoder.layers.0",
    "model.decoder.layers.1",
]

ARCHITECTURES = [
    encoder(
        "bert",
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)),
        "bert",
    ),
    encoder("roberta", lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES)), "roberta"),
    encoder("esm", lambda: transformers.EsmForMaskedLM(transformers.EsmConfig(**SIZES, mask_token_id=4)), "esm"),
    decoder("llama-grouped", causal("Llama", num_key_value_heads=2), kv_heads=2),
    decoder("llama-multi-query", causal("Llama", num_key_value_heads=1), kv_heads=1),
    decoder("qwen3", causal("Qwen3", num_key_value_heads=2, head_dim=10), kv_heads=2),
    decoder("gemma", causal("Gemma", num_key_value_heads=1, head_dim=10), kv_heads=1),
    decoder("mistral", causal("Mistral", num_key_value_heads=2), kv_heads=2),
    Architecture(
        "gpt2-conv1d",
        gpt2,
        ["transformer.h.0.attn", "transformer.h.1.attn"],
        {"c_attn": "qkv", "c_proj": "o"},
        ["transformer.h.0.mlp", "transformer.h.1.mlp"],
        {"c_fc": "rows", "c_proj": "columns"},
    ),
    Architecture(
        "opt",
        opt,
        ["model.decoder.layers.0.self_attn", "model.decoder.layers.1.self_attn"],
        FAIRSEQ_PROJECTIONS,
        ["model.decoder.layers.0", "model.decoder.layers.1"],
        FAIRSEQ_MLP_LAYERS,
    ),
    Architecture(
        "gpt-neox-interleaved",
        causal("GPTNeoX"),
        ["gpt_neox.layers.0.attention", "gpt_neox.layers.1.attention"],
        {"query_key_value": "qkv", "dense": "o"},
        ["gpt_neox.layers.0.mlp", "gpt_neox.layers.1.mlp"],
        {"dense_h_to_4h": "rows", "dense_4h_to_h": "columns"},
        interleaved=True,
    ),
    phi3("phi3-stacked", {"gate_up_proj": "two rows", "down_proj": "columns"}),
    Architecture(
        "bloom-interleaved",
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=96, hidden_size=24, n_layer=2, n_head=HEADS)
        ),
        ["transformer.h.0.self_attention", "transformer.h.1.self_attention"],
        {"query_key_value": "qkv", "dense": "o"},
        ["transformer.h.0.mlp", "transformer.h.1.mlp"],
        {"dense_h_to_4h": "rows", "dense_4h_to_h": "columns"},
        interleaved=True,
    ),
    Architecture(
        "persimmon-interleaved",
        # An even number of rotated features of the 6 that a head has.
        causal("Persimmon", rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0}),
        DECODER_LAYERS["attention"],
        {"query_key_value": "qkv", "dense": "o"},
        DECODER_LAYERS["mlp"],
        {"dense_h_to_4h": "rows", "dense_4h_to_h": "columns"},
        interleaved=True,
    ),
    Architecture(
        "mpt-stacked",
        lambda: transformers.MptForCausalLM(
            transformers.MptConfig(
                vocab_size=96, d_model=24, n_layers=2, n_heads=HEADS, expansion_ratio=2, max_seq_len=64
            )
        ),
        ["transformer.blocks.0.attn", "transformer.blocks.1.attn"],
        {"Wqkv": "qkv", "out_proj": "o"},
        ["transformer.blocks.0.ffn", "transformer.blocks.1.ffn"],
        {"up_proj": "rows", "down_proj": "columns"},
    ),
    Architecture(
        "modernbert-stacked",
        lambda: transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2)
        ),
        ["model.layers.0.attn", "model.layers.1.attn"],
        {"Wqkv": "qkv", "Wo": "o"},
        ["model.layers.0.mlp", "model.layers.1.mlp"],
        {"Wi": "two rows", "Wo": "columns"},
    ),
    Architecture(
        "t5",
        t5("relu"),
        T5_ATTENTION,
        T5_PROJECTIONS,
        T5_MLP,
        {"wi": "rows", "wo": "columns"},
        has_decoder_input=True,
    ),
    Architecture(
        "t5-gated",
        t5("gated-gelu"),
        T5_ATTENTION,
        T5_PROJECTIONS,
        T5_MLP,
        {"wi_0": "rows", "wi_1": "rows", "wo": "columns"},
        has_decoder_input=True,
    ),
    Architecture(
        "bart",
        bart,
        BART_ATTENTION,
        FAIRSEQ_PROJECTIONS,
        BART_MLP,
        FAIRSEQ_MLP_LAYERS,
        has_decoder_input=True,
    ),
]
