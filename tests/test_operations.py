"""The operations that an adapter adds to a training step: no machine's load changes them."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
operations = import_module("operations")

# Per adapted weight of a model with twelve layers. LoRA has 10.
BOUNDS = {"DoTA": 14, "DoTA, random": 12, "LoRTA": 8, "LoTR": 8, "FacT-TT": 8, "FacT-TK": 8, "LoRETTA": 10}
BOUNDS |= {"MetaTT": 8, "MetaTT-5D": 8, "TensLoRA": 8}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_step_has_no_more_operations_per_adapted_weight_than_this(name):
    assert operations.added_per_weight(operations.ADAPTERS[name](16), layers=12) <= BOUNDS[name]


def test_what_is_made_for_all_weights_together_does_not_grow_with_them():
    """As many layers again, of one group still."""
    make = operations.ADAPTERS["DoTA"]
    four, eight = (operations.added_per_weight(make(16), layers) * layers for layers in (4, 8))
    per_layer = (eight - four) / 4 / len(operations.TARGETS)
    assert per_layer <= 6  # build; build, the gradient, fold
