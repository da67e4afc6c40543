"""What a budget buys here: python -m vitlocal.bench forecast --config-file rcfg/ours.yaml [TRAINER'S OPTIONS]

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
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vitlocal.bench.contestants import resident_mib
from vitlocal.bench.measurement import text_table, write_json
from vitlocal.bench.parsing import bench_parser, times
from vitlocal.bench.speeds import NoiseSource, SizeSpeed, measured_speeds, plans_by_size
from vitlocal.config import Config, read_config
from vitlocal.data.batch import Sources
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import ConfigError
from vitlocal.methods import METHODS, build_methods
from vitlocal.methods.method import MethodContext
from vitlocal.models.memory import activation_bytes
from vitlocal.progress import Length, Progress, Stage
from vitlocal.report.run_folder import duration
from vitlocal.storage import methods_writing, parse_rates, recipe_stages, speeds_for
from vitlocal.train.build import build_trainer, device_of, make_model, sources_of
from vitlocal.train.simulate import Speed, StageForecast, by_fractions, seconds_at, spend, spend_wall_time
from vitlocal.train.trainer import batch_size_at

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
    def speeds(self) -> dict[int, Speed]:
        return {measured.size: measured.speed for measured in self.sizes}

    @cached_property
    def stages(self) -> tuple[StageForecast, ...]:
        """The recipe's budget, stage by stage."""
        return self.spending(recipe_stages(self.config), self.config.budget.length)

    @property
    def end(self) -> Progress:
        return self.stages[-1].end

    def spending(self, stages: tuple[Stage, ...], length: Length) -> tuple[StageForecast, ...]:
        """How ``length`` is spent on ``stages``. ConfigError if no time is left for training."""
        if not self.counts_all:
            return spend(stages, length, self.images, self.speeds)
        evaluation, every = self.evaluation_seconds or 0.0, math.ceil(self.config.evaluate.every)
        spent = spend_wall_time(stages, length, self.images, self.speeds, self.other_seconds, evaluation, every)
        if spent is None:
            raise ConfigError(
                f"budget.length: {length} in all, of which {self.other_seconds + evaluation:.0f} s are for starting, "
                "saving and one evaluation: nothing is left to train. Give more time, or count only training: "
                "budget.counts=train"
            )
        return spent

    @property
    def first_point(self) -> float | None:
        """Seconds of training until the first accuracy, at the end of an epoch; None if that is at the end."""
        every = math.ceil(self.config.evaluate.every)
        return seconds_at(self.stages, every) if 0 < every < self.end.epoch else None

    @cached_property
    def fractions(self) -> tuple[Stage, ...]:
        """The recipe's curriculum by fractions of the budget."""
        stages, length = recipe_stages(self.config), self.config.budget.length
        return by_fractions(stages, length, self.images, self.speeds, self.stages)

    def within(self, budgets: Sequence[Length]) -> list[dict[str, Any]]:
        """What other budgets buy with the same fractions: rows with epochs, also by size. None: too short."""
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
    """Measures on this machine. ``images``: measures without data, for epochs of so many images."""
    device, evaluate = device_of(config), config.evaluate
    if device.type == "cpu":
        config = replace(config, evaluate=replace(evaluate, batch_size=min(evaluate.batch_size, CPU_EVALUATED)))
    if images is None:
        sources = sources_of(config, device)
    else:
        noise = NoiseSource(images, 1000, device)
        sources = Sources(noise, noise)
    try:
        trainer = build_trainer(config, sources, device)
        start = time.perf_counter()
        found = measured_speeds(trainer, plans_by_size(trainer, recipe_stages(config)))
        compiling = sum(speed.compile_seconds for speed in found)
        took = time.perf_counter() - start - compiling
        last, length = trainer.upcoming_plans()[-1], trainer.state.clock.length  # a method may have set the length
        return Forecast(
            replace(config, evaluate=evaluate, budget=replace(config.budget, length=length)),
            sources.train.count,
            tuple(found),
            evaluation_seconds=trainer.evaluator.estimate_seconds(last) if images is None else None,
            other_seconds=OTHER_SECONDS + compiling,
            disk_bytes=disk_bytes(config) if images is None else None,
            resident_mib=resident_mib(os.getpid()),
            measured_seconds=took,
        )
    finally:
        sources.close()


def stated_forecast(config: Config, images: int, stated: Mapping[int, float]) -> Forecast:
    """The forecast for another machine, with stated images/s (see :func:`vitlocal.storage.speeds_for`)."""
    if methods_writing(config, "budget.length"):
        raise ConfigError(
            "--rates: a method of the recipe sets the length of the run, which is known only after the trainer is "
            "built; leave --rates out, or leave the method out and give --budget.length"
        )
    model, _ = make_model(config, 1000, torch.device("cpu"))

    def image_bytes(size: int) -> int:
        return activation_bytes(model, size, torch.bfloat16, config.train.kernel != "plain")

    context = MethodContext(config.recipe, images, image_bytes)
    methods = build_methods(context, "feed.batch_size")
    sizes = []
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
    config, last = found.config, found.end
    counts = "in all" if found.counts_all else "of training"
    rows = [row | {"time": duration(row["train_seconds"])} for row in found.rows()]
    lines = [
        f"{config.model.name}, {config.budget.length} {counts}, epochs of {found.images:,} images; images/s:\n",
        text_table(rows, COLUMNS) + "\n",
    ]
    if any((speed.measured_batch or speed.batch_size) < speed.batch_size for speed in found.sizes):
        lines.append("measured with smaller batches than the recipe's, which take too long here")
    lines.append(
        f"in all {last.epoch:.2f} epochs, {last.images_seen:,} images, {last.flops:.3g} FLOPs, "
        f"{duration(last.seconds)} of training"
    )
    if found.evaluation_seconds is not None:
        first = found.first_point
        when = "only at the end" if first is None else f"the first after {duration(first)} of training"
        lines.append(f"accuracy: {when}; an evaluation takes {found.evaluation_seconds:.1f} s")
    elif found.counts_all:
        lines.append("not included: starting, evaluations and saving, which this budget counts")
    if found.measured_seconds is not None:
        lines.append(f"measured in {found.measured_seconds:.0f} s, without compiling")
    if unreached := [str(stage.size) for stage in found.stages if stage.seconds <= 0]:
        lines.append(f"note: the budget ends before {', '.join(unreached)} px")
    if found.resident_mib is not None:
        disk = "" if found.disk_bytes is None else f"{found.disk_bytes / 1e9:.2f} GB of files; "
        device = max(speed.device_mib or 0 for speed in found.sizes)
        on_device = f", {device / 1024:.1f} GiB of the device" if device else ""
        lines.append(f"{disk}memory: {found.resident_mib / 1024:.1f} GiB of the host{on_device}")
    return "\n".join([*lines, *(other_budgets(found, budgets) if budgets else [])])


def other_budgets(found: Forecast, budgets: Sequence[Length]) -> list[str]:
    """The table of other budgets, and the option that gives each size its fraction of them."""
    sizes = dict.fromkeys(stage.size for stage in found.fractions)
    columns = {"budget": ("budget", ">"), "epochs": ("epochs", ".2f")} | {f"{s} px": (str(s), ".2f") for s in sizes}
    rows = [
        row | {str(size): epochs for size, epochs in (row["epochs_by_size"] or {}).items()}
        for row in found.within(budgets)
    ]
    lines = ["\nepochs of the same curriculum in other budgets, with the same fraction for each size:\n"]
    lines.append(text_table(rows, columns))
    if short := [row["budget"] for row in rows if row["epochs"] is None]:
        lines.append(f"note: {', '.join(short)} is spent on starting, evaluating and saving")
    with_stages = (name for name in found.config.methods if takes_stages(name))
    if len(found.fractions) > 1 and (method := next(with_stages, None)):
        lines.append(f'  --{method}.stages="{", ".join(map(str, found.fractions))}"')
    return lines


def takes_stages(method: str) -> bool:
    """Whether a method takes a whole curriculum as its option ``stages``."""
    return any(field.name == "stages" and "tuple[Stage" in str(field.type) for field in fields(METHODS[method].options))


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
        raise ConfigError(f"--images: got {images}, expected at least a batch ({config.train.batch_size})")
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
    measured = {name: getattr(found, name) for name in MEASURED}
    write_json(
        options.json, what, found.rows(), budget=str(config.budget.length), counts=config.budget.counts,
        images=found.images, epochs=last.epoch, flops=last.flops, first_point_seconds=found.first_point, **measured,
        curriculum=[str(stage) for stage in found.fractions], budgets=found.within(options.budgets),
        recipe=config.flat(),
    )  # fmt: skip
