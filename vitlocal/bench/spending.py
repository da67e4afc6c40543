"""What a budget buys at given speeds: the forecast of a run, stage by stage, and of other budgets."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from vitlocal.config import Config
from vitlocal.errors import ConfigError
from vitlocal.progress import Length, Progress, Stage
from vitlocal.storage import recipe_stages
from vitlocal.train.simulate import Speed, StageForecast, spend

MAX_DOUBLINGS = 40  # of a budget, until it reaches the last size


@dataclass(frozen=True)
class SizeSpeed:
    """The images/s of training at one size. ``loader`` is None without data."""

    size: int
    batch_size: int
    together: float
    step: float
    gflops: float  # of an image, forward and backward, with two FLOPs for each multiply-add
    loader: float | None = None
    measured_batch: int | None = None
    step_mode: str = "stated"
    data_wait_fraction: float = 0.0
    compile_seconds: float = 0.0
    device_mib: float | None = None  # peak of a GPU


@dataclass(frozen=True)
class Forecast:
    """The measured speeds, and what the recipe's own budget and other budgets buy with them."""

    config: Config
    images: int
    sizes: tuple[SizeSpeed, ...]
    evaluation_seconds: float | None = None
    other_seconds: float = 0.0  # starting, compiling, saving and the report, which a budget of all time counts
    disk_bytes: int | None = None
    resident_mib: float | None = None
    measured_seconds: float | None = None  # the time for measuring the sizes, without compiling

    @property
    def counts_all(self) -> bool:
        """Whether the budget counts all time, and not only training."""
        return self.config.budget.counts == "wall" and self.config.budget.length.kind == "seconds"

    @cached_property
    def stages(self) -> tuple[StageForecast, ...]:
        """The recipe's budget, stage by stage."""
        return self.spending(recipe_stages(self.config), self.config.budget.length)

    @property
    def speeds(self) -> dict[int, Speed]:
        return {speed.size: Speed(speed.together, speed.batch_size, 1e9 * speed.gflops) for speed in self.sizes}

    def spending(self, stages: Sequence[Stage], length: Length) -> tuple[StageForecast, ...]:
        """Simulates spending ``length`` on ``stages``. Raises ConfigError if no time is left for training."""
        if not self.counts_all:
            return spend(stages, length, self.images, self.speeds)
        used, evaluation = self.other_seconds, self.evaluation_seconds or 0.0
        if used + evaluation >= length.value:
            raise ConfigError(
                f"budget.length: got {length}, but starting, saving and one evaluation take {used + evaluation:.0f} s; "
                "give more time, or count only training: budget.counts=train"
            )
        every, evaluations, due = math.ceil(self.config.evaluate.every), 0, 1
        # Each evaluation leaves less time for epochs, so the first number that suffices is the answer.
        while evaluations < due and used + evaluation < length.value:
            evaluations, used = evaluations + 1, used + evaluation
            spent = spend(stages, length, self.images, self.speeds, used)
            due = 1 + (int(spent[-1].end.epoch) // every if every else 0)
        return spent

    @property
    def first_point(self) -> float | None:
        """Seconds of training until the first evaluation; None if only the end of the run is evaluated."""
        every, ends = math.ceil(self.config.evaluate.every), [Progress(), *(stage.end for stage in self.stages)]
        if not 0 < every < ends[-1].epoch:
            return None
        return float(np.interp(every, [end.epoch for end in ends], [end.seconds for end in ends]))

    @cached_property
    def fractions(self) -> tuple[Stage, ...]:
        """The recipe's curriculum with ends in fractions of its budget, which also fit other budgets.

        A budget that ends before the last size is doubled until it does not. That size then gets as much time as the
        size before it.
        """
        spent, length = self.stages, self.config.budget.length
        for _ in range(MAX_DOUBLINGS):
            if spent[-1].seconds > 0:
                break
            length = replace(length, value=2 * length.value)
            spent = spend(recipe_stages(self.config), length, self.images, self.speeds)
        *first, last = (stage for stage in spent if stage.seconds > 0)
        is_cut = first and length != self.config.budget.length
        whole = first[-1].end.seconds + first[-1].seconds if is_cut else last.end.seconds
        found, before = [], 0.0
        for stage in first:
            percent = round(100 * stage.end.seconds / whole, 4)
            if before < percent < 100:
                found.append(Stage.parse(f"{stage.size}px until {percent:g}%"))
                before = percent
        return (*found, Stage(last.size))

    def within(self, budgets: Sequence[Length]) -> list[dict[str, Any]]:
        """A row for each budget: its epochs, in all and by size, with the same fractions; None if it is too short."""
        found: list[dict[str, Any]] = []
        for budget in budgets:
            row: dict[str, Any] = {"budget": str(budget), "epochs": None, "epochs_by_size": None}
            with suppress(ConfigError):
                spent = self.spending(self.fractions, budget)
                sizes = dict.fromkeys((stage.size for stage in spent), 0.0)
                for stage in spent:
                    sizes[stage.size] += stage.epochs
                row |= {"epochs": spent[-1].end.epoch, "epochs_by_size": sizes}
            found.append(row)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row for each stage: the speeds at its size, and its part of the budget."""
        by_size = {speed.size: speed for speed in self.sizes}
        return [
            asdict(speed := by_size[stage.size])
            | {
                "bottleneck": "data" if (speed.loader or speed.step) < speed.step else "step",
                "images_per_second": speed.together, "epochs": stage.epochs, "images": stage.images,
                "train_seconds": stage.seconds, "until_epoch": stage.end.epoch,
            }
            for stage in self.stages
        ]  # fmt: skip
