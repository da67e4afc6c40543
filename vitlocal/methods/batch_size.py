"""Batches that grow as images shrink, in the memory that they are given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vitlocal.errors import ConfigError
from vitlocal.methods.method import Method, MethodContext, Recipe
from vitlocal.options import COUNT, Bytes, Choice, Maybe, Section, option
from vitlocal.plan import Plan
from vitlocal.progress import Progress

# The learning rate grows with the batch: as its root for Adam (Malladi et al. 2022, arXiv 2205.10287), or with it.
RULES = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}


@dataclass(frozen=True)
class BatchSizeConfig(Section):
    memory: int | None = option(
        None, Maybe(Bytes()), "for activations, on each device; none: what train.batch_size images of model.size take"
    )
    limit: int = option(2048, COUNT, "largest batch")
    multiple: int = option(32, COUNT, "batches larger than train.batch_size are a multiple of this")
    rule: str = option("sqrt", Choice("sqrt", "linear", "none"), "how the learning rate grows with the batch")


class BatchSize(Method):
    """At each image size, the largest batch whose activations fit, at least ``train.batch_size``, at most the limit.

    Each of the batch's parts, on devices beside each other or one after another, has ``batch_size.memory``; where none
    is stated, the whole batch has what ``train.batch_size`` images of ``model.size`` take. A run that goes on keeps its
    batches, whatever it goes on with.
    """

    name = "batch_size"
    writes = frozenset({"feed.batch_size", "dials.lr_scale"})
    options = BatchSizeConfig

    def __init__(self, run: MethodContext):
        recipe = run.recipe
        self.config, self.base, self.largest = recipe.of(self.name), recipe.train.batch_size, recipe.model.size
        self.image_bytes, self.parts = run.image_bytes, run.processes * recipe.train.accumulate
        self._batches: dict[int, int] = {}  # by size

    @staticmethod
    def problems(recipe: Recipe) -> list[str]:
        found = []
        if recipe.methods.index("batch_size") != len(recipe.methods) - 1:
            found.append("methods: batch_size follows the sizes that the others set; name it last")
        limit, base = recipe.of("batch_size").limit, recipe.train.batch_size
        if limit < base:
            found.append(
                f"batch_size.limit: {limit} is smaller than train.batch_size ({base}), from which batches grow"
            )
        return found

    def batch_size_at(self, size: int) -> int:
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
        batch = self.batch_size_at(plan.feed.size)
        scale = (batch / self.base) ** RULES[self.config.rule]
        return replace(plan, feed=replace(plan.feed, batch_size=batch), dials=replace(plan.dials, lr_scale=scale))

    def state_dict(self) -> dict[str, Any]:
        return {"batches": dict(self._batches)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches = dict(state["batches"])
