"""Tiny models with adapters that have moved, and their tokenizers."""

import copy

import torch
import transformers
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cases import Model, perturb, tiny_llama
from tensorpeft import DotaConfig, LortaConfig

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
WORDS = [f"w{k}" for k in range(4, 96)]
# Wider than usual, so that the logits differ clearly: greedy texts are not one word over and over.
LLAMA = Model("llama", lambda: tiny_llama(initializer_range=0.3), ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM")
CONFIGS = {
    "dota": lambda **more: DotaConfig(r=6, num_cores=3, **more),
    "lorta": lambda **more: LortaConfig(r=4, **more),
}


def tiny_gpt2():
    config = transformers.GPT2Config(
        vocab_size=96,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=40,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.3,
    )
    return transformers.GPT2LMHeadModel(config)


def tiny_bert(num_labels=3):
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=num_labels,
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config)


# Learned positions: left padding must shift them.
GPT2 = Model("gpt2", tiny_gpt2, ["c_attn", "c_fc"], "CAUSAL_LM")


def adapt(model: Model, method: str = "dota"):
    adapted = get_peft_model(
        model.fresh(), CONFIGS[method](target_modules=model.targets, task_type=model.task_type, init_weights=True)
    )
    perturb(adapted, scale=1.0)
    return adapted.eval()


def word_tokenizer(bos: bool = False, pairs: bool = False) -> PreTrainedTokenizerFast:
    """One token per word; with `pairs` as BERT's, [CLS] and [SEP] being <s> and </s>."""
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = [("<s>", 2), ("</s>", 3)]
    if pairs:
        words.post_processor = TemplateProcessing("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", special)
    elif bos:
        words.post_processor = TemplateProcessing("<s> $A", "<s> $A <s> $B", special)
    names = ["input_ids", "token_type_ids", "attention_mask"] if pairs else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=names, **SPECIAL)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters a to d and the space, of which "ab", "cd" and " a" are one token each, whatever is a prompt's end."""
    letters = ["a", "b", "c", "d", "▁"]
    merged = ["ab", "cd", "▁a"]
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<unk>", "<s>", "</s>", *letters, *merged])}
    bpe = Tokenizer(BPE(vocabulary, [("a", "b"), ("c", "d"), ("▁", "a")], unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Replace("▁", " ")
    bpe.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **SPECIAL)


def sentence(seed: int, length: int) -> str:
    drawn = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[k] for k in drawn)


def token_log_probs(model, ids: list[int]) -> list[float]:
    """The log-probability of every token but the first, of a text alone and in double precision."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(input_ids=torch.tensor([ids])).logits[0]
    return [(row[token] - row.exp().sum().log()).item() for row, token in zip(logits, ids[1:])]
