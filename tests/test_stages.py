"""Stages of the image-size curriculum: their ends, and errors in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.methods.image_size import ImageSize
from vitlocal.methods.method import MethodContext
from vitlocal.plan import Feed, Plan, fold
from vitlocal.progress import Length, Progress, upcoming_changes
from vitlocal.train.simulate import Speed, spend


def sizes_at(stages: str, *points: Progress) -> list[int]:
    config = read_config([f"--image_size.stages={stages}"], {})
    method, start = ImageSize(MethodContext(config.recipe)), Plan(Feed(224, 8))
    return [fold([method], start, at).feed.size for at in points]


def test_stages_end_by_parts_of_the_budget():
    fractions = [Progress(fraction=part) for part in (0, 0.0999, 0.1, 0.29, 0.3, 1.0)]
    assert sizes_at("32px until 10 %, 64px until 30%, 224px", *fractions) == [32, 32, 64, 64, 224, 224]


def test_stages_end_by_any_length():
    at = [Progress(epoch=1.9), Progress(epoch=2, step=9), Progress(epoch=2, step=10), Progress(3, 11, 0, 3600, 0.5)]
    assert sizes_at("32px until 2ep, 64px until 10steps, 96px until 1h, 128px", *at) == [32, 64, 96, 128]


@pytest.mark.parametrize(
    ("stages", "part"),
    [
        ("32px until 10%", "an end for each stage except the last"),
        ("32px, 64px", "an end for each stage except the last"),
        ("32px until 10%, 64px until 5%, 224px", "5% does not come after 10%"),
        ("32 until 10%, 224px", "a size and its end"),
        ("32px until 120%, 224px", "a size and its end"),
        ("32px until 10%, 256px", "256 px is larger than model.size"),
    ],
)
def test_wrong_stages(stages: str, part: str):
    with pytest.raises(ConfigError, match=part):
        read_config(["--methods=image_size", f"--image_size.stages={stages}"], {})


def test_stages_are_written_into_a_runs_recipe(tmp_path: Path):
    config = read_config(["--methods=image_size", "--image_size.stages=32px until 10%, 224px"], {})
    (tmp_path / "again.yaml").write_text(config.yaml())
    assert read_config(["-C", str(tmp_path / "again.yaml")], {}) == config


@pytest.mark.parametrize("option", ["budget.length=50%", "train.warmup=120%", "train.ema_length=x"])
def test_parts_that_are_none(option: str):
    with pytest.raises(ConfigError, match=option.partition("=")[0]):
        read_config([f"--{option}"], {})


def test_epochs_begin_with_a_part_at_the_neighbours_in_turns():
    options = ["--image_size.stages=32px until 3ep, 48px until 7ep, 64px", "--image_size.mixed=0.1"]
    method, start = ImageSize(MethodContext(read_config(options, {}).recipe)), Plan(Feed(224, 8))

    def size(epoch: float) -> int:
        return fold([method], start, Progress(epoch=epoch)).feed.size

    assert [size(epoch) for epoch in (0, 1.05, 2.0999, 4.05, 5, 6.09, 7, 8.05)] == [48, 48, 48, 32, 64, 32, 48, 48]
    assert [size(epoch + 0.1) for epoch in range(8)] == [32, 32, 32, 48, 48, 48, 48, 64]
    # The plans that are compiled early have each size, also if no stage begins with its own.
    ends = upcoming_changes(method.changes(), Progress())
    assert {size(0), *(size(at.epoch) for at in ends)} == {32, 48, 64}
    # In the middle stage, a tenth of the images, half of them at either neighbour.
    sizes = [size(3 + step / 1000) for step in range(4000)]
    assert [sizes.count(each) for each in (32, 48, 64)] == [200, 3600, 200]


def test_mixed_sizes_are_in_the_forecast():
    stages = read_config(["--image_size.stages=32px until 50%, 64px", "--image_size.mixed=0.2"], {})
    first, last = ImageSize.image_sizes(stages.recipe)
    assert first.shares == ((32, 0.8), (64, 0.2)) and last.shares == ((64, 0.8), (32, 0.2))
    speeds = {32: Speed(400.0, 40, 1e6), 64: Speed(100.0, 20, 4e6)}
    early, late = spend((first, last), Length.parse("100s"), 1000, speeds)
    # An image takes 0.8 / 400 + 0.2 / 100 s in the first stage, and 0.8 / 100 + 0.2 / 400 s in the last.
    assert (early.images, late.images) == (12500, round(50 / 0.0085))
    assert early.end.flops == pytest.approx(12500 * (0.8 * 1e6 + 0.2 * 4e6))
    assert early.end.step == round(12500 * (0.8 / 40 + 0.2 / 20))


def test_mixed_sizes_need_two_sizes():
    with pytest.raises(ConfigError, match=r"image_size.mixed: got 0.1, but the only size is 224 px"):
        read_config(["--methods=image_size", "--image_size.stages=224px", "--image_size.mixed=0.1"], {})
