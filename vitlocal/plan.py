"""What a run does next: methods propose a plan, the trainer acts on it.

A *method* (image-size curriculum, budgeted growth, …) is a pure function from where the run stands
(:class:`Progress`) to what it should do (:class:`Plan`). :func:`fold` applies a recipe's methods in order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

UNITS = {"ep": ("epochs", 1.0), "steps": ("steps", 1.0), "s": ("seconds", 1.0), "m": ("seconds", 60.0),
         "h": ("seconds", 3600.0), "%": ("fraction", None)}  # fmt: skip

FIELDS = {"epochs": "epoch", "steps": "step", "seconds": "seconds", "fraction": "fraction"}  # of Progress


@dataclass(frozen=True)
class Length:
    """A length of training: ``90ep``, ``5000steps``, ``45s``, ``30m``, ``24h``, or ``10%`` of the budget."""

    value: float
    kind: str  # "epochs", "steps", "seconds" or "fraction"
    text: str

    @classmethod
    def parse(cls, text: str) -> Length:
        """Raises ValueError where ``text`` is not a non-negative number and one of the units."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*(ep|steps|s|m|h|%)", text.strip())
        if match is None:
            raise ValueError("a number and a unit: 90ep, 5000steps, 45s, 30m, 24h or 10%")
        kind, scale = UNITS[match[2]]
        number = float(match[1])
        # Divided: 0.35 is the number next to 35 / 100, and not next to 35 × 0.01.
        return cls(number / 100 if scale is None else number * scale, kind, f"{match[1]}{match[2]}")

    def done(self, at: Progress) -> float:
        """The part of this length that lies behind ``at``: 0 at the start, 1 and more once it is over."""
        return self.spent(at) / self.value if self.value else 1.0

    def spent(self, at: Progress) -> float:
        """What ``at`` has behind it, in this length's kind."""
        return getattr(at, FIELDS[self.kind])

    def end(self, now: Progress) -> Progress:
        """``now``, moved to where this length ends (what other kinds will read there is not known)."""
        return replace(now, **{FIELDS[self.kind]: self.value})

    def __str__(self) -> str:
        return self.text


def points(changes: Sequence[Length], now: Progress) -> list[Progress]:
    """Where each of ``changes``, in order, is reached: what is behind ``now`` is left out, and of other kinds than the
    change's own, what was known before it."""
    found = []
    for change in changes:
        if change.done(now) < 1:
            now = change.end(now)
            found.append(now)
    return found


@dataclass(frozen=True)
class Stage:
    """A stage of a curriculum: crops of ``size`` px, until the run has come to ``until``; the last has no end."""

    size: int
    until: Length | None = None

    @classmethod
    def parse(cls, text: str) -> Stage:
        """From ``32px until 10%`` or, without an end, ``224px``; raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)\s*px(?:\s+until\s+(.+))?", text.strip())
        if match is None or not int(match[1]):
            raise ValueError("a size and where it ends: 32px until 10%, 64px until 5ep, and 224px last")
        return cls(int(match[1]), Length.parse(match[2]) if match[2] else None)

    def __str__(self) -> str:
        return f"{self.size}px" + (f" until {self.until}" if self.until else "")


@dataclass(frozen=True)
class Position:
    """Where the next batch begins: ``images`` of epoch ``epoch`` are done."""

    epoch: int = 0
    images: int = 0


@dataclass(frozen=True)
class Progress:
    """Where a run stands. ``seconds`` is the budget's clock, ``fraction`` the part of the budget spent."""

    epoch: float = 0.0  # with its fraction: 2.5 is the middle of the third epoch
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    fraction: float = 0.0


@dataclass(frozen=True)
class Feed:
    """What the loader cuts: crops of ``size`` × ``size`` pixels, ``batch_size`` at a time."""

    size: int
    batch_size: int


@dataclass(frozen=True)
class Dials:
    """Scalars that change at no cost, from step to step."""

    lr_scale: float = 1.0  # on top of the schedule
    strength: float = 1.0  # of augmentation and drop path: a part of what the recipe says


@dataclass(frozen=True)
class Plan:
    """All that a method may decide. A change of ``feed`` starts a new pass of the loader."""

    feed: Feed
    dials: Dials = Dials()

    def changed(self, before: Plan | None) -> dict[str, Any]:
        """The fields in which this plan differs from ``before`` (all of them where there is none)."""
        found = {}
        for part in ("feed", "dials"):
            new, old = getattr(self, part), before and getattr(before, part)
            for field in fields(new):
                value = getattr(new, field.name)
                if old is None or value != getattr(old, field.name):
                    found[f"{part}.{field.name}"] = value
        return found

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, dict[str, Any]]) -> Plan:
        """The plan whose :meth:`state_dict` is given."""
        return cls(Feed(**state["feed"]), Dials(**state["dials"]))


@dataclass(frozen=True)
class StepResult:
    """What a step tells the methods; ``loss`` is a 0-D tensor on the device, not yet read.

    Of several processes each tells of its own part: ``loss`` is that part of the batch's mean, the rest in the others.
    """

    loss: Any
    ids: Any  # (B,) int64, the rows that were trained on
    plan: Plan


class Method(Protocol):
    """A way to train cheaply. ``plan`` is pure: the same progress gives the same plan."""

    name: str
    writes: frozenset[str]  # the plan's fields it may set, such as "feed.size"

    def plan(self, plan: Plan, at: Progress) -> Plan: ...

    def changes(self) -> Sequence[Length]: ...  # where its plan will change, in order, as far as that is known

    def observe(self, seen: StepResult) -> None: ...  # must not wait for the device

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Memoryless:
    """What a method that keeps nothing of what it sees need not write."""

    def observe(self, seen: StepResult) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def conflicts(methods: Sequence[Method]) -> list[str]:
    """Names every pair of methods that would write one field of the plan."""
    return [
        f"methods: {first.name} and {second.name} both set {', '.join(sorted(both))}; keep one of the two"
        for place, first in enumerate(methods)
        for second in methods[place + 1 :]
        if (both := first.writes & second.writes)
    ]


def fold(methods: Sequence[Method], start: Plan, at: Progress) -> Plan:
    """The plan for ``at``: ``start`` with every method's wishes, in the recipe's order."""
    plan = start
    for method in methods:
        proposed = method.plan(plan, at)
        assert proposed.changed(plan).keys() <= method.writes, f"{method.name} sets fields it does not own"
        plan = proposed
    return plan


def with_size(plan: Plan, size: int) -> Plan:
    return replace(plan, feed=replace(plan.feed, size=size))
