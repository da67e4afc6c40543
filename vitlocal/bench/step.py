"""The training step: python -m vitlocal.bench step [--sizes 32,64] [--arms local-eager,timm-eager] [TRAINER'S OPTIONS]

Trains each arm on random pixels that are already on the device. All arms run in one process and take turns, at each
size and in each round, so that other load on the machine affects all of them. Compiling is not counted. Options of the
trainer (--config-file, --model.depth, ...) apply to every arm that has a use for them.

    local        the local-FFN ViT with the trainer's own step; on a GPU with the fused kernel if it supports the grid
    local-plain  the same model with PyTorch's operations instead of the kernel, on a GPU
    deit         our DeiT with the same width, depth and patch size, and the trainer's own step
    localvit     our LocalViT with the same width, depth and patch size, and the trainer's own step
    timm         timm's DeiT of that shape in a plain loop: autocast, cross-entropy and fused AdamW, on normalised
                 pixels and without augmentation

Each arm exists as NAME-eager and NAME-compiled. The phase "augment" is the random draws and RandAugment. Normalisation,
erasing and mixing belong to the forward pass, and gradient clipping belongs to the optimizer.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from vitlocal.bench.measurement import progress_bar, text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser, check_multiples, numbers
from vitlocal.bench.step_arms import PHASES, StepArm, StepEntry, choose_arms, model_shape
from vitlocal.config import Config, read_config
from vitlocal.errors import ConfigError
from vitlocal.plan import Feed
from vitlocal.train.build import device_of
from vitlocal.train.devices import choose_device
from vitlocal.train.precision import choose_precision
from vitlocal.train.timing import Timing

SIZES = {"cpu": [32, 64], "cuda": list(range(32, 225, 32))}
# Defaults below recipes and the command line; they replace the environment.
DEFAULTS = {
    "cpu": {"model.name": "vitlocal_tiny_patch8_64", "model.size": "64", "train.batch_size": "16"},
    "cuda": {"model.name": "vitlocal_small_patch16_224", "model.size": "224", "train.batch_size": "1024"},
}
PEAK = {"cpu": (1024, 1), "cuda": (8192, 10)}  # the side of the matrices, and the products of a turn
PEAK_TURNS = 20

COLUMNS = {
    "px": ("size", "d"), "arm": ("arm", ""), "images/s": ("images_per_second", ",.1f"), "spread": ("spread", ".1%"),
    "step ms": ("step_ms", ",.1f"), "MFU": ("mfu", ".1%"), "GFLOP/image": ("gflops_per_image", ".2f"),
    "peak MiB": ("peak_mib", ",d"), **{f"{phase} ms": (f"{phase}_ms", ".1f") for phase in PHASES},
    "time to deit": ("time_to_deit", ".2f"), "speed to timm": ("speed_to_timm", ".2f"), "": ("note", ""),
}  # fmt: skip


def measured_peak(precision: torch.dtype, device: torch.device) -> tuple[float, str]:
    """The TFLOP/s of a large matrix product on this machine, and a description of the measurement."""
    side, products = PEAK[device.type]
    # Not zeros: a GPU needs less power for them, and is faster than on any real matrix.
    left, right = (torch.randn(side, side, device=device).to(precision) for _ in range(2))
    out = torch.empty_like(left)
    timing = Timing()
    best = min(timing.measure(lambda: torch.mm(left, right, out=out), device, products) for _ in range(PEAK_TURNS))
    name = str(precision).removeprefix("torch.")
    how = f"best of {PEAK_TURNS} turns of {products} product{'s' * (products > 1)} of {side} x {side} matrices, {name}"
    return 2 * side**3 / best / 1e12, how


def compare(
    config: Config, arms: Sequence[StepArm], sizes: Sequence[int], rounds: int, seconds: float, device: torch.device,
    peak_tflops: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the measurement: one for each arm at each size."""
    rows: list[dict[str, Any]] = []
    with progress_bar(len(sizes) * len(arms) * (rounds + 2)) as bar:
        for size in sizes:
            entries = _take_turns(Feed(size, config.train.batch_size), config, arms, rounds, seconds, device, bar)
            rows += [entry.row(peak_tflops) for entry in entries]
            # Weights, compiled code and the pools of CUDA graphs make room for the next size.
            entries.clear()
            torch.compiler.reset()
            gc.collect()  # a model and its compiled step refer to each other
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if not rows:
        raise ConfigError(f"train.batch_size: nothing fits on {device}; use a --batch below {config.train.batch_size}")
    return with_ratios(rows)


def _take_turns(
    feed: Feed, config: Config, arms: Sequence[StepArm], rounds: int, seconds: float, device: torch.device, bar: tqdm
) -> list[StepEntry]:
    entries = []
    for arm in arms:
        bar.set_description_str(f"{feed.size} px, {'compiling' if arm.compiled else 'building'} {arm}")
        try:
            entries.append(StepEntry(arm, config, feed, device))
        except torch.OutOfMemoryError:
            print(f"{arm}: {feed.batch_size} images of {feed.size} px do not fit; it is skipped", file=sys.stderr)
        bar.update()
    # The first round is not counted: caches are cold, clocks rise, and the lengths of turns are first guesses.
    for number, entry in product(range(rounds + 1), entries):
        entry.turn(seconds, counted=number > 0)
        bar.set_description_str(f"{feed.size} px, {entry.arm}", refresh=False)
        bar.update()
    return entries


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to our rows the time relative to our DeiT, the cost of the convolution, and the speed relative to timm.

    Eager is compared with eager, and compiled with compiled. The ratio is None if the other arm was not measured.
    """
    milliseconds = {(row["model"], row["size"], row["compiled"]): row["step_ms"] for row in rows}
    for row in rows:
        deit, timm = (milliseconds.get((name, row["size"], row["compiled"])) for name in ("deit", "timm"))
        own, is_ours = row["step_ms"], row["model"] != "timm"
        row["time_to_deit"] = round(own / deit, 3) if deit and is_ours and row["model"] != "deit" else None
        row["speed_to_timm"] = round(timm / own, 3) if timm and is_ours else None
    return rows


def note_of(row: dict[str, Any]) -> str | None:
    """What the table adds to a row."""
    if row["peak_mib"] is not None and row["kernel"] == "plain" and "plain" not in row["arm"]:
        return "plain: the kernel does not support this grid"
    return "as a CUDA graph" if "graph" in row["mode"] else None


def configured(arguments: Sequence[str]) -> tuple[Config, torch.device]:
    """The trainer's configuration, with a small model as the default on a CPU, and the device."""
    device = choose_device(read_config(arguments).run.device)
    if device.type not in DEFAULTS:
        raise ConfigError(f"run.device: got {device.type}, expected one of {', '.join(DEFAULTS)}")
    config = read_config(arguments, DEFAULTS[device.type] | os.environ)
    for name in ("compile", "kernel"):
        if (got := getattr(config.train, name)) != "auto":
            raise ConfigError(f"train.{name}: got {got}, but the arms set it; use --train.{name}=auto and --arms")
    if config.train.batch_size < 2:
        raise ConfigError("train.batch_size: LocalViT's BatchNorm needs more than 1 image; use a --batch of at least 2")
    return config, device


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("step", __doc__, trainer_options=True)
    parser.add_argument(
        "--sizes", type=numbers, metavar="LIST",
        help="image sizes in px (default: 32,64,96,128,160,192,224 on a GPU, 32,64 on a CPU)",
    )  # fmt: skip
    parser.add_argument("--arms", metavar="LIST", help="arms (default: all of them on a GPU, the eager ones on a CPU)")
    parser.add_argument("--batch", type=int, metavar="N", help="batch size (default: 1024 on a GPU, 16 on a CPU)")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="turns of each arm at each size (default: 3)")
    parser.add_argument(
        "--seconds", type=at_least(0, float), default=1.0, help="approximate length of a turn (default: 1)"
    )
    options, rest = parser.parse_known_args(argv)
    if options.batch is not None:
        rest.append(f"--train.batch_size={options.batch}")
    config, device = configured(rest)
    arms = choose_arms(options.arms, device)
    sizes = sorted(options.sizes or SIZES[device.type])
    check_multiples(sizes, model_shape(config)[1], config.model.name)
    device_of(config)
    precision = choose_precision(config.train.precision, device)
    name, batch_size = str(precision).removeprefix("torch."), config.train.batch_size
    peak, how = measured_peak(precision, device)
    rows = compare(config, arms, sizes, options.rounds, options.seconds, device, peak)
    print(text_table([row | {"note": note_of(row)} for row in rows], COLUMNS))
    print(f"batches of {batch_size} on {device}, {name}; MFU is relative to {peak:.3g} TFLOP/s ({how}); "
          "phases were timed in separate steps")  # fmt: skip
    what = "the training step on random pixels that are on the device; arms take turns in one process"
    more = {"device": str(device), "batch_size": batch_size, "precision": name}
    write_json(options.json, what, rows, **more, peak_tflops=round(peak, 4), peak_measured=how)
