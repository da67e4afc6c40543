"""The timing harness: seconds of repeated work, the phases of a step, and the peak memory of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        """Calls ``work`` at least ``calls`` times and for at least ``seconds``; returns this turn's seconds per call.

        The device is synchronised before the first call and after the last one only. In between, the host may run
        ahead of the device, as it does in training.
        """
        synchronize(device)  # device sync
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
        self.device = device
        self.steps: list[list[tuple[str, Any]]] = []  # of each step: phases and the time at which each ended

    def begin(self) -> None:
        """Begins a step."""
        self.steps.append([("", self._time())])

    def mark(self, phase: str) -> None:
        """Assigns the work that was issued since the last mark to ``phase``. A phase may occur several times."""
        self.steps[-1].append((phase, self._time()))

    def milliseconds(self) -> list[dict[str, float]]:
        """Returns the milliseconds of each step by phase. Synchronises the device."""
        synchronize(self.device)  # device sync
        found = []
        for times in self.steps:
            spent: dict[str, float] = {}
            for (_, before), (phase, after) in pairwise(times):
                took = before.elapsed_time(after) if self.device.type == "cuda" else 1e3 * (after - before)
                spent[phase] = spent.get(phase, 0.0) + took
            found.append(spent)
        return found

    def _time(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class DeviceMemory:
    """Bytes that PyTorch had allocated on a GPU: before some work, and at the peak. On a CPU both are 0."""

    before: int = 0
    peak: int = 0


@contextmanager
def device_memory(device: torch.device) -> Iterator[DeviceMemory]:
    """Measures the memory of the work inside. ``peak`` is known at the end of the block."""
    memory = DeviceMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        memory.before = torch.cuda.memory_allocated(device)
    yield memory
    if device.type == "cuda":
        memory.peak = torch.cuda.max_memory_allocated(device)


def noise_batch(feed: Feed, num_classes: int, device: torch.device) -> Batch:
    """A batch of random pixels on the device, (B, 3, S, S) uint8 in the channels-last format, as a source gives it."""
    pixels = np.random.default_rng(feed.size).integers(0, 256, (feed.batch_size, feed.size, feed.size, 3), np.uint8)
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    labels = torch.arange(feed.batch_size, device=device) % num_classes
    return Batch.whole(images, labels, torch.arange(feed.batch_size))


def noise_step(
    step: Callable[..., object], feed: Feed, num_classes: int, device: torch.device, *arguments: Any
) -> Callable[[], object]:
    """A function that trains ``step`` on one batch of noise, always the same one.

    ``arguments`` are those of the step after the learning rate: mode, EMA decay, dials.
    """
    batch, numbers = noise_batch(feed, num_classes, device), count()
    return lambda: step(batch, next(numbers), LR, *arguments)
