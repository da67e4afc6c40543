"""The parts that methods with a search share: candidate nets, ladders of sizes, stages, and remembered decisions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vitlocal.methods.method import Method, MethodContext
from vitlocal.options import Parsed
from vitlocal.progress import Length, Progress, Stage

T = TypeVar("T")
SearchT = TypeVar("SearchT", bound="SearchMethod")


class Net(NamedTuple):
    """A candidate: ``depth`` blocks (or a level of unfreezing) at this image size. None: the size of other methods."""

    depth: int
    size: int | None

    def __str__(self) -> str:
        return f"{self.depth}" + (f"@{self.size}px" if self.size else "")


def parse_net(value: Any) -> Net:
    """Reads ``8@160px``, or ``8`` without a size."""
    match = re.fullmatch(r"(\d+)(?:@(\d+)px)?", str(value).replace(" ", ""))
    if match is None or not int(match[1]):
        raise ValueError
    return Net(int(match[1]), int(match[2]) if match[2] else None)


NET = Parsed(parse_net, "a number and a size: 6@128px, 8@160px, 12@224px; or only numbers")


def schedule_problems(name: str, schedule: Sequence[Net], stages: int) -> list[str]:
    """Errors in the option ``{name}.schedule`` that do not depend on the method."""
    found = []
    if len(schedule) != stages:
        found.append(f"{name}.schedule: got {len(schedule)} entries for {stages} stages; give one entry for each stage")
    sizes = [net.size for net in schedule]
    if any(size is not None and after is not None and after < size for size, after in pairwise(sizes)):
        found.append(f"{name}.schedule: got sizes {sizes}, expected sizes that do not decrease, up to model.size")
    return found


def schedule_warnings(name: str, schedule: Sequence[Net] | None, model_size: int) -> list[str]:
    """A warning if the last entry of ``{name}.schedule`` is smaller than the model's size."""
    if not schedule or schedule[-1].size in (None, model_size):
        return []
    return [f"{name}.schedule ends with {schedule[-1]}, and model.size is {model_size}: no step trains at that size"]


def divisible(value: float, divisor: int) -> int:
    """The multiple of ``divisor`` nearest to ``value``, at least ``divisor`` and nine tenths of ``value``."""
    found = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return found + divisor if found < 0.9 * value else found


def ladder(largest: int, scale: float, stages: int, divisor: int) -> tuple[int, ...]:
    """Equal steps from ``scale * largest`` to ``largest``, without repeats: 128, 160, 192, 224 for 224, 0.5, 4, 32.

    The last step is ``largest``, even if the divisor does not divide it.
    """
    parts = np.linspace(scale, 1.0, stages).tolist() if stages > 1 else [1.0]
    found = [min(divisible(part * largest, divisor), largest) for part in parts[:-1]]
    return tuple(dict.fromkeys((*found, largest)))


def stages_of(sizes: Sequence[int], stages: int) -> tuple[Stage, ...]:
    """Equal stages with these sizes. The last size repeats if there are fewer sizes than stages."""
    ends = [*map(as_fraction, equal_bounds(stages)[1:]), None]
    return tuple(
        Stage(size, end) for size, end in zip((*sizes, *[sizes[-1]] * (stages - len(sizes))), ends, strict=True)
    )


def equal_bounds(stages: int) -> list[float]:
    """The fractions of the budget at which equal stages begin."""
    return [k / stages for k in range(stages)]


def as_fraction(value: float) -> Length:
    """``value`` of the budget as a length: 0.25 gives 25%."""
    return Length(value, "fraction", f"{100 * value:.4g}%")


def remembered(compute: Callable[[SearchT, int], T]) -> Callable[[SearchT, int], T]:
    """Stores the result of ``compute`` for each stage until more is observed, because each step needs it."""

    @wraps(compute)
    def remember(self: SearchT, stage: int) -> T:
        key = (compute.__name__, stage)
        if key not in self._memory:
            self._memory[key] = compute(self, stage)
        return self._memory[key]

    return remember


class SearchMethod(Method):
    """Base class of methods that choose a net at the start of each stage.

    Subclasses set the stages' ``bounds`` and implement ``_candidates``, ``_answered`` and ``_best``, which depend
    only on the observed results. ``observe`` and ``load_state_dict`` must clear ``_memory``.
    """

    _undecided = 0  # the candidate that stands for a stage whose search is not finished

    def __init__(self, context: MethodContext, bounds: Sequence[float]):
        super().__init__(context)
        self._bounds = bounds  # fractions of the budget at which the stages begin
        self._asked_stage = 0  # the stage of the last probe
        self._memory: dict[tuple[str, int], Any] = {}

    def changes(self) -> Sequence[Length]:
        return [as_fraction(bound) for bound in self._bounds[1:]]

    def choices(self) -> Sequence[str]:
        searched = [stage for stage in range(len(self._bounds)) if len(self._candidates(stage)) > 1]
        return [str(self._chosen(stage)) for stage in searched if self._decided(stage)]

    def _stage(self, progress: Progress) -> int:
        """The stage at ``progress``, from 0."""
        return sum(progress.fraction >= bound - 1e-12 for bound in self._bounds) - 1

    def _candidates(self, stage: int) -> list[Net]:
        """The nets from which ``stage`` chooses; a single one if there is no choice."""
        raise NotImplementedError

    def _answered(self, stage: int) -> bool:
        """Whether all results for the choice of ``stage`` are known."""
        raise NotImplementedError

    def _best(self, stage: int) -> Net:
        """The choice of ``stage``, once all results are known."""
        raise NotImplementedError

    def _decided(self, stage: int) -> bool:
        return len(self._candidates(stage)) == 1 or self._answered(stage)

    @remembered
    def _chosen(self, stage: int) -> Net:
        """The net of ``stage``; one of the candidates as long as its search is not finished."""
        nets = self._candidates(stage)
        if len(nets) == 1:
            return nets[0]
        return self._best(stage) if self._answered(stage) else nets[self._undecided]
