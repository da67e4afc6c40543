"""Measures a recipe's speed at each of its image sizes: the step alone, the loader alone, and both as in training."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count, product
from typing import Any

import torch

from vitlocal.data.batch import Batch, RowSubsets, full_batches
from vitlocal.models.flops import count_macs
from vitlocal.plan import Feed, Plan, with_size
from vitlocal.progress import TRAINING_FLOPS, Position, Stage, upcoming_changes
from vitlocal.train.compile import EAGER
from vitlocal.train.simulate import Speed
from vitlocal.train.timing import LR, Timing, device_memory, noise_batch, noise_step
from vitlocal.train.trainer import Trainer, batch_size_at

SECONDS = 80.0  # for all measurements; the sizes share it
SHARES = {"together": 0.5, "step": 0.3, "loader": 0.2}  # of the seconds of a size
ROUNDS, ROUND_SECONDS = 3, 8.0  # sizes take turns in at most so many rounds, if each has such a long turn
CPU_STEP_SECONDS = 1.5  # on a CPU, a batch whose step takes longer is measured in part


@dataclass(frozen=True)
class SizeSpeed:
    """The images/s of training at one size. ``loader`` is None without data."""

    size: int
    batch_size: int
    together: float
    step: float
    gflops: float  # of an image, forward and backward, with two FLOPs for each multiply-add
    loader: float | None = None
    measured_batch: int | None = None
    step_mode: str = "stated"
    data_wait_fraction: float = 0.0
    compile_seconds: float = 0.0
    device_mib: float | None = None  # peak of a GPU

    @property
    def speed(self) -> Speed:
        return Speed(self.together, self.batch_size, 1e9 * self.gflops)

    @property
    def bottleneck(self) -> str:
        return "data" if self.loader is not None and self.loader < self.step else "step"


class NoiseSource:
    """A source of random pixels that are already on the device, for a forecast without data."""

    def __init__(self, count: int, classes: int, device: torch.device):
        self.count, self.device = count, device
        self.classes = tuple(str(number) for number in range(classes))
        self.damaged: Collection[int] = ()
        self.rows = RowSubsets(count)
        self.side: int | None = None

    @contextmanager
    def open(self, feed: Feed, at: Position) -> Iterator[Iterator[Batch]]:
        batch = noise_batch(feed, len(self.classes), self.device)
        yield (batch for _ in range(at.images, self.count, feed.batch_size))

    def close(self) -> None:
        pass


def plans_by_size(trainer: Trainer, stages: Sequence[Stage]) -> list[Plan]:
    """The plan with which each size of the recipe begins, also of sizes that the budget does not reach."""
    now, plans = trainer.state.clock.progress, dict[int, Plan]()
    reached = upcoming_changes([stage.until for stage in stages if stage.until is not None], now)
    for stage, at in zip(stages, (now, *reached), strict=True):
        plan = with_size(trainer.plan(at), stage.size)
        batch_size = batch_size_at(trainer.state.methods, stage.size, plan.feed.batch_size)
        plans.setdefault(stage.size, replace(plan, feed=replace(plan.feed, batch_size=batch_size)))
    return list(plans.values())


class SizeMeter:
    """Compiles the step of one plan, and then measures it in turns. Timings have the names of ``SHARES``."""

    def __init__(self, trainer: Trainer, plan: Plan):
        self.trainer, self.plan, self.device = trainer, plan, trainer.step.device
        self.has_data = not isinstance(trainer.sources.train, NoiseSource)
        self.timings = {name: Timing() for name in SHARES}
        self.waited = 0.0  # seconds of "together" in which the step waited for data
        self.step_numbers = count()
        with device_memory(trainer.step.device) as memory:
            self.compile_seconds = trainer.step.warm_up(plan.feed, len(trainer.sources.train.classes))
            self.feed = self._measurable_feed()
            # Only full batches are compiled.
            self.mode = trainer.step.mode(self.feed) if self.feed == plan.feed else EAGER
        self.peak = memory.peak  # with that of CUDA graphs, which take their memory when they are captured

    def _measurable_feed(self) -> Feed:
        """The plan's feed. On a CPU its batch is reduced if the step would take too long."""
        feed = self.plan.feed
        if self.device.type != "cpu" or feed.batch_size <= 8:
            return feed
        train = self._noise_step(replace(feed, batch_size=8), EAGER)
        train()
        rate = 8 / Timing().measure(train, self.device, calls=2)
        return replace(feed, batch_size=max(8, min(feed.batch_size, int(CPU_STEP_SECONDS * rate))))

    def _noise_step(self, feed: Feed, mode: Any) -> Callable[[], object]:
        step, classes = self.trainer.step, len(self.trainer.sources.train.classes)
        return noise_step(step, feed, classes, self.device, mode, None, self.plan.dials)

    def turn(self, seconds: float) -> None:
        """Measures all that there is to measure, for about ``seconds``."""
        is_first = not self.timings["step"].calls
        with device_memory(self.device) as memory:
            train = self._noise_step(self.feed, self.mode)
            if is_first:
                train()
            self._measure("step", seconds, train)
            if self.has_data:
                self._measure_data(seconds)
        if is_first:  # later, the memory of larger sizes is allocated too
            self.peak = max(self.peak, memory.peak)

    def _measure(self, name: str, seconds: float, work: Callable[[], object]) -> None:
        timing = self.timings[name]
        timing.measure(work, self.device, 1 if timing.calls else 2, SHARES[name] * seconds)

    def _measure_data(self, seconds: float) -> None:
        source = self.trainer.sources.train

        def train(batch: Batch) -> None:
            self.trainer.step(batch, next(self.step_numbers), LR, self.mode, None, self.plan.dials)

        def read_and_train() -> None:
            start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - start
            train(batch)

        with closing(full_batches(source, self.feed)) as batches:
            train(next(batches))  # the loader reads ahead during this step, as it does in training
            self._measure("together", seconds, read_and_train)
        with closing(full_batches(source, self.feed)) as batches:
            next(batches)
            self._measure("loader", seconds, lambda: next(batches))

    def result(self) -> SizeSpeed:
        rates = {name: self.feed.batch_size * t.calls / t.seconds for name, t in self.timings.items() if t.calls}
        together = self.timings["together" if self.has_data else "step"]
        size = self.plan.feed.size
        return SizeSpeed(
            size=size,
            batch_size=self.plan.feed.batch_size,
            measured_batch=self.feed.batch_size,
            step_mode=str(self.mode),
            together=rates.get("together", rates["step"]),
            step=rates["step"],
            loader=rates.get("loader"),
            data_wait_fraction=self.waited / together.seconds,
            compile_seconds=self.compile_seconds,
            gflops=1e-9 * TRAINING_FLOPS * count_macs(self.trainer.state.model, size),
            device_mib=self.peak / 2**20 if self.device.type == "cuda" else None,
        )


def measured_speeds(trainer: Trainer, plans: Sequence[Plan]) -> list[SizeSpeed]:
    """The speed of each plan, measured in about ``SECONDS`` and the time that compiling takes.

    If there is enough time, sizes take turns. A machine that becomes slower then affects all of them.
    """
    share = SECONDS / len(plans)
    rounds = max(1, min(ROUNDS, int(share / ROUND_SECONDS)))
    meters: list[SizeMeter] = []
    for number, (place, plan) in product(range(rounds), enumerate(plans)):
        line = f"measuring {plan.feed.size} px, {place + 1} of {len(plans)} sizes, round {number + 1} of {rounds}  "
        print(f"\r{line}", end="", file=sys.stderr, flush=True)
        if number == 0:
            meters.append(SizeMeter(trainer, plan))
        meters[place].turn(share / rounds)
    print("\r" + " " * 60, end="\r", file=sys.stderr)
    return [meter.result() for meter in meters]
