"""A tokenizer as llama.cpp reads it: byte-level BPE, or sentencepiece's BPE with bytes for what is in no token."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

_SPACE = "▁"
_REPLACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
# How a text is cut before tokens are merged, by llama.cpp's name of it.
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    "gpt-2": ["words"],
    "smollm": ["digits", "words"],
    "llama-bpe": [_WORD + r"\p{N}{1,3}" + _REST, "bytes"],
    "qwen2": [_WORD + r"\p{N}" + _REST, "bytes"],
}
_ONE_PIECE = ("llama-bpe",)  # those where a piece that is a token is not built from merges


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Write all of a tokenizer: tokens, merges or scores, special tokens, chat template.

    Raises:
        ValueError: llama.cpp would cut texts into other tokens, or the model has too few of them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    kind = state["model"]["type"] if state else type(tokenizer).__name__
    if kind != "BPE":
        raise _refused(f"is {kind}, expected BPE")
    is_byte_level = not state["model"]["byte_fallback"]
    if is_byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_of_cuts(state))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_puts_space_first(state))
    tokens, types = _tokens(tokenizer, config.vocab_size, has_bytes=not is_byte_level)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if not is_byte_level:
        writer.add_token_scores(_scores(tokens, state["model"]["merges"]))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        # What is put around a text is asked of the tokenizer below; of its description gguf knows the simple ones.
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state | {"post_processor": None}), encoding="utf-8")
        special = SpecialVocab(Path(folder), load_merges=is_byte_level, n_vocab=len(tokens))
    ids = tokenizer("a").input_ids
    special.add_special_token = {
        "bos": ids[:1] == [tokenizer.bos_token_id],
        "eos": ids[-1:] == [tokenizer.eos_token_id],
    }
    special.add_to_gguf(writer, quiet=True)


def _refused(what: str) -> ValueError:
    return ValueError(
        f"the tokenizer {what}: it is not written to a GGUF file. Write the merged model with `tensorpeft export "
        "dense` and give that to llama.cpp's convert_hf_to_gguf.py, or an adapter for a GGUF file of the base (leave "
        "out --merged)."
    )


def _name_of_cuts(state: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts a text."""
    cuts = [_cut(step) for step in _steps(state["pre_tokenizer"], "pretokenizers")]
    normalizers = [step["type"] for step in _steps(state["normalizer"], "normalizers")]
    for name, expected in _CUTS.items():
        # Of normalizers: llama.cpp composes no characters, but what is typed and what files have is composed already.
        if cuts == expected and state["model"]["ignore_merges"] == (name in _ONE_PIECE) and set(normalizers) <= {"NFC"}:
            return name
    raise _refused(f"cuts texts by {json.dumps([state['normalizer'], state['pre_tokenizer']])[:300]}")


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _cut(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "words"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return regex
    return "something else"


def _puts_space_first(state: dict[str, Any]) -> bool:
    """Whether a tokenizer after sentencepiece puts a space before a text."""
    match _steps(state["normalizer"], "normalizers"), state["pre_tokenizer"]:
        case [{"type": "Prepend", "prepend": "▁"}, replaces], None if replaces == _REPLACES:
            return True
        case [], {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}:
            return scheme != "never"
        case [replaces], None | {"type": "Split", "pattern": {"String": " "}} if replaces == _REPLACES:
            return False
    raise _refused(f"changes texts by {json.dumps([state['normalizer'], state['pre_tokenizer']])[:300]}")


def _tokens(
    tokenizer: PreTrainedTokenizerBase, size: int, has_bytes: bool
) -> tuple[list[str], list[TokenType]]:  # each of length `size`
    tokens, types = [f"[PAD{k}]" for k in range(size)], [TokenType.UNUSED] * size
    added = tokenizer.added_tokens_decoder
    for token, k in tokenizer.get_vocab().items():
        if k >= size:
            raise ValueError(
                f"token {k} ({token!r}): the model has {size} embeddings. Resize them (resize_token_embeddings) before "
                "training, and save the base so."
            )
        if k not in added:
            is_byte = has_bytes and re.fullmatch("<0x[0-9A-F]{2}>", token)
            types[k] = TokenType.BYTE if is_byte else TokenType.NORMAL
        elif added[k].special:
            types[k] = TokenType.CONTROL
        else:
            token, types[k] = token.replace(_SPACE, " "), TokenType.USER_DEFINED
        tokens[k] = token
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Numbers by which llama.cpp, which merges the two tokens whose union has the largest, does so in this order.

    Raises:
        ValueError: there are two tokens whose union is a token, too, but which are not merged.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    pairs, known = {(left, right) for left, right in merges}, set(tokens)
    for token in ranks:
        for k in range(1, len(token)):
            pair = token[:k], token[k:]
            if pair not in pairs and known.issuperset(pair):
                raise _refused(f"does not merge {pair}, as llama.cpp would")
    return [-float(ranks.get(token, len(merges))) for token in tokens]
