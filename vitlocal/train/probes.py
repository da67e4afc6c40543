"""Measures what methods ask for: the time, the loss or the trainability of a candidate shape.

A probe leaves no trace: weights, moments, averages, BatchNorm's statistics and random generators are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from vitlocal.data.batch import Batch, Sources, full_batches
from vitlocal.methods.method import Probe
from vitlocal.models.shape import check_shape, temporary_shape
from vitlocal.models.vit import VisionTransformer
from vitlocal.plan import Feed, Plan
from vitlocal.progress import TRAINING_FLOPS
from vitlocal.train.devices import synchronize
from vitlocal.train.distributed import ALONE, Ranks
from vitlocal.train.macs import MacCounter
from vitlocal.train.state import TrainState
from vitlocal.train.step import EAGER, TrainStep, buffers_kept, step_seed
from vitlocal.train.trainability import condition_number, tangent_kernel, zico

FORWARD_FLOPS = TRAINING_FLOPS / 3  # for each multiply-add, without the backward pass
EPOCH = 1_000_000  # the probes use the order and crops of this epoch, so that every candidate sees the same images


class Prober:
    """Measures probes for a run. The FLOPs of a probe count towards the budget.

    ``compile_step`` compiles the step for a plan; ``seed`` seeds PyTorch's generators for each probe.
    """

    def __init__(
        self,
        state: TrainState,
        step: TrainStep,
        sources: Sources,
        macs: MacCounter,
        compile_step: Callable[[Plan], None],
        seed: int = 0,
        ranks: Ranks = ALONE,
    ):
        self._state, self._step, self._sources, self._macs = state, step, sources, macs
        self._compile_step, self._seed, self._ranks = compile_step, seed, ranks

    def complete(self, probe: Probe, plan: Plan, batch_size: Callable[[int], int]) -> Probe:
        """``probe`` with its open fields filled in: the rest of the shape, the size, and the batch size."""
        shape = probe.shape
        if probe.sets:
            shape = replace(plan.shape, **{name: getattr(probe.shape, name) for name in probe.sets})
        size = probe.size or plan.feed.size
        return replace(probe, shape=shape, size=size, samples=probe.samples or batch_size(size))

    def measure(self, probe: Probe, plan: Plan) -> Any:
        """The result of a complete ``probe``, the same on every rank. All ranks must call it."""
        if probe.kind == "sum":
            return self._ranks.total(probe.value.to(self._step.device)).cpu()  # device sync
        check_shape(self._step.model, probe.shape)
        if probe.kind == "seconds" and self._state.search_log.replays:
            self._count_timing(probe)  # as if it were measured, so that a budget in FLOPs is spent as before
            return self._state.search_log.replayed_seconds(probe)
        kinds: dict[str, Callable[[Probe, Plan], Any]] = {
            "seconds": self._seconds,
            "loss": self._loss,
            "trainability": self._trainability,
        }
        before = self._step.shape, self._step.dials
        self._step.set_dials(plan.dials)
        try:
            seed = step_seed(self._seed, 0, self._ranks.rank)
            with generators_seeded(self._step.device, seed), buffers_kept(self._step.model):
                return self._ranks.broadcast(kinds[probe.kind](probe, plan))
        finally:
            self._step.set_shape(before[0])
            self._step.set_dials(before[1])

    def _seconds(self, probe: Probe, plan: Plan) -> float:
        """The seconds per image of forward and backward: the mean over the probe's batches, after a warm-up batch."""
        feed = Feed(probe.size, probe.samples)
        timer = self._state.clock.timer
        with timer.paused():
            self._compile_step(Plan(feed, shape=probe.shape))  # compiling is not training time
        self._step.set_shape(probe.shape)
        spent, images = 0.0, 0
        with self._batches(probe, plan, extra=1) as batches:
            for number, batch in enumerate(batches):
                mode = self._step.mode(feed) if batch.total == feed.batch_size else EAGER
                synchronize(self._step.device)  # device sync, here and below: this is a measurement
                began = timer.train_now()
                self._step.forward_backward(batch, mode)
                synchronize(self._step.device)
                if number:
                    spent += timer.train_now() - began
                    images += batch.total
        self._count_timing(probe)
        return spent / max(images, 1)

    def _count_timing(self, probe: Probe) -> None:
        """Counts the FLOPs of :meth:`_seconds`, whose batches are all full."""
        images = (probe.batches + 1) * probe.samples
        self._count_flops(TRAINING_FLOPS * images, probe)

    @torch.no_grad()
    def _loss(self, probe: Probe, plan: Plan) -> float:
        """Mean cross-entropy over the probe's batches, augmented as in training."""
        step, trained = self._step, self._step.model
        step.set_shape(probe.shape)
        model = trained if probe.average is None else self._state.method_emas[probe.average].model
        training = model.training
        total = torch.zeros(2, dtype=torch.float64, device=step.device)
        with (
            temporary_shape(model, probe.shape, probe.shape),
            buffers_kept(model),
            self._batches(probe, plan) as batches,
        ):
            try:
                model.train()
                if isinstance(model, VisionTransformer):  # an average still has the rates of the last step's shape
                    model.drop_path_rates.copy_(trained.drop_path_rates)
                for number, batch in enumerate(batches):
                    if len(batch):
                        total[0] += step.loss(model, batch, number)
                        total[1] += len(batch)
            finally:
                model.train(training)
        summed, images = self._ranks.total(total).tolist()  # device sync
        self._count_flops(FORWARD_FLOPS * images, probe)
        return summed / max(images, 1)

    def _trainability(self, probe: Probe, plan: Plan) -> tuple[float, float]:
        """The mean condition number of the tangent kernel, and ZiCo, on batches of ``samples`` images."""
        step = self._step
        step.set_shape(probe.shape)
        saved = [parameter.grad for parameter in step.model.parameters()]
        numbers, gradients = [], []
        try:
            with self._batches(probe, plan, extra=probe.kernel_batches) as batches:
                for number, batch in enumerate(batches):
                    if number < probe.kernel_batches:
                        with torch.enable_grad():
                            logits = step.logits(step.model, batch, number, torch.float32)
                            numbers.append(condition_number(tangent_kernel(step.model, logits)))
                    else:
                        gradients.append(step.layer_gradients(batch))
        finally:
            for parameter, grad in zip(step.model.parameters(), saved, strict=True):
                parameter.grad = grad
        # Each image's gradient is a backward pass of its own through the whole batch.
        backward = TRAINING_FLOPS - FORWARD_FLOPS
        kernels = len(numbers) * probe.samples * (FORWARD_FLOPS + backward * probe.samples)
        self._count_flops(kernels + len(gradients) * probe.samples * TRAINING_FLOPS, probe)
        return sum(numbers) / max(len(numbers), 1), zico(gradients)

    def _count_flops(self, flops_per_mac: float, probe: Probe) -> None:
        self._state.clock.flops += flops_per_mac * self._macs(probe.size, probe.shape)

    @contextmanager
    def _batches(self, probe: Probe, plan: Plan, extra: int = 0) -> Iterator[Iterator[Batch]]:
        """The probe's batches and ``extra`` further ones, all full: the same images at every call."""
        source: Any = getattr(self._sources, probe.split)
        count = probe.batches + extra
        feed = Feed(probe.size, probe.samples, plan.feed.subset)
        if probe.split == "val":  # sorted by class, perhaps: take rows from all over it
            rows = np.linspace(0, source.count - 1, min(source.count, count * probe.samples)).astype(np.int64)
            source.rows.set(number := len(rows), rows)
            feed = replace(feed, subset=number)
        with closing(full_batches(source, feed, EPOCH)) as batches:
            yield islice(batches, count)


@contextmanager
def generators_seeded(device: torch.device, seed: int) -> Iterator[None]:
    """A context in which PyTorch's generators start from ``seed``; afterwards they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
