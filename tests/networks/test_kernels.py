"""The operators and their Triton kernels against einsum in float64; without a GPU in Triton's interpreter."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tensorpeft.networks import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
over_dtypes = pytest.mark.parametrize("dtype", DROPPED_BITS, ids=str)
# out_left, out_right, in_left, in_right, bond
SIZES = [
    (1, 1, 1, 1, 1),
    (4, 6, 5, 4, 7),  # multiples of no block
    (3, 2, 70, 2, 16),  # a small right half; the pairs of one row in two blocks
    (2, 64, 3, 64, 17),  # a large right half, in many blocks
    (20, 3, 11, 5, 3),  # many pairs
    (2, 3, 2, 300, 65),  # a row of the right half, and the bond, in several blocks
]
over_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)


class Operands(NamedTuple):
    matrix: Tensor  # (out_left · out_right, in_left · in_right)
    left: Tensor
    right: Tensor


def operands(sizes, dtype: torch.dtype, step: float = 0.0) -> Operands:
    """A matrix and halves that are parts of larger ones, of NaN. With a `step` the halves are small multiples of it."""
    torch.manual_seed(0)
    out_left, out_right, in_left, in_right, bond = sizes
    matrix = torch.randn(out_left * out_right, in_left * in_right).to(dtype)
    halves = [torch.randn(out_left, in_left, bond), torch.randn(bond, out_right, in_right)]
    left, right = [(half * 4).round() * step if step else half for half in halves]
    return Operands(
        inside_nan(matrix, (0, 1), (0, 3)),
        inside_nan(left, (0, 1), (1, 0), (0, 2)),
        inside_nan(right, (0, 1), (0, 0), (0, 0)),
    )


def inside_nan(tensor: Tensor, *margins: tuple[int, int]) -> Tensor:  # before and after, of each axis
    """The same, a part of a larger tensor."""
    shape = [before + size + after for size, (before, after) in zip(tensor.shape, margins)]
    larger = torch.full(shape, torch.nan, dtype=tensor.dtype, device=DEVICE)
    return larger[tuple(slice(before, before + size) for size, (before, _) in zip(tensor.shape, margins))].copy_(tensor)


def product(left: Tensor, right: Tensor) -> Tensor:  # (out_left · out_right, in_left · in_right), float64
    result = torch.einsum("abr,rcd->acbd", left.double(), right.double())
    return result.reshape(len(left) * right.shape[1], -1)


def folded(grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:  # float64
    grad = grad.double().reshape(len(left), right.shape[1], left.shape[1], right.shape[2])
    return torch.einsum("acbd,rcd->abr", grad, right.double()), torch.einsum("abr,acbd->rcd", left.double(), grad)


@pytest.fixture(params=["operators", "kernels"])
def run(request, monkeypatch):
    """`kernels` itself with torch's operators alone; or what it does on a GPU, without them."""
    if request.param == "operators":
        monkeypatch.setattr(kernels, "_triton_kernels", lambda device: None)
        return kernels
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # before the kernels are imported for the first time
        monkeypatch.setattr(kernels, "_current", lambda device: contextlib.nullcontext())
    for plain in ("_build_into", "_fold"):
        monkeypatch.setattr(kernels, plain, None)
    return OnGpu


class OnGpu:
    """`kernels`, its operators those of a GPU on a CPU too."""

    fold = staticmethod(kernels._fold_on_gpu)

    @staticmethod
    def build(weight: Tensor, left: Tensor, right: Tensor, first=(0, 0), dropped_bits=0, out=None) -> Tensor:
        out = weight.new_empty(weight.shape) if out is None else out
        kernels._build_into_on_gpu(weight, left, right, *first, dropped_bits, out)
        return out


@over_dtypes
@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000])
def test_what_is_no_number_stays_none(run, dtype, pattern):
    """Whatever its bits: a GPU's NaN has all of them set."""
    nan = torch.tensor(pattern, dtype=torch.int32).view(torch.float32)
    left, right = torch.zeros(4, 4, 1, device=DEVICE), nan.to(DEVICE).expand(1, 4, 4).contiguous()
    weight = torch.zeros(16, 16, dtype=dtype, device=DEVICE)
    assert run.build(weight, left, right, (0, 0), DROPPED_BITS[dtype]).isnan().all()
    if DROPPED_BITS[dtype]:
        assert kernels.dither(nan.to(DEVICE).expand(8, 8), DROPPED_BITS[dtype], 0, 0).isnan().all()


@over_sizes
@over_dtypes
@pytest.mark.parametrize(("first", "has_out"), [((0, 0), False), ((7, 2**20 + 3), True)])
def test_the_exact_sum_is_dithered_bit_for_bit(run, sizes, dtype, first, has_out):
    weight, left, right = operands(sizes, dtype, step=2**-7)
    update = product(left, right)
    assert torch.equal(update.float().double(), update)  # so that every order of summation gives the same
    total = weight.float() + update.float()
    bits = DROPPED_BITS[dtype]
    expected = kernels.dither(total, bits, *first).to(dtype) if bits else total
    # As a block of columns of a larger matrix.
    out = torch.full((len(weight), 2 * weight.shape[1]), 7.0, dtype=dtype, device=DEVICE) if has_out else None
    place = None if out is None else out[:, : weight.shape[1]]
    result = run.build(weight, left, right, first, bits, place)
    assert torch.equal(result, expected)
    assert result.dtype == dtype
    if out is not None:
        assert result is place
        assert (out[:, weight.shape[1] :] == 7).all()


@over_sizes
def test_the_product_is_a_float32s(run, sizes):
    weight, left, right = operands(sizes, torch.float32)
    difference = run.build(weight, left, right).double() - (weight.double() + product(left, right))
    # Every rounding is at most 2**-24 of what is summed: one a product, one a sum.
    allowed = (sizes[-1] + 1) * 2**-24 * (weight.abs() + product(left.abs(), right.abs()))
    assert (difference.abs() <= allowed).all()


@over_sizes
@over_dtypes
def test_a_gradient_is_folded_onto_both_halves(run, sizes, dtype):
    grad, left, right = operands(sizes, dtype)
    results = run.fold(grad, left, right)
    # Roundings of 2**-24 that mostly cancel; a bfloat16's are 2**-9.
    for result, expected, scale in zip(results, folded(grad, left, right), folded(grad.abs(), left.abs(), right.abs())):
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        assert ((result.double() - expected).abs() <= 2**-19 * scale).all()
    assert all(map(torch.equal, results, run.fold(grad, left, right)))


@over_dtypes
def test_a_program_folds_several_blocks(dtype, monkeypatch):
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    from tensorpeft.networks import triton_kernels

    grad, left, right = operands((20, 3, 11, 5, 3), dtype)
    one_each = triton_kernels.fold(grad, left, right)
    monkeypatch.setattr(triton_kernels, "_PROGRAMS", 2)
    several_each = triton_kernels.fold(grad, left, right)
    assert torch.equal(one_each[0], several_each[0])
    torch.testing.assert_close(one_each[1], several_each[1], rtol=2**-19, atol=1e-5)


@over_sizes
@over_dtypes
def test_a_gradient_of_one_element_gives_the_halves_in_all_their_bits(run, sizes, dtype):
    grad, left, right = operands(sizes, dtype)
    grad.zero_()[-1, -1] = 1
    grad_left, grad_right = run.fold(grad, left, right)
    torch.testing.assert_close(grad_left[-1, -1], right[:, -1, -1], rtol=2**-23, atol=0)
    torch.testing.assert_close(grad_right[:, -1, -1], left[-1, -1], rtol=2**-23, atol=0)
    assert grad_left.count_nonzero() == grad_right.count_nonzero() == sizes[-1]


def test_offsets_beyond_what_32_bits_count(run):
    if DEVICE == "cpu" and run is kernels:
        pytest.skip("torch's own")
    weight, left, right = operands((2, 2, 3, 4, 5), torch.bfloat16, step=2**-7)
    # Rows far apart: of the memory between them nothing is ever touched.
    far = torch.empty(3 * 2**30 + weight.shape[1], dtype=weight.dtype, device=DEVICE)
    far = far.as_strided(weight.shape, (2**30, 1))
    far.copy_(weight)
    assert all(map(torch.equal, run.fold(far, left, right), run.fold(weight, left, right)))
    expected = run.build(weight, left, right)
    assert torch.equal(run.build(far, left, right), expected)
    assert torch.equal(run.build(far, left, right, out=far), expected)


@pytest.mark.parametrize("unsuitable", ["columns", "out", "left", "float64"])
def test_what_a_kernel_does_not_take_operators_do(unsuitable, monkeypatch):
    def triton_kernels(device):
        class Unused:
            build = fold = None

        return Unused

    monkeypatch.setattr(kernels, "_triton_kernels", triton_kernels)
    weight, left, right = operands(SIZES[1], torch.bfloat16, step=2**-7)
    expected, expected_halves = kernels.build(weight, left, right), kernels._fold(weight, left, right)
    out = torch.empty_like(expected)
    if unsuitable == "columns":
        weight = weight.t().contiguous().t()
    elif unsuitable == "out":
        out = out.t().contiguous().t()
    elif unsuitable == "left":
        left = left.transpose(0, 2).contiguous().transpose(0, 2)
    else:
        left, right = left.double(), right.double()
    assert torch.equal(OnGpu.build(weight, left, right, out=out), expected)
    if unsuitable != "out":
        for half, other in zip(OnGpu.fold(weight, left, right), expected_halves):
            torch.testing.assert_close(half, other, check_dtype=False)


def test_a_kernel_that_cannot_be_built_is_told_once(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from tensorpeft.networks import triton_kernels

    def fails(*arguments):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(triton_kernels, "build", fails)
    monkeypatch.setattr(kernels, "_current", lambda device: contextlib.nullcontext())
    with pytest.warns(UserWarning, match="Triton cannot build a kernel here.*no C compiler"):
        assert kernels._triton_kernels.__wrapped__(torch.device(DEVICE)) is None


@over_dtypes
def test_the_operators_are_what_a_compiler_takes_them_for(dtype):
    weight, left, right = operands(SIZES[1], dtype)
    operators, place = torch.ops.tensorpeft, (weight, left, right, 3, 5, DROPPED_BITS[dtype])
    torch.library.opcheck(operators.build.default, place)
    torch.library.opcheck(operators.build_into.default, (*place, torch.empty_like(weight)))
    torch.library.opcheck(operators.fold.default, (weight, left, right))


def test_their_operations_are_counted():
    _, left, right = operands(sizes := SIZES[1], torch.float32)
    weight = product(left, right).float()
    flops = 2 * sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizes[4]
    with FlopCounterMode(display=False) as counter:
        kernels.build(weight, left, right)
    assert counter.get_total_flops() == flops
    with FlopCounterMode(display=False) as counter:
        kernels.fold(weight, left, right)
    assert counter.get_total_flops() == 2 * flops
