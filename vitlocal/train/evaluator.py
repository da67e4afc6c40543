"""Evaluates the weights of a run on the validation split."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from time import perf_counter

from torch import nn

from vitlocal.data.batch import Source
from vitlocal.models.shape import temporary_shape
from vitlocal.plan import Feed, Plan, Shape
from vitlocal.tasks.classification import Accuracy, evaluate_accuracy
from vitlocal.train.devices import synchronize
from vitlocal.train.distributed import ALONE, Ranks
from vitlocal.train.state import TrainState
from vitlocal.train.step import TrainStep

ESTIMATED_BATCHES = 5


class Evaluator:
    """Evaluates the weight average, or the weights if there is none, at ``feed``'s size, whatever the training size.

    ``rows``: "all", "even" or "odd" rows of the split are counted.
    """

    def __init__(
        self, state: TrainState, step: TrainStep, source: Source, feed: Feed, rows: str = "all", ranks: Ranks = ALONE
    ):
        self._state, self._step, self._source, self._feed, self._rows = state, step, source, feed, rows
        self._total = ranks.total

    @property
    def model(self) -> nn.Module:
        """The model that is evaluated and exported."""
        return self._state.model if self._state.ema is None else self._state.ema.model

    def shape(self, plan: Plan) -> Shape:
        """The shape in which weights that were trained under ``plan`` are evaluated."""
        shape = replace(plan.shape, input_size=None, skipped_blocks=())
        for method in self._state.methods:
            shape = method.evaluation_shape(shape)
        return shape

    def accuracy(
        self, plan: Plan, stop: Callable[[], bool] = lambda: False, limit: int | None = None
    ) -> Accuracy | None:
        """The accuracy of weights that were trained under ``plan``, on ``limit`` batches at most.

        None if ``stop``, called before each batch, returns true.
        """
        with temporary_shape(self.model, self.shape(plan), self._step.shape):
            return evaluate_accuracy(
                self.model,
                self._step.predict_fn(self.model),
                self._source,
                self._feed,
                self._step.device,
                rows=self._rows,
                limit=limit,
                stop=stop,
                total=self._total,
            )

    def estimate_seconds(self, plan: Plan) -> float:
        """Estimates the time of an evaluation from its first batches. Also compiles it.

        The other batches are expected to take the median time of these, so that one that is delayed does not count
        several times.
        """
        batches = -(-self._source.count // self._feed.batch_size)
        self.accuracy(plan, limit=1)  # the very first batch compiles, or loads kernels
        times: list[float] = []

        def note_time() -> bool:  # called before each batch
            synchronize(self._step.device)
            times.append(perf_counter())
            return False

        began = perf_counter()
        self.accuracy(plan, note_time, limit=ESTIMATED_BATCHES)
        times.append(perf_counter())
        each = statistics.median(after - before for before, after in pairwise(times))
        return times[-1] - began + max(0, batches - ESTIMATED_BATCHES) * each
