"""Many adapters in one batch: a loop over the adapters against factors gathered per row, beside PEFT's LoRA.

    python benchmarks/mixed_batch.py [--adapters 2,4,16,64] [--length 1] [--rounds 7] [--device cuda]

A Llama of hidden size 1024 with four layers, 64 rows of `--length` tokens, adapters of rank 4 on query and value; one
forward in evaluation mode with `adapter_names`. All in turn, medians, and the ratio to PEFT's LoRA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import tensorpeft.plugin.layer as layer_module
from tensorpeft import LortaConfig, LotrConfig
from tensorpeft.studies.measure import median_step_times

ROWS = 64
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "LoRTA": lambda: LortaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "LoTR": lambda: LotrConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


def build(make: Callable[[], PeftConfig], adapters: int, device: str) -> PeftModel:
    """A model with so many adapters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=2048,
    )
    model = get_peft_model(LlamaForCausalLM(config).to(device), make(), adapter_name="a0")
    for k in range(1, adapters):
        model.add_adapter(f"a{k}", make())
    return model.eval()


def forward(model: PeftModel, tokens: torch.Tensor, names: list[str], gathered_from: int) -> None:
    """One mixed batch, gathered from so many adapters on."""
    layer_module._GATHERED_ADAPTERS = gathered_from
    with torch.no_grad():
        model(input_ids=tokens, adapter_names=names)


def main() -> None:
    """Print a row per number of adapters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", default="2,4,16,64")
    parser.add_argument("--length", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    tokens = torch.randint(0, 2048, (ROWS, arguments.length), device=arguments.device)
    columns = ["LoRA", "LoRTA, loop", "LoRTA, gathered", "LoTR, loop", "LoTR, gathered"]
    print(f"{ROWS} rows of {arguments.length} tokens; median s (ratio to LoRA)")
    print(f"{'adapters':>8s}  " + "  ".join(f"{name:>16s}" for name in columns))
    for adapters in map(int, arguments.adapters.split(",")):
        models = {name: build(make, adapters, arguments.device) for name, make in METHODS.items()}
        names = [f"a{k % adapters}" for k in range(ROWS)]
        runs = {}
        for column in columns:
            name, _, how = column.partition(", ")
            gathered_from = 1 if how == "gathered" else ROWS + 1
            runs[column] = partial(forward, models[name], tokens, names, gathered_from)
        times = {name: median(values) for name, values in median_step_times(runs, arguments.rounds).items()}
        cells = [f"{value:7.3f} ({value / times['LoRA']:.2f} x)" for value in times.values()]
        print(f"{adapters:8d}  " + "  ".join(f"{cell:>16s}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
