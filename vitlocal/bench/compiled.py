"""The compiled step against the eager one: python -m vitlocal.bench compiled [--sizes 32,224] [TRAINER'S OPTIONS]

Runs the trainer's step on the same random images, with the same augmentation, in three ways: eagerly in float32,
eagerly in the run's precision, and compiled (on a GPU as a CUDA graph). The weights stay as they are. Errors are
relative to the step in float32: of the loss, and of the norm of all gradients. The command fails if the compiled
step's error is more than twice that of the eager one, or if a CUDA graph was wanted and not captured or not launched.
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import profile

from vitlocal.bench.measurement import text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser, numbers
from vitlocal.bench.step import CLASSES, DEFAULTS
from vitlocal.config import Config, read_config
from vitlocal.errors import DataError
from vitlocal.plan import Feed
from vitlocal.train.build import build_step, device_of
from vitlocal.train.devices import choose_device, choose_precision
from vitlocal.train.timing import fill_zeros, noise_batch, peak_memory, reset_peak

SIZES, BATCH = {"cuda": [32, 224], "cpu": [16]}, {"cuda": 64, "cpu": 4}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-4  # added to twice the eager error, which is 0 in float32
COLUMNS = {
    "px": ("size", "d"), "mode": ("mode", ""), "eager loss": ("eager_loss_error", ".1e"),
    "compiled": ("compiled_loss_error", ".1e"), "eager gradients": ("eager_gradient_error", ".1e"),
    "compiled ": ("compiled_gradient_error", ".1e"), "graph launches": ("graph_launches", ".1f"),
    "skips": ("cudagraph_skips", "d"), "peak MiB": ("peak_mib", ",d"), "compiled in s": ("compile_seconds", ".1f"),
}  # fmt: skip
Results = list[tuple[float, list[Tensor]]]  # of each step: the loss and the gradients


def run_steps(config: Config, feed: Feed, device: torch.device, count: int) -> tuple[Results, dict[str, Any]]:
    """The results of ``count`` steps with a learning rate of 0, and how they ran."""
    step = build_step(config, CLASSES, device)
    fill_zeros(step.model)
    before = reset_peak(device)
    seconds, mode = step.warm_up(feed, CLASSES), step.mode(feed)
    batch, gradients, results = noise_batch(feed, CLASSES, device, step.task), list[Tensor](), Results()

    def keep(phase: str) -> None:
        if phase == "backward":
            gradients[:] = [part.grad.clone() for part in step.model.parameters() if part.grad is not None]

    step.phase_hook = keep
    with profile(acc_events=True) if device.type == "cuda" else nullcontext() as profiler:
        for number in range(count):
            # Other images at each step, because a graph must read its inputs. Their memory format stays.
            images = torch.empty_like(batch.images).copy_(batch.images.roll(number, 0))
            output = step(replace(batch, images=images), number, 0.0, mode)
            results.append((float(output.loss), [*gradients]))
    how: dict[str, Any] = {"mode": str(mode), "compile_seconds": round(seconds, 1)}
    if profiler is not None:
        calls = {row.key: row.count for row in profiler.key_averages() if row.key.startswith("cuda")}
        launches = sum(number for name, number in calls.items() if name.startswith("cudaGraphLaunch")) / count
        how["graph_launches"] = launches if calls else None  # None: the profiler sees no calls of CUDA here
        how["peak_mib"] = round((peak_memory(device) - before) / 2**20)
    return results, how


def errors(name: str, found: Results, exact: Results) -> dict[str, float]:
    """The largest relative errors over all steps, of the loss and of the gradients."""
    norm = torch.nn.utils.get_total_norm
    losses = [abs(one[0] - other[0]) / abs(other[0]) for one, other in zip(found, exact, strict=True)]
    gradients = [
        float(norm([a.float() - b for a, b in zip(one[1], other[1], strict=True)]) / norm(other[1]))
        for one, other in zip(found, exact, strict=True)
    ]
    values = {f"{name}_loss_error": max(losses), f"{name}_gradient_error": max(gradients)}
    return {field: float(f"{value:.3g}") for field, value in values.items()}


def compare(config: Config, size: int, count: int, device: torch.device) -> dict[str, Any]:
    """The row of one image size."""
    feed = Feed(size, config.train.batch_size)
    graphs = "yes" if device.type == "cuda" else "no"
    ways: dict[str, dict[str, Any]] = {
        "exact": {"precision": "fp32", "compile": "no"}, "eager": {"compile": "no"},
        "compiled": {"compile": "yes", "cuda_graphs": graphs},
    }  # fmt: skip
    results: dict[str, Results] = {}
    counters.clear()
    rounds, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # operands of convolutions
    for name, options in ways.items():
        train = replace(config.train, **options)
        results[name], how = run_steps(replace(config, train=train), feed, device, count)
    torch.backends.cudnn.allow_tf32 = rounds
    row = {"size": size, "batch_size": feed.batch_size, "steps": count, **how}  # how the compiled one ran
    for name in ("eager", "compiled"):
        row |= errors(name, results[name], results["exact"])
    skips = counters["inductor"]["cudagraph_skips"]
    torch.compiler.reset()
    return row | {"cudagraph_skips": skips}


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with the compiled step of a row."""
    found = [
        f"the compiled step's {what} is {row[f'compiled_{field}']:.1e} off, the eager one's {row[f'eager_{field}']:.1e}"
        for what, field, tolerance in (
            ("loss", "loss_error", LOSS_TOLERANCE), ("gradient", "gradient_error", GRADIENT_TOLERANCE),
        )
        if not row[f"compiled_{field}"] <= 2 * row[f"eager_{field}"] + tolerance  # also if it is not a number
    ]  # fmt: skip
    if "graph" in row["mode"] and row["cudagraph_skips"]:
        found.append(f"{row['cudagraph_skips']} graphs were not captured (TORCH_LOGS=perf_hints says why)")
    if "graph" in row["mode"] and row["graph_launches"] == 0:
        found.append("no CUDA graph was launched")
    return [f"{row['size']} px: {problem}" for problem in found]


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("compiled", __doc__)
    add = parser.add_argument
    add("--sizes", type=numbers, metavar="LIST", help="image sizes in px (default: 32,224; 16 on a CPU)")
    add("--steps", type=at_least(1), default=4, help="steps of each kind (default: 4)")
    options, rest = parser.parse_known_args(argv)
    device = choose_device(read_config(rest).run.device)
    defaults = DEFAULTS[device.type] | {"train.batch_size": str(BATCH[device.type])}
    config = read_config(rest, defaults | os.environ)
    device_of(config)
    precision, rows = str(choose_precision(config.train.precision, device)).removeprefix("torch."), []
    what = "the compiled step and the eager one: errors of loss and gradients relative to float32"
    for size in options.sizes or SIZES[device.type]:
        rows.append(compare(config, size, options.steps, device))
        write_json(options.json, what, rows, recipe=config.flat(), precision=precision)  # a limit may end it
    print(text_table(rows, COLUMNS))
    print(f"batches of {config.train.batch_size} on {device}, {precision}; errors relative to float32")
    if wrong := [problem for row in rows for problem in problems(row)]:
        raise DataError("; ".join(wrong))
