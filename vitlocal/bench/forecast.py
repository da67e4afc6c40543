"""Forecasts a budget: python -m vitlocal.bench forecast --config-file rcfg/ours.yaml [TRAINER'S OPTIONS]

Measures three speeds at each image size of the recipe: the training step alone, the loader alone, and both as in
training. This takes less than two minutes, plus the time for compiling. The bench then simulates the recipe's budget.
For other budgets (--budgets), each size gets the same fraction. Without a data folder, only the step is measured, with
random pixels, and an epoch has --images images (default: as many as ImageNet). With --rates (images/s, such as
32:60000,224:5000; other sizes follow by FLOPs) nothing is measured, and the forecast is for another machine.

`python -m vitlocal.bench report RUN --forecast FILE` compares a forecast (--json FILE) with the run that followed.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count, product
from pathlib import Path
from typing import Any

import torch

from vitlocal.bench.contestants import resident_mib
from vitlocal.bench.measurement import text_table, write_json
from vitlocal.bench.parsing import bench_parser, times
from vitlocal.config import Config, read_config
from vitlocal.data.batch import Batch, RowSubsets, Sources, full_batches
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import ConfigError
from vitlocal.methods import METHODS, build_methods
from vitlocal.methods.method import MethodContext
from vitlocal.models.flops import count_macs
from vitlocal.models.memory import activation_bytes
from vitlocal.plan import Feed, Plan, with_size
from vitlocal.progress import TRAINING_FLOPS, Length, Position, Progress, Stage, upcoming_changes
from vitlocal.report.run_folder import duration
from vitlocal.storage import methods_writing, parse_rates, recipe_stages, speeds_for
from vitlocal.train.build import build_run, device_of, make_model, sources_of
from vitlocal.train.devices import EAGER
from vitlocal.train.probes import batch_size_at
from vitlocal.train.simulate import Speed, StageForecast, by_fractions, seconds_at, spend, spend_wall_time
from vitlocal.train.timing import LR, Timing, device_memory, noise_batch, noise_step
from vitlocal.train.trainer import Trainer

SECONDS = 80.0  # for all measurements; the sizes share it
SHARES = {"together": 0.5, "step": 0.3, "loader": 0.2}  # of the seconds of a size
ROUNDS, ROUND_SECONDS = 3, 8.0  # sizes take turns in at most ROUNDS rounds; a turn has at least ROUND_SECONDS
CPU_STEP_SECONDS = 1.5  # on a CPU, a smaller batch is measured if a step would take longer
IMAGENET = 1_281_167
MEASURED = ("evaluation_seconds", "disk_bytes", "resident_mib", "measured_seconds")  # fields of the JSON file
CPU_EVALUATED = 32  # images in a measured batch of an evaluation on a CPU
OTHER_SECONDS = 15.0  # an estimate of the time for starting, saving and the report, without compiling
COLUMNS = {
    "px": ("size", "d"), "batch": ("batch_size", "d"), "step": ("step", ",.0f"), "loader": ("loader", ",.0f"),
    "together": ("together", ",.0f"), "limit": ("bottleneck", ""), "waits": ("data_wait_fraction", ".1%"),
    "compile s": ("compile_seconds", ".1f"), "epochs": ("epochs", ".2f"), "images": ("images", ",d"),
    "time": ("time", ">"),
}  # fmt: skip


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

    def open(self, feed: Feed, at: Position) -> AbstractContextManager[Iterator[Batch]]:
        batch = noise_batch(feed, len(self.classes), self.device)
        return nullcontext(batch for _ in range(at.images, self.count, feed.batch_size))

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
        with device_memory(self.device) as memory:
            self.compile_seconds = trainer.step.warm_up(plan.feed, len(trainer.sources.train.classes))
            self.feed = feed = plan.feed
            if self.device.type == "cpu" and feed.batch_size > 8:  # a smaller batch if the step would take too long
                train = self._noise_step(replace(feed, batch_size=8), EAGER)
                train()
                rate = 8 / Timing().measure(train, self.device, calls=2)
                self.feed = replace(feed, batch_size=max(8, min(feed.batch_size, int(CPU_STEP_SECONDS * rate))))
            # Only full batches are compiled.
            self.mode = trainer.step.mode(feed) if self.feed == feed else EAGER
        self.peak = memory.peak  # includes the memory of CUDA graphs, which is allocated at their capture

    def _noise_step(self, feed: Feed, mode: Any) -> Callable[[], object]:
        step, classes = self.trainer.step, len(self.trainer.sources.train.classes)
        return noise_step(step, feed, classes, self.device, mode, 1.0, self.plan.dials)

    def turn(self, seconds: float) -> None:
        """Measures the step and, if there are data, the loader and both together, for about ``seconds``."""
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
            self.trainer.step(batch, next(self.step_numbers), LR, self.mode, 1.0, self.plan.dials)

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
        step, together = rates["step"], rates.get("together", rates["step"])
        size, batch_size = self.plan.feed.size, self.plan.feed.batch_size
        gflops = 1e-9 * TRAINING_FLOPS * count_macs(self.trainer.state.model, size)
        waited = self.waited / self.timings["together" if self.has_data else "step"].seconds
        mib = self.peak / 2**20 if self.device.type == "cuda" else None
        measured, mode = self.feed.batch_size, str(self.mode)
        speed = SizeSpeed(size, batch_size, together, step, gflops, rates.get("loader"), measured, mode)
        return replace(speed, data_wait_fraction=waited, compile_seconds=self.compile_seconds, device_mib=mib)


def measured_speeds(trainer: Trainer, plans: Sequence[Plan]) -> list[SizeSpeed]:
    """The speed of each plan. If there is time, sizes take turns, so that a slow minute affects all of them."""
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


@dataclass(frozen=True)
class Forecast:
    """The measured speeds, and what the recipe's own budget and other budgets buy with them."""

    config: Config
    images: int
    sizes: tuple[SizeSpeed, ...]
    evaluation_seconds: float | None = None
    other_seconds: float = 0.0  # starting, compiling, saving and the report, which a budget of all time counts
    disk_bytes: int | None = None
    resident_mib: float | None = None
    measured_seconds: float | None = None  # the time for measuring the sizes, without compiling

    @property
    def counts_all(self) -> bool:
        """Whether the budget counts all time, and not only training."""
        return self.config.budget.counts == "wall" and self.config.budget.length.kind == "seconds"

    @cached_property
    def stages(self) -> tuple[StageForecast, ...]:
        """The recipe's budget, stage by stage."""
        return self.spending(recipe_stages(self.config), self.config.budget.length)

    @property
    def end(self) -> Progress:
        return self.stages[-1].end

    def spending(self, stages: tuple[Stage, ...], length: Length) -> tuple[StageForecast, ...]:
        """Simulates spending ``length`` on ``stages``. Raises ConfigError if no time is left for training."""
        speeds = {measured.size: measured.speed for measured in self.sizes}
        if not self.counts_all:
            return spend(stages, length, self.images, speeds)
        evaluation, every = self.evaluation_seconds or 0.0, math.ceil(self.config.evaluate.every)
        spent = spend_wall_time(stages, length, self.images, speeds, self.other_seconds, evaluation, every)
        if spent is None:
            used = f"starting, saving and one evaluation take {self.other_seconds + evaluation:.0f} s"
            raise ConfigError(
                f"budget.length: got {length}, but {used}; give more time, or count only training: budget.counts=train"
            )
        return spent

    @property
    def first_point(self) -> float | None:
        """Seconds of training until the first evaluation; None if only the end of the run is evaluated."""
        every = math.ceil(self.config.evaluate.every)
        return seconds_at(self.stages, every) if 0 < every < self.end.epoch else None

    @cached_property
    def fractions(self) -> tuple[Stage, ...]:
        """The recipe's curriculum by fractions of the budget."""
        stages, length = recipe_stages(self.config), self.config.budget.length
        speeds = {measured.size: measured.speed for measured in self.sizes}
        return by_fractions(stages, length, self.images, speeds, self.stages)

    def within(self, budgets: Sequence[Length]) -> list[dict[str, Any]]:
        """A row for each budget: its epochs, in all and by size, with the same fractions; None if it is too short."""
        found: list[dict[str, Any]] = []
        for budget in budgets:
            row: dict[str, Any] = {"budget": str(budget), "epochs": None, "epochs_by_size": None}
            with suppress(ConfigError):
                spent = self.spending(self.fractions, budget)
                sizes = dict.fromkeys((stage.size for stage in spent), 0.0)
                for stage in spent:
                    sizes[stage.size] += stage.epochs
                row |= {"epochs": spent[-1].end.epoch, "epochs_by_size": sizes}
            found.append(row)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row for each stage: the speeds at its size, and its part of the budget."""
        by_size = {measured.size: measured for measured in self.sizes}
        return [
            asdict(speed := by_size[stage.size])
            | {
                "bottleneck": speed.bottleneck, "images_per_second": speed.together, "epochs": stage.epochs,
                "images": stage.images, "train_seconds": stage.seconds, "until_epoch": stage.end.epoch,
            }
            for stage in self.stages
        ]  # fmt: skip


def forecast(config: Config, images: int | None) -> Forecast:
    """Makes the forecast by measuring this machine. ``images``: the length of an epoch, if there are no data."""
    device, evaluate = device_of(config), config.evaluate
    if device.type == "cpu":
        config = replace(config, evaluate=replace(evaluate, batch_size=min(evaluate.batch_size, CPU_EVALUATED)))
    noise = None if images is None else NoiseSource(images, 1000, device)
    with closing(Sources(noise, noise) if noise else sources_of(config, device)) as sources:
        trainer = build_run(config, sources, device).trainer
        start = time.perf_counter()
        speeds = measured_speeds(trainer, plans_by_size(trainer, recipe_stages(config)))
        compiling = sum(speed.compile_seconds for speed in speeds)
        took = time.perf_counter() - start - compiling
        last, length = trainer.upcoming_plans()[-1], trainer.state.clock.length  # a method may have set the length
        config = replace(config, evaluate=evaluate, budget=replace(config.budget, length=length))
        found = Forecast(config, sources.train.count, tuple(speeds), other_seconds=OTHER_SECONDS + compiling)
        found = replace(found, resident_mib=resident_mib(os.getpid()), measured_seconds=took)
        if noise:
            return found
        evaluation_seconds = trainer.evaluator.estimate_seconds(last)
        return replace(found, evaluation_seconds=evaluation_seconds, disk_bytes=disk_bytes(config))


def stated_forecast(config: Config, images: int, stated: Mapping[int, float]) -> Forecast:
    """The forecast for another machine, with stated images/s (see :func:`vitlocal.storage.speeds_for`)."""
    if methods_writing(config, "budget.length"):
        raise ConfigError("--rates: a method of the recipe sets the length of the run; leave --rates or the method out")
    model, _ = make_model(config, 1000, torch.device("cpu"))
    fused = config.train.kernel != "plain"
    context = MethodContext(config.recipe, images, lambda size: activation_bytes(model, size, torch.bfloat16, fused))
    methods, sizes = build_methods(context, "feed.batch_size"), []
    for size, speed in speeds_for(config, stated).items():
        batch_size, rate = batch_size_at(methods, size, config.train.batch_size), speed.images_per_second
        sizes.append(SizeSpeed(size, batch_size, rate, rate, 1e-9 * speed.flops))
    return Forecast(config, images, tuple(sizes))


def disk_bytes(config: Config) -> int | None:
    """The size of the data folder's files, of both splits."""
    if config.data.loader in ("torchvision", "dali"):  # they read the original images
        return None
    manifests = [load_manifest(config.data.root, split) for split in ("train", "val")]
    return sum(file.bytes for manifest in manifests for file in manifest.files)


def as_text(found: Forecast, budgets: Sequence[Length]) -> str:
    """The forecast as text."""
    config, end, first = found.config, found.end, found.first_point
    counts = "in all" if found.counts_all else "of training"
    rows = [row | {"time": duration(row["train_seconds"])} for row in found.rows()]
    lines = [
        f"{config.model.name}, {config.budget.length} {counts}, epochs of {found.images:,} images; images/s:\n",
        text_table(rows, COLUMNS) + "\n",
        f"in all {end.epoch:.2f} epochs, {end.images_seen:,} images, {end.flops:.3g} FLOPs, "
        f"{duration(end.seconds)} of training",
    ]
    if any((speed.measured_batch or speed.batch_size) < speed.batch_size for speed in found.sizes):
        lines.append("measured with smaller batches than the recipe's, which take too long here")
    if found.evaluation_seconds is not None:
        when = "only at the end" if first is None else f"the first after {duration(first)} of training"
        lines.append(f"accuracy: {when}; an evaluation takes {found.evaluation_seconds:.1f} s")
    if unreached := [str(stage.size) for stage in found.stages if stage.seconds <= 0]:
        lines.append(f"note: the budget ends before {', '.join(unreached)} px")
    if found.resident_mib is not None:
        sizes = {"files": (found.disk_bytes or 0) / 2**30, "host memory": found.resident_mib / 1024}
        sizes["device memory"] = max(speed.device_mib or 0 for speed in found.sizes) / 1024
        lines.append(", ".join(f"{size:.1f} GiB of {name}" for name, size in sizes.items() if size))
        lines.append(f"measured in {found.measured_seconds:.0f} s, without compiling")
    return "\n".join([*lines, *(other_budgets(found, budgets) if budgets else [])])


def other_budgets(found: Forecast, budgets: Sequence[Length]) -> list[str]:
    """The table of other budgets, and the option that gives each size its fraction of them."""
    sizes = dict.fromkeys(stage.size for stage in found.fractions)
    columns = {"budget": ("budget", ">"), "epochs": ("epochs", ".2f")} | {f"{s} px": (str(s), ".2f") for s in sizes}
    rows = found.within(budgets)
    cells = [row | {str(size): epochs for size, epochs in (row["epochs_by_size"] or {}).items()} for row in rows]
    lines = ["\nepochs of the same curriculum in other budgets, with the same fraction for each size:\n"]
    lines.append(text_table(cells, columns))
    if short := [row["budget"] for row in rows if row["epochs"] is None]:
        lines.append(f"note: {', '.join(short)} is spent on starting, evaluating and saving")
    annotations = {name: METHODS[name].options.__annotations__ for name in found.config.methods}
    takes_stages = [name for name, types in annotations.items() if "tuple[Stage" in str(types.get("stages"))]
    if len(found.fractions) > 1 and takes_stages:
        lines.append(f'  --{takes_stages[0]}.stages="{", ".join(map(str, found.fractions))}"')
    return lines


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("forecast", __doc__, trainer_options=True)
    parser.add_argument(
        "--budgets", default="1h,6h,24h", type=lambda text: [] if text == "none" else times(text), metavar="LIST",
        help="other budgets in time, or none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--images", type=int, metavar="N", help="forecast without data, for epochs of N images")
    parser.add_argument("--rates", metavar="LIST", help="images/s by size, instead of measuring: 224:5000")
    options, trainer = parser.parse_known_args(argv)
    config, images = read_config(trainer), options.images
    if images is not None and images < config.train.batch_size:
        raise ConfigError(f"--images: got {images}, expected at least {config.train.batch_size}, one batch")
    if images is None and not Path(config.data.root).exists():
        images = IMAGENET
        what = "" if options.rates else "only the step is measured, with random pixels, "
        print(f"{config.data.root} does not exist: {what}for epochs of {images:,} images")
    if options.rates:
        count = load_manifest(config.data.root, "train").count if images is None else images
        found = stated_forecast(config, count, parse_rates(options.rates))
    else:
        found = forecast(config, images)
    print(as_text(found, options.budgets))
    if shaping := methods_writing(config, "shape."):
        print(f"note: {', '.join(shaping)} change the cost of an image; this forecast is for the full model throughout")
    if config.budget.counts == "cpu":
        print("note: the budget counts processor time; this forecast is for a run that does not share its cores")
    what, last = "what a budget is forecast to buy: measured images/s by size, and the simulated budget", found.end
    write_json(
        options.json, what, found.rows(), budget=str(config.budget.length), counts=config.budget.counts,
        images=found.images, epochs=last.epoch, flops=last.flops, first_point_seconds=found.first_point,
        **{name: getattr(found, name) for name in MEASURED},
        curriculum=[str(stage) for stage in found.fractions], budgets=found.within(options.budgets),
        recipe=config.flat(),
    )  # fmt: skip
