"""Lengths of training and the progress of a run: the values that every module uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

UNITS = {"ep": ("epochs", 1.0), "steps": ("steps", 1.0), "s": ("seconds", 1.0), "m": ("seconds", 60.0),
         "h": ("seconds", 3600.0), "%": ("fraction", None), "TF": ("flops", 1e12), "PF": ("flops", 1e15),
         "EF": ("flops", 1e18)}  # fmt: skip

# The field of Progress that measures each kind of length.
FIELDS = {"epochs": "epoch", "steps": "step", "seconds": "seconds", "fraction": "fraction", "flops": "flops"}

# FLOPs of a training step for each multiply-add of its forward pass: 2 for the forward pass, 4 for the backward pass.
TRAINING_FLOPS = 6


@dataclass(frozen=True)
class Length:
    """A length of training: ``90ep``, ``5000steps``, ``45s``, ``30m``, ``24h``, ``3PF``, or ``10%`` of the budget.

    ``TF``, ``PF`` and ``EF`` are 1e12, 1e15 and 1e18 floating-point operations.
    """

    value: float
    kind: str  # "epochs", "steps", "seconds", "flops" or "fraction"
    text: str

    @classmethod
    def parse(cls, text: str) -> Length:
        """Reads a length. Raises ValueError unless ``text`` is a non-negative number and one of the units."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*(ep|steps|s|m|h|%|TF|PF|EF)", text.strip())
        if match is None:
            raise ValueError("a number and a unit: 90ep, 5000steps, 45s, 30m, 24h, 3PF or 10%")
        kind, scale = UNITS[match[2]]
        number = float(match[1])
        # A division, because 35 / 100 is the float nearest to 0.35, and 35 * 0.01 is not.
        return cls(number / 100 if scale is None else number * scale, kind, f"{match[1]}{match[2]}")

    def fraction_done(self, progress: Progress) -> float:
        """The fraction of this length that ``progress`` has completed: 0 at the start, 1 or more after the end."""
        return self.elapsed(progress) / self.value if self.value else 1.0

    def elapsed(self, progress: Progress) -> float:
        """The value of ``progress`` in the unit of this length (epochs, steps, seconds, FLOPs or fraction)."""
        return getattr(progress, FIELDS[self.kind])

    def end(self, progress: Progress) -> Progress:
        """``progress`` moved to the end of this length. Fields of other units keep their values."""
        changes: dict[str, Any] = {FIELDS[self.kind]: self.value}
        return replace(progress, **changes)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Stage:
    """A stage of an image-size curriculum: crops of ``size`` px until ``until``. The last stage has no end."""

    size: int
    until: Length | None = None

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Reads ``32px until 10%`` or, without an end, ``224px``. Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)\s*px(?:\s+until\s+(.+))?", text.strip())
        if match is None or not int(match[1]):
            raise ValueError("a size and its end: 32px until 10%, 64px until 5ep, and 224px last")
        return cls(int(match[1]), Length.parse(match[2]) if match[2] else None)

    def __str__(self) -> str:
        return f"{self.size}px" + (f" until {self.until}" if self.until else "")


@dataclass(frozen=True)
class Position:
    """The start of the next batch: after ``images`` images of epoch ``epoch``."""

    epoch: int = 0
    images: int = 0


@dataclass(frozen=True)
class Progress:
    """The progress of a run, in every unit."""

    epoch: float = 0.0  # 2.5 is the middle of the third epoch
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0  # of the budget's clock
    fraction: float = 0.0  # of the budget that is spent
    flops: float = 0.0  # of training steps, TRAINING_FLOPS for each multiply-add, also if blocks are frozen

    @property
    def is_end(self) -> bool:
        """Whether the budget is spent."""
        return self.fraction >= 1.0


def upcoming_changes(changes: Sequence[Length], now: Progress) -> list[Progress]:
    """The progress at which each of ``changes`` is reached, in order. Changes that ``now`` has passed are left out.

    Only the field that measures the change is exact. The other fields keep their last known values.
    """
    found = []
    for change in changes:
        if change.fraction_done(now) < 1:
            now = change.end(now)
            found.append(now)
    return found
