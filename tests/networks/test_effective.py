"""The fused map against the plain formula, and the cast that loses no small update."""

import shutil

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tensorpeft.networks import effective
from tensorpeft.networks.cut import Cut
from tensorpeft.networks.effective import add_apart, effective_linear, effective_weight, trained_weight
from tensorpeft.networks.kernels import dither
from tensorpeft.networks.mpo import MPO, MpoUpdate, contract, random_cores

MODES = [((2, 3, 2), (3, 2, 2)), ((2, 2, 3, 1, 2), (1, 2, 2, 3, 1)), ((4, 3), (2, 6)), ((12, 1), (1, 12))]
over_modes = pytest.mark.parametrize("modes", MODES, ids=str)


def make_cores(modes, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(seed)
    return [core.to(dtype) for core in random_cores(*modes, max_bond=4)]


def shape_of(modes) -> tuple[int, int]:
    out, in_ = contract(make_cores(modes, 0)).shape
    return out, in_


@pytest.fixture
def block_elements(request, monkeypatch):
    monkeypatch.setitem(effective._BLOCK_ELEMENTS, "cpu", request.param)
    return request.param


@over_modes
@pytest.mark.parametrize("block_elements", [1, 30, 10**6], indirect=True)
@pytest.mark.parametrize("has_start", [True, False])
@pytest.mark.parametrize("has_weight", [True, False])
def test_gradcheck_and_plain_formula(modes, block_elements, has_start, has_weight):
    cores = [core.requires_grad_() for core in make_cores(modes, 1)]
    start = tuple(make_cores(modes, 2)) if has_start else ()
    out, in_ = shape_of(modes)
    x = torch.randn(2, 3, in_, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(out, in_, dtype=torch.float64, requires_grad=True) if has_weight else None
    bias = torch.randn(out, dtype=torch.float64, requires_grad=True) if has_weight else None

    def fused(x, weight, bias, *cores):
        return effective_linear(x, weight, bias, [Cut(MPO, cores, start)])

    def plain(x, weight, bias, *cores):
        update = contract(cores) - (contract(start) if start else 0)
        return linear(x, update if weight is None else weight + update, bias)

    inputs = (x, weight, bias, *cores)
    tensors = [tensor for tensor in inputs if tensor is not None]
    # Every entry of the Jacobian in pieces of a few rows; in the others, which only cut elsewhere, a random projection.
    assert torch.autograd.gradcheck(fused, inputs, fast_mode=block_elements != 30)
    direction = torch.randn(2, 3, out, dtype=torch.float64)
    outputs = fused(*inputs), plain(*inputs)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(*(torch.autograd.grad((y * direction).sum(), tensors) for y in outputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_elements", [1, 30, 10**6], indirect=True)
def test_several_networks_of_different_cuts_add_up(block_elements):
    modes = [((2, 3, 2), (3, 2, 2)), ((3, 4), (4, 3))]
    cuts = [Cut(MPO, tuple(core.requires_grad_() for core in make_cores(m, 3))) for m in modes]
    x, weight = torch.randn(5, 12, dtype=torch.float64), torch.randn(12, 12, dtype=torch.float64)
    expected = x @ (weight + sum(contract(cut.cores) for cut in cuts)).T
    result = effective_linear(x, weight, None, cuts)
    torch.testing.assert_close(result, expected)
    cores = [core for cut in cuts for core in cut.cores]
    gradients = [torch.autograd.grad(y.square().sum(), cores) for y in (result, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@over_modes
def test_update_is_forward_and_weight_of_one_matrix(modes):
    update = MpoUpdate(make_cores(modes, 4), make_cores(modes, 5))
    x = torch.randn(7, shape_of(modes)[1], dtype=torch.float64)
    torch.testing.assert_close(update(x), x @ update.matrix().T)
    x32, update32 = x.float(), MpoUpdate(make_cores(modes, 4, torch.float32))
    torch.testing.assert_close(update32(x32), x32 @ update32.matrix().T)


def test_halves_that_are_ready_change_no_bit_and_follow_cores_and_start():
    update = MpoUpdate(make_cores(MODES[0], 4, torch.float32), make_cores(MODES[0], 5, torch.float32))
    x, weight = torch.randn(7, 12), torch.randn(12, 12)

    def output_and_gradients(cut: Cut) -> list[Tensor]:
        output = effective_linear(x, weight, None, [cut])
        return [output, *torch.autograd.grad(output.square().sum(), update.cores())]

    for change in (lambda: None, lambda: update.start_2.add_(0.5), update.double, update.float):
        with torch.no_grad():
            change()
        ready = output_and_gradients(update.cut())
        contracted_there = output_and_gradients(update.cut()._replace(ready=None))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ready, contracted_there, strict=True))


def test_nothing_of_the_weight_s_size_is_saved_for_backward():
    cores = [core.requires_grad_() for core in random_cores((8, 8), (8, 8), 2)]
    x, weight = torch.randn(3, 64), torch.randn(64, 64)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, *cores)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        effective_linear(x, weight, None, [Cut(MPO, tuple(cores), tuple(core.detach() for core in cores))])
    assert saved
    large = [tensor for tensor in saved if tensor.numel() > 1]
    assert {tensor.untyped_storage().data_ptr() for tensor in large} <= known


class _OnOneDevice(TorchDispatchMode):
    """Raises where an operation gets tensors of several devices, as real ones do: torch does not check ours."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {tensor.device for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        assert len(devices) <= 1, f"{func} gets tensors of {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("of", ["linear", "few rows", "weight", "trained weight"])
def test_an_update_whose_tensors_are_on_another_device(of):
    elsewhere, (out, in_) = torch.device("meta"), shape_of(MODES[0])
    with FakeTensorMode(), _OnOneDevice():
        cores = tuple(core.requires_grad_() for core in make_cores(MODES[0], 1))
        cut = Cut(MPO, cores, tuple(make_cores(MODES[0], 2)))
        x, weight = (torch.empty(*shape, dtype=torch.float64, device=elsewhere) for shape in ((1, in_), (out, in_)))
        results = {
            "linear": lambda: effective_linear(x, weight, None, [cut]),
            "few rows": lambda: add_apart(x, [cut]),
            "weight": lambda: effective_weight(weight, [cut], weight.dtype),
            "trained weight": lambda: trained_weight(weight, [cut]),
        }
        result = results[of]()
        assert result.device == elsewhere
        if result.requires_grad:
            result.sum().backward()
            assert {core.grad.device.type for core in cores} == {"cpu"}


class _Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize("has_start", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_for_a_row_beside_a_base_no_matrix_is_made(has_start, dtype):
    """As a token is decoded where the base's own forward must run: quantised, offloaded, on several devices."""
    torch.manual_seed(0)
    cores, start = (random_cores((8, 8), (8, 8), 4) for _ in range(2))
    update = MpoUpdate(cores, start if has_start else None)
    x = torch.randn(1, 64).to(dtype)
    with torch.no_grad(), _Largest() as largest:
        found = update(x)
    assert largest.elements < 64 * 64 // 2
    assert found.dtype == dtype
    torch.testing.assert_close(found, (x.float() @ update.matrix().t()).to(dtype).detach())
    with torch.no_grad():
        assert update(x[:0]).shape == (0, 64)
        assert update(x.expand(64, 64)).shape == (64, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestDither:
    """`W0 + ΔW` in half precision."""

    size = 256

    def weight_and_cut(self, dtype: torch.dtype, share: float) -> tuple[Tensor, Cut, Tensor]:
        """A weight, and an update whose norm is a share of the weight's."""
        torch.manual_seed(0)
        weight = (torch.randn(self.size, self.size) * 0.02).to(dtype)
        cores = random_cores((16, 16), (16, 16), 16)
        cores[0] *= share * weight.float().norm() / contract(cores).norm()
        return weight, Cut(MPO, tuple(cores)), contract(cores)

    def test_no_update_is_exactly_the_weight(self, dtype):
        weight, cut, _ = self.weight_and_cut(dtype, 1e-2)
        assert torch.equal(effective_weight(weight, [cut._replace(start=cut.cores)], dtype), weight)

    @pytest.mark.parametrize("share", [1e-5, 1e-4, 1e-3])
    def test_small_updates_survive_where_rounding_loses_them(self, dtype, share):
        weight, cut, update = self.weight_and_cut(dtype, share)
        survived = effective_weight(weight, [cut], dtype).float() - weight.float()
        rounded = (weight.float() + update).to(dtype).float() - weight.float()
        assert (survived * update).sum() / update.square().sum() == pytest.approx(1, abs=0.1)
        if share < 1e-4 and dtype == torch.bfloat16:
            assert (rounded * update).sum() / update.square().sum() < 0.1

    def test_error_is_below_one_unit_in_the_last_place(self, dtype):
        weight, cut, update = self.weight_and_cut(dtype, 0.3)
        exact = weight.float() + update
        error = (effective_weight(weight, [cut], dtype).float() - exact).abs()
        assert (error <= exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal).all()

    def test_blocks_do_not_change_a_bit(self, dtype, monkeypatch):
        weight, cut, _ = self.weight_and_cut(dtype, 1e-3)
        whole = effective_weight(weight, [cut], dtype)
        monkeypatch.setitem(effective._BLOCK_ELEMENTS, "cpu", 5000)
        assert torch.equal(effective_weight(weight, [cut], dtype), whole)


@pytest.mark.parametrize("transposed", [False, True])
def test_effective_weight_keeps_the_layout_of_the_weight(transposed):
    weight = torch.randn(12, 12).t() if transposed else torch.randn(12, 12)
    cut = Cut(MPO, tuple(random_cores((3, 4), (4, 3), 2)))
    assert effective_weight(weight, [cut], torch.float32).stride() == weight.stride()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: g++ not found")
@pytest.mark.slow
@pytest.mark.parametrize("first", [(0, 0), (3, 70_000)], ids=str)
def test_a_compiled_program_dithers_with_the_same_bits(first):
    torch.compiler.reset()
    arguments = torch.randn(64, 90), 16, *first
    assert torch.equal(torch.compile(dither)(*arguments), dither(*arguments))
