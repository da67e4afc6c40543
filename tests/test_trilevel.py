"""Tri-level training: the schedule of tokens and connections, and the exchange of examples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_plans import START, context_of, plan_at

from vitlocal.methods.method import StepResult
from vitlocal.methods.trilevel import Trilevel, forgetting, swap
from vitlocal.plan import WHOLE_MODEL, Shape
from vitlocal.progress import Progress

EXACT = ("trilevel.decay_steps=0", "train.compile=no")
PUBLISHED = (
    "budget.length=300ep",
    "trilevel.decay_start=10ep",
    "trilevel.decay_end=110ep",
    "trilevel.update_every=30ep",
)


def test_the_schedule_of_tokens():
    method = Trilevel(
        context_of(*PUBLISHED, "trilevel.token_keep_rate=0.7", "trilevel.attention_keep_rate=0.3", *EXACT)
    )
    kept = [plan_at(method, epoch=epoch).shape.token_keep_rate for epoch in (0, 9, 35, 60, 85, 110, 300)]
    assert kept == pytest.approx([1, 1, 0.956, 0.85, 0.744, 0.7, 0.7], abs=1e-3)
    assert plan_at(method, epoch=60).shape.pruned_blocks == (3, 6, 9)
    assert method.evaluation_shape(WHOLE_MODEL) == Shape(
        token_keep_rate=0.7, attention_keep_rate=0.3, pruned_blocks=(3, 6, 9)
    )


def test_decay_steps_are_at_the_stated_changes():
    method = Trilevel(context_of("trilevel.token_keep_rate=0.5"))
    fractions = np.linspace(0, 1, 2001)
    kept = [plan_at(method, fraction=float(part)).shape.token_keep_rate for part in fractions]
    assert len(set(kept)) == 9 and kept == sorted(kept, reverse=True) and kept[-1] == 0.5
    turned = [part for part, before, now in zip(fractions[1:], kept, kept[1:], strict=False) if now != before]
    assert turned == pytest.approx(sorted({end.value for end in method.changes()})[1:], abs=1e-3)


def test_forgetting():
    histories = {(1, 2, 2, 2): 0, (2, 1, 2, 1): 2, (1, 1, 1, 1): 4, (2, 2, 2, 2): 0, (0, 0, 0, 0): -1, (2, 0, 1, 2): 1}
    record = np.array(list(histories), np.uint8).T
    assert forgetting(record).tolist() == list(histories.values())


def test_the_easiest_examples_are_swapped():
    draw = np.random.default_rng(0)
    kept, pool = np.arange(0, 80), np.arange(80, 100)
    times = draw.integers(-1, 5, 100)
    ties = draw.random(100)
    new, out = swap(kept, pool, times, ties, 5, draw)
    assert len(new) == 80 and not set(new) & set(out) and set(new) | set(out) == set(range(100))
    removed = sorted(set(kept) - set(new))
    easiest = sorted((times[row], ties[row], row) for row in kept if times[row] >= 0)[:5]
    assert removed == sorted(row for *_, row in easiest)
    assert not set(removed) & set(new)
    few, _ = swap(kept, pool, np.full(100, -1), ties, 5, draw)  # nothing was seen: nothing changes
    assert np.array_equal(few, kept)


def watched(method: Trilevel, epochs: int, start: int = 0) -> None:
    """``epochs`` epochs in which even rows are always right, and odd rows never."""
    for epoch in range(start, start + epochs):
        rows = torch.from_numpy(method._kept)
        for part in rows.split(64):
            method.observe(StepResult(None, part, START, Progress(epoch=epoch + 0.5), part % 2 == 0, part.float()))


def test_evaluations_use_the_final_rates():
    narrow, trained = (
        Trilevel(context_of()),
        Shape(token_keep_rate=0.95, attention_keep_rate=0.5, pruned_blocks=(3, 6, 9)),
    )
    assert (
        narrow.evaluation_shape(trained)
        == narrow.evaluation_shape(WHOLE_MODEL)
        == Shape(token_keep_rate=0.9, attention_keep_rate=0.1, pruned_blocks=(3, 6, 9))
    )
    assert Trilevel(context_of("trilevel.prune_evaluation=no")).evaluation_shape(trained) == WHOLE_MODEL
    own = Trilevel(context_of("trilevel.attention_masks=per_head"))
    assert plan_at(own, fraction=0.9).shape.per_head_masks and own.evaluation_shape(WHOLE_MODEL).per_head_masks
    assert (
        not Trilevel(context_of("trilevel.attention_masks=per_head", "trilevel.levels=tokens"))
        .evaluation_shape(WHOLE_MODEL)
        .per_head_masks
    )


def test_updates_remove_easy_examples():
    method = Trilevel(context_of(*PUBLISHED))
    plan = plan_at(method)
    assert plan.feed.subset == 1 and len(method.rows(1)) == 800
    first = method.rows(1).copy()
    watched(method, 30)
    assert not method.probes(Progress(epoch=29.5)) and not method.probes(Progress(epoch=29))
    for probe in method.probes(Progress(epoch=30)):
        method.observe(replace(probe, answer=probe.value))
    gone = np.setdiff1d(first, method._kept)
    assert len(gone) == 50 and not (gone % 2).any() and gone.tolist() == sorted(first[first % 2 == 0])[:50]
    assert plan_at(method, epoch=30).feed.subset == 2 and not method.probes(Progress(epoch=30))
    state = method.state_dict()
    again = Trilevel(context_of(*PUBLISHED))
    again.load_state_dict(state)
    assert np.array_equal(again._kept, method._kept) and plan_at(again, epoch=31) == plan_at(method, epoch=31)


def test_updates_end():
    method = Trilevel(context_of(*PUBLISHED, "trilevel.max_updates=2", "trilevel.score=forgetting"))
    assert method.needs.step_outputs == {"correct"}
    assert not Trilevel(
        context_of("trilevel.max_updates=0", "trilevel.score=attention")
    ).needs.step_outputs  # nobody would look
    for update in range(4):
        watched(method, 30, 30 * update)
        for probe in method.probes(Progress(epoch=30 * (update + 1))):
            method.observe(replace(probe, answer=probe.value))
    assert method._version == 3
