"""A tiny Llama as a GGUF file, as llama.cpp's converter writes one."""

from pathlib import Path

import gguf
import numpy as np

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS = 2, 32, 64, 4, 2
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary() -> tuple[list[str], list[str]]:  # tokens, merges
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
    return [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)], merges


def tensors(tied: bool, seed: int = 0) -> dict[str, np.ndarray]:  # by transformers' names
    generator = np.random.default_rng(seed)
    kv_width = WIDTH // HEADS * KV_HEADS
    shapes = {"model.embed_tokens.weight": (len(vocabulary()[0]), WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for layer in (f"model.layers.{k}" for k in range(LAYERS)):
        for name, rows in (("q", WIDTH), ("k", kv_width), ("v", kv_width), ("o", WIDTH)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, WIDTH)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        shapes |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    weights: dict[str, np.ndarray],
    architecture: str = "llama",
    quantized: str = "",  # ending of the names whose weights become Q8_0
    **fields: int,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10_000.0)
    tokens, merges = vocabulary()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in fields.items():
        writer.add_uint16(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in weights.items():
        stored = names.get_name(name, try_suffixes=(".weight",)) or name
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, transformers halves
            heads = HEADS if "q_proj" in name else KV_HEADS
            weight = weight.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(weight.shape)
        if quantized and name.endswith(quantized):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
