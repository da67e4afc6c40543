"""Budgeted training: stages, budgets and growth, against the numbers of the paper."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml
from method_plans import context_of, plan_at

from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.methods.budgeted import Budgeted, BudgetedConfig, solve, stage_shapes, stage_weights
from vitlocal.plan import WHOLE_MODEL, ModelParts, Shape
from vitlocal.progress import Progress


def test_published_stages_of_deit_s():
    shapes = Budgeted(context_of())._shapes
    assert [(s.heads, s.hidden, s.grid) for s in shapes] == [((2,), (384,), 10), ((4,), (768,), 12), (None, None, None)]


def test_heads_of_levels_by_fraction_published_or_stated():
    levels = ModelParts((1, 2, 5, 8), (64, 128, 160, 256), 56, (2, 2, 2, 2), grid_multiple=8)

    def shapes(*options: str, parts: ModelParts = levels) -> tuple[Shape, ...]:
        config = read_config([f"--budgeted.{option}" for option in options], {}).recipe.section(BudgetedConfig)
        return stage_shapes(config, parts)

    first, second, last = shapes()
    assert first == Shape((1, 1, 2, 2), (16, 32, 40, 64), 40) and second == Shape((1, 2, 4, 4), (32, 64, 80, 128), 48)
    assert last == WHOLE_MODEL
    assert [shape.heads for shape in shapes("heads=1/3, 2/3, 1")] == [(1, 1, 2, 3), (1, 1, 3, 5), None]
    assert [shape.heads for shape in shapes("heads=1,1,1,1 | 1,2,5,8", "stages=2")] == [(1, 1, 1, 1), None]
    swin = ModelParts((3, 6, 12, 24), (96, 192, 384, 768), 16, (2, 2, 6, 2), grid_multiple=8)
    assert [shape.heads for shape in shapes(parts=swin)] == [(1, 2, 4, 8), (2, 4, 8, 16), None]
    assert [shape.grid for shape in shapes(parts=swin)] == [8, None, None]  # multiples of 8
    for heads in ("1,1,2,2 | 1,2,4,4 | 1,2,5,7", "1,1,2 | 1,2,4 | 1,2,5", "1,2,5,8 | 1,2,4,8 | 1,2,5,8",
                  "0,1,2,2 | 1,2,4,4 | 1,2,5,8"):  # fmt: skip
        with pytest.raises(ConfigError, match="budgeted.heads: got .*expected 4 numbers .*: 1,2,5,8"):
            shapes(f"heads={heads}")


def test_stated_heads_survive_a_recipe():
    config = read_config(["--budgeted.heads=1,1,2,2|1,2,4,4|1,2,5,8"], {})
    stored = yaml.safe_load(config.yaml())["budgeted"]["heads"]
    assert stored == "1,1,2,2 | 1,2,4,4 | 1,2,5,8"
    assert read_config([f"--budgeted.heads={stored}"], {}).flat()["budgeted.heads"] == stored


def test_the_solver():
    costs = (0.69, 1.91, 4.608)
    weights = stage_weights(2.0, (0.9, 0.2, 0.5))  # seeds are sorted
    assert [round(weight, 3) for weight in weights] == [1.492, 2.718, 6.05]
    epochs = solve(691.2, costs, weights)
    assert epochs == (30, 55, 122)
    assert sum(c * e for c, e in zip(costs, epochs, strict=True)) == pytest.approx(688.2, abs=0.5)
    assert len(set(solve(1000, costs, stage_weights(0, (0.1, 0.7, 0.3))))) == 1
    draw = np.random.default_rng(0)
    for _ in range(50):
        budget, alpha = draw.uniform(50, 1500), draw.uniform(0, 4)
        found = solve(budget, costs, stage_weights(alpha, draw.uniform(size=3)))
        spent = sum(c * e for c, e in zip(costs, found, strict=True))
        assert spent <= budget < spent + sum(costs) and min(found) >= 0 and list(found) == sorted(found)
        if min(found) > 5:
            assert found[-1] / found[0] <= np.exp(alpha) * 1.25  # whole epochs


def test_budgets_of_every_kind():
    half = Budgeted(context_of("budgeted.compute=50%", "budgeted.alpha=0"))
    assert len(set(half._epochs)) == 1 and half.needs.budget_length.value == sum(half._epochs)
    spent = sum(c * e for c, e in zip(half._costs, half._epochs, strict=True))
    assert 0.5 * 300 * half._costs[-1] - sum(half._costs) < spent <= 0.5 * 300 * half._costs[-1]
    stated = Budgeted(context_of("budgeted.compute=691.2GFLOPs"))
    assert sum(c * e for c, e in zip(stated._costs, stated._epochs, strict=True)) <= 691.2e9
    given = Budgeted(context_of("budgeted.epochs=49,71,113"))
    assert given.needs.budget_length.text == "233ep"
    assert [plan_at(given, epoch=epoch).shape.heads for epoch in (0, 48.9, 49, 119.9, 120, 233)] == [
        (2,),
        (2,),
        (4,),
        (4,),
        None,
        None,
    ]
    epochs = Budgeted(context_of("budget.length=30ep", "budgeted.alpha=0"))
    assert epochs.needs.budget_length is None and [end.value for end in epochs.changes()] == [10, 20]
    hours = Budgeted(context_of("budget.length=24h", "budgeted.alpha=0"))
    parts = [end.value for end in hours.changes()]
    assert parts == pytest.approx((np.cumsum(hours._costs) / sum(hours._costs))[:-1].tolist())
    with pytest.raises(ConfigError, match="less than one epoch of the full model"):
        Budgeted(context_of("budgeted.compute=0.1%"))


def test_stages_by_measured_times():
    method = Budgeted(context_of("budget.length=1h", "budgeted.alpha=0", "budgeted.cost=time"))
    for seconds in (1.0, 2.0, 3.0):
        probe = method.probes(Progress())[0]
        assert probe.kind == "seconds"
        method.observe(replace(probe, answer=seconds))
    assert not method.probes(Progress())
    assert [end.value for end in method.changes()] == pytest.approx([1 / 6, 1 / 2])


def test_growth_is_as_the_options_say():
    method = Budgeted(context_of("budgeted.new_moments=reset", "budgeted.copy_scale=0.5", "budgeted.copy_noise=0.1"))
    growth = plan_at(method, fraction=0.9).growth
    assert growth.sources == "first"
    assert plan_at(Budgeted(context_of("budgeted.copy_from=last")), fraction=0.9).growth.sources == "last"
    assert (growth.moments, growth.scale, growth.noise) == ("reset", 0.5, 0.1) and growth.average is None


def test_each_stage_grows_once():
    method = Budgeted(context_of("budget.length=30ep", "budgeted.alpha=0"))
    assert [plan_at(method, epoch=epoch).growth.number for epoch in (0, 9, 10, 19, 20, 30)] == [0, 0, 1, 1, 2, 2]
    only = Budgeted(context_of("budgeted.grow=heads,hidden"))
    assert all(shape.grid is None for shape in only._shapes)
