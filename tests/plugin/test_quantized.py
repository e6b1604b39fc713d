"""Our methods on top of bitsandbytes' 4-bit and 8-bit layers, through PEFT's quantisation backends."""

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from tensorpeft import DotaConfig, LortaConfig, LotrConfig

bitsandbytes = pytest.importorskip("bitsandbytes")


class Quantized(nn.Module):
    """One linear layer, quantised when moved to its device."""

    def __init__(self, bits: int):
        super().__init__()
        torch.manual_seed(0)
        source = nn.Linear(128, 64)
        self.linear = (
            bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32)
            if bits == 4
            else bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
        )
        self.linear.load_state_dict(source.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@pytest.fixture(params=[4, 8])
def bits(request) -> int:
    return request.param


@pytest.fixture(params=["dota", "lorta", "lotr"])
def config(request) -> PeftConfig:
    """A fresh configuration of a method of high rank, and of two of low rank."""
    return {
        "dota": DotaConfig(r=4, num_cores=3, target_modules=["linear"]),
        "lorta": LortaConfig(r=4, target_modules=["linear"]),
        "lotr": LotrConfig(r=4, target_modules=["linear"]),
    }[request.param]


def build(bits: int) -> nn.Module:
    return Quantized(bits).to("cpu").eval()


def inputs() -> torch.Tensor:
    return torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


def trained(bits: int, config: PeftConfig) -> PeftModel:
    model = get_peft_model(build(bits), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        (model(inputs()) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_start_and_disabling_are_the_quantised_base(bits: int, config: PeftConfig):
    base = build(bits)(inputs())
    model = get_peft_model(build(bits), config).eval()
    assert torch.equal(model(inputs()), base)
    model = trained(bits, config)
    assert not torch.allclose(model(inputs()), base)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), base)


def test_reloading_is_exact(bits: int, config: PeftConfig, tmp_path):
    model = trained(bits, config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(bits), tmp_path).eval()
    assert torch.equal(loaded(inputs()), model(inputs()))


def test_merging_after_an_evaluation_reads_the_weight_in_its_own_order(bits: int, config: PeftConfig):
    """Bitsandbytes repacks a 4-bit weight at the first forward in evaluation; read as it lies, it is scrambled."""
    model = trained(bits, config)
    with torch.no_grad():
        before = model(inputs())
        model.merge_adapter()
        # One more 4-bit (8-bit) rounding of each weight lies between the two.
        assert (model(inputs()) - before).abs().max() < {4: 0.5, 8: 0.1}[bits] * before.abs().max()
        model.unmerge_adapter()
        assert (model(inputs()) - before).abs().max() < {4: 0.5, 8: 0.1}[bits] * before.abs().max()
