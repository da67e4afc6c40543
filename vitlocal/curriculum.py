"""An image-size curriculum: the size of the training crops at any point of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vitlocal.errors import ConfigError
from vitlocal.progress import Length, Progress, Stage

EXAMPLE = "32px until 10%, 64px until 30%, 224px"


def stage_problem(stages: Sequence[Stage]) -> str | None:
    """What is wrong with the ends of a curriculum's stages; None if nothing is."""
    ends = [stage.until for stage in stages[:-1] if stage.until is not None]
    if not stages or len(ends) < len(stages) - 1 or stages[-1].until is not None:
        found = ", ".join(map(str, stages)) or "none"
        return f"got {found}; expected an end for each stage except the last, as in {EXAMPLE}"
    if empty := [stage for stage in stages[:-1] if stage.until is not None and not stage.until.value]:
        return f"the stage {empty[0]} is empty; remove it"
    for before, after in pairwise(ends):
        if after.kind == before.kind and after.value <= before.value:
            return f"{after} does not come after {before}; expected increasing ends"
    return None


@dataclass(frozen=True)
class Curriculum:
    """Stages of image sizes, each until its end; the last has none. ConfigError for ends that do not increase."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if problem := stage_problem(self.stages):
            raise ConfigError(f"curriculum: {problem}")

    @classmethod
    def parse(cls, text: str) -> Curriculum:
        """Reads ``32px until 10%, 64px until 30%, 224px``. Ends are fractions of the budget, epochs (5ep), or times."""
        try:
            return cls(tuple(Stage.parse(part) for part in text.split(",")))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"curriculum: got {text!r}, expected {error}") from None

    def size(self, at: float | Progress) -> int:
        """The size at a point of the run, px: a fraction of the budget, or a Progress for ends in other units."""
        if not isinstance(at, Progress):
            if odd := [stage.until for stage in self.stages if stage.until and stage.until.kind != "fraction"]:
                raise ConfigError(
                    f"curriculum: the end {odd[0]} is not a fraction of the budget; call size(Progress(epoch=…)) with "
                    "the progress in its unit, or write ends such as 10%"
                )
            at = Progress(fraction=float(at))
        at = replace(at, epoch=at.epoch + 1e-9)  # it is a float; 1e-9 epochs are less than an image
        return next(stage.size for stage in self.stages if stage.until is None or stage.until.fraction_done(at) < 1)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(stage.size for stage in self.stages)

    @property
    def changes(self) -> tuple[Length, ...]:
        """The ends of all stages but the last."""
        return tuple(stage.until for stage in self.stages if stage.until is not None)

    def __str__(self) -> str:
        return ", ".join(map(str, self.stages))
