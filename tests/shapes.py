"""The weight shapes that the tests of modes and networks run over, with modes written out by hand."""

from math import prod
from typing import NamedTuple

__all__ = ["HUGE", "SHAPES", "Shape"]


class Shape(NamedTuple):
    """A weight's modes and a largest bond."""

    name: str
    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    max_bond: int  # cuts at least one bond, except where a comment says that there is none to cut

    @property
    def size(self) -> tuple[int, int]:
        return prod(self.out_modes), prod(self.in_modes)


SHAPES = [
    Shape("square-1024x1024", (4, 4, 4, 4, 4), (4, 4, 4, 4, 4), 16),
    Shape("wide-768x3072", (4, 4, 4, 4, 3), (4, 4, 8, 6, 4), 16),
    Shape("tall-96x12", (2, 6, 8), (3, 2, 2), 4),
    Shape("prime-257x64", (1, 1, 257, 1, 1), (2, 2, 4, 2, 2), 3),
    Shape("primes-in-one-core-127x131", (1, 1, 127, 1, 1), (1, 1, 131, 1, 1), 16),  # every bond is 1
    Shape("primes-in-two-cores-127x131", (1, 127, 1), (1, 1, 131), 16),
    Shape("two-cores-64x48", (8, 8), (6, 8), 16),
    Shape("odd-105x45", (3, 5, 7), (5, 3, 3), 5),
    Shape("row-1x12", (1, 1, 1), (2, 3, 2), 1),
    Shape("one-core-6x10", (6,), (10,), 1),  # no bond
]
HUGE = Shape("huge-11008x4096", (4, 4, 43, 4, 4), (4, 4, 8, 8, 4), 16)  # the MLP weight of LLaMA-2-7B: slow
