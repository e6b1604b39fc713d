"""What QDoTA, QLoRA and DoTA keep in memory for training: base, adapter, gradients and AdamW's moments.

    python benchmarks/qdota_memory.py

First measured on MiniLM-L6, by adding up every tensor that is there after a step, beside the arithmetic's answer; then
the arithmetic alone for LLaMA-2-7B in bfloat16, on the meta device. Activations are not counted here: they depend on
the batch (`step_time.py` measures them).
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from minilm_runs import find_minilm
from tensorpeft import DotaConfig
from tensorpeft.quantization import quantize_residual
from tensorpeft.quantization.model import plan_layers
from tensorpeft.studies.plan import nf4_bytes

BERT = r".*\.layer\.\d+\.(attention\.self\.(query|key|value)|intermediate\.dense|output\.dense)"
LLAMA = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
MIB = 2**20


def main() -> None:
    """Print both tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("MiniLM-L6, MiB".ljust(34) + "base   adapter  AdamW and gradients  total   arithmetic")
    for name, make, quantise in (
        ("DoTA R=16, float32 base", dota(BERT), None),
        ("QLoRA r=8", lora(8, BERT), lambda model, config: quantize_residual(model, None)),
        ("QDoTA R=16", dota(BERT), quantize_residual),
    ):
        measured = measure(make(), quantise)
        expected = sum(arithmetic(build_minilm("meta"), make(), quantise, 4))
        cells = [f"{value / MIB:7.2f}" for value in (*measured, sum(measured), expected)]
        print(f"{name:32s}{cells[0]}  {cells[1]}  {cells[2]:>19s}  {cells[3]}  {cells[4]:>10s}")
    print()
    print("LLaMA-2-7B, bfloat16, GiB".ljust(34) + "base   adapter  AdamW and gradients  total   trained")
    for name, make, quantise in (
        ("DoTA R=16", dota(LLAMA), None),
        ("QLoRA r=16", lora(16, LLAMA), quantize_residual),
        ("QLoRA r=6, about QDoTA's size", lora(6, LLAMA), quantize_residual),
        ("QDoTA R=16", dota(LLAMA), quantize_residual),
    ):
        parts = arithmetic(build_llama(), make(), quantise, 2)
        cells = [f"{value / 2**30:7.3f}" for value in (*parts, sum(parts))]
        print(f"{name:32s}{cells[0]}  {cells[1]}  {cells[2]:>19s}  {cells[3]}  {parts[1] // 4:11,d}")


def dota(targets: str | list[str]) -> Callable[[], DotaConfig]:
    """DoTA as in the paper."""
    return lambda: DotaConfig(r=16, target_modules=targets)


def lora(r: int, targets: str | list[str]) -> Callable[[], LoraConfig]:
    """LoRA of a rank."""
    return lambda: LoraConfig(r=r, target_modules=targets)


def build_minilm(device: str = "cpu") -> nn.Module:
    """MiniLM-L6 without a head."""
    model = AutoModel.from_pretrained(find_minilm())
    return model.to(device)


def build_llama() -> nn.Module:
    """LLaMA-2-7B on the meta device."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(intermediate_size=11008))


def measure(config: PeftConfig, quantise: Callable[[nn.Module, PeftConfig], nn.Module] | None) -> list[int]:
    """Bytes of base, adapter, and gradients with moments, after a training step."""
    model = build_minilm()
    model = get_peft_model(model if quantise is None else quantise(model, config), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.arange(8).unsqueeze(0)).last_hidden_state.sum().backward()
    optimizer.step()
    adapter = {id(parameter): parameter for parameter in trained}
    base = {id(tensor): tensor for tensor in stored_tensors(model) if id(tensor) not in adapter}
    state = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    return [sum(map(num_bytes, tensors)) for tensors in (base.values(), adapter.values(), [*state, *gradients])]


def stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and what bitsandbytes keeps beside a 4-bit weight."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield state.absmax
            yield from (state.offset, state.state2.absmax) if state.nested else ()
    # The tables of codes (16 and 256 numbers) are the same in all layers; bitsandbytes shares or repeats them.


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the elements."""
    return tensor.numel() * tensor.element_size()


def arithmetic(
    model: nn.Module,  # on the meta device
    config: PeftConfig,
    quantise: object,  # None: the base stays as it is
    width: int,  # bytes of an unquantised weight
) -> list[int]:
    """Bytes of base, adapter, and gradients with moments, from shapes alone."""
    is_dota = isinstance(config, DotaConfig)
    shapes, _ = plan_layers(model, config if is_dota else DotaConfig(r=1, target_modules=config.target_modules))
    _, plain = plan_layers(model, None)
    base = sum(num_bytes(buffer) for buffer in model.buffers())
    for name, parameter in model.named_parameters():
        is_4bit = quantise is not None and name.removesuffix(".weight") in plain
        base += nf4_bytes(parameter.numel()) if is_4bit else parameter.numel() * width
    if is_dota:
        trained = sum(torch.Size(shape).numel() for cores in shapes.values() for shape in cores)
        base += 4 * trained  # the start
    else:
        trained = sum(config.r * sum(model.get_submodule(name).weight.shape) for name in shapes)
    return [base, 4 * trained, 12 * trained]


if __name__ == "__main__":
    main()
