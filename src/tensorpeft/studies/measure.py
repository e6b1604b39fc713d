"""What a step costs: the peak of the memory it allocates, and the times of several steps measured fairly."""

import os
import time
from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def peak_memory(
    function: Callable[[], object],
    device: str | torch.device | None = None,
) -> int:  # bytes
    """The largest number of bytes that were allocated above the level at the start while ``function`` ran.

    Counts what torch's allocator hands out, not what the process holds: no weights that were there before, no
    workspace of the matrix libraries. Run the function once before, so that lasting state (an optimiser's moments,
    caches) exists already and is not counted. A function that frees what was there before (last step's gradients)
    gets it credited on CUDA, not on the CPU, whose profiler does not know such blocks: free them outside.

    Args:
        function: called once, without arguments.
        device: whose memory is counted, CUDA's counters or, for the CPU, the allocator's events as the profiler
            records them. None: CUDA where there is one, otherwise the CPU.
    """
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return _peak_on_cuda(function, device) if device.type == "cuda" else _peak_on_cpu(function)


def median_step_times(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
) -> dict[str, list[float]]:  # name -> seconds, one per round
    """The times to take the median of: every function once per round, so that all see the same state of the machine.

    Every second round goes through the functions backwards; no function always follows the same neighbour. One round
    before the first is not recorded. Where there is CUDA, it is synchronised before and after each call.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: cannot take a median of nothing. Pass at least 1.")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for round_number in range(rounds):
        for name in list(functions)[:: 1 if round_number % 2 == 0 else -1]:
            times[name].append(seconds(functions[name]))
    return times


def seconds(function: Callable[[], object]) -> float:
    """The wall-clock time of one call; where there is CUDA, until all that it started has ended."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_on_cuda(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    level = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - level


def _peak_on_cpu(function: Callable[[], object]) -> int:
    # The profiler writes two lines to stderr each time, at a level above errors; it reads this at its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    # The profiler's own tables show sums per operator; only the raw events tell what was alive at the same time.
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event for event in changes if event.device_type() == DeviceType.CPU]
    changes.sort(key=lambda event: event.start_ns())
    # torch's stubs lack nbytes.
    return max(accumulate((event.nbytes() for event in changes), initial=0))  # pyright: ignore[reportAttributeAccessIssue]
