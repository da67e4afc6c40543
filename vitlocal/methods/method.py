"""What every method is made from and with: its options, the run around it, and what it need not write itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from vitlocal.plan import Claims, Length, Plan, Probe, ProbeResult, Progress, Shape, Stage, StepResult


class Recipe(Protocol):
    """What a method may ask of the configuration that it is part of."""

    methods: tuple[str, ...]
    model: Any
    train: Any
    augment: Any
    evaluate: Any
    budget: Any
    data: Any
    run: Any

    def of(self, method: str) -> Any: ...  # that method's own options

    @property
    def claims(self) -> Sequence[Claims]: ...  # of its methods


@dataclass(frozen=True)
class Surroundings:
    """What a method may know of the run, beside its configuration."""

    recipe: Recipe
    images: int = 1  # of the training split
    image_bytes: Callable[[int], int] = lambda size: size * size  # activations of an image of a size, on the device
    macs: Callable[[int, Shape], int] = lambda size, shape: size * size  # of an image of a size, forward
    parts: Mapping[str, int] | None = None  # see surgery.parts_of
    blocks: int = 0  # of the model; 0 where it has none that can be told apart
    processes: int = 1


class Defaults:
    """A method that keeps nothing, measures nothing, and goes with every other one. Each overrides what it must.

    ``options`` is a frozen dataclass whose fields are made by :func:`vitlocal.options.option`; the recipe's section of
    the method's name fills it.
    """

    name: ClassVar[str]
    writes: ClassVar[frozenset[str]]
    options: ClassVar[type]
    averages: Sequence[float] = ()  # decays a step of copies of the weights that it wants beside the run's own
    taps: frozenset[str] = frozenset()  # what it wants to be told of each step beside the loss
    stage_rows: int = 0  # of a table of stages that the model is to have, the last one standing for no stage
    length: Length | None = None  # of the run, where the method reckons it, in place of budget.length
    refuses: Mapping[str, str] = {}  # fields that no other method may set beside it, and why

    @classmethod
    def claims(cls, recipe: Recipe) -> Claims:
        """What the recipe has it set, told before anything is built; overridden where that hangs on its options."""
        return Claims(cls.name, cls.writes, cls.refuses)

    @staticmethod
    def problems(recipe: Recipe) -> list[str]:
        """What the recipe asks of this method and cannot be: sentences that name option, value and remedy."""
        return []

    @staticmethod
    def doubts(recipe: Recipe) -> list[str]:
        """What the recipe asks of this method and may hardly mean: sentences, told when the run begins."""
        return []

    @staticmethod
    def feeds(recipe: Recipe) -> Sequence[Stage]:
        """The image sizes that it will feed and until when, as far as that is known before a run; none: not its own."""
        return []

    def plan(self, plan: Plan, at: Progress) -> Plan:
        raise NotImplementedError

    def changes(self) -> Sequence[Length]:
        return []

    def variants(self, plan: Plan, at: Progress) -> Sequence[Plan]:
        return []

    def evaluated(self, shape: Shape) -> Shape:
        return shape

    def probes(self, at: Progress) -> Sequence[Probe]:
        return []

    def observe(self, seen: StepResult | ProbeResult) -> None:
        pass

    def choices(self) -> Sequence[str]:
        return []

    def notes(self) -> dict[str, Any]:
        return {}

    def load_notes(self, notes: dict[str, Any]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
