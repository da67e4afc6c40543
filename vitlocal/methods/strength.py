"""Augmentation and drop path that grow with the images, or with time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitlocal.config import StrengthConfig
from vitlocal.plan import Length, Memoryless, Plan, Progress


class Strength(Memoryless):
    """From a part of the recipe's augmentation and drop path to all of it (Tan and Le 2021, arXiv 2104.00298).

    Small images are harder to fit, so what makes training harder may wait. Grows linearly with the image size from
    the smallest to the largest of ``sizes``; with ``by=budget``, with the part of the budget that is spent.
    """

    name = "strength"
    writes = frozenset({"dials.strength"})

    def __init__(self, config: StrengthConfig, sizes: Sequence[int]):
        self.config, self.smallest, self.largest = config, min(sizes), max(sizes)

    def plan(self, plan: Plan, at: Progress) -> Plan:
        if self.config.by == "budget":
            way = at.fraction
        elif self.largest == self.smallest:
            way = 1.0
        else:
            way = (plan.feed.size - self.smallest) / (self.largest - self.smallest)
        return replace(plan, dials=replace(plan.dials, strength=self.config.start + (1 - self.config.start) * way))

    def changes(self) -> Sequence[Length]:
        return []  # no feed changes by it
