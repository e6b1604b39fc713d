"""The kernel is torch's operators, bit for bit; without a GPU in Triton's interpreter."""

import pytest
import torch

from tensorpeft.networks import effective
from tensorpeft.networks.effective import Cut, effective_weight
from tensorpeft.networks.mpo import MPO, random_cores

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = [((4, 6, 4), (5, 4, 6)), ((3, 4, 2, 2), (2, 2, 3, 5)), ((8, 1), (1, 8))]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Before the kernels are imported for the first time."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("modes", MODES, ids=str)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("has_out", [False, True])
def test_it_sums_and_dithers_as_torch_does(modes, dim, has_out, dtype, monkeypatch):
    from tensorpeft.networks.kernels import dithered_sum

    torch.manual_seed(0)
    cut = Cut(MPO, tuple(random_cores(*modes, max_bond=6, device=DEVICE)))
    weight = (effective_weight(None, [cut], torch.float32) + 0.1 * torch.randn(1, device=DEVICE)).to(dtype)
    update = effective._Update(cut)
    first, stop = update.right.shape[1 + dim], weight.shape[dim]
    if first == stop:
        first = 0
    used = []

    def kernel_for(part, left, out):
        used.append(dithered_sum)
        return dithered_sum

    def part() -> torch.Tensor:
        place = torch.zeros_like(weight.narrow(dim, first, stop - first)) if has_out else None
        result = effective._effective_part(weight, [update], dim, first, stop, dtype, place)
        assert place is None or result is place
        return result

    monkeypatch.setattr(effective, "_kernel_for", lambda part, left, out: None)
    expected = part()
    monkeypatch.setattr(effective, "_kernel_for", kernel_for)
    assert torch.equal(part(), expected)
    assert used
