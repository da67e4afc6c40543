"""Stages of the image-size curriculum: their ends, and errors in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.methods.image_size import ImageSize
from vitlocal.methods.method import MethodContext
from vitlocal.plan import Feed, Plan, fold
from vitlocal.progress import Progress


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
