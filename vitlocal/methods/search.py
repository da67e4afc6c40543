"""The base class of methods with a search, and its candidate nets."""

import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vitlocal.methods.method import Method, MethodContext, Recipe
from vitlocal.options import Parsed, messages
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
    """Base class of methods that choose a net at the start of each stage. ``schedule`` states the nets instead.

    Subclasses have the options ``stages``, ``schedule``, ``min_scale`` and ``size_multiple``. They implement
    ``_candidates`` and ``_best``, which depend only on the observed results. Their ``observe`` and ``load_state_dict``
    must clear ``_memory``.
    """

    _undecided = 0  # the candidate that stands for a stage whose search is not finished

    def __init__(self, context: MethodContext):
        super().__init__(context)
        stages = context.recipe.options[self.name].stages
        self._bounds = [k / stages for k in range(stages)]  # fractions of the budget at which the stages begin
        self._asked_stage = 0  # the stage of the last probe
        self._memory: dict[tuple[str, int], Any] = {}

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        config = recipe.options[cls.name]
        if config.schedule is None:
            return []
        count, sizes = len(config.schedule), [net.size for net in config.schedule if net.size is not None]
        return messages({
            f"{cls.name}.schedule: got {count} entries for {config.stages} stages; give one entry for each stage":
                count != config.stages,
            f"{cls.name}.schedule: got sizes {sizes}, expected sizes that do not decrease, up to model.size":
                sizes != sorted(sizes),
        })  # fmt: skip

    @classmethod
    def config_warnings(cls, recipe: Recipe) -> list[str]:
        schedule, size = recipe.options[cls.name].schedule, recipe.model_size
        if not schedule or schedule[-1].size in (None, size):
            return []
        end = f"{cls.name}.schedule ends with {schedule[-1]}"
        return [f"{end}, and model.size is {size}: no step trains at that size"]

    @classmethod
    def _ladder(cls, recipe: Recipe) -> tuple[int, ...]:
        """The image sizes of the schedule, or those that a search climbs."""
        config = recipe.options[cls.name]
        stated = tuple(net.size for net in config.schedule or () if net.size is not None)
        return stated or ladder(recipe.model_size, config.min_scale, config.stages, config.size_multiple)

    @classmethod
    def image_sizes(cls, recipe: Recipe) -> Sequence[Stage]:
        """Equal stages with the sizes of :meth:`_ladder`. A search may reach larger sizes sooner or later."""
        sizes, stages = cls._ladder(recipe), recipe.options[cls.name].stages
        if set(sizes) == {recipe.model_size}:
            return ()
        sizes = (*sizes, *sizes[-1:] * stages)[:stages]
        ends = [*(as_fraction(k / stages) for k in range(1, stages)), None]
        return [Stage(size, end) for size, end in zip(sizes, ends, strict=True)]

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

    def _best(self, stage: int) -> Net | None:
        """The choice of ``stage`` among several candidates; None until all results are known."""
        raise NotImplementedError

    @remembered
    def _decision(self, stage: int) -> Net | None:
        nets = self._candidates(stage)
        return nets[0] if len(nets) == 1 else self._best(stage)

    def _decided(self, stage: int) -> bool:
        return self._decision(stage) is not None

    def _chosen(self, stage: int) -> Net:
        """The net of ``stage``; one of the candidates as long as its search is not finished."""
        return self._decision(stage) or self._candidates(stage)[self._undecided]
