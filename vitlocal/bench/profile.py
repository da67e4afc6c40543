"""The trainer's time by phase: python -m vitlocal.bench profile [--sizes 32,64] [--trace FILE] [TRAINER'S OPTIONS]

Runs the trainer itself with the data and the loader of its recipe, for some steps at each size of the recipe. The steps
are first timed by phase, and then traced with PyTorch's profiler, which slows them down. The default recipe is
rcfg/demo.yaml on a CPU and rcfg/ours.yaml on a GPU.

    data       the step waits for its batch
    copy       host-to-device copies; they overlap with other phases and are not part of the sum (on a CPU: none)
    augment    random draws and, in eager steps on a CPU, RandAugment; the rest belongs to the forward pass
    other      the loop around the step: methods and clock

On a GPU, a phase is the time between two CUDA events. It includes launches that the device waits for.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from vitlocal.bench.measurement import progress_bar, text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser, check_multiples, numbers
from vitlocal.bench.step import PHASES
from vitlocal.config import Config, read_config
from vitlocal.data.batch import Batch, full_batches
from vitlocal.errors import ConfigError
from vitlocal.models.factory import size_multiple
from vitlocal.plan import Feed, Plan
from vitlocal.train.build import build_run, device_of, sources_of
from vitlocal.train.devices import choose_device, synchronize
from vitlocal.train.timing import PhaseTimer
from vitlocal.train.trainer import Trainer

Rows = list[dict[str, Any]]
WARM_UP_STEPS = 2  # uncounted steps at each size
TRACED_STEPS = 3  # traced steps at each size
SHOWN_OPERATORS = 10
FEW_BATCHES = 20  # in fewer batches, the start of an epoch is a notable part of its time
PARTS = ("data", *PHASES, "other")  # of a step, one after the other
COLUMNS = {
    "px": ("size", "d"), "batch": ("batch_size", "d"), "images/s": ("images_per_second", ",.1f"), "": ("unit", ""),
    "step": ("step", ".1f"), **{part: (part, ".2f") for part in ("data", "copy", *PARTS[1:])},
}  # fmt: skip


def timed_steps(trainer: Trainer, feed: Feed, batches: Iterator[Batch], steps: int) -> PhaseTimer:
    """Trains for ``steps`` steps, and times each of them by phase."""
    timer = PhaseTimer(trainer.step.device)
    trainer.step.phase_hook = timer.mark
    for _ in range(steps):
        timer.begin()
        batch = next(batches)
        timer.mark("data")
        trainer.train_step(batch, Plan(feed))
        timer.mark("other")
    return timer


def operator_rows(averages: Any, feed: Feed, device: torch.device) -> Rows:
    """The milliseconds per step of each operator, without the operators that it calls. On a GPU they are kernels."""
    on_gpu = device.type == "cuda"
    found = []
    for average in averages:
        if (average.device_type == DeviceType.CUDA) != on_gpu or getattr(average, "is_user_annotation", False):
            continue
        spent = average.self_device_time_total if on_gpu else average.self_cpu_time_total
        about = {"size": feed.size, "batch_size": feed.batch_size, "operator": average.key}
        found.append(about | {"ms": spent / 1e3 / TRACED_STEPS, "calls": average.count / TRACED_STEPS})
    total = sum(row["ms"] for row in found) or 1.0
    return [row | {"ms": round(row["ms"], 4), "percent": round(100 * row["ms"] / total, 2)} for row in found]


def profiled(config: Config, sizes: Sequence[int] | None, steps: int, trace: str | None) -> tuple[Rows, Rows]:
    """The rows of the measurement, one for each size, and those of the operators."""
    rows, operators = [], []
    device = device_of(config)
    with closing(sources_of(config, device)) as sources:
        trainer = build_run(config, sources, device).trainer
        feeds = list(dict.fromkeys(plan.feed for plan in trainer.upcoming_plans()))
        if sizes is not None:
            check_multiples(sizes, size_multiple(trainer.step.model), config.model.name)
            batch_sizes = {feed.size: feed.batch_size for feed in feeds}
            feeds = [Feed(size, batch_sizes.get(size, config.train.batch_size)) for size in sorted(sizes)]
        for feed in feeds:
            check_batches(feed, sources.train.rows.count(feed.subset))
        with progress_bar(len(feeds)) as bar:
            for feed in feeds:
                bar.set_description_str(f"{feed.size} px, {trainer.step.mode(feed)}")
                row, found = profile_size(trainer, feed, steps, trace)
                rows.append(row)
                operators += found
                bar.update()
    return rows, operators


def check_batches(feed: Feed, images: int) -> None:
    """ConfigError if the data are less than a batch. Prints a note if an epoch has few batches."""
    if images < feed.batch_size:
        raise ConfigError(
            f"train.batch_size: {feed.batch_size} at {feed.size} px is more than the {images} images of data.root; use "
            "smaller batches or more data"
        )
    if images < FEW_BATCHES * feed.batch_size:
        print(
            f"note: at {feed.size} px an epoch has {images // feed.batch_size} batches, and each epoch starts the "
            f"loader again; with {FEW_BATCHES * feed.batch_size:,} images or more, steps wait less for data"
        )


def profile_size(trainer: Trainer, feed: Feed, steps: int, trace: str | None) -> tuple[dict[str, Any], Rows]:
    """The row of one size, with milliseconds and percent of a step by phase, and the rows of its operators."""
    device, clock = trainer.step.device, trainer.state.clock
    if device.type == "cpu":  # the profiler would print only that it starts and stops
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    trainer.compile_for(Plan(feed))
    clock.start()
    with closing(full_batches(trainer.sources.train, feed)) as batches:
        timed_steps(trainer, feed, batches, WARM_UP_STEPS)
        timer = timed_steps(trainer, feed, batches, steps)
        synchronize(device)
        with profile(acc_events=True) as profiler:
            timed_steps(trainer, feed, batches, TRACED_STEPS)
            synchronize(device)
    clock.timer.stop()
    if trace:
        file = Path(f"{trace.removesuffix('.json')}_{feed.size}px_{feed.batch_size}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))
    averages, timed = profiler.key_averages(), timer.milliseconds()
    spent = {part: sum(step.get(part, 0.0) for step in timed) / steps for part in PARTS}
    total = sum(spent.values())
    copied = sum(row.self_device_time_total for row in averages if row.key.startswith("Memcpy HtoD"))
    spent["copy"] = copied / 1e3 / TRACED_STEPS
    row = {
        "size": feed.size, "batch_size": feed.batch_size, "mode": str(trainer.step.mode(feed)), "steps": steps,
        "step_ms": round(total, 3), "images_per_second": round(1e3 * feed.batch_size / total, 1),
        **{f"{part}_ms": round(value, 3) for part, value in spent.items()},
        **{f"{part}_percent": round(100 * value / total, 2) for part, value in spent.items()},
    }  # fmt: skip
    return row, operator_rows(averages, feed, device)


def operators_table(operators: Rows) -> str:
    """The operators that take the most time themselves, over all sizes."""
    lines: dict[str, dict[str, Any]] = {}
    columns = {"operator, ms per step and percent": ("operator", "")}
    for row in operators:
        line = lines.setdefault(row["operator"], {"operator": row["operator"][:60], "ms": 0.0})
        line["ms"] += row["ms"]
        for field, unit in (("ms", "ms"), ("percent", "%")):
            key = f"{row['size']} px, {row['batch_size']}: {unit}"
            line[key], columns[key] = row[field], (key, ".2f")
    return text_table(sorted(lines.values(), key=lambda line: -line["ms"])[:SHOWN_OPERATORS], columns)


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("profile", __doc__)
    add = parser.add_argument
    add("--sizes", type=numbers, metavar="LIST", help="image sizes in px (default: the recipe's)")
    add("--steps", type=at_least(1), default=10, help="steps to time at each size; 3 more are traced (default: 10)")
    add("--trace", metavar="FILE", help="write a trace for chrome://tracing; of each size, NAME_{size}px_{batch}.json")
    options, rest = parser.parse_known_args(argv)
    if not any(word.startswith(("--config-file", "-C")) for word in rest):
        on_gpu = choose_device(read_config(rest).run.device).type == "cuda"
        rest = ["--config-file", "rcfg/ours.yaml" if on_gpu else "rcfg/demo.yaml", *rest]
    config = read_config(rest)
    rows, operators = profiled(config, options.sizes, options.steps, options.trace)
    lines: Rows = []  # for each size, one in milliseconds and one in percent of the step
    for row in rows:
        ms, percent = ({part: row[f"{part}_{unit}"] for part in ("copy", *PARTS)} for unit in ("ms", "percent"))
        lines += [{**row, "unit": "ms", "step": row["step_ms"], **ms}, {"unit": "%", **percent}]
    print(text_table(lines, COLUMNS), operators_table(operators), sep="\n\n")
    large = [row for row in operators if row["percent"] >= 0.1]
    what = "the trainer's time by phase, at each size of its recipe"
    write_json(options.json, what, rows, recipe=config.flat(), operators=large)
