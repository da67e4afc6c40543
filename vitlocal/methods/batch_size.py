"""Batches that grow as images shrink, in the memory that they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vitlocal.config import BatchSizeConfig
from vitlocal.errors import ConfigError
from vitlocal.plan import Length, Plan, Progress, StepResult

# The learning rate grows with the batch: as its root for Adam (Malladi et al. 2022, arXiv 2205.10287), or with it.
RULES = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}


class BatchSize:
    """At each image size, the largest batch whose activations fit, at least ``base`` and at most the limit.

    ``image_bytes`` says what an image of a size takes. Each of the batch's ``parts``, on devices beside each other or
    one after another, has ``batch_size.memory``; where none is stated, the whole batch has what ``base`` images of
    ``largest`` px take. A run that goes on keeps its batches, whatever it goes on with.
    """

    name = "batch_size"
    writes = frozenset({"feed.batch_size", "dials.lr_scale"})

    def __init__(
        self, config: BatchSizeConfig, base: int, largest: int, image_bytes: Callable[[int], int], parts: int = 1
    ):
        self.config, self.base, self.largest = config, base, largest
        self.image_bytes, self.parts = image_bytes, parts
        self._batches: dict[int, int] = {}  # by size

    def batch_at(self, size: int) -> int:
        """Images of a global batch at ``size`` px: a multiple of ``batch_size.multiple`` where it is more than base."""
        if size not in self._batches:
            each = self.image_bytes(size)
            if self.config.memory is None:
                fits = self.image_bytes(self.largest) * self.base // each
            else:
                fits = self.config.memory // each * self.parts
                if fits < self.base:
                    raise ConfigError(
                        f"batch_size.memory: {self.config.memory / 1e9:.3g} GB hold {fits} images of {size} px (in "
                        f"{self.parts} parts), fewer than train.batch_size ({self.base}); state more memory, or lower "
                        "the batch, or raise train.accumulate"
                    )
            fits = min(fits, self.config.limit)
            self._batches[size] = max(self.base, fits - fits % self.config.multiple)
        return self._batches[size]

    def plan(self, plan: Plan, at: Progress) -> Plan:
        batch = self.batch_at(plan.feed.size)
        scale = (batch / self.base) ** RULES[self.config.rule]
        return replace(plan, feed=replace(plan.feed, batch_size=batch), dials=replace(plan.dials, lr_scale=scale))

    def changes(self) -> Sequence[Length]:
        return []  # it follows the size

    def observe(self, seen: StepResult) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"batches": dict(self._batches)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches = dict(state["batches"])
