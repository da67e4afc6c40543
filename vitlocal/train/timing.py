"""The timing harness: seconds of repeated work, the phases of a step, and the peak memory of a device."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from vitlocal.data.batch import Batch
from vitlocal.plan import Feed
from vitlocal.tasks.task import Task
from vitlocal.train.devices import new_event, synchronize

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


class WaitMeter:
    """Adds up the seconds in which a device has no work, because the host waits for the next batch.

    On a CPU this is the time between :meth:`begin` and :meth:`end`, by ``now``. An accelerator may still be busy with
    earlier steps then. So two events mark when it comes to both places, and it had no work between them.
    """

    def __init__(
        self, device: torch.device, now: Callable[[], float],
        make_event: Callable[[torch.device], Any] = new_event,
    ):  # fmt: skip
        self._device, self._now, self._make_event = device, now, make_event
        self._seconds = 0.0
        self._waits: deque[tuple[Any, Any]] = deque()  # events that the device may not have reached yet

    def _mark(self) -> Any:
        if self._device.type == "cpu":
            return self._now()
        event = self._make_event(self._device)
        event.record()
        return event

    def begin(self) -> Any:
        """The host asks for a batch. Returns what :meth:`end` needs."""
        return self._mark()

    def end(self, begun: Any) -> None:
        """The host has the batch."""
        if self._device.type == "cpu":
            self._seconds += self._now() - begun
            return
        self._waits.append((begun, self._mark()))
        while self._waits and self._waits[0][1].query():  # without waiting for the device
            self._take_one()

    def _take_one(self) -> None:
        begun, ended = self._waits.popleft()
        self._seconds += 1e-3 * begun.elapsed_time(ended)

    def take(self) -> float:
        """The seconds since the last call. Waits for the device."""
        synchronize(self._device)  # device sync
        while self._waits:
            self._take_one()
        taken, self._seconds = self._seconds, 0.0
        return taken


class PhaseTimer:
    """Measures the phases of steps. On a CUDA device it uses events, else the host's clock."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.device = device.type == "cuda", device
        self.steps: list[list[tuple[str, Any]]] = []  # of each step: phases and the time at which each ended

    def begin(self) -> None:
        """Begins a step."""
        self.steps.append([])
        self.mark("")

    def mark(self, phase: str) -> None:
        """Assigns the work that was issued since the last mark to ``phase``. A phase may occur several times."""
        if self.on_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            synchronize(self.device)  # device sync; a CPU has done its work
            now = time.perf_counter()
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


def noise_batch(feed: Feed, num_classes: int, device: torch.device, task: Task | None = None) -> Batch:
    """A batch of random images on the device, as a source gives it to ``task``; the same for each size.

    Without a task: (B, 3, S, S) uint8 in the channels-last format.
    """
    if task is None:
        pixels = np.random.default_rng(feed.size).integers(0, 256, (feed.batch_size, feed.size, feed.size, 3), np.uint8)
        images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    else:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(feed.size)
            images = task.blank(feed.batch_size, feed.size, random=True)
    labels = torch.arange(feed.batch_size, device=device) % num_classes
    return Batch.whole(images, labels, torch.arange(feed.batch_size))


def noise_step(step: Callable[..., object], batch: Batch, *arguments: Any) -> Callable[[], object]:
    """A function that trains ``step`` on ``batch``. ``arguments``: mode, EMA decay and dials of the step."""
    numbers = count()
    return lambda: step(batch, next(numbers), LR, *arguments)


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Draws matrices that are all zeros, such as those of adaLN-Zero, at random.

    Else most gradients of a new model would be zero. They would hide errors, and a GPU is faster on zeros.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
