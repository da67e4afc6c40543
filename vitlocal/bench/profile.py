"""Where the trainer's time goes: python -m vitlocal.bench profile [--sizes 32,64] [--trace FILE] [TRAINER'S OPTIONS]

The trainer itself, on the data and through the loader of its recipe, some steps at each of the recipe's sizes: first
timed by phase, then traced by PyTorch's profiler, which slows them down. Without a recipe: rcfg/demo.yaml on a CPU,
rcfg/ours.yaml on a GPU. Without data: the built-in sample.

    data       the step stands still until its batch is there
    copy       host-to-device copies, beside the rest and no part of the sum (on a CPU there are none)
    augment    draws and RandAugment; normalising, erasing and mixing belong to the forward
    other      the loop around the step: methods, clock, log

On a GPU a phase is the time between the device's own stamps, launches that it waits for included.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vitlocal.bench.contestants import TurnDisplay
from vitlocal.bench.loader import sample_folder
from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.parsing import numbers
from vitlocal.bench.step import PHASES, Stopwatch, check_multiples
from vitlocal.config import Config, read_config
from vitlocal.data.batch import Batch
from vitlocal.data.writer.write import WriteConfig, write
from vitlocal.errors import ConfigError
from vitlocal.models.factory import build_model, patch_side
from vitlocal.plan import Feed, Plan
from vitlocal.train.devices import choose_device
from vitlocal.train.run import Run, open_run
from vitlocal.train.watch import wait

RECIPES = {"cpu": "rcfg/demo.yaml", "cuda": "rcfg/ours.yaml"}
STEPS = 10
WARMING = 2  # steps at each size that are not counted
TRACED = 3  # steps at each size, at most
SHOWN = 10  # operators
PARTS = ("data", *PHASES, "other")  # of a step, one after the other


def batches_of(run: Run, feed: Feed) -> Iterator[Batch]:
    """Batches from where the run's clock stands, pass after pass."""
    while True:
        with run.sources.train.open(feed, run.clock.position) as batches:
            yield from batches


def full_batch(run: Run, feed: Feed) -> int:
    """Images of a whole batch; of a data set that is smaller than a batch, all."""
    return min(feed.batch_size, run.sources.train.count)


def train_on(run: Run, feed: Feed, batches: Iterator[Batch], steps: int, watch: Stopwatch) -> float:
    """Trains until ``watch`` has so many steps; returns how many whole batches that were.

    An epoch's last batch, smaller than the others, is trained on and not watched.
    """
    images, whole = 0, full_batch(run, feed)
    run.step.mark = watch.mark
    try:
        while len(watch.steps) < steps:
            watch.begin()
            batch = next(batches)
            watch.mark("data")
            run.train_on(batch, Plan(feed))
            watch.mark("other")
            images += batch.total
            if batch.total < whole:
                watch.drop()
    finally:
        run.step.mark = lambda phase: None
    return images / whole


def row_of(run: Run, feed: Feed, steps: Sequence[dict[str, float]], copied: float) -> dict[str, Any]:
    """Milliseconds and per cent of a step; ``copied`` is the copies' milliseconds."""
    spent = {part: sum(step.get(part, 0.0) for step in steps) / len(steps) for part in PARTS}
    total = sum(spent.values())
    spent["copy"] = copied
    parts = ("data", "copy", *PARTS[1:])
    return {
        "size": feed.size, "batch_size": feed.batch_size, "mode": str(run.step.mode(feed)), "steps": len(steps),
        "step_ms": round(total, 3), "images_per_second": round(1e3 * full_batch(run, feed) / total, 1),
        **{f"{part}_ms": round(spent[part], 3) for part in parts},
        **{f"{part}_percent": round(100 * spent[part] / total, 2) for part in parts},
    }  # fmt: skip


def operators_of(averages: Any, feed: Feed, steps: float, device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds of a step that each operator takes itself: on a GPU kernels, which graphs do not hide."""
    on_device = device.type == "cuda"
    found = []
    for average in averages:
        if (average.device_type == DeviceType.CUDA) != on_device or getattr(average, "is_user_annotation", False):
            continue
        spent = average.self_device_time_total if on_device else average.self_cpu_time_total
        fed = {"size": feed.size, "batch_size": feed.batch_size}
        found.append(fed | {"operator": average.key, "ms": spent / 1e3 / steps, "calls": average.count / steps})
    total = sum(row["ms"] for row in found) or 1.0
    for row in found:
        row |= {"ms": round(row["ms"], 4), "percent": round(100 * row["ms"] / total, 2)}
    return found


def check_sizes(sizes: Sequence[int], config: Config) -> None:
    """Raises ConfigError where the recipe's model does not take a size."""
    model, _ = build_model(config.model, 2)
    check_multiples(sizes, patch_side(model), config.model.name)


def feeds_for(run: Run, sizes: Sequence[int] | None) -> list[Feed]:
    """What the recipe feeds, or would at ``sizes``."""
    feeds = list(dict.fromkeys(plan.feed for plan in run.plans_ahead()))
    if sizes is None:
        return feeds
    batch = {feed.size: feed.batch_size for feed in feeds}
    return [Feed(size, batch.get(size, run.config.train.batch_size)) for size in sizes]


def trace_path(path: str, feed: Feed, alone: bool) -> str:
    """``path``, with the feed in its name where there is a trace for each of several."""
    whole = Path(path)
    return path if alone else str(whole.with_name(f"{whole.stem}_{feed.size}px_{feed.batch_size}{whole.suffix}"))


def profiled(
    config: Config, sizes: Sequence[int] | None, steps: int, trace: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the measurement, a size each, and the operators at each size. Leaves no run folder behind."""
    rows, operators = [], []
    with tempfile.TemporaryDirectory() as folder:
        own = replace(config.run, folder=f"{folder}/run", resume="never", progress=False)
        with open_run(replace(config, run=own)) as run:
            feeds, device = feeds_for(run, sizes), run.device
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            if device.type == "cpu":  # there the profiler has no more to tell than that it starts and stops
                os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            told = TurnDisplay(3 * len(feeds))
            for feed in feeds:
                told.bar.set_description_str(f"{feed.size} px, {run.step.mode(feed)}, made ready")
                run.warm(Plan(feed))
                run.clock.start()
                with closing(batches_of(run, feed)) as batches:
                    train_on(run, feed, batches, WARMING, Stopwatch(device))
                    told.step(f"{feed.size} px, timed")
                    watch = Stopwatch(device)
                    train_on(run, feed, batches, steps, watch)
                    wait(device)
                    told.step(f"{feed.size} px, traced")
                    with profile(activities=activities, acc_events=True) as profiler:
                        traced = train_on(run, feed, batches, min(steps, TRACED), Stopwatch(device))
                        wait(device)
                    told.step(f"{feed.size} px")
                run.clock.stop()
                averages = profiler.key_averages()
                copied = sum(a.self_device_time_total for a in averages if a.key.startswith("Memcpy HtoD"))
                rows.append(row_of(run, feed, watch.milliseconds(), copied / 1e3 / traced))
                operators += operators_of(averages, feed, traced, device)
                if trace:
                    Path(trace).parent.mkdir(parents=True, exist_ok=True)
                    profiler.export_chrome_trace(trace_path(trace, feed, len(feeds) == 1))
            told.close()
    return rows, operators


def table(rows: Sequence[dict[str, Any]]) -> str:
    parts = ("data", "copy", *PARTS[1:])
    lines = [f"{'px':>4} {'batch':>6} {'images/s':>10} {'step':>9}    " + " ".join(f"{part:>9}" for part in parts)]
    for row in rows:
        lines.append(
            f"{row['size']:4} {row['batch_size']:6} {row['images_per_second']:10,.1f} {row['step_ms']:9.1f} ms "
            + " ".join(f"{row[f'{part}_ms']:9.2f}" for part in parts)
        )
        lines.append(f"{'':32} % " + " ".join(f"{row[f'{part}_percent']:9.1f}" for part in parts))
    return "\n".join(lines)


def operators_table(operators: Sequence[dict[str, Any]]) -> str:
    """The operators that take most time themselves, over all sizes."""
    sums: dict[str, float] = {}
    for row in operators:
        sums[row["operator"]] = sums.get(row["operator"], 0.0) + row["ms"]
    shown = sorted(sums, key=lambda name: -sums[name])[:SHOWN]
    found = {(row["operator"], row["size"], row["batch_size"]): row for row in operators}
    feeds = list(dict.fromkeys((row["size"], row["batch_size"]) for row in operators))
    title = "most time of their own, ms a step (%)"
    lines = [f"{title:60} " + " ".join(f"{f'{size} px':>16}" for size, _ in feeds)]
    for name in shown:
        cells = [found.get((name, *feed)) for feed in feeds]
        lines.append(
            f"{name[:60]:60} "
            + " ".join(f"{cell['ms']:8.2f} ({cell['percent']:4.1f}%)" if cell else f"{'':16}" for cell in cells)
        )
    return "\n".join(lines)


def configured(arguments: Sequence[str]) -> Config:
    """The trainer's configuration: of a recipe even if none is named, on the sample where its data are not there."""
    if not any(word.startswith(("--config-file", "-C")) for word in arguments):
        device = choose_device(read_config(arguments).run.device)
        arguments = ["--config-file", RECIPES.get(device.type, RECIPES["cpu"]), *arguments]
    config = read_config(arguments)
    named = any(word.partition("=")[0] == "--data.root" for word in arguments)
    if not named and not Path(config.data.root).is_dir():
        print(f"{config.data.root} is not there: the built-in sample stands in for it", file=sys.stderr)
        folder = sample_folder()
        if not (Path(folder) / "val.json").exists():
            write(WriteConfig("val", "sample:20", folder))
        config = replace(config, data=replace(config.data, root=folder))
    return config


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vitlocal.bench profile", description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False, usage="%(prog)s [options] [options of train_imagenet.py]",
    )  # fmt: skip
    parser.add_argument("--sizes", help="image sizes, px; none: the recipe's")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"to time at each size (%(default)s); at most {TRACED} are traced"
    )
    parser.add_argument("--trace", metavar="FILE", help="for chrome://tracing; of several, NAME_{size}px_{batch}.json")
    parser.add_argument("--json", metavar="FILE")
    options, rest = parser.parse_known_args(argv)
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: expected at least 1")
    sizes = None if options.sizes is None else sorted(numbers(options.sizes, "--sizes"))
    config = configured(rest)
    if sizes is not None:
        check_sizes(sizes, config)  # before the run is opened
    rows, operators = profiled(config, sizes, options.steps, options.trace)
    print(table(rows))
    print()
    print(operators_table(operators))
    if options.json:
        what = "where the trainer's time goes, at each size of its recipe"
        top = [row for row in operators if row["percent"] >= 0.1]
        write_json(options.json, measurement(what, rows, recipe=config.flat(), operators=top))
