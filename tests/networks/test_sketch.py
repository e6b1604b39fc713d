"""Sketches of a matrix that is never formed, against its singular vectors in float64."""

import pytest
import torch
from torch import Tensor

from tensorpeft.networks.sketch import Noise, Sketch, exact, leading_frames, leading_part


def matrix_of_spectrum(values: Tensor, out: int, in_: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(size, len(values), generator=generator).double() for size in (out, in_)]
    left, right = (torch.linalg.qr(columns)[0] for columns in noise)
    return left * values @ right.t()


def sketch_of(matrix: Tensor, rank: int, parts: int = 3, seed: int = 0) -> Sketch:
    """Gathered from layer inputs and output gradients whose products sum to the matrix."""
    out, in_ = matrix.shape
    sketch = Sketch(out, in_, rank, Noise(seed), torch.device("cpu"))
    x = torch.randn(60, in_, generator=torch.Generator().manual_seed(9)).double()
    while len(x) < in_:
        x = torch.cat([x, torch.randn(60, in_, generator=torch.Generator().manual_seed(len(x))).double()])
    grads = torch.linalg.lstsq(x.t(), matrix.t()).solution  # xᵀ grads = matrixᵀ
    for rows_x, rows_y in zip(x.chunk(parts), grads.chunk(parts)):
        sketch.add(rows_x.float().unsqueeze(0), rows_y.float().unsqueeze(0))
    return sketch


def held(matrix: Tensor, rank: int, sketch: Sketch) -> float:
    """What the sketched frames hold of what the best ones hold."""
    left, right = (frame.double() for frame in leading_frames([sketch.gradient()], rank))
    best = torch.linalg.svdvals(matrix)[:rank].square().sum()
    return ((left.t() @ matrix @ right).square().sum() / best).item()


@pytest.mark.parametrize(("power", "least"), [(0.75, 0.8), (1.0, 0.93), (1.5, 0.99)])
def test_frames_hold_nearly_what_the_exact_ones_do_where_the_spectrum_falls(power: float, least: float):
    matrix = matrix_of_spectrum(torch.arange(1, 251).double() ** -power, 300, 250)
    shares = [held(matrix, 8, sketch_of(matrix, 8, seed=seed)) for seed in range(3)]
    assert least < min(shares) <= max(shares) <= 1 + 1e-6


def test_of_a_matrix_of_small_rank_nothing_is_lost():
    matrix = matrix_of_spectrum(torch.tensor([3.0, 2.0, 1.0]).double(), 90, 120)
    sketch = sketch_of(matrix, 3)
    assert held(matrix, 3, sketch) == pytest.approx(1, abs=1e-5)
    gradient = sketch.gradient()
    torch.testing.assert_close(gradient.left @ gradient.core @ gradient.right.t(), matrix.float(), rtol=1e-3, atol=1e-4)


def test_of_few_tokens_the_frames_are_exact():
    """A gradient of fewer tokens than a sketch has columns, however flat its spectrum is."""
    matrix = matrix_of_spectrum(torch.linspace(1, 0.5, 12).double(), 90, 120)
    assert held(matrix, 3, sketch_of(matrix, 3)) == pytest.approx(1, abs=1e-4)


def test_a_narrow_matrix_is_exact():
    matrix = matrix_of_spectrum(torch.ones(20).double(), 20, 30)
    gradient = sketch_of(matrix, 8).gradient()
    torch.testing.assert_close(gradient.left @ gradient.core @ gradient.right.t(), matrix.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient.left @ gradient.left.t(), (matrix @ matrix.t()).float(), rtol=1e-3, atol=1e-4)


def test_the_sum_of_sketches_is_the_sketch_of_the_sum():
    one, other = (matrix_of_spectrum(torch.ones(50).double(), 70, 60, seed=seed) for seed in (1, 2))
    first, second, both = sketch_of(one, 4), sketch_of(other, 4), sketch_of(one + other, 4)
    torch.testing.assert_close(first.left + second.left, both.left, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first.right + second.right, both.right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [exact, lambda matrix: leading_part(matrix, 5)], ids=["exact", "leading part"])
def test_of_a_matrix_that_is_there_it_has_the_singular_vectors(make: object):
    matrix = matrix_of_spectrum(torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]).double(), 40, 30).float()
    gradient = make(matrix)  # type: ignore[operator]
    torch.testing.assert_close(gradient.left @ gradient.core @ gradient.right.t(), matrix, rtol=1e-3, atol=1e-4)
    left, right = leading_frames([gradient], 2)
    _, values, _ = torch.linalg.svd(matrix)
    assert (left.t() @ matrix @ right).norm().item() == pytest.approx(values[:2].norm().item(), rel=1e-4)


def test_the_leading_part_leaves_all_random_states_alone(monkeypatch: pytest.MonkeyPatch):
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("it seeds every GPU"))
    one, again = leading_part(torch.eye(9), 2), leading_part(torch.eye(9), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, one, again))


def test_sketches_are_in_float32_whatever_is_around_them():
    torch.set_default_dtype(torch.bfloat16)
    try:
        sketch = Sketch(9, 7, 2, Noise(0), torch.device("cpu"))
        leading_part(torch.eye(9), 2)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sketch.add(torch.eye(7), torch.ones(7, 9))
    torch.testing.assert_close(sketch.left, torch.ones(9, 7) @ sketch._omega, rtol=1e-6, atol=1e-6)


def test_a_zero_matrix_has_frames_too():
    left, right = leading_frames([exact(torch.zeros(5, 4))], 2)
    assert (len(left), len(right)) == (5, 4)
