"""The operations that an adapter adds to a training step, per adapted weight: what a small or a fast step waits for.

    python benchmarks/operations.py [--rank 16] [--layers 4 12 30]

Counted by torch's dispatcher, forward and backward, without what only looks at a tensor in another way (views), and
less those of the bare model with the same gradients. Not a time: no machine's load changes it. The model is a Llama of
width 256 with that many layers, five adapted weights each (q, k, v, up, down), in float32, on the CPU. What is done
once per step for all weights together is shared by them: so the number falls with the layers. `tensorpeft::build` and
`::fold` count as one each, which they are on a GPU; on a CPU they are two and three operations.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import ADAPTERS, TARGETS

NAMES = ["LoRA", "DoTA", "DoTA, random", "LoRTA", "LoTR", "FacT-TT", "FacT-TK", "FLoRA", "LoRETTA", "NOLA"]
NAMES += ["QuanTA 4 axes", "MetaTT", "MetaTT-5D", "TensLoRA", "TensLoRA, heads"]


class OperationCounter(TorchDispatchMode):
    """Counts what is dispatched while it is on, by name; not what only views a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and count it if it works on tensors and does not only view them."""
        result = func(*args, **(kwargs or {}))
        is_view = func.is_view or func.name() in ("aten::detach", "aten::_unsafe_view")
        if not is_view and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, result))):
            self.counts[func.name()] += 1
        return result


def build_model(layers: int) -> LlamaForCausalLM:
    """The Llama of the benchmark; its embeddings are trained, so that every layer has a gradient to hand on."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=512,
        )
    )
    model.requires_grad_(False)
    return model


def count_step(model: nn.Module, steps: int = 2) -> Counter[str]:
    """The operations of a training step: of the second one, when what is made once has been made."""
    tokens = torch.arange(64).view(2, 32)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    counter = OperationCounter()
    for _ in range(steps):
        optimizer.zero_grad()
        counter = OperationCounter()
        with counter:
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return counter.counts


def added_per_weight(config: PeftConfig, layers: int) -> float:
    """Operations that the adapter adds to a step, per adapted weight."""
    base = build_model(layers)
    base.get_input_embeddings().requires_grad_(True)
    alone = count_step(base.train())
    adapted: Any = get_peft_model(build_model(layers), config).train()
    adapted.base_model.model.get_input_embeddings().requires_grad_(True)
    return (count_step(adapted).total() - alone.total()) / (len(TARGETS) * layers)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 30])
    arguments = parser.parse_args()
    print(f"Operations added per adapted weight, forward and backward, r = {arguments.rank}\n")
    print(f"{'':16s}" + "".join(f"{layers:>5d} layers" for layers in arguments.layers))
    for name in NAMES:
        counts = [added_per_weight(ADAPTERS[name](arguments.rank), layers) for layers in arguments.layers]
        print(f"{name:16s}" + "".join(f"{count:12.1f}" for count in counts))


if __name__ == "__main__":
    main()
