"""What a budget will buy here: python -m vitlocal.bench forecast --config-file rcfg/ours.yaml [TRAINER'S OPTIONS]

Measures, at each image size of the recipe, the training step alone, the loader alone, and both together as in
training, in under two minutes (compiling apart), and walks through the recipe's budget with what it found. For other
budgets (--budgets) it gives each size the same part. Without a data folder, it measures the step on noise, and takes
--images images for an epoch, ImageNet's number. With --rates (images/s, as 32:60000,224:5000; other sizes by FLOPs) it
measures nothing and reckons for another machine, by as many images as the data folder has, if it is there.

`python -m vitlocal.bench report RUN --forecast FILE` compares a forecast (--json FILE) with the run that followed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vitlocal.bench.contestants import resident_mib
from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.parsing import times
from vitlocal.bench.step import noise
from vitlocal.config import Config, read_config
from vitlocal.data.batch import Batch, RowSubsets, Sources, full_batches
from vitlocal.data.manifest import load_manifest
from vitlocal.data.sources import open_sources
from vitlocal.errors import ConfigError
from vitlocal.methods import MethodContext, claimed
from vitlocal.methods.batch_size import BatchSize
from vitlocal.models.factory import build_model
from vitlocal.models.flops import count_macs
from vitlocal.models.memory import activation_bytes
from vitlocal.plan import Feed, Plan, with_size
from vitlocal.progress import TRAINING_FLOPS, Length, Position, Stage, upcoming_changes
from vitlocal.report.page import duration
from vitlocal.train.devices import prepare_device
from vitlocal.train.rates import parse_rates, rates_for
from vitlocal.train.room import rehearse_evaluation, rehearse_finish
from vitlocal.train.run import Run
from vitlocal.train.simulate import Speed, StageForecast, curriculum, spend
from vitlocal.train.step import Mode
from vitlocal.train.watch import wait

IMAGENET = 1_281_167
BUDGETS = "1h,6h,24h"
SECONDS = 80.0  # for all that is measured, shared among the sizes
SHARES = {"together": 0.5, "step": 0.3, "loader": 0.2}  # of a size's seconds
ROUNDS, ROUND_SECONDS = 3, 8.0  # in which sizes take turns, where each has so long a turn
CPU_STEP_SECONDS = 1.5  # of a measured step on a CPU: where the recipe's batch takes longer, a part of it is measured
DOUBLINGS = 40  # of a budget that does not come to its curriculum's last size, to find one that does
CPU_EVALUATED = 32  # images of a measured batch of an evaluation on a CPU
LR = 1e-6  # the weights hardly move
STARTING_SECONDS = 10.0  # until the first step, but for compiling: a guess, for budgets in which everything counts
FED = ("image_size", "strength", "batch_size")  # methods that leave the model as it is


@dataclass(frozen=True)
class Measured:
    """One image size, images/s; ``loader`` is None where there are no data. All but the first is of measuring."""

    size: int
    batch_size: int
    together: float
    step: float
    gflops: float  # of an image, forward and backward, two to a multiply-add
    loader: float | None = None
    measured_batch: int | None = None
    step_mode: str = "stated"
    data_wait_fraction: float = 0.0
    compile_seconds: float = 0.0
    device_mib: float | None = None  # peak, of a GPU

    @property
    def speed(self) -> Speed:
        return Speed(self.together, self.batch_size, 1e9 * self.gflops)

    @property
    def bottleneck(self) -> str:
        return "data" if self.loader is not None and self.loader < self.step else "step"


class NoiseSource:
    """A split of noise that lies on the device, for a forecast without data."""

    def __init__(self, count: int, classes: int, device: torch.device):
        self.count, self.device = count, device
        self.classes = tuple(str(number) for number in range(classes))
        self.damaged: Collection[int] = ()
        self.rows, self.side = RowSubsets(count), None

    @contextmanager
    def open(self, feed: Feed, at: Position) -> Iterator[Iterator[Batch]]:
        images, labels = noise(feed, self.device)
        batch = Batch.whole(images, labels % len(self.classes), torch.arange(feed.batch_size))
        yield (batch for _ in range(at.images, self.count, feed.batch_size))

    def close(self) -> None:
        pass


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What was timed so far."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # for data

    @property
    def rate(self) -> float:
        """Images/s."""
        return self.images / self.seconds


class Rehearsal:
    """Trains at one size for some seconds, on data or on one batch that is there already, or reads data alone; what was
    timed adds up, under the names of ``SHARES``."""

    def __init__(self, run: Run, plan: Plan, feed: Feed, mode: Mode):
        self.run, self.plan, self.feed, self.mode = run, plan, feed, mode
        self.device = run.device
        self.steps = 0
        self.timed: dict[str, Tally] = {}

    def step(self, batch: Batch) -> None:
        self.run.step(batch, self.steps, LR, self.mode, None, self.plan.dials)
        self.steps += 1

    def together(self, seconds: float) -> None:
        """Reads and trains."""
        with closing(full_batches(self.run.sources.train, self.feed)) as batches:
            self.step(next(batches))  # meanwhile the loader reads ahead, as it does in training
            self._time("together", seconds, lambda: self.step(self._waited_for(batches)))

    def alone(self, seconds: float) -> None:
        images, labels = noise(self.feed, self.device)
        classes = len(self.run.sources.train.classes)
        batch = Batch.whole(images, labels % classes, torch.arange(self.feed.batch_size))
        if "step" not in self.timed:
            self.step(batch)
        self._time("step", seconds, lambda: self.step(batch))

    def reading(self, seconds: float) -> None:
        with closing(full_batches(self.run.sources.train, self.feed)) as batches:
            next(batches)
            self._time("loader", seconds, lambda: next(batches))

    def _waited_for(self, batches: Iterator[Batch]) -> Batch:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def _time(self, name: str, seconds: float, work: Callable[[], object]) -> None:
        """Does ``work`` for so many seconds, once at least and twice in the first round, and adds it to ``name``."""
        wait(self.device)
        least = 1 if name in self.timed else 2
        self.waited, done, began = 0.0, 0, time.perf_counter()
        while done < least or time.perf_counter() - began < seconds:
            work()
            done += 1
        wait(self.device)
        tally = self.timed.setdefault(name, Tally())
        tally.images += done * self.feed.batch_size
        tally.seconds += time.perf_counter() - began
        tally.waited += self.waited


def smaller_batch(run: Run, plan: Plan) -> Feed:
    """The plan's feed; on a CPU with a batch whose step takes no longer than is worth waiting for."""
    feed = plan.feed
    if run.device.type != "cpu" or feed.batch_size <= 8:
        return feed
    tried = Rehearsal(run, plan, replace(feed, batch_size=8), Mode())
    tried.alone(0.0)
    return replace(feed, batch_size=max(8, min(feed.batch_size, int(CPU_STEP_SECONDS * tried.timed["step"].rate))))


class Size:
    """One of the recipe's sizes, which is compiled, and then measured by turns."""

    def __init__(self, run: Run, plan: Plan):
        self.run, self.plan = run, plan
        self.real = not isinstance(run.sources.train, NoiseSource)
        self.device_mib: float | None = None
        with self._memory():
            self.compile_seconds = run.step.warm(plan.feed, len(run.sources.train.classes))
            feed = smaller_batch(run, plan)
            self.rehearsal = Rehearsal(run, plan, feed, run.step.mode(feed) if feed == plan.feed else Mode())

    def turn(self, seconds: float) -> None:
        with nullcontext() if self.rehearsal.timed else self._memory():  # the first: no larger size is there yet
            self.rehearsal.alone(seconds * SHARES["step"])
            if self.real:
                self.rehearsal.together(seconds * SHARES["together"])
                self.rehearsal.reading(seconds * SHARES["loader"])

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Keeps the largest peak. A CUDA graph takes its memory when it is compiled, and its replays ask for none."""
        on_gpu = self.run.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.run.device)
        yield
        if on_gpu:
            self.device_mib = max(self.device_mib or 0.0, torch.cuda.max_memory_allocated(self.run.device) / 2**20)

    def measured(self) -> Measured:
        rehearsal, timed, size = self.rehearsal, self.rehearsal.timed, self.plan.feed.size
        both = timed["together" if self.real else "step"]
        return Measured(
            size=size,
            batch_size=self.plan.feed.batch_size,
            measured_batch=rehearsal.feed.batch_size,
            step_mode=str(rehearsal.mode),
            together=both.rate,
            step=timed["step"].rate,
            loader=timed["loader"].rate if self.real else None,
            data_wait_fraction=both.waited / both.seconds,
            compile_seconds=self.compile_seconds,
            gflops=1e-9 * TRAINING_FLOPS * count_macs(self.run.model, size),
            device_mib=self.device_mib,
        )


def measure(run: Run, plans: Sequence[Plan]) -> list[Measured]:
    """Each plan's size, in about ``SECONDS`` in all and what compiling takes.

    Where there is time for it sizes take turns, so that a machine that grows slower meanwhile does so for all.
    """
    share = SECONDS / len(plans)
    rounds = max(1, min(ROUNDS, int(share / ROUND_SECONDS)))
    sizes: list[Size] = []
    for number in range(rounds):
        for place, plan in enumerate(plans):
            told = f"measuring {plan.feed.size} px, {place + 1} of {len(plans)} sizes, round {number + 1} of {rounds}  "
            print(f"\r{told}", end="", file=sys.stderr, flush=True)
            if number == 0:
                sizes.append(Size(run, plan))
            sizes[place].turn(share / rounds)
    print("\r" + " " * 60, end="\r", file=sys.stderr)
    return [size.measured() for size in sizes]


def plans_by_size(run: Run, stages: Sequence[Stage]) -> dict[int, Plan]:
    """The plan under which each of the recipe's sizes begins."""
    now, plans = run.clock.progress, {}
    reached = upcoming_changes([stage.until for stage in stages if stage.until is not None], now)
    for stage, at in zip(stages, (now, *reached), strict=True):
        plan = with_size(run.plan(at), stage.size)
        plans.setdefault(stage.size, replace(plan, feed=replace(plan.feed, batch_size=run.batch_size_at(stage.size))))
    return plans


# --- the forecast ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What was measured, and what it means for the recipe's own budget and others."""

    config: Config
    images: int
    sizes: tuple[Measured, ...]
    evaluation_seconds: float | None = None
    other_seconds: float = 0.0  # starting, compiling, saving, the report: what a budget counts that counts everything
    disk_bytes: int | None = None
    resident_mib: float | None = None
    measured_seconds: float | None = None  # what measuring the sizes took, but for compiling

    @cached_property
    def stages(self) -> tuple[StageForecast, ...]:
        """The recipe's budget, stage by stage."""
        return self.spending(curriculum(self.config), self.config.budget.length)

    @property
    def speeds(self) -> dict[int, Speed]:
        return {one.size: one.speed for one in self.sizes}

    def spending(self, stages: tuple[Stage, ...], length: Length) -> tuple[StageForecast, ...]:
        """``length`` spent on ``stages``; where all counts, less what is no training. ConfigError: nothing is left."""
        speeds = self.speeds
        spent = spend(stages, length, self.images, speeds)
        if self.config.budget.counts != "wall" or length.kind != "seconds":
            return spent
        every, evaluation = math.ceil(self.config.evaluate.every), self.evaluation_seconds or 0.0  # where an epoch ends

        def due(spent: Sequence[StageForecast]) -> int:
            return 1 + (int(spent[-1].end.epoch) // every if every else 0)

        def left(count: int) -> tuple[StageForecast, ...] | None:
            used = self.other_seconds + count * evaluation
            return spend(stages, length, self.images, speeds, used) if used < length.value else None

        # Evaluations take time for epochs, after which fewer of them are due: the least number that is enough.
        low, high = 1, due(spent)
        while low < high:
            middle = (low + high) // 2
            after = left(middle)
            if after is None or due(after) <= middle:
                high = middle
            else:
                low = middle + 1
        found = left(low) or left(max(1, low - 1))
        if found is None:
            raise ConfigError(
                f"budget.length: of {length} in all, {self.other_seconds + evaluation:.0f} s go to starting, saving "
                "and one evaluation: nothing is left to train. Give more time, or let only training count: "
                "budget.counts=train"
            )
        return found

    @property
    def flops(self) -> float:
        return self.stages[-1].end.flops

    @property
    def epochs(self) -> float:
        return self.stages[-1].end.epoch

    @property
    def first_point(self) -> float | None:
        """Seconds of training until the first accuracy, if there is one before the end: where an epoch ends."""
        every = math.ceil(self.config.evaluate.every)
        return None if not every or every >= self.epochs else seconds_at(self.stages, every)

    @cached_property
    def parts(self) -> tuple[Stage, ...]:
        """The recipe's curriculum with each size's part of its own budget, so that it fits any other.

        Where that budget ends before the last size, the parts are those of a budget that gives it as long as the size
        before; a size that no budget comes to is left out.
        """
        stages, length, spent = curriculum(self.config), self.config.budget.length, self.stages
        for _ in range(DOUBLINGS):
            if spent[-1].seconds > 0:
                break
            length = replace(length, value=2 * length.value)
            spent = spend(stages, length, self.images, self.speeds)
        spent = [part for part in spent if part.seconds > 0]
        if length == self.config.budget.length or len(spent) < 2:
            whole = spent[-1].end.seconds
        else:
            whole = spent[-1].start.seconds + spent[-2].seconds
        found, before = [], 0.0
        for part in spent[:-1]:
            percent = round(100 * part.end.seconds / whole, 4)
            if before < percent < 100:
                found.append(Stage.parse(f"{part.size}px until {percent:.4f}".rstrip("0").rstrip(".") + "%"))
                before = percent
        return (*found, Stage(spent[-1].size))

    def within(self, budgets: Sequence[Length]) -> list[dict[str, Any]]:
        """What other budgets buy with the same parts, a row each: epochs in all and by size; None: too short."""
        found = []
        for budget in budgets:
            sizes = dict.fromkeys((stage.size for stage in self.parts), 0.0)
            try:
                spent = self.spending(self.parts, budget)
            except ConfigError:
                found.append({"budget": str(budget), "epochs": None, "epochs_by_size": None})
                continue
            for part in spent:
                sizes[part.size] += part.epochs
            found.append({"budget": str(budget), "epochs": spent[-1].end.epoch, "epochs_by_size": sizes})
        return found


def seconds_at(stages: Sequence[StageForecast], epoch: float) -> float:
    """When training has come to ``epoch``."""
    for stage in stages:
        if stage.epochs and epoch <= stage.end.epoch + 1e-9:
            return stage.start.seconds + (epoch - stage.start.epoch) / stage.epochs * stage.seconds
    return stages[-1].end.seconds


def forecast(config: Config, images: int | None) -> Forecast:
    """Measures here; without data in ``config.data.root``, the step alone, for epochs of ``images``."""
    device, stated, real = prepare_device(config), config.evaluate, images is None
    if device.type == "cpu":
        config = replace(config, evaluate=replace(stated, batch_size=min(stated.batch_size, CPU_EVALUATED)))
    if real:
        sources = open_sources(
            config.data.loader, config.data.root, source=config.data.source, workers=config.data.workers,
            on_error=config.data.on_error, side_ratio=config.data.side_ratio, seed=config.run.seed,
            crop_scale=config.augment.crop_scale, crop_ratio=config.augment.crop_ratio, flip=config.augment.flip,
            repeats=config.augment.repeats, centre_crop=config.evaluate.crop_ratio, device=device,
        )  # fmt: skip
    else:
        made = NoiseSource(images, 1000, device)
        sources = Sources(made, made)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(config, Path(folder), sources, device)
            began = time.perf_counter()
            found = measure(run, list(plans_by_size(run, curriculum(config)).values()))
            compiling = sum(one.compile_seconds for one in found)
            took = time.perf_counter() - began - compiling
            evaluation = rehearse_evaluation(run) if real else None
            other = STARTING_SECONDS + compiling
            if run.clock.counts_all:
                saving, finishing = rehearse_finish(run)
                other += 2 * saving + finishing
            run.log.close()
            return Forecast(
                replace(run.config, evaluate=stated), sources.train.count, tuple(found), evaluation, other,
                disk_bytes(config) if real else None, resident_mib(os.getpid()), took,
            )  # fmt: skip
    finally:
        sources.close()


def reckoned(config: Config, images: int, stated: Mapping[int, float]) -> Forecast:
    """For another machine, of stated speeds (see :func:`vitlocal.train.rates.rates_for`)."""
    if "budget.length" in claimed(config):
        raise ConfigError(
            "--rates: budgeted.epochs or budgeted.budget set the run's length, which is known once it is built; leave "
            "--rates out, or give --budget.length alone"
        )
    model, _ = build_model(config.model, 1000)

    def image_bytes(size: int) -> int:
        return activation_bytes(model, size, torch.bfloat16, config.train.kernel != "plain")

    batches = BatchSize(MethodContext(config, images, image_bytes)) if "batch_size" in config.methods else None
    sizes = []
    for size, rate in rates_for(config, stated).items():
        batch = config.train.batch_size if batches is None else batches.batch_size_at(size)
        sizes.append(Measured(size, batch, rate, rate, 1e-9 * TRAINING_FLOPS * count_macs(model, size)))
    return Forecast(config, images, tuple(sizes))


def disk_bytes(config: Config) -> int | None:
    """Of the data folder's files, both splits."""
    if config.data.loader not in ("native", "ffcv"):
        return None
    manifests = [load_manifest(config.data.root, split) for split in ("train", "val")]
    return sum(file.bytes for one in manifests for file in one.files)


# --- telling --------------------------------------------------------------------------------------------------------


def table(found: Forecast) -> list[str]:
    """The sizes, and what the recipe's budget buys of each."""
    by_size = {one.size: one for one in found.sizes}
    lines = [
        f"{'px':>4} {'batch':>6} {'step':>9} {'loader':>10} {'together':>9}  {'limit':5} {'waits':>6} {'compiled':>9} "
        f"{'epochs':>8} {'images':>12} {'time':>9}"
    ]
    for stage in found.stages:
        one = by_size[stage.size]
        loader = "–" if one.loader is None else f"{one.loader:,.0f}"
        lines.append(
            f"{stage.size:4} {one.batch_size:6} {one.step:9,.0f} {loader:>10} {one.together:9,.0f}  {one.bottleneck:5} "
            f"{one.data_wait_fraction:6.1%} {one.compile_seconds:7.1f} s {stage.epochs:8.2f} {stage.images:12,} "
            f"{duration(stage.seconds):>9}"
        )
    return lines


def as_text(found: Forecast, budgets: Sequence[Length]) -> str:
    """All of it, as text."""
    config, last = found.config, found.stages[-1].end
    counts = " in all" if config.budget.counts == "wall" and config.budget.length.kind == "seconds" else " of training"
    lines = [
        f"{config.model.name}, {config.budget.length}{counts}, epochs of {found.images:,} images; images/s:",
        "",
        *table(found),
        "",
    ]
    if any((one.measured_batch or one.batch_size) < one.batch_size for one in found.sizes):
        lines.append("measured in smaller batches than the recipe's, which take too long here")
    lines.append(
        f"in all {last.epoch:.2f} epochs, {last.images_seen:,} images, {found.flops:.3g} FLOPs, "
        f"{duration(last.seconds)} of training"
    )
    if counts == " in all" and found.evaluation_seconds is None:
        lines.append("not reckoned: starting, evaluations and saving, which this budget counts")
    if found.evaluation_seconds is not None:
        first = found.first_point
        when = "at the end alone" if first is None else f"the first after {duration(first)} of training"
        lines.append(f"accuracy: {when}; an evaluation takes {found.evaluation_seconds:.1f} s")
    if found.measured_seconds is not None:
        lines.append(f"measured in {found.measured_seconds:.0f} s, but for compiling")
    unreached = [str(stage.size) for stage in found.stages if stage.seconds <= 0]
    if unreached:
        lines.append(f"note: the budget ends before {', '.join(unreached)} px")
    memory = max((one.device_mib or 0 for one in found.sizes), default=0)
    disk = f"{found.disk_bytes / 1e9:.2f} GB of files; " if found.disk_bytes is not None else ""
    if found.resident_mib is not None:
        lines.append(
            f"{disk}memory: {found.resident_mib / 1024:.1f} GiB of the host"
            + (f", {memory / 1024:.1f} GiB of the device" if memory else "")
        )
    if budgets:
        lines += ["", "the same curriculum in other budgets, each size with the same part:", ""]
        parts = found.parts
        sizes = list(dict.fromkeys(stage.size for stage in parts))
        lines.append(f"{'budget':>8} {'epochs':>9}   " + " ".join(f"{size:>7} px" for size in sizes) + "   (epochs)")
        for row in found.within(budgets):
            if row["epochs"] is None:
                lines.append(f"{row['budget']:>8}   is spent on starting, evaluating and saving")
                continue
            each = " ".join(f"{epochs:10.2f}" for epochs in row["epochs_by_size"].values())
            lines.append(f"{row['budget']:>8} {row['epochs']:9.2f}   {each}")
        if len(parts) > 1 and "image_size" in found.config.methods:
            lines.append(f'  --image_size.stages="{", ".join(map(str, parts))}"')
    return "\n".join(lines)


def rows(found: Forecast) -> list[dict[str, Any]]:
    """One a stage: what was measured at its size, and what it gets."""
    by_size = {one.size: one for one in found.sizes}
    return [
        asdict(by_size[stage.size])
        | {
            "bottleneck": by_size[stage.size].bottleneck,
            "images_per_second": by_size[stage.size].together,
            "epochs": stage.epochs,
            "images": stage.images,
            "train_seconds": stage.seconds,
            "until_epoch": stage.end.epoch,
        }
        for stage in found.stages
    ]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vitlocal.bench forecast", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--budgets", default=BUDGETS, metavar="LIST", help=f"to fit it to; none (default: {BUDGETS})")
    parser.add_argument("--images", type=int, metavar="N", help="forecast without data, for epochs of so many images")
    parser.add_argument("--rates", metavar="LIST", help="reckon with these images/s instead of measuring: 224:5000")
    parser.add_argument("--json", metavar="FILE", help="write what was found")
    options, arguments = parser.parse_known_args(list(argv))
    config = read_config(arguments)
    budgets = [] if options.budgets == "none" else times(options.budgets)
    if options.images is not None and options.images < config.train.batch_size:
        raise ConfigError(f"--images: got {options.images}, expected at least a batch ({config.train.batch_size})")
    images, there = options.images, Path(config.data.root).exists()
    if images is None and not there:
        images = IMAGENET
        what = "" if options.rates else "the step alone, on noise, "
        print(f"{config.data.root} is not there: {what}for epochs of {images:,} images")
    if options.rates:
        count = load_manifest(config.data.root, "train").count if images is None else images
        found = reckoned(config, count, parse_rates(options.rates))
    else:
        found = forecast(config, images)
    print(as_text(found, budgets))
    if shaping := [name for name in config.methods if name not in FED]:
        print(f"note: {', '.join(shaping)} change what an image costs; this is a forecast of the full model throughout")
    if config.budget.counts == "cpu":
        print("note: the budget counts processor time; this is a forecast for a run that has its cores for itself")
    if options.json:
        what = (
            "what a budget is forecast to buy: images/s by size, as measured, and the budget walked through with them"
        )
        more = {
            "budget": str(config.budget.length), "counts": config.budget.counts, "images": found.images,
            "epochs": found.epochs, "flops": found.flops, "evaluation_seconds": found.evaluation_seconds,
            "first_point_seconds": found.first_point, "disk_bytes": found.disk_bytes,
            "resident_mib": found.resident_mib, "curriculum": [str(stage) for stage in found.parts],
            "measured_seconds": found.measured_seconds,
            "budgets": found.within(budgets), "recipe": config.flat(),
        }  # fmt: skip
        write_json(options.json, measurement(what, rows(found), **more))
