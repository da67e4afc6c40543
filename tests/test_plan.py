from __future__ import annotations

import pytest

from vitlocal.config import Config, TrainConfig, read_config
from vitlocal.errors import ConfigError
from vitlocal.methods import METHODS, conflicts
from vitlocal.methods.batch_size import BatchSize
from vitlocal.methods.image_size import ImageSize, ImageSizeConfig
from vitlocal.methods.method import MethodContext
from vitlocal.plan import Feed, Plan, Shape, fold
from vitlocal.progress import Length, Progress

START = Plan(Feed(224, 64))


def context_of(*options: str, **facts) -> MethodContext:
    """A run whose recipe has these options."""
    return MethodContext(read_config([f"--{option}" for option in options], {}).recipe, **facts)


@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [("90ep", 90, "epochs"), ("24h", 86400, "seconds"), ("30m", 1800, "seconds"), ("45s", 45, "seconds"),
     ("5000steps", 5000, "steps"), ("1.5h", 5400, "seconds")],
)  # fmt: skip
def test_lengths(text: str, value: float, kind: str):
    assert Length.parse(text) == Length(value, kind, text)


@pytest.mark.parametrize("text", ["", "90", "ep", "-3ep", "3 weeks", "3epochs"])
def test_wrong_lengths(text: str):
    with pytest.raises(ValueError, match="a number and a unit"):
        Length.parse(text)


def test_the_papers_curriculum():
    method = ImageSize(context_of())
    at = {epoch: fold([method], START, Progress(epoch=epoch)).feed.size for epoch in (0, 4.999, 5, 12, 29.9, 30, 300)}
    assert at == {0: 32, 4.999: 32, 5: 64, 12: 96, 29.9: 192, 30: 224, 300: 224}


def test_a_last_step_that_does_not_fit_ends_at_the_final_size():
    assert [stage.size for stage in ImageSizeConfig(init=32, step_pixels=48, final=96).curriculum] == [32, 80, 96]


def test_shapes_of_older_checkpoints_have_one_number():
    assert Shape.from_state({"heads": 2, "hidden": 48, "grid": 4}) == Shape(heads=(2,), hidden=(48,), grid=4)
    assert Shape.from_state({"heads": [1, 2], "hidden": None}) == Shape(heads=(1, 2))


def test_planning_is_pure_and_conflicts_are_named():
    method = ImageSize(context_of())
    at = Progress(epoch=7.0)
    assert fold([method], START, at) == fold([method], START, at)
    claims = ImageSize.claims(context_of().recipe)
    (problem,) = conflicts([claims, claims])
    assert "feed.size" in problem
    budgeted, autoprog = (METHODS[name].claims(context_of().recipe) for name in ("budgeted", "autoprog"))
    (problem,) = conflicts([budgeted, autoprog])  # autoprog also excludes image sizes of other methods
    assert problem == "methods: budgeted and autoprog both set growth; remove one of the two"


@pytest.mark.parametrize(("rule", "scale"), [("sqrt", 2.0), ("linear", 4.0), ("none", 1.0)])
def test_batches_grow_as_images_shrink(rule: str, scale: float):
    sizes = ImageSize(context_of())
    batches = BatchSize(context_of("train.batch_size=64", "batch_size.limit=256", f"batch_size.lr_scaling={rule}"))
    early, later, last = (fold([sizes, batches], START, Progress(epoch=epoch)) for epoch in (0, 20, 40))
    assert (early.feed, early.dials.lr_scale) == (Feed(32, 256), scale)  # as many as would fit: 3136
    assert later.feed == Feed(160, 96)  # 125 fit
    assert (last.feed, last.dials.lr_scale) == (Feed(224, 64), 1.0)


def test_batches_fill_the_memory_of_every_device():
    options = ["train.batch_size=20", "batch_size.memory=10KB", "batch_size.limit=10000", "batch_size.multiple=7"]
    one, four = (
        BatchSize(context_of(*options, image_bytes=lambda size: size * 10, processes=count)) for count in (1, 4)
    )
    assert (one.batch_size_at(32), four.batch_size_at(32)) == (28, 119)  # 31 on each device, and multiples of 7
    with pytest.raises(ConfigError, match="hold 15 images of 64 px"):  # the recipe's own batch is not made smaller
        one.batch_size_at(64)
    assert four.batch_size_at(64) == 56


def test_what_changed():
    small = Plan(Feed(32, 64))
    assert small.changed(START) == {"feed.size": 32}
    assert small.changed(small) == {}
    assert small.changed(None) == {
        "feed.size": 32, "feed.batch_size": 64, "feed.subset": 0, "dials.lr_scale": 1.0, "dials.strength": 1.0,
        "dials.randaugment_strength": None,
    }  # fmt: skip


def test_the_learning_rate_ends_with_the_budget():
    config = Config(train=TrainConfig(batch_size=256, lr=1e-3, lr_batch=512, end_lr=1e-5))
    schedule = config.train.lr_schedule
    assert schedule(Progress()) == pytest.approx(5e-4)
    assert schedule(Progress(fraction=0.5)) == pytest.approx((5e-4 + 1e-5) / 2)
    assert schedule(Progress(fraction=1.0)) == pytest.approx(1e-5)


def test_linear_constant_and_warm_up():
    linear = TrainConfig(schedule="linear", lr=1.0, lr_batch=0, end_lr=0.0, warmup=Length.parse("2ep")).lr_schedule
    assert linear(Progress(epoch=1, fraction=0.25)) == pytest.approx(0.375)
    assert linear(Progress(epoch=3, fraction=0.75)) == pytest.approx(0.25)
    assert TrainConfig(schedule="constant", lr=1.0, lr_batch=0).lr_schedule(Progress(fraction=0.9)) == 1.0


def test_the_released_schedule_lags_by_an_epoch():
    import math

    config = TrainConfig(batch_size=64, schedule_length=Length.parse("300ep"), schedule_by="epoch")
    for epoch in (0, 1, 2, 30):
        stated = 1e-5 + 0.5 * (1.25e-4 - 1e-5) * (1 + math.cos(math.pi * max(epoch - 1, 0) / 300))
        assert config.lr_schedule(Progress(epoch=epoch + 0.5)) == pytest.approx(stated)
