"""AutoProg: candidates, searches and growth."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from method_plans import START, context_of, plan_at

from vitlocal.config import read_config
from vitlocal.methods import build_methods
from vitlocal.methods.autoprog import AutoProg, best, fitted_exponent
from vitlocal.methods.method import StepResult
from vitlocal.methods.search import Net, divisible, ladder
from vitlocal.plan import Shape, fold
from vitlocal.progress import Progress
from vitlocal.storage import recipe_stages


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
    """A first step, after the probes that come before it."""
    point = Progress(fraction=fraction)
    while probes := method.probes(point):
        for probe in probes:
            method.observe(replace(probe, answer=1.0))
    method.observe(StepResult(None, None, plan_at(method, fraction=fraction), point))


def searched(method: AutoProg, stage: int, choose: int) -> None:
    """Answers a stage's probes so that candidate ``choose`` has the smallest loss."""
    bounds = [*method._bounds, 1.0]
    entered(method, bounds[stage])
    for part in (0.0, 0.5, 0.625, 0.75, 0.875, 1.0):
        point = Progress(fraction=bounds[stage] + part * method._search + 1e-9)
        number = 0
        while probes := method.probes(point):
            for probe in probes:
                value = 1.0 if probe.kind == "seconds" else 1.0 + (number != choose)
                method.observe(replace(probe, answer=value))
                number += 1
        method.observe(StepResult(None, None, plan_at(method, fraction=point.fraction), point))


def test_a_search_from_stage_to_stage():
    method = AutoProg(context_of("budget.length=100ep", "augment.randaugment=9", "autoprog.cost=time"))
    assert [bound * 100 for bound in method._bounds] == [0, 25, 50, 75]
    assert method._candidates(0) == [Net(depth, size) for size in (128, 192, 224) for depth in (6, 10, 12)]
    shapes = {plan_at(method, step=step).shape for step in range(200)}
    assert {(shape.skipped_blocks, shape.input_size) for shape in shapes} == {
        (skipped, size) for skipped in (tuple(range(6, 12)), (6, 7), ()) for size in (128, 192, None)
    }
    assert all(plan_at(method, step=step).feed.size == 224 for step in range(9))
    order = plan_at(method).shape.block_order
    assert order == (0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11)
    assert plan_at(method).dials.strength == 1  # the supernet has the last stage's
    searched(method, 0, choose=0)
    plan = plan_at(method, fraction=0.1)
    assert plan.shape == Shape(block_order=(0, 1, 2, 3, 4, 5)) and plan.feed.size == 128
    assert plan.growth.number == 2 and plan.growth.moments == "reset"
    assert plan.dials.strength == 0 and plan.dials.randaugment_strength == pytest.approx(4 / 9)
    assert method._candidates(1) == [Net(depth, size) for size in (128, 160) for depth in (8, 10, 12)]
    plan = plan_at(method, fraction=0.25)
    assert plan.growth.number == 3 and plan.growth.average == 1  # the slow one
    assert plan.growth.blocks == tuple((slot, source) for slot, source in zip(range(6, 12), range(6), strict=True))
    searched(method, 1, choose=4)
    plan = plan_at(method, fraction=0.4)
    assert (len(plan.shape.block_order), plan.feed.size) == (10, 160)
    assert plan.dials.randaugment_strength == pytest.approx(6 / 9)
    searched(method, 2, choose=0)
    assert len(plan_at(method, fraction=0.6).shape.block_order or range(12)) == 12
    last = plan_at(method, fraction=0.9)
    assert last.feed.size == 224 and sorted(last.shape.block_order or range(12)) == list(range(12))
    assert (last.dials.strength, last.dials.randaugment_strength) == (1, 1)
    depths = [method._chosen(stage).depth for stage in range(4)]
    sizes = [method._chosen(stage).size for stage in range(4)]
    assert depths == sorted(depths) and sizes == sorted(sizes)
    state = json.loads(json.dumps(method.state_dict()))  # plain values
    assert state["times"]


def test_a_search_by_flops_measures_no_time():
    method = AutoProg(context_of("budget.length=100ep", "autoprog.cost=flops", "autoprog.exponent=0"))
    assert not method.probes(Progress()) and not method.choices()
    searched(method, 0, choose=4)
    assert not method._record.times and method.choices() == [str(method._candidates(0)[4])]


def test_an_interrupted_search_continues():
    options = ("budget.length=100ep",)
    whole, first = AutoProg(context_of(*options)), AutoProg(context_of(*options))
    searched(whole, 0, choose=1)
    probes = first.probes(Progress())
    for probe in probes[:4]:
        first.observe(replace(probe, answer=1.0))
    again = AutoProg(context_of(*options))
    again.load_state_dict(first.state_dict())
    assert again.probes(Progress()) == probes[4:]
    searched(again, 0, choose=6)
    assert again._decided(0)


def test_a_stage_that_is_passed_over_leaves_no_gap():
    """A run is killed in the first stage and resumed in the third: new blocks are copied from existing blocks."""
    method = AutoProg(context_of("autoprog.schedule=6,8,10,12", "autoprog.space=depth"))
    method.observe(StepResult(None, None, START, Progress(fraction=0.1)))
    plan = plan_at(method, fraction=0.6)
    existing = set(range(6))
    assert len(plan.shape.block_order) == 10 and plan.growth.number == 5
    for new, source in plan.growth.blocks:
        assert source in existing and new not in existing
    assert set(plan.shape.block_order) == existing | {new for new, _ in plan.growth.blocks}


def test_losses_are_measured_on_nets_that_have_trained():
    """The length of a search counts from its first step, however long the measurement of times took."""
    method = AutoProg(context_of("budget.length=1h", "autoprog.search_length=4%"))
    late = Progress(fraction=0.04)
    probes = method.probes(Progress())
    assert {probe.kind for probe in probes} == {"seconds"}
    for probe in probes:
        method.observe(replace(probe, answer=1.0))
    assert not method.probes(late)
    method.observe(StepResult(None, None, START, late))
    assert not method.probes(Progress(fraction=0.055))
    assert {probe.kind for probe in method.probes(Progress(fraction=0.0601))} == {"loss"}


def test_when_and_on_what_losses_are_taken():
    method = AutoProg(context_of("autoprog.loss_at=0.25,1", "autoprog.loss_on=val", "autoprog.search_length=4%"))
    entered(method, 0.0)
    assert not method.probes(Progress(fraction=0.009))
    first = method.probes(Progress(fraction=0.0101))
    assert {(probe.kind, probe.split) for probe in first} == {("loss", "val")}
    for probe in first:
        method.observe(replace(probe, answer=1.0))
    # The round took until 0.05. That does not count for the search, and a second round needs a step in between.
    assert not method.probes(Progress(fraction=0.05)) and not method._decided(0)
    method.observe(StepResult(None, None, START, Progress(fraction=0.05)))
    again = AutoProg(context_of("autoprog.loss_at=0.25,1", "autoprog.loss_on=val", "autoprog.search_length=4%"))
    again.load_state_dict(method.state_dict())
    for one in (method, again):
        assert not one.probes(Progress(fraction=0.0798))
        for probe in one.probes(Progress(fraction=0.0801)):
            one.observe(replace(probe, answer=1.0))
        assert one._decided(0)


def test_a_step_of_the_stage_before_begins_no_search():
    """The clock may pass a stage's bound between planning a step and taking it: nothing has grown yet."""
    method = AutoProg(context_of("autoprog.schedule=6,8,10,12", "autoprog.space=depth"))
    method.observe(StepResult(None, None, plan_at(method, fraction=0.24), Progress(fraction=0.24)))
    method.observe(StepResult(None, None, plan_at(method, fraction=0.24), Progress(fraction=0.2501)))
    assert sorted(method._record.began) == [0]
    method.observe(StepResult(None, None, plan_at(method, fraction=0.2501), Progress(fraction=0.26)))
    assert sorted(method._record.began) == [0, 1]


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
    method = AutoProg(context_of(*options))
    assert method.needs.ema_decays == averages
    if method._config.schedule is None and method._config.loss_of == "average":
        assert averages[method._probe("loss", 0, Net(6, None)).average] == 0.998
    entered(method, 0.0)
    grown = plan_at(method, fraction=0.3).growth
    if method._config.grow.startswith("momentum") and method._config.schedule:
        assert averages[grown.average] == 0.9996


def test_the_last_stage_has_the_recipes_strength():
    method = AutoProg(context_of("autoprog.schedule=6,8,10,12", "autoprog.space=depth", "augment.randaugment=7.5"))
    for fraction in (0.1, 0.3, 0.6):
        method.observe(StepResult(None, None, plan_at(method, fraction=fraction), Progress(fraction=fraction)))
    assert plan_at(method, fraction=0.9).dials.randaugment_strength == 1
    fixed = AutoProg(context_of("autoprog.grow_augmentation=no", "autoprog.schedule=6,8,10,12", "autoprog.space=depth"))
    assert plan_at(fixed, fraction=0.1).dials == START.dials


def test_sizes_that_are_known_before_a_run():
    def fed(*options: str) -> list[str]:
        return [str(stage) for stage in recipe_stages(read_config([f"--{option}" for option in options], {}))]

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
    method = AutoProg(context_of("autoprog.space=size"))
    assert {net.depth for net in method._candidates(0)} == {12}


def test_the_smallest_net_has_one_block():
    method = AutoProg(context_of("methods=autoprog", "autoprog.space=depth", "autoprog.min_scale=0"))
    assert {net.depth for net in method._candidates(0)} == {1, 8, 12}


def test_ladders_of_small_models():
    assert ladder(64, 0.5, 4, 16) == (32, 48, 64) and ladder(64, 0.25, 4, 32) == (32, 64)
    assert ladder(240, 0.5, 4, 32)[-1] == 240 and ladder(96, 0.25, 4, 32) == (32, 64, 96)


def test_depth_alone_leaves_sizes_to_the_curriculum():
    run = context_of("methods=image_size,autoprog", "autoprog.space=depth", "budget.length=40ep")
    curriculum, method = build_methods(run)
    assert method._candidates(0) == [Net(6, None), Net(10, None), Net(12, None)]
    assert fold([curriculum, method], START, Progress()).feed.size == 32


def test_a_given_schedule_is_followed():
    method = AutoProg(context_of("autoprog.schedule=6@128px,8@160px,10@192px,12@224px"))
    plans = []
    for fraction in (0, 0.3, 0.6, 0.9):
        plans.append(plan_at(method, fraction=fraction))
        method.observe(StepResult(None, None, plans[-1], Progress(fraction=fraction)))
    assert [plan.feed.size for plan in plans] == [128, 160, 192, 224]
    assert [len(plan.shape.block_order or range(12)) for plan in plans] == [6, 8, 10, 12]
    assert [plan.growth.number for plan in plans] == [0, 3, 5, 7]
    still = AutoProg(context_of("autoprog.schedule=6@128px,8@160px,12@224px,12@224px"))
    for fraction in (0, 0.3, 0.6):
        still.observe(StepResult(None, None, plan_at(still, fraction=fraction), Progress(fraction=fraction)))
    assert plan_at(still, fraction=0.6).growth == plan_at(still, fraction=0.9).growth  # nothing grows
    assert plan_at(still, fraction=0.9).growth.number == 5
    assert not method.probes(Progress(fraction=0.3))
