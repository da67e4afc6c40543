"""What methods want to know beside training: the time, the loss or the trainability of a candidate.

Nothing here leaves a trace: weights, moments, averages, BatchNorm's statistics and random generators are as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vitlocal.data.batch import Batch, full_batches
from vitlocal.methods.method import Probe
from vitlocal.models.shape import check_shape, temporary_shape
from vitlocal.models.vit import VisionTransformer
from vitlocal.plan import Feed, Plan
from vitlocal.progress import TRAINING_FLOPS
from vitlocal.train.step import EAGER, buffers_kept, step_seed
from vitlocal.train.trainability import condition_number, zico
from vitlocal.train.watch import wait

if TYPE_CHECKING:
    from vitlocal.train.run import Run

FORWARD_FLOPS = TRAINING_FLOPS / 3  # to a multiply-add, without a backward
EPOCH = 1_000_000  # whose order and crops are for probes: every candidate sees the same


def answer(run: Run, probe: Probe) -> Any:
    """What ``probe`` asks for, the same on every rank. Every rank must call it. It is of the budget, FLOPs and all.

    ``probe`` leaves nothing open: see :func:`in_place`.
    """
    if probe.kind == "sum":
        return run.ranks.total(probe.value.to(run.device)).cpu()  # device sync
    check_shape(run.model, probe.shape)
    if probe.kind == "seconds" and run.searches.replay is not None:
        count_timing(run, probe)  # as if it had been measured: a budget in FLOPs is to go as it went
        return run.searches.told(probe)
    before = run.step.shape, run.step.dials
    run.step.turn(run.plan().dials)
    try:
        with generators_seeded(run.device, step_seed(run.config.run.seed, 0, run.ranks.rank)), buffers_kept(run.model):
            return run.ranks.broadcast(KINDS[probe.kind](run, probe))
    finally:
        run.step.put(before[0])
        run.step.turn(before[1])


def in_place(run: Run, probe: Probe) -> Probe:
    """``probe`` with what it leaves open as the run has it: the shape's other fields, the size, the batch."""
    now = run.plan()
    shape = (
        replace(now.shape, **{name: getattr(probe.shape, name) for name in probe.sets}) if probe.sets else probe.shape
    )
    size = probe.size or now.feed.size
    return replace(probe, shape=shape, size=size, samples=probe.samples or run.batch_size_at(size))


def seconds(run: Run, probe: Probe) -> float:
    """Of forward and backward, an image: the mean over the probe's batches, after one more that is not counted."""
    feed = Feed(probe.size, probe.samples)
    with run.clock.paused():
        run.warm(Plan(feed, shape=probe.shape))  # compiling is not training time
    run.step.put(probe.shape)
    spent, images = 0.0, 0
    with batches_of(run, probe, extra=1) as batches:
        for number, batch in enumerate(batches):
            mode = run.step.mode(feed) if batch.total == feed.batch_size else EAGER
            wait(run.device)  # device sync, here and below: this is a measurement
            began = run.clock.watch()
            run.step.rehearse(batch, mode)
            wait(run.device)
            if number:
                spent += run.clock.watch() - began
                images += batch.total
    count_timing(run, probe)
    return spent / max(images, 1)


def count_timing(run: Run, probe: Probe) -> None:
    """The FLOPs of :func:`seconds`, whose batches are all full."""
    images = (probe.batches + 1) * probe.samples
    run.clock.count_flops(TRAINING_FLOPS * images * run.macs(probe.size, probe.shape))


@torch.no_grad()
def loss(run: Run, probe: Probe) -> float:
    """Mean cross-entropy of the probe's batches, as in training but for the update."""
    run.step.put(probe.shape)
    model = run.model if probe.average is None else run.copies[probe.average].model
    training = model.training
    total = torch.zeros(2, dtype=torch.float64, device=run.device)
    with temporary_shape(model, probe.shape, probe.shape), buffers_kept(model), batches_of(run, probe) as batches:
        try:
            model.train()
            if isinstance(model, VisionTransformer):  # an average's are those of the last step's shape
                model.drop_path_rates.copy_(run.model.drop_path_rates)
            for number, batch in enumerate(batches):
                if len(batch):
                    total[0] += run.step.loss_of(model, batch, number)
                    total[1] += len(batch)
        finally:
            model.train(training)
    summed, images = run.ranks.total(total).tolist()  # device sync
    run.clock.count_flops(FORWARD_FLOPS * images * run.macs(probe.size, probe.shape))
    return summed / max(images, 1)


def trainability(run: Run, probe: Probe) -> tuple[float, float]:
    """The mean condition number of the tangent kernel, and ZiCo, over batches of ``samples`` images."""
    run.step.put(probe.shape)
    kept = [parameter.grad for parameter in run.model.parameters()]
    numbers, gradients = [], []
    try:
        with batches_of(run, probe, extra=probe.kernel_batches) as batches:
            for number, batch in enumerate(batches):
                if number < probe.kernel_batches:
                    numbers.append(condition_number(run.step, batch, number))
                else:
                    gradients.append(run.step.gradients_of(batch))
    finally:
        for parameter, grad in zip(run.model.parameters(), kept, strict=True):
            parameter.grad = grad
    # Each image's gradient is a backward of its own, through the whole batch.
    backward, macs = TRAINING_FLOPS - FORWARD_FLOPS, run.macs(probe.size, probe.shape)
    kernels = len(numbers) * probe.samples * (FORWARD_FLOPS + backward * probe.samples)
    run.clock.count_flops(macs * (kernels + len(gradients) * probe.samples * TRAINING_FLOPS))
    return sum(numbers) / max(len(numbers), 1), zico(gradients)


@contextmanager
def batches_of(run: Run, probe: Probe, extra: int = 0) -> Iterator[Iterator[Batch]]:
    """The probe's batches, and ``extra`` ones, all of them full: images of its split, the same at every call.

    Raises ConfigError where the split has fewer images than a batch.
    """
    source, count = getattr(run.sources, probe.split), probe.batches + extra
    feed = Feed(probe.size, probe.samples, run.plan().feed.subset)
    if probe.split == "val":  # which has an order, by class perhaps: from all over it
        rows = np.linspace(0, source.count - 1, min(source.count, count * probe.samples)).astype(np.int64)
        source.rows.keep(number := len(rows), rows)
        feed = replace(feed, subset=number)
    with closing(full_batches(source, feed, EPOCH)) as batches:
        yield islice(batches, count)


@contextmanager
def generators_seeded(device: torch.device, seed: int) -> Iterator[None]:
    """PyTorch's generators start from ``seed`` in here, and are afterwards as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


KINDS = {"seconds": seconds, "loss": loss, "trainability": trainability}
