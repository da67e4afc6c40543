"""What a budget buys at given speeds: a run, walked through stage by stage without training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vitlocal.config import Config
from vitlocal.methods import METHODS
from vitlocal.progress import Length, Progress, Stage


@dataclass(frozen=True)
class Speed:
    """How fast a run goes at one image size."""

    images_per_second: float
    batch_size: int
    flops: float = 0.0  # of an image, forward and backward


@dataclass(frozen=True)
class StageForecast:
    """One stage: from ``start`` to ``end``, in crops of ``size`` px."""

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


def curriculum(config: Config) -> tuple[Stage, ...]:
    """The recipe's stages, as far as they are known before a run; where no method feeds sizes one, at the model's."""
    each = (tuple(METHODS[name].image_sizes(config.recipe)) for name in config.methods)
    return next((stages for stages in each if stages), (Stage(config.model.size),))


def spend(
    stages: tuple[Stage, ...], budget: Length, images: int, speeds: Mapping[int, Speed], used: float = 0.0
) -> tuple[StageForecast, ...]:
    """Spends ``budget`` on ``stages``, for a training set of ``images`` and ``speeds`` by size.

    Stages that the budget does not reach are left in, and get nothing. ``used``: the part of a budget in time that is
    not for training.
    """
    at = Progress()
    spent = []
    for stage in stages:
        speed = speeds[stage.size]
        # What passes of each kind of length, in a second.
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
            to_go = (stage.until.value - stage.until.elapsed(at)) / rates[stage.until.kind]
            seconds = min(seconds, max(0.0, to_go))
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
