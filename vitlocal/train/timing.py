"""The timing harness: seconds of repeated work, the phases of a step, and the peak memory of a device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch

from vitlocal.data.batch import Batch
from vitlocal.plan import Feed
from vitlocal.train.devices import synchronize

LR = 1e-6  # so small that the weights stay almost the same: each timed step does the same work


@dataclass
class Timing:
    """The number of calls of some work, and the seconds that they took, summed over all turns."""

    calls: int = 0
    seconds: float = 0.0

    def measure(self, work: Callable[[], object], device: torch.device, calls: int = 1, seconds: float = 0.0) -> float:
        """Calls ``work`` at least ``calls`` times and for ``seconds``. Returns this turn's seconds per call."""
        synchronize(device)  # device sync; between the calls, the host may run ahead of the device, as in training
        done, start = 0, time.perf_counter()
        while done < calls or time.perf_counter() - start < seconds:
            work()
            done += 1
        synchronize(device)  # device sync
        spent = time.perf_counter() - start
        self.calls += done
        self.seconds += spent
        return spent / done


class PhaseTimer:
    """Measures the phases of steps. On a GPU it uses CUDA events, on a CPU the host's clock."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.device = device.type == "cuda", device
        self.steps: list[list[tuple[str, Any]]] = []  # of each step: phases and the time at which each ended

    def begin(self) -> None:
        """Begins a step."""
        self.steps.append([])
        self.mark("")

    def mark(self, phase: str) -> None:
        """Assigns the work that was issued since the last mark to ``phase``. A phase may occur several times."""
        now: Any = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            now.record()
        self.steps[-1].append((phase, now))

    def milliseconds(self) -> list[dict[str, float]]:
        """Returns the milliseconds of each step by phase. Synchronises the device."""
        synchronize(self.device)  # device sync
        found: list[dict[str, float]] = [{} for _ in self.steps]
        for times, spent in zip(self.steps, found, strict=True):
            for (_, before), (phase, after) in pairwise(times):
                took = before.elapsed_time(after) if self.on_gpu else 1e3 * (after - before)
                spent[phase] = spent.get(phase, 0.0) + took
        return found


def reset_peak(device: torch.device) -> int:
    """Begins to measure the peak memory of a GPU. Returns the bytes that are allocated now; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were allocated on a GPU since :func:`reset_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def noise_batch(feed: Feed, num_classes: int, device: torch.device) -> Batch:
    """A batch of random pixels on the device, (B, 3, S, S) uint8 in the channels-last format, as a source gives it."""
    pixels = np.random.default_rng(feed.size).integers(0, 256, (feed.batch_size, feed.size, feed.size, 3), np.uint8)
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    labels = torch.arange(feed.batch_size, device=device) % num_classes
    return Batch.whole(images, labels, torch.arange(feed.batch_size))


def noise_step(
    step: Callable[..., object], feed: Feed, num_classes: int, device: torch.device, *arguments: Any
) -> Callable[[], object]:
    """A function that trains ``step`` on one batch of noise. ``arguments``: mode, EMA decay and dials of the step."""
    batch, numbers = noise_batch(feed, num_classes, device), count()
    return lambda: step(batch, next(numbers), LR, *arguments)
