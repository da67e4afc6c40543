"""Simulates how a budget is spent: walks through a curriculum at given speeds, stage by stage, without training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vitlocal.progress import Length, Progress, Stage

MAX_DOUBLINGS = 40  # of a budget, until it reaches the last size


@dataclass(frozen=True)
class Speed:
    """The speed of training at one image size."""

    images_per_second: float
    batch_size: int
    flops: float = 0.0  # of an image, forward and backward


@dataclass(frozen=True)
class StageForecast:
    """A stage with crops of ``size`` px, from ``start`` to ``end``."""

    size: int
    start: Progress
    end: Progress

    @property
    def images(self) -> int:
        return self.end.images_seen - self.start.images_seen

    @property
    def epochs(self) -> float:
        return self.end.epoch - self.start.epoch

    @property
    def seconds(self) -> float:
        return self.end.seconds - self.start.seconds


def spend(
    stages: Sequence[Stage], budget: Length, images: int, speeds: Mapping[int, Speed], used: float = 0.0
) -> tuple[StageForecast, ...]:
    """Spends ``budget`` on ``stages``, for a training set of ``images`` and for ``speeds`` by image size.

    The result has all stages. Those that the budget does not reach get no images. ``used`` are seconds of a budget in
    time that do not go to training.
    """
    at = Progress()
    spent = []
    for stage in stages:
        speed = speeds[stage.size]
        # How much of each kind of length passes in a second.
        rates = {
            "epochs": speed.images_per_second / images,
            "steps": speed.images_per_second / speed.batch_size,
            "seconds": 1.0,
            "flops": speed.images_per_second * speed.flops,
        }
        whole = budget.value - (used if budget.kind == "seconds" else 0.0)
        rates["fraction"] = rates[budget.kind] / whole
        seconds = max(0.0, 1 - at.fraction) / rates["fraction"]
        if stage.until is not None:
            left = (stage.until.value - stage.until.elapsed(at)) / rates[stage.until.kind]
            seconds = min(seconds, max(0.0, left))
        end = replace(
            at,
            epoch=at.epoch + seconds * rates["epochs"],
            step=at.step + math.floor(seconds * rates["steps"] + 0.5),
            images_seen=at.images_seen + round(seconds * speed.images_per_second),
            seconds=at.seconds + seconds,
            fraction=at.fraction + seconds * rates["fraction"],
            flops=at.flops + seconds * rates["flops"],
        )
        spent.append(StageForecast(stage.size, at, end))
        at = end
    return tuple(spent)


def spend_wall_time(
    stages: Sequence[Stage],
    budget: Length,
    images: int,
    speeds: Mapping[int, Speed],
    other: float,
    evaluation: float,
    every: int,
) -> tuple[StageForecast, ...] | None:
    """As :func:`spend`, if the budget counts all time. None if no time is left for training.

    ``other`` are the seconds of starting and saving, ``evaluation`` those of one evaluation. There is one at the end,
    and one after each ``every`` epochs (0: none).
    """
    spent, count = None, 1
    while (used := other + count * evaluation) < budget.value:
        spent = spend(stages, budget, images, speeds, used)
        due = 1 + (int(spent[-1].end.epoch) // every if every else 0)
        if due <= count:  # each evaluation leaves less time for epochs, so the first count that suffices is the answer
            break
        count += 1
    return spent


def seconds_at(stages: Sequence[StageForecast], epoch: float) -> float:
    """The seconds of training at which ``epoch`` is reached."""
    for stage in stages:
        if stage.epochs and epoch <= stage.end.epoch + 1e-9:
            return stage.start.seconds + (epoch - stage.start.epoch) / stage.epochs * stage.seconds
    return stages[-1].end.seconds


def by_fractions(
    stages: Sequence[Stage], budget: Length, images: int, speeds: Mapping[int, Speed], spent: Sequence[StageForecast]
) -> tuple[Stage, ...]:
    """The curriculum with ends in fractions of its budget, which also fit other budgets.

    ``spent`` is how ``budget`` is spent. If it ends before the last size, it is doubled until it does not. The last
    size then gets as much time as the size before it. A size that no budget reaches is left out.
    """
    length = budget
    for _ in range(MAX_DOUBLINGS):
        if spent[-1].seconds > 0:
            break
        length = replace(length, value=2 * length.value)
        spent = spend(stages, length, images, speeds)
    spent = [stage for stage in spent if stage.seconds > 0]
    cut = length != budget and len(spent) > 1
    whole = spent[-1].start.seconds + spent[-2].seconds if cut else spent[-1].end.seconds
    found, before = [], 0.0
    for stage in spent[:-1]:
        percent = round(100 * stage.end.seconds / whole, 4)
        if before < percent < 100:
            found.append(Stage.parse(f"{stage.size}px until {percent:.4f}".rstrip("0").rstrip(".") + "%"))
            before = percent
    return (*found, Stage(spent[-1].size))
