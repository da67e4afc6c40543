"""The training methods by themselves: what they plan, and the numbers of their sources."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.methods import METHODS, build_methods
from vitlocal.methods.autoprog import AutoProg, best, fitted_exponent
from vitlocal.methods.budgeted import Budgeted, solve, stage_weights
from vitlocal.methods.method import MethodContext, ProbeResult, StepResult
from vitlocal.methods.search import Net, divisible, ladder
from vitlocal.methods.trilevel import Trilevel, forgetting, swap
from vitlocal.methods.unfreeze import Unfreeze, groups_of, ranks, vote
from vitlocal.models.flops import count_macs
from vitlocal.models.shape import model_parts, temporary_shape
from vitlocal.plan import WHOLE_MODEL, Feed, Plan, Shape, fold
from vitlocal.progress import Progress
from vitlocal.report.run_folder import read_log
from vitlocal.train.simulate import curriculum

ROOT = Path(__file__).parent.parent
DEIT_S = "vitlocal_deit_small_patch16_224"
START = Plan(Feed(224, 64))


@lru_cache
def deit_s():
    with torch.device("meta"):
        return timm.create_model(DEIT_S)


@lru_cache
def macs(size: int, shape: Shape) -> int:
    with temporary_shape(deit_s(), shape, WHOLE_MODEL):
        return count_macs(deit_s(), shape.input_size or size)


def around(*options: str, images: int = 1000) -> MethodContext:
    """A DeiT-S whose recipe has these options."""
    config = read_config([f"--model.name={DEIT_S}", *(f"--{option}" for option in options)], {})
    return MethodContext(config, images, macs=macs, parts=model_parts(deit_s()), blocks=12)


def at(method, **progress) -> Plan:
    return fold([method], START, Progress(**progress))


# --- budgeted -------------------------------------------------------------------------------------------------------


def test_published_stages_of_deit_s():
    shapes = Budgeted(around()).shapes
    assert [(s.heads, s.hidden, s.grid) for s in shapes] == [(2, 384, 10), (4, 768, 12), (None, None, None)]


def test_the_solver():
    costs = (0.69, 1.91, 4.608)
    weights = stage_weights(3, 2.0, (0.9, 0.2, 0.5))  # seeds are sorted
    assert [round(weight, 3) for weight in weights] == [1.492, 2.718, 6.05]
    epochs = solve(691.2, costs, weights)
    assert epochs == (30, 55, 122)
    assert sum(c * e for c, e in zip(costs, epochs, strict=True)) == pytest.approx(688.2, abs=0.5)
    assert len(set(solve(1000, costs, stage_weights(3, 0, (0.1, 0.7, 0.3))))) == 1
    draw = np.random.default_rng(0)
    for _ in range(50):
        budget, alpha = draw.uniform(50, 1500), draw.uniform(0, 4)
        found = solve(budget, costs, stage_weights(3, alpha, draw.uniform(size=3)))
        spent = sum(c * e for c, e in zip(costs, found, strict=True))
        assert spent <= budget < spent + sum(costs) and min(found) >= 0 and list(found) == sorted(found)
        if min(found) > 5:
            assert found[-1] / found[0] <= np.exp(alpha) * 1.25  # whole epochs


def test_budgets_of_every_kind():
    half = Budgeted(around("budgeted.compute=50%", "budgeted.alpha=0"))
    assert len(set(half.epochs)) == 1 and half.budget_length.value == sum(half.epochs)
    spent = sum(c * e for c, e in zip(half.costs, half.epochs, strict=True))
    assert 0.5 * 300 * half.costs[-1] - sum(half.costs) < spent <= 0.5 * 300 * half.costs[-1]
    stated = Budgeted(around("budgeted.compute=691.2GFLOPs"))
    assert sum(c * e for c, e in zip(stated.costs, stated.epochs, strict=True)) <= 691.2e9
    given = Budgeted(around("budgeted.epochs=49,71,113"))
    assert given.budget_length.text == "233ep"
    assert [at(given, epoch=epoch).shape.heads for epoch in (0, 48.9, 49, 119.9, 120, 233)] == [2, 2, 4, 4, None, None]
    epochs = Budgeted(around("budget.length=30ep", "budgeted.alpha=0"))
    assert epochs.budget_length is None and [end.value for end in epochs.changes()] == [10, 20]
    hours = Budgeted(around("budget.length=24h", "budgeted.alpha=0"))
    parts = [end.value for end in hours.changes()]
    assert parts == pytest.approx((np.cumsum(hours.costs) / sum(hours.costs))[:-1].tolist())
    with pytest.raises(ConfigError, match="buys no epoch"):
        Budgeted(around("budgeted.compute=0.1%"))


def test_stages_by_measured_times():
    method = Budgeted(around("budget.length=1h", "budgeted.alpha=0", "budgeted.cost=time"))
    for seconds in (1.0, 2.0, 3.0):
        probe = method.probes(Progress())[0]
        assert probe.kind == "seconds"
        method.observe(ProbeResult(probe, seconds))
    assert not method.probes(Progress())
    assert [end.value for end in method.changes()] == pytest.approx([1 / 6, 1 / 2])


def test_growth_is_as_the_options_say():
    method = Budgeted(around("budgeted.new_moments=reset", "budgeted.copy_scale=0.5", "budgeted.copy_noise=0.1"))
    growth = at(method, fraction=0.9).growth
    assert growth.sources == "first"
    assert at(Budgeted(around("budgeted.copy_from=last")), fraction=0.9).growth.sources == "last"
    assert (growth.moments, growth.scale, growth.noise) == ("reset", 0.5, 0.1) and growth.average is None


def test_each_stage_grows_once():
    method = Budgeted(around("budget.length=30ep", "budgeted.alpha=0"))
    assert [at(method, epoch=epoch).growth.number for epoch in (0, 9, 10, 19, 20, 30)] == [0, 0, 1, 1, 2, 2]
    only = Budgeted(around("budgeted.grow=heads,hidden"))
    assert all(shape.grid is None for shape in only.shapes)


# --- tri-level ------------------------------------------------------------------------------------------------------

EXACT = ("trilevel.decay_steps=0", "train.compile=no")
PUBLISHED = (
    "budget.length=300ep",
    "trilevel.decay_start=10ep",
    "trilevel.decay_end=110ep",
    "trilevel.update_every=30ep",
)


def test_the_schedule_of_tokens():
    method = Trilevel(around(*PUBLISHED, "trilevel.token_keep_rate=0.7", "trilevel.attention_keep_rate=0.3", *EXACT))
    kept = [at(method, epoch=epoch).shape.token_keep_rate for epoch in (0, 9, 35, 60, 85, 110, 300)]
    assert kept == pytest.approx([1, 1, 0.956, 0.85, 0.744, 0.7, 0.7], abs=1e-3)
    assert at(method, epoch=60).shape.pruned_blocks == (3, 6, 9)
    assert method.evaluation_shape(WHOLE_MODEL) == Shape(
        token_keep_rate=0.7, attention_keep_rate=0.3, pruned_blocks=(3, 6, 9)
    )


def test_rungs_change_where_they_say():
    method = Trilevel(around("trilevel.token_keep_rate=0.5"))
    fractions = np.linspace(0, 1, 2001)
    kept = [at(method, fraction=float(part)).shape.token_keep_rate for part in fractions]
    assert len(set(kept)) == 9 and kept == sorted(kept, reverse=True) and kept[-1] == 0.5
    turned = [part for part, before, now in zip(fractions[1:], kept, kept[1:], strict=False) if now != before]
    assert turned == pytest.approx(sorted({end.value for end in method.changes()})[1:], abs=1e-3)


def test_forgetting():
    histories = {(1, 2, 2, 2): 0, (2, 1, 2, 1): 2, (1, 1, 1, 1): 4, (2, 2, 2, 2): 0, (0, 0, 0, 0): -1, (2, 0, 1, 2): 1}
    record = np.array(list(histories), np.uint8).T
    assert forgetting(record).tolist() == list(histories.values())


def test_swaps():
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
    """``epochs`` epochs in which even rows are hit always, and odd rows never."""
    for epoch in range(start, start + epochs):
        rows = torch.from_numpy(method.kept)
        for part in rows.split(64):
            method.observe(StepResult(None, part, START, Progress(epoch=epoch + 0.5), part % 2 == 0, part.float()))


def test_what_evaluations_drop():
    narrow, trained = Trilevel(around()), Shape(token_keep_rate=0.95, attention_keep_rate=0.5, pruned_blocks=(3, 6, 9))
    assert (
        narrow.evaluation_shape(trained)
        == narrow.evaluation_shape(WHOLE_MODEL)
        == Shape(token_keep_rate=0.9, attention_keep_rate=0.1, pruned_blocks=(3, 6, 9))
    )
    assert Trilevel(around("trilevel.prune_evaluation=no")).evaluation_shape(trained) == WHOLE_MODEL
    own = Trilevel(around("trilevel.attention_masks=own"))
    assert at(own, fraction=0.9).shape.per_head_masks and own.evaluation_shape(WHOLE_MODEL).per_head_masks
    assert (
        not Trilevel(around("trilevel.attention_masks=own", "trilevel.levels=tokens"))
        .evaluation_shape(WHOLE_MODEL)
        .per_head_masks
    )


def test_easy_examples_leave():
    method = Trilevel(around(*PUBLISHED))
    plan = at(method)
    assert plan.feed.subset == 1 and len(method.rows(1)) == 800
    first = method.rows(1).copy()
    watched(method, 30)
    assert not method.probes(Progress(epoch=29.5)) and not method.probes(Progress(epoch=29))
    for probe in method.probes(Progress(epoch=30)):
        method.observe(ProbeResult(probe, probe.value))
    gone = np.setdiff1d(first, method.kept)
    assert len(gone) == 50 and not (gone % 2).any() and gone.tolist() == sorted(first[first % 2 == 0])[:50]
    assert at(method, epoch=30).feed.subset == 2 and not method.probes(Progress(epoch=30))
    state = method.state_dict()
    again = Trilevel(around(*PUBLISHED))
    again.load_state_dict(state)
    assert np.array_equal(again.kept, method.kept) and at(again, epoch=31) == at(method, epoch=31)


def test_updates_end():
    method = Trilevel(around(*PUBLISHED, "trilevel.max_updates=2", "trilevel.score=forgetting"))
    assert method.step_outputs == {"correct"}
    assert not Trilevel(around("trilevel.max_updates=0", "trilevel.score=attention")).step_outputs  # nobody would look
    for update in range(4):
        watched(method, 30, 30 * update)
        for probe in method.probes(Progress(epoch=30 * (update + 1))):
            method.observe(ProbeResult(probe, probe.value))
    assert method.version == 3


# --- AutoProg -------------------------------------------------------------------------------------------------------


def test_ladders():
    assert ladder(224, 0.5, 4, 32) == (128, 160, 192, 224)
    assert ladder(18, 0.5, 4, 1) == (9, 12, 15, 18)
    assert ladder(12, 0.5, 4, 1) == (6, 8, 10, 12)
    assert [divisible(0.23 * depth, 2) for depth in (9, 12, 15, 18)] == [2, 4, 4, 4]  # VOLO's outlookers
    assert ladder(256, 0.25, 4, 64) == (64, 128, 192, 256)


def test_the_fitted_trade_off():
    times = np.array([1.0, 2.0, 4.0, 8.0])
    assert fitted_exponent((2 * times**-0.05).tolist(), times.tolist()) == pytest.approx(0.05)
    assert fitted_exponent([1.0, 1.1, 1.2, 1.3], times.tolist()) == 0
    assert best([1.0, 1.1, 0.9, 1.3], times.tolist()) == 2
    assert best([1.1, 1.0, 1.2], [1, 2, 3], 0.0) == 1
    for rounding in (-1e-7, 0.0, 1e-7):  # two candidates lie on the curve fitted to them: the cheaper one is taken
        assert best([2.9402629 + rounding, 2.9393359], [1.1e-3, 2.3e-3]) == 0
    under = (2 * times**-0.05).tolist()
    under[1] *= 0.98  # farthest below the curve
    assert best(under, times.tolist()) == 1


def entered(method: AutoProg, fraction: float) -> None:
    """A first step, after the questions that come before it."""
    point = Progress(fraction=fraction)
    while probes := method.probes(point):
        for probe in probes:
            method.observe(ProbeResult(probe, 1.0))
    method.observe(StepResult(None, None, at(method, fraction=fraction), point))


def searched(method: AutoProg, stage: int, choose: int) -> None:
    """Answers a stage's questions so that candidate ``choose`` has the smallest loss."""
    bounds = [*method.bounds(), 1.0]
    entered(method, bounds[stage])
    for part in (0.0, 0.5, 0.625, 0.75, 0.875, 1.0):
        point = Progress(fraction=bounds[stage] + part * method.search + 1e-9)
        number = 0
        while probes := method.probes(point):
            for probe in probes:
                value = 1.0 if probe.kind == "seconds" else 1.0 + (number != choose)
                method.observe(ProbeResult(probe, value))
                number += 1
        method.observe(StepResult(None, None, at(method, fraction=point.fraction), point))


def test_a_search_from_stage_to_stage():
    method = AutoProg(around("budget.length=100ep", "augment.randaugment=9", "autoprog.cost=time"))
    assert [bound * 100 for bound in method.bounds()] == [0, 25, 50, 75]
    assert method.candidates(0) == [Net(depth, size) for size in (128, 192, 224) for depth in (6, 10, 12)]
    shapes = {at(method, step=step).shape for step in range(200)}
    assert {(shape.skipped_blocks, shape.input_size) for shape in shapes} == {
        (skipped, size) for skipped in (tuple(range(6, 12)), (6, 7), ()) for size in (128, 192, None)
    }
    assert all(at(method, step=step).feed.size == 224 for step in range(9))
    order = at(method).shape.block_order
    assert order == (0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11)
    assert at(method).dials.strength == 1  # the supernet has the last stage's
    searched(method, 0, choose=0)
    plan = at(method, fraction=0.1)
    assert plan.shape == Shape(block_order=(0, 1, 2, 3, 4, 5)) and plan.feed.size == 128
    assert plan.growth.number == 2 and plan.growth.moments == "reset"
    assert plan.dials.strength == 0 and plan.dials.randaugment_strength == pytest.approx(4 / 9)
    assert method.candidates(1) == [Net(depth, size) for size in (128, 160) for depth in (8, 10, 12)]
    plan = at(method, fraction=0.25)
    assert plan.growth.number == 3 and plan.growth.average == 1  # the slow one
    assert plan.growth.blocks == tuple((slot, source) for slot, source in zip(range(6, 12), range(6), strict=True))
    searched(method, 1, choose=4)
    plan = at(method, fraction=0.4)
    assert (len(plan.shape.block_order), plan.feed.size) == (10, 160)
    assert plan.dials.randaugment_strength == pytest.approx(6 / 9)
    searched(method, 2, choose=0)
    assert len(at(method, fraction=0.6).shape.block_order or range(12)) == 12
    last = at(method, fraction=0.9)
    assert last.feed.size == 224 and sorted(last.shape.block_order or range(12)) == list(range(12))
    assert (last.dials.strength, last.dials.randaugment_strength) == (1, 1)
    depths = [method.chosen(stage).depth for stage in range(4)]
    sizes = [method.chosen(stage).size for stage in range(4)]
    assert depths == sorted(depths) and sizes == sorted(sizes)
    state = json.loads(json.dumps(method.state_dict()))  # plain values
    assert state["times"]


def test_a_search_by_flops_measures_no_time():
    method = AutoProg(around("budget.length=100ep", "autoprog.cost=flops", "autoprog.exponent=0"))
    assert not method.probes(Progress()) and not method.choices()
    searched(method, 0, choose=4)
    assert not method.times and method.choices() == [str(method.candidates(0)[4])]


def test_a_search_that_is_interrupted_goes_on():
    options = ("budget.length=100ep",)
    whole, first = AutoProg(around(*options)), AutoProg(around(*options))
    searched(whole, 0, choose=1)
    probes = first.probes(Progress())
    for probe in probes[:4]:
        first.observe(ProbeResult(probe, 1.0))
    again = AutoProg(around(*options))
    again.load_state_dict(first.state_dict())
    assert again.probes(Progress()) == probes[4:]
    searched(again, 0, choose=6)
    assert again.decided(0)


def test_a_stage_that_is_passed_over_leaves_no_gap():
    """Killed in the first stage and resumed in the third: what is new there is copied from what there is."""
    method = AutoProg(around("autoprog.schedule=6,8,10,12", "autoprog.space=depth"))
    method.observe(StepResult(None, None, START, Progress(fraction=0.1)))
    plan = at(method, fraction=0.6)
    there = set(range(6))
    assert len(plan.shape.block_order) == 10 and plan.growth.number == 5
    for new, source in plan.growth.blocks:
        assert source in there and new not in there
    assert set(plan.shape.block_order) == there | {new for new, _ in plan.growth.blocks}


def test_losses_are_asked_of_nets_that_have_trained():
    """However long it took to ask for times, the search has its length from its first step on."""
    method = AutoProg(around("budget.length=1h", "autoprog.search_length=4%"))
    late = Progress(fraction=0.04)
    probes = method.probes(Progress())
    assert {probe.kind for probe in probes} == {"seconds"}
    for probe in probes:
        method.observe(ProbeResult(probe, 1.0))
    assert not method.probes(late)
    method.observe(StepResult(None, None, START, late))
    assert not method.probes(Progress(fraction=0.055))
    assert {probe.kind for probe in method.probes(Progress(fraction=0.0601))} == {"loss"}


def test_when_and_on_what_losses_are_taken():
    method = AutoProg(around("autoprog.loss_at=0.25,1", "autoprog.loss_on=val", "autoprog.search_length=4%"))
    entered(method, 0.0)
    assert not method.probes(Progress(fraction=0.009))
    first = method.probes(Progress(fraction=0.0101))
    assert {(probe.kind, probe.split) for probe in first} == {("loss", "val")}
    for probe in first:
        method.observe(ProbeResult(probe, 1.0))
    # The round took until 0.05: not of the search's length, and no second one without a step in between.
    assert not method.probes(Progress(fraction=0.05)) and not method.decided(0)
    method.observe(StepResult(None, None, START, Progress(fraction=0.05)))
    again = AutoProg(around("autoprog.loss_at=0.25,1", "autoprog.loss_on=val", "autoprog.search_length=4%"))
    again.load_state_dict(method.state_dict())
    for one in (method, again):
        assert not one.probes(Progress(fraction=0.0798))
        for probe in one.probes(Progress(fraction=0.0801)):
            one.observe(ProbeResult(probe, 1.0))
        assert one.decided(0)


def test_a_step_of_the_stage_before_begins_no_search():
    """The clock may pass a stage's bound between planning a step and taking it: nothing has grown yet."""
    method = AutoProg(around("autoprog.schedule=6,8,10,12", "autoprog.space=depth"))
    method.observe(StepResult(None, None, at(method, fraction=0.24), Progress(fraction=0.24)))
    method.observe(StepResult(None, None, at(method, fraction=0.24), Progress(fraction=0.2501)))
    assert sorted(method.began) == [0]
    method.observe(StepResult(None, None, at(method, fraction=0.2501), Progress(fraction=0.26)))
    assert sorted(method.began) == [0, 1]


@pytest.mark.parametrize(
    ("options", "averages"),
    [
        ((), (0.998, 0.9996)),
        (("autoprog.grow=clone",), (0.998,)),
        (("autoprog.loss_of=online",), (0.9996,)),
        (("autoprog.loss_of=online", "autoprog.grow=random"), ()),
        (("autoprog.space=depth", "autoprog.schedule=6,8,10,12"), (0.9996,)),
        (("autoprog.space=depth", "autoprog.schedule=6,8,10,12", "autoprog.grow=clone"), ()),
    ],
)
def test_averages_that_nothing_reads_are_not_kept(options: tuple[str, ...], averages: tuple[float, ...]):
    method = AutoProg(around(*options))
    assert method.ema_decays == averages
    if method.config.schedule is None and method.config.loss_of == "average":
        assert averages[method._probe("loss", 0, Net(6, None)).average] == 0.998
    entered(method, 0.0)
    grown = at(method, fraction=0.3).growth
    if method.config.grow.startswith("momentum") and method.config.schedule:
        assert averages[grown.average] == 0.9996


def test_the_last_stage_has_the_recipes_strength():
    method = AutoProg(around("autoprog.schedule=6,8,10,12", "autoprog.space=depth", "augment.randaugment=7.5"))
    for fraction in (0.1, 0.3, 0.6):
        method.observe(StepResult(None, None, at(method, fraction=fraction), Progress(fraction=fraction)))
    assert at(method, fraction=0.9).dials.randaugment_strength == 1
    fixed = AutoProg(around("autoprog.grow_augmentation=no", "autoprog.schedule=6,8,10,12", "autoprog.space=depth"))
    assert at(fixed, fraction=0.1).dials == START.dials


def test_sizes_that_are_known_before_a_run():
    def fed(*options: str) -> list[str]:
        return [str(stage) for stage in curriculum(around(*options).recipe)]

    ladder_of = ["128px until 25%", "160px until 50%", "192px until 75%", "224px"]
    assert fed("methods=autoprog") == ladder_of
    assert fed("methods=autoprog", "autoprog.space=depth") == ["224px"]
    assert fed("methods=image_size,autoprog", "autoprog.space=depth", "image_size.init=192") == [
        "192px until 5ep",
        "224px",
    ]
    assert fed("methods=autoprog", "autoprog.schedule=6@96px,12@224px", "autoprog.stages=2") == [
        "96px until 50%",
        "224px",
    ]
    assert fed("methods=unfreeze") == ["64px until 25%", "128px until 50%", "160px until 75%", "224px"]
    assert fed("methods=unfreeze", "unfreeze.min_scale=1") == fed("methods=budgeted") == ["224px"]


def test_size_alone_keeps_the_depth():
    method = AutoProg(around("autoprog.space=size"))
    assert {net.depth for net in method.candidates(0)} == {12}


def test_the_least_of_all_is_a_block():
    method = AutoProg(around("methods=autoprog", "autoprog.space=depth", "autoprog.min_scale=0"))
    assert {net.depth for net in method.candidates(0)} == {1, 8, 12}


def test_ladders_of_small_models():
    assert ladder(64, 0.5, 4, 16) == (32, 48, 64) and ladder(64, 0.25, 4, 32) == (32, 64)
    assert ladder(240, 0.5, 4, 32)[-1] == 240 and ladder(96, 0.25, 4, 32) == (32, 64, 96)


def test_depth_alone_leaves_sizes_to_the_curriculum():
    run = around("methods=image_size,autoprog", "autoprog.space=depth", "budget.length=40ep")
    curriculum, method = build_methods(run)
    assert method.candidates(0) == [Net(6, None), Net(10, None), Net(12, None)]
    assert fold([curriculum, method], START, Progress()).feed.size == 32


def test_a_given_schedule_is_followed():
    method = AutoProg(around("autoprog.schedule=6@128px,8@160px,10@192px,12@224px"))
    plans = []
    for fraction in (0, 0.3, 0.6, 0.9):
        plans.append(at(method, fraction=fraction))
        method.observe(StepResult(None, None, plans[-1], Progress(fraction=fraction)))
    assert [plan.feed.size for plan in plans] == [128, 160, 192, 224]
    assert [len(plan.shape.block_order or range(12)) for plan in plans] == [6, 8, 10, 12]
    assert [plan.growth.number for plan in plans] == [0, 3, 5, 7]
    still = AutoProg(around("autoprog.schedule=6@128px,8@160px,12@224px,12@224px"))
    for fraction in (0, 0.3, 0.6):
        still.observe(StepResult(None, None, at(still, fraction=fraction), Progress(fraction=fraction)))
    assert at(still, fraction=0.6).growth == at(still, fraction=0.9).growth  # nothing grows
    assert at(still, fraction=0.9).growth.number == 5
    assert not method.probes(Progress(fraction=0.3))


# --- AutoProg-Zero --------------------------------------------------------------------------------------------------


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
    assert vote([1.0, 2.0, 3.0], [9.0, 1.0, 5.0], [1.0, 9.0, 5.0], (1, 0.5, 0.5), 1e-6) == 1
    assert vote([1.0, 2.0], [2.0, 1.0], [1.0, 2.0], (1, 0.5, 0.5), 1e-6) == 0  # a tie: the faster one


def test_stages_of_unfreezing():
    method = Unfreeze(around("model.size=256", "unfreeze.size_multiple=64"))
    assert method.sizes == (64, 128, 192, 256)
    assert method.nets()[0][0] == [Net(1, 64), Net(2, 64), Net(1, 128), Net(2, 128)]
    for number in range(8):
        (probe,) = method.probes(Progress())
        assert probe.kind == ("trainability", "seconds")[number % 2]
        better = number // 2 == 3
        method.observe(
            ProbeResult(probe, (1.0, 5.0) if number % 2 == 0 and better else (3.0, 1.0) if number % 2 == 0 else 1.0)
        )
    plan = at(method)
    assert plan.feed.size == 128 and plan.shape == Shape(trainable_blocks=(0, 1, 4, 5, 8, 9), stage=0)
    assert method.nets()[1][0] == [Net(level, size) for size in (128, 192) for level in (2, 3)]
    before = at(method, fraction=0.3)
    assert before.feed.size == 128 and method.probes(Progress(fraction=0.3))  # until it is answered, all stays
    assert method.nets() is method.nets()  # reckoned once, not at every step
    with pytest.raises(ConfigError, match="use an even number of at least 4"):
        Unfreeze(replace(around("unfreeze.probe_batch_size=5"), processes=2))
    head = Unfreeze(around("unfreeze.non_blocks=head", "unfreeze.moments=reset", "unfreeze.kernel_batches=3",
                           "unfreeze.zico_batches=4", "unfreeze.timed_batches=5"))  # fmt: skip
    (probe,) = head.probes(Progress())
    assert (probe.kernel_batches, probe.batches) == (3, 4) and probe.shape.head_only and "head_only" in probe.sets
    head.observe(ProbeResult(probe, (1.0, 1.0)))
    assert head.probes(Progress())[0].batches == 5
    given = Unfreeze(
        around("unfreeze.non_blocks=head", "unfreeze.moments=reset", "unfreeze.schedule=1@64px,2@128px,3@160px,4@224px")
    )
    plans = [at(given, fraction=fraction) for fraction in (0, 0.3, 0.8)]
    assert all(plan.shape.head_only for plan in plans)
    assert [(plan.growth.number, plan.growth.moments) for plan in plans] == [(0, "zero"), (1, "reset"), (3, "reset")]
    last = Unfreeze(around("unfreeze.schedule=1@64px,2@128px,3@160px,4@224px"))
    assert at(last, fraction=0.8).shape == Shape(stage=3) and not last.probes(Progress(fraction=0.8))
    small = Unfreeze(around("unfreeze.schedule=1@64px,2@64px,3@64px,4@64px"))
    assert [at(small, fraction=fraction).feed.size for fraction in (0, 0.8)] == [64, 64]
    full = "1@224px,2@224px,3@224px,4@224px"
    both = build_methods(around("methods=image_size,unfreeze", f"unfreeze.schedule={full}"))
    assert fold(both, START, Progress()).feed.size == 32


def test_times_of_batches_are_compared():
    """The published tolerance, 1e-6, is of seconds a batch: 3e-7 s an image apart are 5e-6 s a batch of 16."""
    method = Unfreeze(around("unfreeze.rank_weights=1,0,0"))
    for number, probe in enumerate(method.probes(Progress())[0] for _ in range(8)):
        seconds = 1e-3 - 3e-7 * (number // 2)
        method.observe(ProbeResult(probe, (1.0, 1.0) if number % 2 == 0 else seconds))
    assert method.times[0][0] == pytest.approx(16e-3)
    assert ranks(method.times[0], method.config.tolerance) == [4, 3, 2, 1]


# --- together -------------------------------------------------------------------------------------------------------

GROWING = ("budgeted", "trilevel", "autoprog", "unfreeze")
PAIRS = [  # all that docs/methods/README.md has as allowed
    *("image_size," + name for name in GROWING), *("strength," + name for name in GROWING),
    *(name + ",batch_size" for name in GROWING), "budgeted,trilevel", "trilevel,autoprog", "budgeted,unfreeze",
    "trilevel,unfreeze", "image_size,strength", "image_size,batch_size",
]  # fmt: skip
ALLOWING = (
    "budgeted.grow=heads,hidden", "autoprog.space=depth", "trilevel.levels=examples", "unfreeze.min_scale=1",
    "strength.by=budget", "augment.mixup=1", "autoprog.grow_augmentation=no",
)  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_that_go_together(pair: str):
    methods = build_methods(around(f"methods={pair}", *ALLOWING))
    for fraction in (0.0, 0.2, 0.5, 0.9):
        now = Progress(epoch=30 * fraction, fraction=fraction)
        assert fold(methods, START, now) == fold(methods, START, now)


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        ("budgeted,trilevel", ("trilevel.levels=attention",)),
        ("budgeted,trilevel", ("trilevel.levels=examples,attention",)),
        ("budgeted,trilevel", ("trilevel.token_keep_rate=1",)),
        ("trilevel,autoprog", ("autoprog.space=size",)),
        ("trilevel,autoprog", ("autoprog.schedule=12@128px,12@224px", "autoprog.stages=2")),
        ("unfreeze,autoprog", ("autoprog.space=size", "unfreeze.min_scale=1")),
    ],
)
def test_pairs_that_go_together_as_their_options_are(pair: str, options: tuple[str, ...]):
    """What a method leaves alone by its options, another may set."""
    methods = build_methods(around(f"methods={pair}", *options))
    for fraction in (0.0, 0.1, 0.3, 0.6, 0.9):
        fold(methods, START, Progress(epoch=30 * fraction, fraction=fraction))


@pytest.mark.parametrize(
    ("pair", "options", "reason"),
    [
        ("image_size,budgeted", (), "both take away tokens"),
        ("budgeted,trilevel", (), "both take away tokens"),
        ("budgeted,trilevel", ("trilevel.levels=tokens",), "both take away tokens"),
        ("trilevel,autoprog", (), "tokens and connections go at blocks that may not be there yet"),
        (
            "trilevel,autoprog",
            ("trilevel.token_keep_rate=1",),
            "tokens and connections go at blocks that may not be there yet",
        ),
        ("image_size,autoprog", (), "both set feed.size"),
        ("budgeted,autoprog", (), "both set growth"),
        ("autoprog,unfreeze", ("autoprog.space=depth", "unfreeze.min_scale=1"), "both choose which blocks"),
        ("autoprog,unfreeze", ("autoprog.space=size",), "both set feed.size"),
    ],
)
def test_pairs_that_do_not(pair: str, options: tuple[str, ...], reason: str):
    with pytest.raises(ConfigError, match=reason):
        around(f"methods={pair}", *options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("methods=budgeted", "budgeted.heads=0.5,1"), "2 values for 3 stages"),
        (("methods=budgeted", "budgeted.heads=0.5,0.4,1"), "expected growing parts"),
        (("methods=budgeted", "budgeted.compute=50%", "budgeted.epochs=1,2,3"), "keep one of the two"),
        (("methods=budgeted", "budgeted.compute=half"), "a part of full training"),
        (("methods=budgeted", "budgeted.grow=none"), "nothing grows"),
        (("methods=budgeted", "budgeted.new_weights=random", "budgeted.copy_noise=1"), "random ones have no copies"),
        (("methods=budgeted", "budgeted.cost=time", "budget.length=9ep"), "time is for a budget in time"),
        (("methods=unfreeze", "unfreeze.schedule=[]"), "it is empty"),
        (("methods=autoprog", "autoprog.search_length=0%"), "0 leaves nothing"),
        (("methods=autoprog", "autoprog.loss_at=1,0.5"), "expected growing parts of the search"),
        (("methods=autoprog", "autoprog.loss_at=0.5"), "and 1 at last"),
        (("methods=autoprog", "autoprog.loss_at=0,1"), "expected growing parts of the search above 0"),
        (("methods=autoprog", "autoprog.ema_decays=0.9,0.99,0.999"), "expected two decays"),
        (("methods=autoprog", "autoprog.ema_decays=0.99,0.9"), "the smaller one first"),
        (("methods=budgeted", "budgeted.new_weights=random", "budgeted.copy_from=last"), "random ones have no copies"),
        (("methods=unfreeze", "unfreeze.zico_batches=1"), "at least 2"),
        (("methods=trilevel", "trilevel.levels=none"), "all are off"),
        (("methods=trilevel", "trilevel.decay_steps=0"), "set train.compile=no"),
        (("methods=trilevel", "augment.repeats=3"), "set augment.repeats=1"),
        (("methods=trilevel", "trilevel.token_keep_rate=0"), "nothing would be left"),
        (("methods=trilevel", "trilevel.decay_start=50%", "trilevel.decay_end=40%"), "does not come after"),
        (("methods=autoprog", "autoprog.search_length=2ep"), "give a part, as 2%"),
        (("methods=autoprog", "autoprog.search_length=25%"), "search for less"),
        (("methods=autoprog", "autoprog.schedule=6,12"), "2 nets for 4 stages"),
        (("methods=autoprog", "autoprog.schedule=8,6,10,12", "autoprog.space=depth"), "must not fall"),
        (("methods=unfreeze", "unfreeze.schedule=1@64px,2@64px,5@64px,5@64px"), "of at most 4"),
        (("methods=unfreeze", "unfreeze.schedule=1@224px,2@160px,3@224px,4@224px"), "got sizes .224, 160.* not fall"),
        (("methods=autoprog", "autoprog.schedule=6@224px,8@160px,10@192px,12@224px"), "got sizes .224, 160.* not fall"),
        (("methods=unfreeze,image_size",), "image_size sets the sizes"),
        (("methods=trilevel,trilevel",), "trilevel and trilevel both set"),
        (("methods=autoprog", "model.weights=a.pth"), "give an autoprog.schedule of one depth"),
        (
            ("methods=autoprog", "model.weights=a.pth", "autoprog.space=depth", "autoprog.schedule=6,8,10,12"),
            "copies take the places of blocks of model.weights",
        ),
        (("methods=trilevel", "data.on_error=skip"), "an example that is held out may take a damaged one's place"),
    ],
)
def test_what_recipes_may_not_ask(options: tuple[str, ...], problem: str):
    with pytest.raises(ConfigError, match=problem):
        around(*options)


@pytest.mark.parametrize(
    ("options", "doubt"),
    [
        (
            ("methods=image_size,budgeted", "budgeted.compute=50%"),
            r"budget \(50%\) is .* model.size.* with image_size the",
        ),
        (("methods=budgeted,trilevel", "budgeted.compute=50%"), "with trilevel the run will cost less"),
        (("methods=budgeted,trilevel,unfreeze", "budgeted.compute=50%"), "with trilevel and unfreeze the run"),
        (("methods=image_size,budgeted", "budgeted.cost=time"), "changes with image_size, and the stages"),
        (("methods=budgeted", "model.weights=a.pth"), "the first stage's heads and hidden units alone are used"),
        (("methods=budgeted,unfreeze", "model.weights=a.pth"), "is overwritten as the model grows"),
        (("methods=unfreeze", "unfreeze.schedule=1@64px,2@64px,3@64px,3@224px"), "level 3 of 4: .* never trained"),
        (
            ("methods=unfreeze", "unfreeze.schedule=1@64px,2@64px,3@64px,4@192px"),
            "192 px, and model.size is 224",
        ),
        (
            ("methods=autoprog", "autoprog.schedule=6@64px,12@192px", "autoprog.stages=2"),
            "12@192px, and model.size",
        ),
        (("methods=autoprog", "autoprog.schedule=6,12", "autoprog.stages=2", "autoprog.space=depth"), None),
        (("methods=budgeted", "budgeted.compute=50%"), None),
        (("methods=image_size,budgeted",), None),
        (("methods=budgeted", "budgeted.grow=tokens", "model.weights=a.pth"), None),
        (("methods=autoprog", "autoprog.space=size", "model.weights=a.pth"), None),
        (("methods=autoprog", "autoprog.schedule=12@128px,12@224px", "autoprog.stages=2", "model.weights=a.pth"), None),
    ],
)
def test_what_recipes_may_hardly_mean(options: tuple[str, ...], doubt: str | None):
    grow = [] if any(option.startswith("budgeted.grow") for option in options) else ["budgeted.grow=heads,hidden"]
    recipe = around("trilevel.levels=examples", *grow, *options).recipe
    found = [doubt for name in recipe.methods for doubt in METHODS[name].config_warnings(recipe)]
    found = [sentence for sentence in found if "set the run's length" not in sentence]
    assert (not found) if doubt is None else re.search(doubt, " ".join(found))


# --- the worked example ---------------------------------------------------------------------------------------------


def test_the_example_in_contributing_is_a_method(folder: Path, tmp_path: Path):
    """File, line and recipe as they stand there, in a copy of the code, by the trainer's command."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code, line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) < 30 and len(line.splitlines()) == 1
    for name in ("vitlocal", "rcfg"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_imagenet.py", tmp_path)
    (tmp_path / "vitlocal" / "methods" / "joining.py").write_text(code)
    (tmp_path / "rcfg" / "joining.yaml").write_text(recipe)
    registry = tmp_path / "vitlocal" / "methods" / "__init__.py"
    lines = registry.read_text().splitlines(keepends=True)
    (place,) = (number for number, before in enumerate(lines) if before.startswith("MODULES ="))
    assert line.replace(', "joining"', "") == lines[place]
    registry.write_text("".join([*lines[:place], line, *lines[place + 1 :]]))
    command = re.search(r"#   python (.*)", recipe)[1].split()
    small = ["--model.width=32", "--model.heads=2", "--budget.length=8steps", "--train.batch_size=32",
             "--run.device=cpu", "--train.warmup=0ep", f"--data.root={folder}",
             f"--run.folder={tmp_path}/run"]  # fmt: skip
    done = subprocess.run([sys.executable, *command, *small], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    records = read_log(tmp_path / "run")
    assert [record["shape.block_order"] for record in records if "shape.block_order" in record] == [
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
    ]
    assert records[0]["macs_per_image"] < records[-1]["macs_per_image"]
