"""What is wrong with a run, or hardly meant, told before its first step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from vitlocal.config import IMMATERIAL, Config
from vitlocal.errors import ConfigError
from vitlocal.methods import METHODS
from vitlocal.models.factory import patch_side
from vitlocal.models.shape import check_shape
from vitlocal.progress import FIELDS, upcoming_changes
from vitlocal.report.run_folder import read_log
from vitlocal.train.distributed import Ranks

if TYPE_CHECKING:
    from vitlocal.train.run import Run

TRAINED = 0.5  # of the time, where everything counts: less than that is told
SEARCHED = 0.25  # of the time: more than that for searches is told


def check_sizes(config: Config, model: nn.Module) -> None:
    """Raises ConfigError where the model does not take a size that the run would come to, hours later perhaps."""
    patch, largest = patch_side(model), config.model.size
    fed = [(name, stage.size) for name in config.methods for stage in METHODS[name].image_sizes(config)]
    stated = [("model.size", largest), ("evaluate.size", config.evaluate.size)]
    odd = [f"{name} {size}" for name, size in (*stated, *fed) if size % patch]
    if odd:
        raise ConfigError(f"{', '.join(odd)}: expected multiples of {patch}, the patch side of {config.model.name}")
    if above := [f"{name} {size}" for name, size in fed if size > largest]:
        raise ConfigError(f"{', '.join(above)}: expected at most model.size ({largest})")


def check_clock(config: Config, device: torch.device, ranks: Ranks) -> None:
    """Raises ConfigError where processor time would not be that of training."""
    if config.budget.counts == "cpu" and (device.type != "cpu" or ranks.world > 1):
        raise ConfigError("budget.counts: cpu is for one process on a CPU; set run.device=cpu, or let training count")


def check_peers(config: Config, ranks: Ranks) -> None:
    """Raises ConfigError where the processes were not all started with the same options."""
    theirs = ranks.broadcast(config.flat())
    apart = [name for name, value in config.flat().items() if name not in IMMATERIAL and theirs[name] != value]
    if apart:
        raise ConfigError(f"{', '.join(apart)}: rank {ranks.rank} and rank 0 were started with different values")


def check_plans(run: Run) -> None:
    """Raises ConfigError where a batch is too small to be shared, or the model lacks a part that a method counts on."""
    plans, world = run.plans_ahead(), run.ranks.world
    small = min(plan.feed.batch_size for plan in plans)
    if small < 2 * world:
        raise ConfigError(
            f"train.batch_size: {small} is too small for {world} processes, which take pairs of images; use at least "
            f"{2 * world}"
        )
    for plan in plans:
        check_shape(run.model, plan.shape)


def config_warnings(run: Run) -> list[str]:
    """What is allowed, and may be a mistake: a sentence each."""
    config, count = run.config, run.sources.train.count
    warmup, length, batch = config.train.warmup, config.budget.length, config.train.batch_size
    epochs = dict.fromkeys(FIELDS, math.nan) | {"epochs": 1.0, "steps": batch / count}  # in a unit
    found = list(run.config_warnings)
    if run.started_anew:
        found.append(f"{', '.join(run.started_anew)} start anew; all other weights are from {config.model.weights}")
    if warmup.value * epochs[warmup.kind] > length.value * epochs[length.kind] or (
        warmup.kind == length.kind and warmup.value > length.value
    ):
        found.append(f"the warm-up ({warmup}) is longer than the budget ({length}): the learning rate never gets up")
    if config.budget.counts == "wall" and length.kind != "seconds":
        found.append(f"budget.counts=wall is for budgets in time, and has no effect on {length}")
    if batch > count:
        found.append(f"train.batch_size is {batch}, and there are {count} images: each epoch is one step")
    largest, stored = max(plan.feed.size for plan in run.plans_ahead()), run.sources.train.side
    if stored is not None and largest > stored:
        found.append(
            f"images are trained on at up to {largest} px, and stored with long edges of at most {stored} px: they are "
            f"enlarged. If the photos are larger, write them so: write_dataset.py --sides "
            f"{math.ceil(largest * config.data.side_ratio)}"
        )
    return found


def end_warnings(run: Run) -> list[str]:
    """What the recipe asks for and the budget did not buy, at its end: a sentence each."""
    config, at, found = run.config, run.clock.progress, []
    later = [
        run.plan(),
        *(run.plan(point) for method in run.methods for point in upcoming_changes(method.changes(), at)),
    ]
    sizes = sorted({plan.feed.size for plan in later} - {record["image_size"] for record in read_log(run.folder)})
    if sizes:
        found.append(f"the budget ended before images of {', '.join(map(str, sizes))} px")
    clock = run.clock
    if clock.counts_all and clock.train_seconds < TRAINED * clock.wall_seconds:
        found.append(
            f"{clock.train_seconds:.0f} of {clock.wall_seconds:.0f} s were training: starting, evaluating and saving "
            "took the others; with budget.counts=train they do not count"
        )
    if config.train.warmup.value and config.train.warmup.fraction_done(at) < 1:
        found.append(f"the budget ended in the warm-up ({config.train.warmup})")
    if run.probing > SEARCHED * run.clock.train_seconds:
        found.append(
            f"searches took {run.probing:.0f} of {run.clock.train_seconds:.0f} s, which is much: in so short a budget, "
            "search less often (stages) or by fewer batches (autoprog.batches; unfreeze.kernel_batches, timed_batches)"
        )
    return found
