"""The training step: python -m vitlocal.bench step [--sizes 32,64] [--arms local-eager,timm-eager] [TRAINER'S OPTIONS]

Each arm trains on noise that lies on the device. They take turns in one process, size by size and round by round, so
that what else the machine does falls on all alike; compiling is never counted. Options of the trainer (--config-file,
--model.depth, …) hold for every arm that has a use for them.

    local        the local-FFN ViT by the trainer's own step; on a GPU with the fused kernel where that serves the grid
    local-plain  the same with PyTorch's operations in the kernel's place, on a GPU
    deit         our DeiT of the same width, depth and patch, by the same step
    localvit     our LocalViT, likewise
    timm         timm's DeiT of that shape in a loop as its users write it: autocast, cross-entropy, fused AdamW, on
                 pixels that are normalised already; no augmentation

Each is …-eager or …-compiled. Phases: "augment" is draws and RandAugment; normalising, erasing and mixing belong to
the forward, clipping to the optimizer.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from vitlocal.bench.contestants import TurnDisplay
from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.parsing import numbers, plot_file
from vitlocal.config import Config, read_config
from vitlocal.data.batch import Batch
from vitlocal.errors import ConfigError
from vitlocal.models.factory import build_model
from vitlocal.models.flops import count_macs
from vitlocal.models.local_mix import fuses
from vitlocal.plan import Feed
from vitlocal.report.figures import save
from vitlocal.train.devices import choose_device, prepare_device
from vitlocal.train.ema import build_ema
from vitlocal.train.optim import build_optimizer
from vitlocal.train.step import Mode, Step, choose_precision
from vitlocal.train.watch import wait

ROUNDS, SECONDS = 3, 1.0
SIZES = {"cpu": "32,64", "cuda": "32,64,96,128,160,192,224"}
# Under recipes and the command line, in the environment's place.
DEFAULTS = {
    "cpu": {"model.name": "vitlocal_tiny_patch8_64", "model.size": "64", "train.batch_size": "16"},
    "cuda": {"model.name": "vitlocal_small_patch16_224", "model.size": "224", "train.batch_size": "1024"},
}
CLASSES = 1000
LR = 1e-6  # the weights hardly move: every step is the same work
PHASES = ("augment", "forward", "backward", "optimizer", "average")
# Steps by phase after each turn: not counted, as the host is not ahead of a GPU yet; and counted.
PHASE_STEPS = {"cpu": (0, 1), "cuda": (2, 2)}
PEAK = {"cpu": (1024, 1), "cuda": (8192, 10)}  # side of the matrices, products a turn
PEAK_TURNS = 20

FAMILIES = {"local": "", "deit": "deit_", "localvit": "localvit_"}
OURS = re.compile(r"vitlocal_(?:deit_|localvit_)?(tiny|small|base)_patch(\d+)_\d+")


# --- arms -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    model: str  # of FAMILIES, or timm
    compiled: bool
    kernel: str = "auto"  # as train.kernel

    def __str__(self) -> str:
        kernel = "" if self.kernel == "auto" else f"-{self.kernel}"
        return f"{self.model}{kernel}-{'compiled' if self.compiled else 'eager'}"


def arms_on(device: torch.device) -> dict[str, Arm]:
    """The arms that a device has, by name."""
    found = []
    for model in (*FAMILIES, "timm"):
        for kernel in ("auto", "plain") if model == "local" and device.type == "cuda" else ("auto",):
            found += [Arm(model, compiled, kernel) for compiled in (False, True)]
    return {str(arm): arm for arm in found}


def chosen_arms(text: str | None, device: torch.device) -> list[Arm]:
    """Arms by their names with commas between; without any, all (on a CPU those that are not compiled)."""
    known = arms_on(device)
    if text is None:
        return [arm for arm in known.values() if device.type == "cuda" or not arm.compiled]
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--arms: got {', '.join(unknown)}, expected some of {', '.join(known)} on {device}")
    return [known[name] for name in names]


def shape_of(config: Config) -> tuple[str, int]:
    """Width by name (tiny, small, base) and patch side of the recipe's model; ConfigError where it is not ours."""
    match = OURS.fullmatch(config.model.name)
    if match is None:
        raise ConfigError(
            f"model.name: got '{config.model.name}', expected one of ours, such as vitlocal_small_patch16_224: the "
            "arms are of its width and patch"
        )
    return match[1], config.model.patch_size or int(match[2])


def config_of(arm: Arm, config: Config) -> Config:
    """The recipe as one of our arms trains by it: the same shape in the arm's family."""
    width, patch = shape_of(config)
    name = f"vitlocal_{FAMILIES[arm.model]}{width}_patch16_224"
    model = replace(config.model, name=name, patch_size=patch)
    if arm.model != "local":
        model = replace(model, norm=None, convolution=None)  # ablations of the local FFN
    train = replace(config.train, compile="yes" if arm.compiled else "no", kernel=arm.kernel)
    return replace(config, model=model, train=train)


def timm_model(config: Config) -> nn.Module:
    """timm's DeiT of the recipe's shape."""
    width, patch = shape_of(config)
    model = config.model
    stated = {"embed_dim": model.width, "depth": model.depth, "num_heads": model.heads, "qkv_bias": model.qkv_bias}
    arguments = {name: value for name, value in stated.items() if value is not None}
    if model.pool == "avg":
        arguments |= {"global_pool": "avg", "class_token": False, "fc_norm": False}
    return timm.create_model(
        f"deit_{width}_patch16_224", num_classes=CLASSES, patch_size=patch, img_size=model.size, dynamic_img_size=True,
        drop_path_rate=model.drop_path, **arguments,
    )  # fmt: skip


def kernel_of(arm: Arm, config: Config, size: int, device: torch.device) -> str | None:
    """Which kernel the local FFN takes in fact; None where there is none to choose."""
    if arm.model != "local" or config.model.convolution is False:
        return None
    side = size // shape_of(config)[1]
    return "fused" if arm.kernel == "auto" and fuses(device, (side, side)) else "plain"


# --- clocks -----------------------------------------------------------------------------------------------


class Stopwatch:
    """Time by phase: a mark ends one. On a GPU by events, stamped when the device comes to them; else by the host."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[list[tuple[str, Any]]] = []

    def begin(self) -> None:
        """A step begins."""
        self.steps.append([("", self._stamp())])

    def mark(self, phase: str) -> None:
        """What was issued since the last mark was ``phase``."""
        self.steps[-1].append((phase, self._stamp()))

    def drop(self) -> None:
        """The last step is not counted."""
        self.steps.pop()

    def milliseconds(self) -> list[dict[str, float]]:
        """Of every step, by phase. Waits for the device."""
        wait(self.device)
        found = []
        for stamps in self.steps:
            spent: dict[str, float] = {}
            for (_, before), (phase, after) in pairwise(stamps):
                spent[phase] = spent.get(phase, 0.0) + self._between(before, after)
            found.append(spent)
        return found

    def _stamp(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) if self.device.type == "cuda" else 1e3 * (after - before)


def measured_peak(precision: torch.dtype, device: torch.device) -> tuple[float, str]:
    """TFLOP/s that this machine reaches in a large matrix product, and how that was measured."""
    side, products = PEAK[device.type]
    # Not zeros: on those a GPU draws less power, and runs faster than on any real matrix.
    left, right = (torch.randn(side, side, device=device).to(precision) for _ in range(2))
    out, best = torch.empty_like(left), math.inf
    for _ in range(PEAK_TURNS):
        wait(device)
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right, out=out)
        wait(device)
        best = min(best, (time.perf_counter() - began) / products)
    name = str(precision).removeprefix("torch.")
    how = f"best of {PEAK_TURNS} turns of {products} product{'s' * (products > 1)} of {side} x {side} matrices, {name}"
    return 2 * side**3 / best / 1e12, how


# --- what takes turns -------------------------------------------------------------------------------------


def noise(feed: Feed, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 3, S, S) uint8, channels-last as from a source, and labels (B,)."""
    count, size = feed.batch_size, feed.size
    pixels = np.random.default_rng(size).integers(0, 256, (count, size, size, 3), np.uint8)
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2), torch.arange(count, device=device) % CLASSES


class Ours:
    """One of our models, and the trainer's step."""

    def __init__(self, arm: Arm, config: Config, feed: Feed, device: torch.device):
        config = config_of(arm, config)
        torch.manual_seed(config.run.seed)
        model, _ = build_model(config.model, CLASSES)
        self.model = model.to(device, memory_format=torch.channels_last).train()
        average = build_ema(self.model, config.train)
        self.step = Step(
            self.model,
            build_optimizer(self.model, config.train, choose_precision(config.train.precision, device)),
            average,
            config,
            device,
        )
        self.feed, self.mode = feed, self.step.mode(feed)
        images, labels = noise(feed, device)
        self.batch = Batch.whole(images, labels, torch.arange(feed.batch_size))
        self.done = 0

    def compile(self) -> float:
        """Seconds that it took."""
        return self.step.warm(self.feed, CLASSES)

    def run(self) -> None:
        self.step(self.batch, self.done, LR, self.mode)
        self.done += 1

    def watched_by(self, watch: Stopwatch | None) -> None:
        self.step.mark = watch.mark if watch else lambda phase: None


class Peer:
    """timm's model, in a plain loop with automatic mixed precision."""

    def __init__(self, arm: Arm, config: Config, feed: Feed, device: torch.device):
        train = config.train
        torch.manual_seed(config.run.seed)
        self.model = timm_model(config).to(device).train()
        if train.checkpointing:
            self.model.set_grad_checkpointing(True)
        self.forward = torch.compile(self.model) if arm.compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LR, weight_decay=train.weight_decay, fused=True)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=train.label_smoothing)
        self.device, self.clip_norm = device, train.clip_norm
        self.precision = choose_precision(train.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.mode = Mode(arm.compiled)
        pixels, self.labels = noise(feed, device)
        self.images = ((pixels.float() / 255 - 0.45) / 0.225).contiguous()
        self.mark = lambda phase: None

    def compile(self) -> float:
        if not self.mode.compiled:
            return 0.0
        began = time.perf_counter()
        self.run()
        wait(self.device)
        return time.perf_counter() - began

    def run(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            loss = self.criterion(self.forward(self.images), self.labels)
        self.mark("forward")
        self.scaler.scale(loss).backward()
        self.mark("backward")
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.mark("optimizer")

    def watched_by(self, watch: Stopwatch | None) -> None:
        self.mark = watch.mark if watch else lambda phase: None


class Entry:
    """An arm at one size: made, compiled and run once; then what its turns measured."""

    def __init__(self, arm: Arm, config: Config, feed: Feed, device: torch.device):
        self.arm, self.feed, self.device = arm, feed, device
        before = self._reset_peak()
        self.runner = (Peer if arm.model == "timm" else Ours)(arm, config, feed, device)
        self.macs = count_macs(self.runner.model, feed.size)
        self.compile_seconds = self.runner.compile()
        self.timed(1)  # the optimizer makes its state
        self.peak = 0.0
        if device.type == "cuda":
            self.held = torch.cuda.memory_allocated(device) - before
            if self.runner.mode.graphs:
                # A graph's memory is taken when it is captured; replayed, it passes the allocator by.
                self.peak = torch.cuda.max_memory_allocated(device) - before
        self.spent = self.timed(1)  # seconds a step: how many make a turn
        self.turns: list[float] = []
        self.phases: list[dict[str, float]] = []  # milliseconds, of each step that was watched

    def _reset_peak(self) -> int:
        """Bytes that are held now, with the peak set back to them."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def timed(self, steps: int) -> float:
        """Seconds a step. Inside, the host may run ahead of the device."""
        wait(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.runner.run()
        wait(self.device)
        return (time.perf_counter() - began) / steps

    def turn(self, seconds: float, counted: bool) -> None:
        """About ``seconds`` of steps: their number is fixed beforehand, since asking the time means to wait."""
        held = self._reset_peak()
        self.spent = self.timed(max(1, math.ceil(seconds / self.spent)))
        if self.device.type == "cuda":
            others = held - self.held
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) - others)
        if counted:
            self.turns.append(self.spent)

    def watch_phases(self) -> None:
        """Some steps by phase, apart from those of the turns, which no mark may slow down."""
        ahead, counted = PHASE_STEPS[self.device.type]
        watch = Stopwatch(self.device)
        self.runner.watched_by(watch)
        for _ in range(ahead + counted):
            watch.begin()
            self.runner.run()
        self.runner.watched_by(None)
        self.phases += watch.milliseconds()[ahead:]

    def row(self, config: Config, peak_tflops: float) -> dict[str, Any]:
        rates = [self.feed.batch_size / spent for spent in self.turns]
        rate, flops = statistics.median(rates), 6 * self.macs  # 2 a multiply-add, forward once and backward twice
        phases = {name: statistics.median(step[name] for step in self.phases) for name in self.phases[0]}
        return {
            "arm": str(self.arm), "model": self.arm.model, "compiled": self.arm.compiled,
            "kernel": kernel_of(self.arm, config, self.feed.size, self.device), "mode": str(self.runner.mode),
            "size": self.feed.size, "batch_size": self.feed.batch_size, "images_per_second": round(rate, 2),
            "spread": round((max(rates) - min(rates)) / rate, 3) if len(rates) > 1 else None, "n": len(rates),
            "step_ms": round(1e3 * self.feed.batch_size / rate, 3), "gflops_per_image": flops / 1e9,
            "mfu": round(rate * flops / (peak_tflops * 1e12), 4),
            "peak_mib": round(self.peak / 2**20) if self.device.type == "cuda" else None,
            **{f"{phase}_ms": round(phases[phase], 3) if phase in phases else None for phase in PHASES},
            "compile_seconds": round(self.compile_seconds, 1) if self.arm.compiled else None,
        }  # fmt: skip


def compare(
    config: Config, arms: Sequence[Arm], sizes: Sequence[int], rounds: int, seconds: float, device: torch.device,
    peak_tflops: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the measurement: an arm at a size, each."""
    rows: list[dict[str, Any]] = []
    told = TurnDisplay(len(sizes) * len(arms) * (rounds + 2))
    for size in sizes:
        feed = Feed(size, config.train.batch_size)
        entries = _compared_at(feed, config, arms, rounds, seconds, device, told)
        rows += [entry.row(config, peak_tflops) for entry in entries]
        entries.clear()
        _forget(device)
    told.close()
    if not rows:
        raise ConfigError(f"train.batch_size: nothing fits on {device}; use a --batch below {config.train.batch_size}")
    return with_ratios(rows)


def _compared_at(
    feed: Feed,
    config: Config,
    arms: Sequence[Arm],
    rounds: int,
    seconds: float,
    device: torch.device,
    told: TurnDisplay,
) -> list[Entry]:
    entries = []
    for arm in arms:
        told.bar.set_description_str(f"{feed.size} px, {'compiling' if arm.compiled else 'making'} {arm}")
        try:
            entries.append(Entry(arm, config, feed, device))
        except torch.OutOfMemoryError:
            print(f"{arm}: {feed.batch_size} images of {feed.size} px do not fit; left out", file=sys.stderr)
        told.step(f"{feed.size} px")
    for number in range(rounds + 1):  # the first is not counted: caches, clocks that rise, first guesses of length
        for entry in entries:
            entry.turn(seconds, counted=number > 0)
            if number:
                entry.watch_phases()
            told.step(f"{feed.size} px, {entry.arm}")
    return entries


def _forget(device: torch.device) -> None:
    """Lets weights, compiled code and the pools of CUDA graphs go, before the next size takes its own."""
    torch.compiler.reset()
    gc.collect()  # a model and its compiled step refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- what is made of it -----------------------------------------------------------------------------------


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds what our rows take of our DeiT's time, which is the convolution's price, and their speed to timm's.

    Eager is compared with eager, compiled with compiled; None where there is nothing to compare with.
    """
    milliseconds = {(row["model"], row["size"], row["compiled"]): row["step_ms"] for row in rows}
    for row in rows:
        deit, peer = (milliseconds.get((name, row["size"], row["compiled"])) for name in ("deit", "timm"))
        own, ours = row["step_ms"], row["model"] != "timm"
        row["time_to_deit"] = round(own / deit, 3) if deit and ours and row["model"] != "deit" else None
        row["speed_to_timm"] = round(peer / own, 3) if peer and ours else None
    return rows


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'' if value is None else format(value, form):>{width}}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    width = max(len(row["arm"]) for row in rows)
    lines = [
        f"{'':4}  {'':{width}} {'':>10} {'':>7} {'':>9} {'':>6} {'GFLOP/':>8} {'peak':>7}  "
        f"{'milliseconds of a step, by phase':^42}  {'time':>7} {'speed':>7}",
        f"{'px':>4}  {'arm':{width}} {'images/s':>10} {'spread':>7} {'ms':>9} {'MFU %':>6} {'image':>8} {'MiB':>7}  "
        f"{'augment':>8} {'forward':>8} {'backward':>8} {'optimize':>8} {'average':>7}  {'to deit':>7} {'to timm':>7}",
    ]
    for place, row in enumerate(rows):
        if place and row["size"] != rows[place - 1]["size"]:
            lines.append("")
        phases = [_cell(row[f"{phase}_ms"], 7 if phase == "average" else 8, ".1f") for phase in PHASES]
        lines.append(
            f"{row['size']:4}  {row['arm']:{width}} {row['images_per_second']:10,.1f} {_cell(row['spread'], 7, '.1%')} "
            f"{row['step_ms']:9,.1f} {100 * row['mfu']:6.1f} {row['gflops_per_image']:8.2f} "
            f"{_cell(row['peak_mib'], 7, ',')}  {' '.join(phases)}  {_cell(row['time_to_deit'], 7, '.2f')} "
            f"{_cell(row['speed_to_timm'], 7, '.2f')}"
            + ("  as a CUDA graph" if "graph" in row["mode"] else "")
            + ("  plain: the kernel does not serve this grid" if _falls_back(row) else "")
        )
    return "\n".join(lines)


def _falls_back(row: dict[str, Any]) -> bool:
    return row["peak_mib"] is not None and row["kernel"] == "plain" and "plain" not in row["arm"]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Images a second against size, on a logarithmic axis, and below it the part of the peak; a line an arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 6.6), layout="constrained")
    rates, parts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    colours = {model: f"C{number}" for number, model in enumerate((*FAMILIES, "timm"))}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        line = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["size"])
        look = {
            "color": colours[line[0]["model"]], "linestyle": "-" if line[0]["compiled"] else ":", "label": arm,
            "marker": "x" if "plain" in arm else ".",
        }  # fmt: skip
        sizes = [row["size"] for row in line]
        rates.plot(sizes, [row["images_per_second"] for row in line], **look)
        parts.plot(sizes, [100 * row["mfu"] for row in line], **look)
    rates.set_yscale("log")
    rates.set_ylabel("images/s")
    parts.set_ylim(bottom=0)
    parts.set_ylabel("model FLOP/s, % of the peak")
    parts.set_xlabel("image size, px")
    parts.set_xticks(sorted({row["size"] for row in rows}))
    for axes in (rates, parts):
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*rates.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


# --- the command ------------------------------------------------------------------------------------------


def check_multiples(sizes: Sequence[int], patch: int, name: str) -> None:
    """Raises ConfigError where the patch does not divide a size of ``--sizes``."""
    if odd := [size for size in sizes if size % patch]:
        better = ",".join(str(max(1, round(size / patch)) * patch) for size in odd)
        raise ConfigError(
            f"--sizes: got {', '.join(map(str, odd))}, expected multiples of {patch}, the patch side of {name}; "
            f"use {better}, or another --model.patch_size"
        )


def configured(arguments: Sequence[str]) -> tuple[Config, torch.device]:
    """The trainer's configuration, small on a CPU where it does not say otherwise, and the device that it runs on."""
    device = choose_device(read_config(arguments).run.device)
    if device.type not in DEFAULTS:
        raise ConfigError(f"run.device: got {device.type}, expected one of {', '.join(DEFAULTS)}")
    config = read_config(arguments, DEFAULTS[device.type] | os.environ)
    for name in ("compile", "kernel"):
        if (got := getattr(config.train, name)) != "auto":
            raise ConfigError(f"train.{name}: got {got}, but here the arms say it; use --train.{name}=auto and --arms")
    if config.train.batch_size < 2:
        raise ConfigError("train.batch_size: LocalViT's norms need more than 1 image; use a --batch of at least 2")
    return config, device


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vitlocal.bench step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False, usage="%(prog)s [options] [options of train_imagenet.py]",
    )  # fmt: skip
    parser.add_argument("--sizes", help="image sizes, px; none: " + "; ".join(f"{of}: {s}" for of, s in SIZES.items()))
    parser.add_argument("--arms", help="none: all that the device allows; on a CPU the eager ones")
    parser.add_argument("--batch", type=int, help="as --train.batch_size; none: 1024 on a GPU, 16 on a CPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each arm at each size (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="about the length of a turn, one step at least (%(default)s)"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", type=plot_file, metavar="FILE")
    options, rest = parser.parse_known_args(argv)
    if options.rounds < 1 or options.seconds < 0:
        raise ConfigError(f"--rounds {options.rounds} --seconds {options.seconds:g}: expected at least 1 and 0")
    if options.batch is not None:
        rest.append(f"--train.batch_size={options.batch}")
    config, device = configured(rest)
    arms = chosen_arms(options.arms, device)
    sizes = sorted(numbers(options.sizes or SIZES[device.type], "--sizes"))
    check_multiples(sizes, shape_of(config)[1], config.model.name)
    prepare_device(config)
    precision = choose_precision(config.train.precision, device)
    peak, how = measured_peak(precision, device)
    rows = compare(config, arms, sizes, options.rounds, options.seconds, device, peak)
    print(table(rows))
    print(f"batches of {config.train.batch_size} on {device}, {str(precision).removeprefix('torch.')}; "
          f"MFU is of {peak:.3g} TFLOP/s: {how}; phases were timed in steps of their own")  # fmt: skip
    if options.json:
        what = "the training step on noise that lies on the device, arms by turns in one process"
        more = {
            "device": str(device), "batch_size": config.train.batch_size,
            "precision": str(precision).removeprefix("torch."),
        }  # fmt: skip
        write_json(options.json, measurement(what, rows, **more, peak_tflops=round(peak, 4), peak_measured=how))
    if options.plot:
        draw(rows, options.plot)
