"""A pytest plugin for PEFT's own tests: every one starts at the same random numbers, and what was imported stays.

Without a seed, PEFT's `test_mixed_adapter_batches_different_target_layers` compares log-probabilities near zero to less
than the rounding of their logits, and fails by chance, for PEFT's own LoRA too.
"""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_finish():
    """Some of PEFT's tests end in a full collection."""
    gc.collect()
    gc.freeze()
