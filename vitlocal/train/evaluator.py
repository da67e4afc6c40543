"""Evaluates the weights of a run on the validation split.

Running statistics of BatchNorm belong to the weights and the shape that gathered them. Before other weights or another
shape are evaluated, they are estimated again on training images.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitlocal.data.batch import Sources
from vitlocal.data.shares import WholeBatches
from vitlocal.models.shape import temporary_shape
from vitlocal.plan import Feed, Plan, Shape
from vitlocal.progress import Position
from vitlocal.tasks.memory import explained_memory_errors
from vitlocal.tasks.task import Scores
from vitlocal.train.devices import synchronize
from vitlocal.train.distributed import Ranks
from vitlocal.train.probes import EPOCH
from vitlocal.train.state import TrainState
from vitlocal.train.step import TrainStep, buffers_kept, has_batch_norm

ESTIMATED_BATCHES = 5
# Training images for an estimate of BatchNorm's statistics. The logits of a LocalViT then differed by 2 % (root mean
# square) from those with 6000 images; with 256 by 5 %, with 4096 by 1.3 %.
RECALIBRATION_IMAGES, RECALIBRATION_BATCH = 2048, 128
SAME_NETWORK = {"shape.trainable_blocks", "shape.head_only"}  # fields that do not change what a network computes
REMAINDERS = {"all": (0, 1), "even": (0,), "odd": (1,)}  # of the rows that are counted, divided by two


def counted_rows(ids: Tensor, rows: str) -> Tensor:
    """Whether each validation image, by its row (B,), is one of "all", "even" or "odd" ``rows``: (B,) bool."""
    return torch.isin(ids % 2, torch.tensor(REMAINDERS[rows]))


class Evaluator:
    """Evaluates the weight average, or the weights without one, on "all", "even" or "odd" ``rows``, at one size.

    ``recalibrates``: whether an evaluation first estimates BatchNorm's statistics. It does so for an average, and if a
    method changes the network: its growth, or the difference between the trained and the evaluated shape.
    """

    def __init__(self, state: TrainState, step: TrainStep, sources: Sources, feed: Feed, rows: str = "all"):
        self._state, self._step, self._feed, self._rows = state, step, feed, rows
        self._sources, self._source = sources, sources.val
        self._predict = step.predict_fn(self.model)
        writes = frozenset[str]().union(*(method.writes for method in state.methods)) - SAME_NETWORK
        differs = state.ema is not None or any(field.startswith(("growth", "shape.")) for field in writes)
        self.recalibrates = differs and has_batch_norm(self.model)

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

    def scores(self, plan: Plan, stop: Callable[[], bool] = lambda: False, limit: int | None = None) -> Scores | None:
        """The scores of weights that were trained under ``plan``, on ``limit`` batches at most.

        None if ``stop``, called before each batch, returns true. Each process evaluates its share of every batch. A
        ``limit`` is for measurements of time: BatchNorm's statistics stay as they are.
        """
        if limit is None and self.recalibrates and not self.recalibrate(plan, stop):
            return None
        task, source = self._step.task, self._source
        sums = task.new_sums(len(source.classes))
        with self._evaluated(plan), source.open(self._feed, Position()) as batches:
            for batch in islice(batches, limit):
                if stop():
                    return None
                if len(batch):
                    is_whole = batch.total == self._feed.batch_size and len(batch) == len(batch.places)
                    counted = counted_rows(batch.ids, self._rows)
                    with self._memory_errors():
                        task.add(sums, batch, counted, partial(self._predict, is_whole))
        return task.scores(self._step.ranks.total(sums).cpu().numpy())  # device sync, once per pass

    def judge(
        self, scores: Scores, plan: Plan, last: bool, stop: Callable[[], bool], say: Callable[[str], None]
    ) -> Scores | None:
        """``scores`` with what the task measures in another way; see :meth:`vitlocal.tasks.task.Task.judge`."""
        with self._evaluated(plan) as model:
            return self._step.task.judge(scores, model, last, self._step.ranks, stop, say)

    def judging_seconds(self, plan: Plan, stop: Callable[[], bool] = lambda: False) -> tuple[float, float]:
        """Estimates the time of :meth:`judge`, between and at the end of a run. 0 if ``stop()`` was true."""
        with self._evaluated(plan) as model:
            return self._step.task.judging_seconds(model, self._step.ranks, stop)

    @contextmanager
    def _evaluated(self, plan: Plan) -> Iterator[nn.Module]:
        """The model in evaluation mode, in the shape in which weights trained under ``plan`` are evaluated."""
        model, training = self.model, self.model.training
        with temporary_shape(model, self.shape(plan), self._step.shape), torch.inference_mode():
            try:
                yield model.eval()
            finally:
                model.train(training)

    @torch.no_grad()
    def recalibrate(
        self, plan: Plan, stop: Callable[[], bool] = lambda: False, limit: int = RECALIBRATION_IMAGES
    ) -> bool:
        """Estimates BatchNorm's statistics on training images, in the shape and at the size of the evaluation.

        As in :func:`torch.optim.swa_utils.update_bn`, they become the mean over batches of the batches' statistics. All
        other layers run as in an evaluation. The images, random crops without further augmentation, are always the
        same, ``limit`` at most. Processes take turns with the batches. False if ``stop``, called before each turn,
        returned true.
        """
        model, ranks, images = self.model, self._step.ranks, self._sources.train.count
        size = min(RECALIBRATION_BATCH, images)  # not that of evaluations, which must not change results
        count, training = max(1, min(limit, images) // size), model.training
        share = WholeBatches(ranks.rank, ranks.world, count)
        opened = self._sources.train.open(replace(self._feed, batch_size=size), Position(EPOCH), share)
        with temporary_shape(model, self.shape(plan), self._step.shape), opened as batches:
            modules = [module for module in model.train().modules() if isinstance(module, _BatchNorm)]
            layers: list[Any] = [module for module in modules if module.training and module.track_running_stats]
            momenta = [layer.momentum for layer in layers]
            try:
                model.eval()
                for layer in layers:
                    layer.train().momentum = None  # a mean over all batches
                    layer.num_batches_tracked.zero_()
                for _ in range(0, count, ranks.world):
                    if stop():
                        return False
                    if (batch := next(batches, None)) is not None:
                        self._predict(False, batch.images)
            finally:
                for layer, momentum in zip(layers, momenta, strict=True):
                    layer.momentum = momentum
                model.train(training)
            _average_statistics(layers, ranks)
        return True

    def _memory_errors(self) -> AbstractContextManager[None]:
        """A context in which an error for lack of memory names the option to change."""
        size, count = self._feed.size, self._feed.batch_size
        remedy = f"use evaluate.batch_size={max(1, count // 2)}; the same command continues with it"
        return explained_memory_errors("a batch of an evaluation", size, count, remedy)

    def estimate_seconds(self, plan: Plan) -> float:
        """Estimates the time of an evaluation from its first batches. Also compiles it."""
        batches = -(-self._source.count // self._feed.batch_size)
        self.scores(plan, limit=1)  # the very first batch compiles, or loads kernels
        times: list[float] = []

        def note_time() -> bool:  # called before each batch
            synchronize(self._step.device)
            times.append(perf_counter())
            return False

        recalibration = 0.0
        if self.recalibrates:
            few, images = RECALIBRATION_BATCH * self._step.ranks.world, self._sources.train.count
            began = perf_counter()
            with buffers_kept(self.model):
                self.recalibrate(plan, limit=few)
            synchronize(self._step.device)
            recalibration = (perf_counter() - began) * max(1.0, min(RECALIBRATION_IMAGES, images) / few)
        began = perf_counter()
        self.scores(plan, note_time, limit=ESTIMATED_BATCHES)
        times.append(perf_counter())
        # Of the other batches. The median, so that a batch that was delayed does not count several times.
        each = statistics.median(after - before for before, after in pairwise(times))
        return recalibration + times[-1] - began + max(0, batches - ESTIMATED_BATCHES) * each


def _average_statistics(layers: Sequence[Any], ranks: Ranks) -> None:
    """Gives all ranks the mean over the batches of all of them. Layers that did not run keep their statistics."""
    for layer in layers if ranks.world > 1 else ():
        done = layer.num_batches_tracked.to(layer.running_mean)
        sums = [layer.running_mean * done, layer.running_var * done, done.expand_as(layer.running_mean)]
        mean, variance, count = ranks.total(torch.stack(sums))
        layer.running_mean.copy_(torch.where(count > 0, mean / count, layer.running_mean))
        layer.running_var.copy_(torch.where(count > 0, variance / count, layer.running_var))
        layer.num_batches_tracked.copy_(count[0])
