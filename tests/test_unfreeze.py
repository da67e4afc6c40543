"""AutoProg-Zero: groups of blocks, scores and votes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from method_plans import START, context_of, plan_at

from vitlocal.errors import ConfigError
from vitlocal.methods import build_methods
from vitlocal.methods.search import Net
from vitlocal.methods.unfreeze import Unfreeze, groups_of, ranks, vote
from vitlocal.plan import Shape, fold
from vitlocal.progress import Progress


def test_groups_of_blocks():
    found = groups_of(28, 4, "mod")
    assert found[0] == (0, 4, 8, 12, 16, 20, 24) and [len(group) for group in found] == [7, 14, 21, 28]
    assert [len(group) for group in groups_of(28, 4, "released")] == [7, 20, 26, 28]
    assert groups_of(8, 4, "top")[0] == (6, 7) and groups_of(8, 4, "contiguous")[0] == (0, 1)
    for how in ("mod", "contiguous", "top"):
        nested = groups_of(12, 4, how)
        assert all(set(small) < set(large) for small, large in pairwise(nested))
        assert nested[-1] == tuple(range(12))


def test_votes():
    assert ranks([3.0, 1.0, 2.0], 1e-6) == [3, 1, 2]
    assert ranks([1.0, 1.0 + 1e-7, 2.0], 1e-6) == [1, 1, 3]
    assert ranks([float("nan"), float("inf"), 1.0], 1e-6)[2] == 1
    # Time 1, 2, 3 with 1; conditioning 3, 1, 2 and ZiCo 3, 1, 2 with a half each: 4, 3, 5.
    assert vote([1.0, 2.0, 3.0], [(9.0, 1.0), (1.0, 9.0), (5.0, 5.0)], (1, 0.5, 0.5), 1e-6) == 1
    assert vote([1.0, 2.0], [(2.0, 1.0), (1.0, 2.0)], (1, 0.5, 0.5), 1e-6) == 0  # a tie: the faster one


def test_stages_of_unfreezing():
    method = Unfreeze(context_of("model.size=256", "unfreeze.size_multiple=64"))
    assert method._sizes == (64, 128, 192, 256)
    assert method._candidates(0) == [Net(1, 64), Net(2, 64), Net(1, 128), Net(2, 128)]
    for number in range(8):
        (probe,) = method.probes(Progress())
        assert probe.kind == ("trainability", "seconds")[number % 2]
        better = number // 2 == 3
        method.observe(
            replace(probe, answer=(1.0, 5.0) if number % 2 == 0 and better else (3.0, 1.0) if number % 2 == 0 else 1.0)
        )
    plan = plan_at(method)
    assert plan.feed.size == 128 and plan.shape == Shape(trainable_blocks=(0, 1, 4, 5, 8, 9), stage=0)
    assert method._candidates(1) == [Net(level, size) for size in (128, 192) for level in (2, 3)]
    before = plan_at(method, fraction=0.3)
    assert before.feed.size == 128 and method.probes(Progress(fraction=0.3))  # until it is answered, all stays
    assert method._candidates(1) is method._candidates(1)  # computed once, not at every step
    with pytest.raises(ConfigError, match="use an even number of at least 4"):
        Unfreeze(replace(context_of("unfreeze.probe_batch_size=5"), processes=2))
    head = Unfreeze(context_of("unfreeze.non_blocks=head", "unfreeze.moments=reset", "unfreeze.kernel_batches=3",
                           "unfreeze.zico_batches=4", "unfreeze.timed_batches=5"))  # fmt: skip
    (probe,) = head.probes(Progress())
    assert (probe.kernel_batches, probe.batches) == (3, 4) and probe.shape.head_only and "head_only" in probe.sets
    head.observe(replace(probe, answer=(1.0, 1.0)))
    assert head.probes(Progress())[0].batches == 5
    given = Unfreeze(
        context_of(
            "unfreeze.non_blocks=head", "unfreeze.moments=reset", "unfreeze.schedule=1@64px,2@128px,3@160px,4@224px"
        )
    )
    plans = [plan_at(given, fraction=fraction) for fraction in (0, 0.3, 0.8)]
    assert all(plan.shape.head_only for plan in plans)
    assert [(plan.growth.number, plan.growth.moments) for plan in plans] == [(0, "zero"), (1, "reset"), (3, "reset")]
    last = Unfreeze(context_of("unfreeze.schedule=1@64px,2@128px,3@160px,4@224px"))
    assert plan_at(last, fraction=0.8).shape == Shape(stage=3) and not last.probes(Progress(fraction=0.8))
    small = Unfreeze(context_of("unfreeze.schedule=1@64px,2@64px,3@64px,4@64px"))
    assert [plan_at(small, fraction=fraction).feed.size for fraction in (0, 0.8)] == [64, 64]
    full = "1@224px,2@224px,3@224px,4@224px"
    both = build_methods(context_of("methods=image_size,unfreeze", f"unfreeze.schedule={full}"))
    assert fold(both, START, Progress()).feed.size == 32


def test_times_of_batches_are_compared():
    """The published tolerance, 1e-6, is in seconds per batch. 3e-7 s per image are 5e-6 s per batch of 16."""
    method = Unfreeze(context_of("unfreeze.rank_weights=1,0,0"))
    for number, probe in enumerate(method.probes(Progress())[0] for _ in range(8)):
        seconds = 1e-3 - 3e-7 * (number // 2)
        method.observe(replace(probe, answer=(1.0, 1.0) if number % 2 == 0 else seconds))
    assert method._times[0][0] == pytest.approx(16e-3)
    assert ranks(method._times[0], method._config.rank_tolerance) == [4, 3, 2, 1]
