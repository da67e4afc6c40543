"""Simulates how a budget is spent: walks through a curriculum at given speeds, stage by stage, without training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitlocal.progress import Length, Progress, Stage


@dataclass(frozen=True)
class Speed:
    """The speed of training at one image size."""

    images_per_second: float
    batch_size: int
    flops: float = 0.0  # of an image, forward and backward


@dataclass(frozen=True)
class StageForecast:
    """A stage with crops of ``size`` px: what it trains, and the progress at its ``end``."""

    size: int
    images: int
    epochs: float
    seconds: float
    end: Progress


def spend(
    stages: Sequence[Stage], budget: Length, images: int, speeds: Mapping[int, Speed], used: float = 0.0
) -> tuple[StageForecast, ...]:
    """Spends ``budget`` on ``stages``, for a training set of ``images`` and for ``speeds`` by image size.

    Stages that the budget does not reach get no images. ``used``: seconds of a budget in time that go elsewhere.
    """
    at, spent = Progress(), []
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
        images_seen, epochs = round(seconds * speed.images_per_second), seconds * rates["epochs"]
        at = Progress(
            at.epoch + epochs,
            at.step + round(seconds * rates["steps"]),
            at.images_seen + images_seen,
            at.seconds + seconds,
            at.fraction + seconds * rates["fraction"],
            at.flops + seconds * rates["flops"],
        )
        spent.append(StageForecast(stage.size, images_seen, epochs, seconds, at))
    return tuple(spent)
