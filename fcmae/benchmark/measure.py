"""The stop-watch and the scales: how long a step takes, and how much memory it needs.

A *step* is a function without arguments that does one unit of work. Steps that are compared take turns, so that a
machine which slows down, or is shared, slows them all alike.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], object]
Clock = Callable[[Step], float]
"""Runs a step once and says how many seconds it took."""


@dataclass(frozen=True)
class Times:
    """How long each repeat of a step took, in seconds, in the order in which they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile in seconds: half of the repeats lie between them."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def measure_times(
    steps: Mapping[str, Step],
    clock: Clock,
    *,
    repeats: int,
    warmup: int,
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Times]:
    """Runs the steps in turn, `warmup` rounds without and `repeats` rounds with the clock's times kept.

    Args:
        steps: what to time, by name.
        clock: `process_clock`, `wall_clock` or `cuda_clock`.
        repeats: rounds that count, from 1.
        warmup: rounds before those.
        progress: told the name of each step that is done, warm-up included.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warmup + repeats):
        for name, step in steps.items():
            seconds[name].append(clock(step))
            progress(name)
    return {name: Times(tuple(values[warmup:])) for name, values in seconds.items()}


def process_clock(step: Step) -> float:
    """CPU seconds of this process, all of its threads together.

    With one thread this is what the step costs, whoever else uses the machine; with several it is their sum.
    """
    start = time.process_time()
    step()
    return time.process_time() - start


def wall_clock(step: Step) -> float:
    """Seconds on the wall, for work on the CPU."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def cuda_clock(step: Step) -> float:
    """Seconds on the current CUDA device, between two events; waits for the device before and after the step."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def saved_activations(forward: Callable[[], Tensor], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of `forward()`: its distinct storages, each counted once.

    Args:
        forward: computes a tensor that requires a gradient. Its graph is dropped without a backward pass.
        exclude: tensors whose storages do not count: parameters, inputs.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being given away twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def cuda_peak(step: Step) -> int:
    """Bytes that the current CUDA device holds at the worst moment of a step, beyond what it holds before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(step: Step) -> int | None:
    """Bytes that this process holds at the worst moment of a step, beyond what it holds before it.

    Read from the kernel's count of resident memory, after free memory was given back to it; None where the system
    (Linux with glibc) does not allow that.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
        before = _resident("VmRSS")
        step()
        return _resident("VmHWM") - before
    except (AttributeError, OSError):
        return None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) * 1024
