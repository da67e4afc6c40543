"""The training speed of a recipe, from which the files to write are chosen: stated, by FLOPs, or measured."""

from __future__ import annotations

import pytest

from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.storage import parse_rates, size_demands, speeds_for
from vitlocal.train.simulate import Speed


def recipe_options(**options: object) -> list[str]:
    options = {"model.name": "vitlocal_tiny_patch8_64", "model.size": 48, "model.depth": 2, "methods": "image_size",
               "image_size.init": 16, "image_size.step_pixels": 16, "image_size.step_epochs": 2,
               "train.batch_size": 8, **options}  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


def test_stages_spend_the_budget() -> None:
    speeds = {16: Speed(1000.0, 8), 32: Speed(500.0, 8), 48: Speed(100.0, 8)}
    for length, last in (("10ep", 600), ("5ep", 100), ("3ep", 1), ("100steps", 400), ("9s", 780)):
        stages = size_demands(read_config(recipe_options(**{"budget.length": length}), {}), 100, speeds)
        assert [stage.size for stage in stages] == [16, 32, 48]
        assert [stage.rate for stage in stages] == [1000, 500, 100]
        assert stages[0].images == 200 and stages[2].images == pytest.approx(last, abs=0.1 + last * 0.1)
    single = size_demands(read_config(recipe_options(methods="none", **{"budget.length": "10ep"}), {}), 100, speeds)
    assert [(stage.size, stage.images) for stage in single] == [(48, 1000)]


def test_rates_follow_from_flops() -> None:
    config = read_config(recipe_options(), {})

    def rates_for(stated: dict[int, float]) -> dict[int, float]:
        return {size: speed.images_per_second for size, speed in speeds_for(config, stated).items()}

    rates = rates_for({48: 100.0})
    assert rates[48] == 100 and rates[32] > 200 and rates[16] > 2.5 * rates[32]
    assert rates_for({16: 250.0, 48: 100.0}) == {16: 250, 32: rates[32], 48: 100}
    assert rates_for({16: 150.0, 48: 100.0}) == {16: 150, 32: 150, 48: 100}  # 32 px cannot be faster than 16 px
    speeds = speeds_for(config, {48: 100.0})
    assert {speed.batch_size for speed in speeds.values()} == {8} and speeds[48].flops > 2 * speeds[16].flops > 0


def test_rates_are_parsed() -> None:
    assert parse_rates(" 32:20000, 224:2500.5") == {32: 20000, 224: 2500.5} and parse_rates(None) == {}
    for wrong in ("224", "224:x", "0:5", "5:0", "32:1,", "224=5"):
        with pytest.raises(ConfigError, match=r"--rates.*SIZE:IMAGES_A_SECOND"):
            parse_rates(wrong)


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlocal.storage.MEASURE_SECONDS", 0.0)
    found = speeds_for(read_config(recipe_options(**{"run.device": "cpu"}), {}), {})
    assert found.keys() == {16, 32, 48} and min(speed.images_per_second for speed in found.values()) > 0
