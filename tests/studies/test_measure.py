import time

import pytest
import torch

from tensorpeft.studies.measure import median_step_times, peak_memory

MEBI = 2**20


def allocate(mebibytes):
    return torch.zeros(mebibytes * MEBI // 4)


def test_the_peak_counts_what_is_alive_at_the_same_time():
    def allocate_two_then_one():
        first, second = allocate(4), allocate(8)
        del first, second
        third = allocate(10)
        return third.sum()

    assert MEBI * 12 <= peak_memory(allocate_two_then_one, "cpu") < MEBI * 12 + 10_000


def test_what_was_there_before_is_not_counted():
    there = allocate(16)
    # The ten and their sum with the first of the sixteen.
    assert MEBI * 20 <= peak_memory(lambda: allocate(10) + there[0], "cpu") < MEBI * 20 + 10_000


def test_backward_holds_the_saved_activations_and_the_gradients():
    weights = [torch.zeros(1024, 1024, requires_grad=True) for _ in range(3)]
    x = torch.zeros(2048, 1024)  # one activation: 8 MiB, one weight or its gradient: 4 MiB

    def step():
        y = x
        for weight in weights:
            y = y @ weight
        y.sum().backward()
        for weight in weights:
            weight.grad = None

    # Backward's first product: three activations alive, the gradient of the last one, the first weight's gradient.
    # The sum's gradient is an expanded scalar, so the lower bound has three activations and one of their gradients.
    peak = peak_memory(step, "cpu")
    assert 4 * 8 * MEBI <= peak <= (5 * 8 + 3 * 4) * MEBI

    with torch.no_grad():
        assert peak_memory(lambda: x @ weights[0] @ weights[1] @ weights[2], "cpu") < 2 * 8 * MEBI + 10_000


def test_times_alternate_and_keep_their_names():
    calls = []
    times = median_step_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_times_are_those_of_the_function_that_they_are_named_after():
    times = median_step_times({"short": lambda: None, "long": lambda: time.sleep(0.02)}, rounds=2)
    assert min(times["long"]) >= 0.02 > min(times["short"]) > 0


def test_no_rounds_is_an_error():
    with pytest.raises(ValueError, match="rounds=0"):
        median_step_times({"a": lambda: None}, rounds=0)
