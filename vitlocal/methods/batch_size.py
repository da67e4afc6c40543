"""Batches that grow as images shrink, within a given amount of memory."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from vitlocal.errors import ConfigError
from vitlocal.methods.method import Method, MethodContext, Recipe
from vitlocal.options import BYTES, COUNT, Choice, Section, messages, option
from vitlocal.plan import Plan
from vitlocal.progress import Progress

# The exponent by which the learning rate grows with the batch: 0.5 for Adam (Malladi et al. 2022, arXiv 2205.10287).
LR_EXPONENTS = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}


@dataclass(frozen=True)
class BatchSizeConfig(Section):
    memory: int | None = option(
        None, BYTES, "memory for activations on each device; none: as train.batch_size images of model.size take"
    )
    limit: int = option(2048, COUNT, "largest batch size")
    multiple: int = option(32, COUNT, "batch sizes above train.batch_size are multiples of this number")
    lr_scaling: str = option("sqrt", Choice(*LR_EXPONENTS), "how the learning rate grows with the batch size")
    renamed = {"rule": "lr_scaling"}


class BatchSize(Method):
    """At each image size, the largest batch whose activations fit: at least ``train.batch_size``, at most ``limit``.

    Each part of the batch (process, gradient accumulation step) has ``memory``. A resumed run keeps its batch sizes.
    """

    name = "batch_size"
    options = BatchSizeConfig
    writes = frozenset({"feed.batch_size", "dials.lr_scale"})

    def __init__(self, context: MethodContext):
        recipe = context.recipe
        self._config, self._base = recipe.section(BatchSizeConfig), recipe.batch_size
        self._largest_size, self._image_bytes = recipe.model_size, cache(context.image_bytes)  # counting takes seconds
        self._parts = context.processes * recipe.grad_accum_steps
        self._batch_sizes: dict[int, int] = {}  # by image size

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        limit, base = recipe.section(BatchSizeConfig).limit, recipe.batch_size
        return messages({
            "methods: batch_size follows the image sizes that other methods set; put it last":
                recipe.methods.index("batch_size") != len(recipe.methods) - 1,
            f"batch_size.limit: got {limit}, expected at least train.batch_size ({base})": limit < base,
        })  # fmt: skip

    def batch_size_at(self, size: int) -> int:
        if size not in self._batch_sizes:
            image_bytes, memory = self._image_bytes(size), self._config.memory
            if memory is None:
                fits = self._image_bytes(self._largest_size) * self._base // image_bytes
            else:
                fits = memory // image_bytes * self._parts
                if fits < self._base:
                    raise ConfigError(
                        f"batch_size.memory: {memory / 1e9:.3g} GB hold {fits} images of {size} px (in {self._parts} "
                        f"parts), fewer than train.batch_size ({self._base}); increase batch_size.memory or "
                        "train.grad_accum_steps, or reduce train.batch_size"
                    )
            fits = min(fits, self._config.limit)
            self._batch_sizes[size] = max(self._base, fits - fits % self._config.multiple)
        return self._batch_sizes[size]

    def plan(self, plan: Plan, progress: Progress) -> Plan:
        batch_size = self.batch_size_at(plan.feed.size)
        scale = (batch_size / self._base) ** LR_EXPONENTS[self._config.lr_scaling]
        return replace(plan, feed=replace(plan.feed, batch_size=batch_size), dials=replace(plan.dials, lr_scale=scale))

    def state_dict(self) -> dict[str, Any]:
        return {"batches": dict(self._batch_sizes)}

    def load_state_dict(self, state: dict[str, Any], local: Any = None) -> None:
        self._batch_sizes = dict(state["batches"])
