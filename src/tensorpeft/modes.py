"""Integers only: a size and its modes, the bonds between cores, the number of parameters. No torch here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from math import isqrt, log, prod

# DoTA's table 2 (five cores). Sizes that are not in it are factored by `factor_modes`.
_MODES_OF_THE_PAPER: dict[int, tuple[int, ...]] = {
    768: (4, 4, 4, 4, 3),
    1024: (4, 4, 4, 4, 4),
    2304: (4, 4, 8, 6, 3),
    3072: (4, 4, 8, 6, 4),
    4096: (4, 4, 8, 8, 4),
    11008: (4, 4, 43, 4, 4),
    14336: (4, 8, 8, 8, 7),
    50400: (5, 10, 14, 12, 6),
}


def factor_modes(size: int, num_modes: int) -> tuple[int, ...]:
    """Modes of one side of a weight: `num_modes` factors of `size`, their product.

    The paper's table is used where it has the size (five modes). Any other size is split as evenly as its
    divisors allow (the sum of the modes is the least possible), the largest mode in the middle. A prime can
    not be split: it is one mode, the others are 1, and a `UserWarning` says so.

    Args:
        size: rows or columns of the weight, at least 1.
        num_modes: how many modes, the number of cores; at least 1.

    Raises:
        ValueError: `size` or `num_modes` is below 1.

    Source: DoTA (arXiv 2412.20891), table 2; the rule for other sizes is ours.

    >>> factor_modes(4096, 5)
    (4, 4, 8, 8, 4)
    >>> factor_modes(384, 5)
    (3, 4, 4, 4, 2)
    """
    if size < 1:
        raise ValueError(f"cannot factor the size {size} into modes: expected a size of at least 1.")
    if num_modes < 1:
        raise ValueError(f"cannot factor {size} into {num_modes} modes: expected at least 1 mode.")
    if num_modes == 5 and size in _MODES_OF_THE_PAPER:
        return _MODES_OF_THE_PAPER[size]
    if num_modes > 1 and _is_prime(size):
        warnings.warn(
            f"the size {size} is prime: it stays one mode, the other {num_modes - 1} are 1, so that one core holds "
            f"the whole side. Exclude the layer (exclude_modules) or pass modes={{{size}: (...)}} otherwise.",
            UserWarning,
            stacklevel=2,
        )
    ascending = _most_even_factors(size, num_modes, 1)
    assert ascending is not None  # `size` itself beside ones is always a solution
    return _largest_in_the_middle(ascending)


def modes_near_8(
    size: int,
    least: int = 1,  # how many, at least
) -> tuple[int, ...]:
    """The modes of a tensor train's side or vector: as many factors of `size` as bring them near 8 (`factor_modes`).

    Raises:
        ValueError: `size` or `least` is below 1.

    Source: LoRETTA (arXiv 2402.11417), whose modes for 768 and 6144 these are.

    >>> modes_near_8(768), modes_near_8(6144)
    ((8, 12, 8), (8, 8, 12, 8))
    """
    return factor_modes(size, max(least, round(log(size, 8)) if size > 0 else least))


def fold_modes(size: int, num_modes: int) -> tuple[int, ...]:
    """Ascending, nearly equal modes of a tensor that holds `size` entries: their product, or a little more.

    The most even factors of the size, where they are even: their sum is at most a hundredth above the least that any
    tensor has, of equal modes. Otherwise the modes with the least sum that hold the entries, the rest being padding.

    >>> fold_modes(14_155_776, 2), fold_modes(14_155_776, 3)
    ((3456, 4096), (216, 256, 256))
    >>> fold_modes(7919, 2)  # a prime
    (89, 89)
    """
    exact = _most_even_factors(size, num_modes, 1)
    assert exact is not None  # `size` itself beside ones is always a solution
    if sum(exact) <= 1.01 * num_modes * size ** (1 / num_modes):
        return exact
    # One less than the modes of a cube that is large enough, in as many of them as leave it so.
    side = round(size ** (1 / num_modes))
    side += side**num_modes < size
    smaller = next(k for k in range(num_modes, -1, -1) if (side - 1) ** k * side ** (num_modes - k) >= size)
    return (*(side - 1,) * smaller, *(side,) * (num_modes - smaller))


def bond_dimensions(
    out_modes: Sequence[int], in_modes: Sequence[int], max_bond: int | Sequence[int]
) -> tuple[int, ...]:
    """The N + 1 bond dimensions of an MPO, first and last 1: the exact ones, none above `max_bond`.

    `b_k = min(prod_{m<=k} i_m j_m, prod_{m>k} i_m j_m, max_bond)` for modes i of the output, j of the input. With a
    `max_bond` for each of the N - 1 inner bonds, also none that its neighbours leave unused: `b_k <= b_{k-1} i_k j_k`
    and `b_k <= i_{k+1} j_{k+1} b_{k+1}`.

    Raises:
        ValueError: the two sides have different numbers of modes, `max_bond` is below 1, or is not one per inner bond.

    >>> bond_dimensions((4, 4, 8, 8, 4), (4, 4, 8, 8, 4), 16)
    (1, 16, 16, 16, 16, 1)
    >>> bond_dimensions((4, 4, 8, 8, 4), (4, 4, 8, 8, 4), [2, 99, 64, 3])
    (1, 2, 32, 64, 3, 1)
    """
    if len(out_modes) != len(in_modes):
        raise ValueError(
            f"got {len(out_modes)} output modes {tuple(out_modes)} and {len(in_modes)} input modes {tuple(in_modes)}: "
            "each core takes one of each, so their numbers must be equal."
        )
    pairs = [i * j for i, j in zip(out_modes, in_modes)]
    if not isinstance(max_bond, int):
        return _limited_by_neighbours(pairs, max_bond)
    if max_bond < 1:
        raise ValueError(f"got a largest bond dimension of {max_bond}, expected at least 1.")
    return (*(min(prod(pairs[:k]), prod(pairs[k:]), max_bond) for k in range(len(pairs))), 1)


def count_parameters(out_modes: Sequence[int], in_modes: Sequence[int], max_bond: int | Sequence[int]) -> int:
    """The number of elements of an MPO's cores: the sum of `b_{k-1} i_k j_k b_k`.

    >>> count_parameters((4, 4, 8, 8, 4), (4, 4, 8, 8, 4), 16)
    37376
    """
    bonds = bond_dimensions(out_modes, in_modes, max_bond)
    return sum(bonds[k] * i * j * bonds[k + 1] for k, (i, j) in enumerate(zip(out_modes, in_modes)))


def _limited_by_neighbours(pairs: Sequence[int], inner: Sequence[int]) -> tuple[int, ...]:
    """The inner bonds, cut to what the bonds on their left and on their right can use, between two ones."""
    if len(inner) != len(pairs) - 1 or any(bond < 1 for bond in inner):
        raise ValueError(
            f"got the largest bond dimensions {list(inner)} for {len(pairs)} cores, expected {len(pairs) - 1}, one for "
            "each bond between two cores, and each at least 1."
        )
    bonds = [1, *inner, 1]
    for k, pair in enumerate(pairs[:-1]):
        bonds[k + 1] = min(bonds[k + 1], bonds[k] * pair)
    for k in range(len(pairs) - 1, 0, -1):
        bonds[k] = min(bonds[k], pairs[k] * bonds[k + 1])
    return tuple(bonds)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


@cache
def _most_even_factors(size: int, num_modes: int, smallest: int) -> tuple[int, ...] | None:
    """The ascending factors of `size`, none below `smallest`, with the least sum; None if there are none."""
    if num_modes == 1:
        return (size,) if size >= smallest else None
    best: tuple[int, ...] | None = None
    factor = smallest
    while factor**num_modes <= size:
        if size % factor == 0:
            rest = _most_even_factors(size // factor, num_modes - 1, factor)
            if rest is not None and (best is None or factor + sum(rest) < sum(best)):
                best = (factor, *rest)
        factor += 1
    return best


def _largest_in_the_middle(ascending: Sequence[int]) -> tuple[int, ...]:
    """Alternate the modes, largest first, to the middle's two sides: (1, 2, 3, 4, 5) -> (2, 4, 5, 3, 1)."""
    descending = sorted(ascending, reverse=True)
    return tuple(descending[1::2][::-1] + descending[0::2])
