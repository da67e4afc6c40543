"""The schedule of the learning rate."""

from __future__ import annotations

import pytest

from vitlocal.progress import Length, Progress
from vitlocal.schedule import LRSchedule

NONE = Length.parse("0ep")


@pytest.mark.parametrize(("name", "half"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_rate_falls_over_the_budget(name: str, half: float):
    schedule = LRSchedule(name, 1.0, 0.1)
    assert schedule(Progress()) == 1.0
    assert schedule(Progress(fraction=0.5)) == pytest.approx(half)
    assert schedule(Progress(fraction=1.0)) == pytest.approx(1.0 if name == "constant" else 0.1)


def test_end_above_the_peak_is_the_peak():
    schedule = LRSchedule("cosine", 1e-3, 1.0)
    assert schedule(Progress()) == schedule(Progress(fraction=1.0)) == 1e-3


def test_warmup_multiplies_the_rate():
    schedule = LRSchedule("constant", 1.0, 0.0, Length.parse("2ep"))
    assert [schedule(Progress(epoch=epoch)) for epoch in (0.0, 1.0, 2.0, 3.0)] == [1e-3, 0.5, 1.0, 1.0]


def test_length_of_its_own_may_end_before_the_budget():
    schedule = LRSchedule("linear", 1.0, 0.0, NONE, Length.parse("4ep"))
    assert schedule(Progress(epoch=1.0, fraction=0.9)) == 0.75
    assert schedule(Progress(epoch=8.0, fraction=0.95)) == 0.0


def test_by_epoch_moves_once_per_epoch():
    """A step that ends with an epoch still belongs to it."""
    schedule = LRSchedule("linear", 1.0, 0.0, NONE, Length.parse("10ep"), "epoch")
    assert [schedule(Progress(epoch=epoch)) for epoch in (0.5, 1.0, 2.0, 2.1, 3.0)] == [1.0, 1.0, 1.0, 0.9, 0.9]
