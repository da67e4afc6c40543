"""Evaluates the weights of a run on the validation split."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from time import perf_counter

import torch
from torch import Tensor, nn

from vitlocal.data.augment import send
from vitlocal.data.batch import Batch, Source
from vitlocal.models.shape import temporary_shape
from vitlocal.plan import Feed, Plan, Shape
from vitlocal.progress import Position
from vitlocal.tasks.classification import Accuracy
from vitlocal.train.devices import synchronize
from vitlocal.train.state import TrainState
from vitlocal.train.step import TrainStep

ESTIMATED_BATCHES = 5
REMAINDERS = {"all": (0, 1), "even": (0,), "odd": (1,)}  # of the rows that are counted, divided by two


class Evaluator:
    """Evaluates the weight average, or the weights without one, on "all", "even" or "odd" ``rows``, at one size."""

    def __init__(self, state: TrainState, step: TrainStep, source: Source, feed: Feed, rows: str = "all"):
        self._state, self._step, self._source, self._feed, self._rows = state, step, source, feed, rows
        self._predict = step.predict_fn(self.model)

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

        None if ``stop``, called before each batch, returns true. Each process evaluates its share of every batch.
        """
        model, step, source = self.model, self._step, self._source
        shape, training = self.shape(plan), model.training
        sums = torch.zeros(3, len(source.classes), dtype=torch.int64, device=step.device)
        opened = source.open(self._feed, Position())
        with temporary_shape(model, shape, step.shape), torch.inference_mode(), opened as batches:
            try:
                model.eval()
                for batch in islice(batches, limit):
                    if stop():
                        return None
                    if len(batch):
                        sums.index_add_(1, batch.labels, self._found(batch))
            finally:
                model.train(training)
        counts = step.ranks.total(sums).cpu().numpy()  # device sync, once per pass
        top1, top5, images = counts.sum(axis=1).tolist()
        return Accuracy(100 * top1 / max(images, 1), 100 * top5 / max(images, 1), counts[[0, 2]].T)

    def _found(self, batch: Batch) -> Tensor:
        """1 or 0 for each image: whether it is right (top-1, top-5), and whether it is counted: (3, B) int64."""
        is_whole = batch.total == self._feed.batch_size and len(batch) == len(batch.places)
        logits = self._predict(batch.images, is_whole).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        right = best == batch.labels[:, None]
        counted = send(torch.isin(batch.ids % 2, torch.tensor(REMAINDERS[self._rows])).long(), self._step.device)
        return torch.stack([right[:, 0] * counted, right.any(dim=1) * counted, counted])

    def estimate_seconds(self, plan: Plan) -> float:
        """Estimates the time of an evaluation from its first batches. Also compiles it."""
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
        # Of the other batches. The median, so that a batch that was delayed does not count several times.
        each = statistics.median(after - before for before, after in pairwise(times))
        return times[-1] - began + max(0, batches - ESTIMATED_BATCHES) * each
