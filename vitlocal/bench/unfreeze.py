"""Schedules of `unfreeze`: python -m vitlocal.bench unfreeze [--sizes 64,128,192,256] [TRAINER'S OPTIONS]

Times the training step at each image size with each level of groups of blocks, on random inputs that are on the device.
The model has random weights, and there are as many levels and stages as sizes. From these times the bench computes how
much faster schedules of equal stages are than full fine-tuning at the largest size, at equal steps. Beside it is the
ratio by FLOPs, where a frozen block saves the products of its weights' gradients.

    freezing alone    levels 1, 2, ..., all at the largest size
    sizes alone       all blocks at each size
    ladder            level 1 at the first size, 2 at the second, ...
    time-heavy vote   level 1 at the first size, then at the second, and all blocks at the last size in the last stage
    bound             level 1 at the first size, and all blocks at the last size in the last stage

"mod" are the groups that the paper's code means, "released" those that it makes. The eager step is measured first, and
then the compiled one, for which each size and level compiles. What the most schedules need comes first, so that
--minutes may end the bench. The default model is DiT-XL/2 on a GPU, and a very small DiT on a CPU.
"""

import gc
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vitlocal.bench.measurement import spread, text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser, check_multiples, names, numbers
from vitlocal.bench.step import CLASSES, measured_peak
from vitlocal.config import Config, read_config
from vitlocal.errors import ConfigError, DeviceMemoryError
from vitlocal.methods.unfreeze import groups_of
from vitlocal.models.counts import count_macs
from vitlocal.models.factory import size_multiple
from vitlocal.models.shape import model_blocks
from vitlocal.plan import Feed, Shape
from vitlocal.progress import TRAINING_FLOPS
from vitlocal.train.build import build_step, device_of
from vitlocal.train.devices import choose_device, choose_precision
from vitlocal.train.step import TrainStep
from vitlocal.train.timing import Timing, fill_zeros, noise_batch, noise_step, peak_memory, reset_peak

GROUPS, MODES = ("mod", "released"), ("eager", "compiled")
FINE_TUNING = {"model.drop_path": "0", "train.ema_decay": "0.9999", "train.weight_decay": "0", "methods": "none"}
# Defaults below recipes and the command line; they replace the environment. 256 is the paper's global batch.
DEFAULTS = {
    "cpu": FINE_TUNING | {
        "model.name": "vitlocal_dit_small_patch2", "model.size": "256", "model.width": "32", "model.depth": "12",
        "model.heads": "2", "train.batch_size": "4",
    },
    "cuda": FINE_TUNING | {
        "model.name": "vitlocal_dit_xlarge_patch2", "model.size": "256", "train.batch_size": "256",
    },
}  # fmt: skip
COLUMNS = {
    "mode": ("mode", ""), "px": ("size", "d"), "trained": ("trained_blocks", "d"), "mod": ("mod_level", "d"),
    "released": ("released_level", "d"), "images/s": ("images_per_second", ",.1f"), "step ms": ("step_ms", ",.1f"),
    "spread": ("spread", ".1%"), "n": ("n", "d"), "MFU": ("mfu", ".1%"), "GFLOP/image": ("gflops_per_image", ",.2f"),
    "peak MiB": ("peak_mib", ",d"), "compile s": ("compile_seconds", ".1f"),
}  # fmt: skip
SCHEDULE_COLUMNS = {
    "mode": ("mode", ""), "groups": ("groups", ""), "schedule": ("schedule", ""), "stages": ("stages", ""),
    "speed-up": ("speed_up", ".2f"), "spread": ("spread", ".1%"), "by FLOPs": ("by_flops", ".2f"),
}  # fmt: skip
Net = tuple[int, int]  # an image size, px, and a number of trained blocks: those of the level that trains as many
Stages = Sequence[tuple[int, int]]  # a level and an image size, px, for each stage


def schedules_of(sizes: Sequence[int]) -> dict[str, Stages]:
    """The schedules by name, for increasing ``sizes``. The first one is full fine-tuning."""
    count, last = len(sizes), sizes[-1]
    levels, start, full = range(1, count + 1), (1, sizes[0]), (count, last)
    return {
        "all": [full] * count,
        "freezing alone": [(level, last) for level in levels],
        "sizes alone": [(count, size) for size in sizes],
        "ladder": list(zip(levels, sizes, strict=True)),
        "time-heavy vote": [start, *[(1, sizes[1])] * (count - 2), full],
        "bound": [start] * (count - 1) + [full],
    }


def nets_in_order(sizes: Sequence[int], trained: dict[str, list[int]], levels: Sequence[int]) -> list[Net]:
    """Each image size with each number of trained blocks of the ``levels``, those that most schedules need first.

    ``trained``: the number of trained blocks of each level, by the kind of groups.
    """
    needed = Counter[Net]()
    for groups, counts in trained.items():
        needed.update((size, counts[level - 1]) for level in levels for size in sizes)
        for stages in schedules_of(sizes).values():
            # The groups "mod" come before "released", which differ in the levels between the first and the last.
            worth = 100 if groups == GROUPS[0] else 10
            needed.update({(size, counts[level - 1]): worth for level, size in set(stages) if level in levels})
    return [net for net, _ in needed.most_common()]


class TimedNet:
    """A step at one image size with some trained blocks: compiled, run, and measured once; then measured in turns."""

    def __init__(self, step: TrainStep, feed: Feed, blocks: tuple[int, ...], seconds: float):
        self._step, self.feed, self.shape, self.seconds = step, feed, Shape(trainable_blocks=blocks), seconds
        step.set_shape(self.shape)
        reset_peak(step.device)
        self.compile_seconds = step.warm_up(feed, CLASSES)
        self.mode = step.mode(feed)
        self._run = noise_step(step, noise_batch(feed, CLASSES, step.device, step.task), self.mode)
        self.turns: list[float] = []  # seconds per step
        self._calls = 1
        self.turn()  # the optimizer creates its state
        self._calls = max(1, math.ceil(seconds / self.turns.pop()))
        self.turn()
        self.peak = peak_memory(step.device)

    def turn(self) -> None:
        """Trains for about ``seconds``, after a step that does not count."""
        self._step.set_shape(self.shape)
        self._run()
        # The number of steps is fixed beforehand: reading the clock between steps would need a device sync.
        self.turns.append(Timing().measure(self._run, self._step.device, self._calls))

    def row(self, macs: int, depth: int, peak_tflops: float) -> dict[str, Any]:
        """The row of the measurement, without the levels. ``macs``: of a forward pass of one image."""
        rate = self.feed.batch_size / (took := statistics.median(self.turns))
        trained = len(self.shape.trainable_blocks or ())
        flops = step_cost(macs, trained / depth)
        on_gpu = self._step.device.type == "cuda"
        return {
            "size": self.feed.size, "batch_size": self.feed.batch_size, "trained_blocks": trained,
            "step_mode": str(self.mode), "images_per_second": round(rate, 2), "step_ms": round(1e3 * took, 3),
            "spread": spread(self.turns), "n": len(self.turns),
            "mfu": round(rate * flops / (peak_tflops * 1e12), 4), "gflops_per_image": flops / 1e9,
            "peak_mib": round(self.peak / 2**20) if on_gpu else None,
            "compile_seconds": round(self.compile_seconds, 1) if self.mode.compiled else None,
        }  # fmt: skip


def step_cost(macs: int, trained: float) -> float:
    """The FLOPs of a step for one image if this fraction of the blocks is trained. All else counts as trained."""
    return TRAINING_FLOPS * macs * (2 + trained) / 3


def measure(
    step: TrainStep, nets: Sequence[tuple[Feed, tuple[int, ...]]], repeats: int, seconds: float, ends: float
) -> list[TimedNet]:
    """Measures steps in turns, until ``ends``, a value of ``time.monotonic``; those that do not fit are left out."""
    timed, longest = list[TimedNet](), 0.0
    for feed, blocks in nets:
        began = time.monotonic()
        if began + longest > ends:
            break
        try:
            timed.append(TimedNet(step, feed, blocks, seconds))
        except (torch.OutOfMemoryError, DeviceMemoryError):
            print(f"{feed.size} px, {len(blocks)} blocks: {feed.batch_size} images do not fit", file=sys.stderr)
        longest = max(longest, time.monotonic() - began)
    for _ in range(repeats - 1):
        for net in timed:
            if time.monotonic() < ends:
                net.turn()
    return timed


def schedule_rows(
    mode: str, sizes: Sequence[int], trained: dict[str, list[int]], turns: dict[Net, list[float]], macs: dict[int, int]
) -> list[dict[str, Any]]:
    """The rows of the schedules whose steps were all measured. ``turns``: seconds per step of each turn."""
    rows: list[dict[str, Any]] = []
    for groups, counts in trained.items():
        for name, stages in schedules_of(sizes).items():
            nets = [(size, counts[level - 1]) for level, size in stages]
            full = sizes[-1], counts[-1]
            if name == "all" or not {full, *nets} <= turns.keys():
                continue
            cost = {net: step_cost(macs[net[0]], net[1] / counts[-1]) for net in {full, *nets}}
            # The same turns of all, which were close in time.
            count = min(len(turns[net]) for net in {full, *nets})
            ratios = [len(nets) * turns[full][n] / sum(turns[net][n] for net in nets) for n in range(count)]
            rows.append({
                "mode": mode, "groups": groups, "schedule": name,
                "stages": ", ".join(f"{level}@{size}px" for level, size in stages),
                "speed_up": round(statistics.median(ratios), 3), "spread": spread(ratios),
                "n": count, "by_flops": round(len(nets) * cost[full] / sum(cost[net] for net in nets), 3),
            })  # fmt: skip
    return rows


class ScheduleBench:
    """The bench of one model: ``rows`` of the steps, and of the ``schedules``, once :meth:`run` has measured them."""

    def __init__(self, config: Config, sizes: Sequence[int], levels: Sequence[int], device: torch.device):
        self._config, self._sizes, self._levels, self._device = config, sizes, levels, device
        self.rows, self.schedules = list[dict[str, Any]](), list[dict[str, Any]]()
        self._macs = dict[int, int]()
        precision = choose_precision(config.train.precision, device)
        self.peak_tflops, self.peak_how = measured_peak(precision, device)
        self.precision = str(precision).removeprefix("torch.")

    def run(self, mode: str, repeats: int, seconds: float, ends: float) -> None:
        """Measures the steps in one mode ("eager" or "compiled")."""
        config, stages = self._config, len(self._sizes)
        train = replace(config.train, compile="yes" if mode == "compiled" else "no")
        step = build_step(replace(config, train=train), CLASSES, self._device)
        check_multiples(self._sizes, size_multiple(step.model), config.model.name)
        fill_zeros(step.model)
        depth = len(model_blocks(step.model))
        blocks = {groups: groups_of(depth, stages, groups) for groups in GROUPS}
        trained = {groups: [len(level) for level in levels] for groups, levels in blocks.items()}
        by_count = {len(level): level for groups in reversed(GROUPS) for level in blocks[groups]}
        nets = nets_in_order(self._sizes, trained, self._levels)
        self._macs = {size: count_macs(step.model, size) for size in self._sizes}
        feeds = [(Feed(size, config.train.batch_size), by_count[count]) for size, count in nets]
        timed = measure(step, feeds, repeats, seconds, ends)
        if left := len(nets) - len(timed):
            print(f"{mode}: {left} of {len(nets)} sizes and levels were not measured", file=sys.stderr)
        turns = dict[Net, list[float]]()
        for net in timed:
            row = net.row(self._macs[net.feed.size], depth, self.peak_tflops)
            count = row["trained_blocks"]
            turns[net.feed.size, count] = net.turns
            found = {
                f"{groups}_level": counts.index(count) + 1 if count in counts else None
                for groups, counts in trained.items()
            }
            self.rows.append({"mode": mode, **row, **found})
        self.schedules += schedule_rows(mode, self._sizes, trained, turns, self._macs)


def free_memory() -> None:
    """Frees weights and compiled code that nothing uses any more."""
    torch.compiler.reset()
    gc.collect()  # a model and its compiled step refer to each other
    torch.cuda.empty_cache()


def main(argv: Sequence[str]) -> None:
    began = time.monotonic()
    parser = bench_parser("unfreeze", __doc__)
    add = parser.add_argument
    add("--sizes", type=numbers, metavar="LIST", help="image sizes, px (default: four quarters of model.size)")
    add("--levels", type=numbers, metavar="LIST", help="levels, from 1 to the number of sizes (default: all)")
    add("--modes", metavar="LIST", help="eager,compiled (default: both on a GPU, eager on a CPU)")
    add("--batch", type=at_least(2), metavar="N", help="batch size (default: 256 on a GPU, 4 on a CPU)")
    add("--repeats", type=at_least(1), default=3, help="turns of each size and level (default: 3)")
    add("--seconds", type=at_least(0, float), default=0.3, help="approximate length of a turn (default: 0.3)")
    add("--minutes", type=at_least(0, float), default=8.0, help="time limit; half of it for eager steps (default: 8)")
    options, rest = parser.parse_known_args(argv)
    device = choose_device(read_config(rest).run.device)
    if options.batch is not None:
        rest.append(f"--train.batch_size={options.batch}")
    config = read_config(rest, DEFAULTS.get(device.type, DEFAULTS["cpu"]) | os.environ)
    if config.train.compile != "auto":
        raise ConfigError(f"train.compile: got {config.train.compile}, but the bench sets it; use --modes")
    device_of(config)
    modes = names(options.modes, MODES, "--modes") if options.modes else MODES[: 2 if device.type == "cuda" else 1]
    sizes = sorted(options.sizes or [config.model.size * quarter // 4 for quarter in range(1, 5)])
    levels = options.levels or list(range(1, len(sizes) + 1))
    if len(sizes) < 2 or max(levels) > len(sizes):
        raise ConfigError(
            f"--levels: got {max(levels)} for {len(sizes)} sizes, expected at least two sizes and no higher level"
        )
    bench = ScheduleBench(config, sizes, levels, device)
    what = "steps with some trained blocks, and the speed-up of schedules at equal steps; random weights and inputs"
    for place, mode in enumerate(modes, start=1):
        bench.run(mode, options.repeats, options.seconds, began + 60 * options.minutes * place / len(modes))
        free_memory()
        write_json(options.json, what, bench.rows, schedules=bench.schedules, device=str(device),
                   precision=bench.precision, recipe=config.flat(), peak_tflops=round(bench.peak_tflops, 4),
                   peak_measured=bench.peak_how)  # fmt: skip
    if not bench.rows:
        raise ConfigError(
            f"train.batch_size: nothing was measured on {device}; use a --batch below {config.train.batch_size}, or "
            "more --minutes"
        )
    ordered = sorted(bench.rows, key=lambda row: (MODES.index(row["mode"]), row["size"], row["trained_blocks"]))
    print(text_table(ordered, COLUMNS), text_table(bench.schedules, SCHEDULE_COLUMNS), sep="\n\n")
    print(f"\n{config.model.name}, batches of {config.train.batch_size} on {device}, {bench.precision}; MFU is "
          f"relative to {bench.peak_tflops:.3g} TFLOP/s ({bench.peak_how})")  # fmt: skip
