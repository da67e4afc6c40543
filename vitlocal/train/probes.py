"""Measures what methods ask for: the time, the loss or the trainability of a candidate shape.

A probe leaves no trace: weights, moments, averages, BatchNorm's statistics and random generators are as before.

Trainability is two scores that predict how well a part of a network will train, used as in Li et al. 2024 (arXiv
2410.00350):

- The condition number of the neural tangent kernel (Chen et al. 2021, arXiv 2102.11535); small is good.
- ZiCo (Li et al. 2023, arXiv 2301.11300): log of mean over deviation of gradients, summed over layers; large is good.

Shape letters: n samples, p weights of a layer.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitlocal.data.batch import Batch, Sources, full_batches
from vitlocal.errors import ConfigError
from vitlocal.methods.method import Method, Probe
from vitlocal.models.shape import check_shape, temporary_shape
from vitlocal.plan import Feed, Plan, Shape
from vitlocal.progress import TRAINING_FLOPS
from vitlocal.tasks.memory import explained_memory_errors
from vitlocal.tasks.task import sum_type
from vitlocal.train.devices import synchronize
from vitlocal.train.state import TrainState
from vitlocal.train.step import TrainStep, buffers_kept, step_seed

FORWARD_FLOPS = TRAINING_FLOPS / 3  # for each multiply-add, without the backward pass
MacCount = Callable[[int, Shape], int]  # multiply-adds of a forward pass of one image, by image size and shape
EPOCH = 1_000_000  # the probes use the order and crops of this epoch, so that every candidate sees the same images
SINGULAR = 1e-12  # if the smallest eigenvalue is less than this fraction of the largest, the kernel has no inverse


def batch_size_at(methods: Sequence[Method], size: int, default: int) -> int:
    """The batch size at ``size`` px: as a method says, else ``default``."""
    stated = (method.batch_size_at(size) for method in methods)
    return next((batch for batch in stated if batch is not None), default)


class Prober:
    """Measures probes, whose FLOPs count towards the budget. ``compile_step`` compiles the step for a plan."""

    def __init__(
        self, state: TrainState, step: TrainStep, sources: Sources, macs: MacCount, compile_step: Callable[[Plan], None]
    ):
        self._state, self._step, self._sources, self._macs = state, step, sources, macs
        self._compile_step, self._ranks = compile_step, step.ranks

    def complete(self, probe: Probe, plan: Plan) -> Probe:
        """``probe`` with its open fields filled in: the rest of the shape, the size, and the batch size."""
        shape = probe.shape
        if probe.sets:
            shape = replace(plan.shape, **{name: getattr(probe.shape, name) for name in probe.sets})
        size = probe.size or plan.feed.size
        samples = probe.samples or batch_size_at(self._state.methods, size, plan.feed.batch_size)
        return replace(probe, shape=shape, size=size, samples=samples)

    def measure(self, probe: Probe, plan: Plan) -> Any:
        """The result of a complete ``probe``, the same on every rank. All ranks must call it."""
        if probe.kind == "sum":
            return self._ranks.total(probe.value.to(self._step.device)).cpu()  # device sync
        check_shape(self._step.model, probe.shape)
        if probe.kind == "seconds" and (replayed := self._state.search_log.replayed_seconds(probe)) is not None:
            self._count_timing(probe)  # as if it were measured, so that a budget in FLOPs is spent as before
            return replayed
        if probe.kind == "trainability" and sum_type(self._step.device) != torch.float64:
            raise ConfigError(
                f"methods: {self._step.device.type} has no float64, which measuring trainability needs; use "
                "run.device=cpu, or another search"
            )
        kinds = {"seconds": self._seconds, "loss": self._loss, "trainability": self._trainability}
        step, shape, dials = self._step, self._step.shape, self._step.dials
        step.set_dials(plan.dials)
        try:
            devices = [step.device] if step.device.type == "cuda" else []
            with torch.random.fork_rng(devices), buffers_kept(step.model):
                torch.manual_seed(step_seed(step.seed, 0, self._ranks.rank))
                return self._ranks.broadcast(kinds[probe.kind](probe, plan))
        finally:
            step.set_shape(shape)
            step.set_dials(dials)

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
                synchronize(self._step.device)  # device sync, here and below: this is a measurement
                began = timer.train_now()
                self._step.gradients(batch, self._step.mode(feed))
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
        """The mean loss over the probe's batches, augmented as in training."""
        step, trained = self._step, self._step.model
        step.set_shape(probe.shape)
        model = trained if probe.average is None else self._state.method_emas[probe.average].model
        shape, training = probe.shape, model.training
        total = torch.zeros(2, dtype=sum_type(step.device), device=step.device)
        with temporary_shape(model, shape, shape), buffers_kept(model), self._batches(probe, plan) as batches:
            try:
                model.train()
                for number, batch in enumerate(batches):
                    if len(batch):
                        total[0] += step.probe(model, batch, number, step.task.precision)[1]
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
        numbers, gradients = [], []
        remedy = "use smaller batches for the method's probes, or state its schedule, which needs no search"
        with self._batches(probe, plan, extra=probe.kernel_batches) as batches:
            for number, batch in enumerate(batches):
                if number < probe.kernel_batches:
                    with explained_memory_errors("the tangent kernel", probe.size, probe.samples, remedy):
                        outputs, _ = step.probe(step.model, batch, number, torch.float32)
                        numbers.append(condition_number(tangent_kernel(step.model, outputs)))
                else:
                    gradients.append(layer_gradients(step, batch, number))
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


def layer_gradients(step: TrainStep, batch: Batch, number: int = 0) -> dict[str, Tensor]:
    """The loss's gradients of the weights of trained linear and convolutional layers, by name, as in step ``number``.

    Batches with other numbers have other random values. For diffusion, these are most of what ZiCo measures.
    """
    layers = {f"{n}.weight" for n, module in step.model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    # Copies, because several processes keep all gradients in buffers that the next backward pass writes.
    return {name: gradient.clone() for name, gradient in step.gradients(batch, number=number).items() if name in layers}


def tangent_kernel(model: nn.Module, outputs: Tensor) -> Tensor:
    """G @ G.T (n, n), where row i of G is the gradient of the sum of sample i's outputs by the trained weights.

    G has the weights' precision; products are summed in float64, weight by weight.
    """
    weights = [p for name, p in model.named_parameters() if "weight" in name and p.requires_grad]
    rows = [torch.autograd.grad(sample.sum(), weights, retain_graph=True, allow_unused=True) for sample in outputs]
    kernel = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=outputs.device)
    for grads in zip(*rows, strict=True):
        if grads[0] is not None:
            stacked = torch.stack([grad.flatten() for grad in grads]).double()  # (n, p)
            kernel += stacked @ stacked.T
    return (kernel + kernel.T) / 2  # symmetric to the last bit, which not every matrix product is


def condition_number(kernel: Tensor) -> float:
    """The largest over the smallest eigenvalue of a symmetric kernel; infinite if the smallest is zero or NaN."""
    values = torch.linalg.eigvalsh(kernel)
    if not bool(values.isfinite().all()) or values[-1] <= 0 or values[0] <= SINGULAR * values[-1]:
        return math.inf
    return float(values[-1] / values[0])


def zico(gradients: Sequence[Mapping[str, Tensor]]) -> float:
    """ZiCo of two or more batches' gradients by layer: the sum over layers of log sum(mean|g| / std(g)).

    Entries that do not vary over the batches are left out, and so are layers with no other entries.
    """
    total = 0.0
    for name in gradients[0]:
        stacked = torch.stack([batch[name].flatten().double() for batch in gradients])  # (batches, p)
        deviation = stacked.std(dim=0, unbiased=False)
        varies = deviation > 0
        if bool(varies.any()):
            total += math.log(float((stacked.abs().mean(dim=0)[varies] / deviation[varies]).sum()))
    return total
