"""What methods want to know beside training: the time, the loss or the trainability of a candidate.

Nothing here leaves a trace: weights, moments, averages, BatchNorm's statistics and random generators are as before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from vitlocal.data.source import Batch
from vitlocal.models.surgery import check_shape, in_shape
from vitlocal.models.vit import VisionTransformer
from vitlocal.plan import TRAINING_FLOPS, Feed, Plan, Position, Probe
from vitlocal.train.step import EAGER, buffers_kept
from vitlocal.train.trainability import condition_number, zico
from vitlocal.train.watch import wait

if TYPE_CHECKING:
    from vitlocal.train.run import Run

FORWARD_FLOPS = TRAINING_FLOPS / 3  # to a multiply-add, without a backward
EPOCH = 1_000_000  # whose order and crops are for probes: every candidate sees the same


def answer(run: Run, probe: Probe) -> Any:
    """What ``probe`` asks for, the same on every rank. Every rank must call it. It is of the budget, FLOPs and all."""
    if probe.kind == "sum":
        return run.ranks.total(probe.value.to(run.device)).cpu()  # device sync
    probe = in_place(run, probe)
    check_shape(run.model, probe.shape)
    before = run.step.shape
    try:
        with generators_kept(run.device), buffers_kept(run.model):
            return run.ranks.told(KINDS[probe.kind](run, probe))
    finally:
        run.step.put(before)


def in_place(run: Run, probe: Probe) -> Probe:
    """``probe`` with what it leaves open as the run has it: the shape's other fields, the size, the batch."""
    now = run.plan()
    shape = (
        replace(now.shape, **{name: getattr(probe.shape, name) for name in probe.sets}) if probe.sets else probe.shape
    )
    size = probe.size or now.feed.size
    return replace(probe, shape=shape, size=size, samples=probe.samples or run.batch_at(size))


def seconds(run: Run, probe: Probe) -> float:
    """Of forward and backward, an image: the mean over the probe's batches, after one more that is not counted."""
    feed = Feed(probe.size, probe.samples)
    with run.clock.paused():
        run.warm(Plan(feed, shape=probe.shape))  # compiling is not training time
    run.step.put(probe.shape)
    spent, images, all_images = 0.0, 0, 0
    with batches_of(run, probe, extra=1) as batches:
        for number, batch in enumerate(batches):
            mode = run.step.mode(feed) if batch.total == feed.batch_size else EAGER
            wait(run.device)  # device sync, here and below: this is a measurement
            began = time.perf_counter()
            run.step.rehearse(batch, mode)
            wait(run.device)
            all_images += batch.total
            if number:
                spent += time.perf_counter() - began
                images += batch.total
    run.clock.count_flops(TRAINING_FLOPS * all_images * run.macs(probe.size, probe.shape))
    return spent / max(images, 1)


@torch.no_grad()
def loss(run: Run, probe: Probe) -> float:
    """Mean cross-entropy of the probe's training batches, as in training but for the update."""
    run.step.put(probe.shape)
    model = run.model if probe.average is None else run.copies[probe.average].model
    training = model.training
    total = torch.zeros(2, dtype=torch.float64, device=run.device)
    with in_shape(model, probe.shape, probe.shape), buffers_kept(model), batches_of(run, probe) as batches:
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
    """The mean condition number of the tangent kernel, and ZiCo, over the probe's batches of ``samples`` images."""
    run.step.put(probe.shape)
    kept = [parameter.grad for parameter in run.model.parameters()]
    numbers, gradients = [], []
    half = probe.batches // 2  # for the kernel; the rest for ZiCo
    try:
        with batches_of(run, probe) as batches:
            for number, batch in enumerate(batches):
                if number < half:
                    numbers.append(condition_number(run.step, batch))
                else:
                    gradients.append(run.step.gradients_of(batch))
    finally:
        for parameter, grad in zip(run.model.parameters(), kept, strict=True):
            parameter.grad = grad
    images = probe.samples * (len(numbers) + len(gradients))
    run.clock.count_flops(TRAINING_FLOPS * images * run.macs(probe.size, probe.shape))
    return sum(numbers) / max(len(numbers), 1), zico(gradients)


@contextmanager
def batches_of(run: Run, probe: Probe, extra: int = 0) -> Iterator[Iterator[Batch]]:
    """The probe's batches, and ``extra`` ones: training images that are the same at every call."""
    feed = Feed(probe.size, probe.samples, run.plan().feed.subset)
    with run.sources.train.open(feed, Position(EPOCH)) as batches:
        yield islice(batches, probe.batches + extra)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """PyTorch's generators are afterwards as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


KINDS = {"seconds": seconds, "loss": loss, "trainability": trainability}
