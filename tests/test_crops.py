from __future__ import annotations

import numpy as np
import pytest
from torchvision.transforms.v2 import RandomResizedCrop

from vitlocal.data.crops import REPEAT_SHIFT, ROW_MASK, centre_box, crop_key, epoch_order, random_box

POLICY = (0.08, 1.0, 0.75, 4 / 3, 0.5)


def boxes(height: int, width: int, count: int, policy=POLICY) -> np.ndarray:
    return np.array([random_box(0, 0, draw, height, width, *policy) for draw in range(count)], float)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (375, 500), (500, 333), (40, 400), (1, 1), (3, 2)])
def test_boxes_lie_inside(height: int, width: int):
    top, left, rows, columns, _ = boxes(height, width, 500).T
    assert (rows >= 1).all() and (columns >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + rows <= height).all() and (left + columns <= width).all()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 250)])
def test_boxes_follow_torchvisions_law(height: int, width: int):
    top, left, rows, columns, flipped = boxes(height, width, 4000).T
    theirs = RandomResizedCrop(8)
    image = np.zeros((3, height, width), np.uint8)
    import torch

    torch.manual_seed(0)
    drawn = [theirs.make_params([torch.from_numpy(image)]) for _ in range(4000)]
    their = {name: np.array([params[name] for params in drawn]) for name in ("top", "left", "height", "width")}
    for mine, other in ((top, "top"), (left, "left"), (rows, "height"), (columns, "width")):
        for quantile in (0.1, 0.5, 0.9):
            expected = np.quantile(their[other], quantile)
            assert np.quantile(mine, quantile) == pytest.approx(expected, abs=0.04 * max(height, width))
    assert flipped.mean() == pytest.approx(0.5, abs=0.03)


def test_a_crop_is_the_same_part_of_every_stored_size():
    for draw in range(300):
        big = np.array(random_box(5, 2, draw, 1200, 1600, *POLICY), float)
        small = np.array(random_box(5, 2, draw, 300, 400, *POLICY), float)
        assert np.abs(big[:4] / 4 - small[:4]).max() <= 1
        assert big[4] == small[4]


def test_keys_tell_seed_epoch_and_draw_apart():
    keys = {int(crop_key(seed, epoch, draw)) for seed in range(20) for epoch in range(20) for draw in range(20)}
    assert len(keys) == 8000


def test_the_centre_crop():
    assert centre_box(256, 256, 0.875) == (16, 16, 224, 224)
    assert centre_box(256, 341, 0.875) == (16, 58, 224, 224)
    assert centre_box(64, 64, 1.0) == (0, 0, 64, 64)


def test_orders_are_permutations_with_keys_of_their_own():
    orders = [epoch_order(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(1000))
    assert len({tuple(order) for order in orders}) == 4  # FFCV's seed + epoch would make (0, 1) and (1, 0) one
    assert (epoch_order(1000, 0, 0) == orders[0]).all()


def test_repeats_follow_each_other_with_crops_of_their_own():
    draws = epoch_order(100, 3, 0, repeats=3)
    rows = draws & ROW_MASK
    assert len(draws) == 100 and len(set(draws)) == 100
    assert (rows[0:99:3] == rows[1:99:3]).all() and (rows[0:99:3] == rows[2:99:3]).all()
    assert set(draws[:3] >> REPEAT_SHIFT) == {0, 1, 2}
    assert len(set(rows)) == 34
