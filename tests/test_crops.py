from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from PIL import Image
from reference_boxes import _scramble, crop_key, random_box
from timm.data import create_transform
from torchvision.transforms.v2 import RandomResizedCrop

from vitlocal.data.crops import REPEAT_SHIFT, ROW_MASK, Box, CropPolicy, cut
from vitlocal.data.native import native_box, native_policy
from vitlocal.data.random_keys import integers

POLICY = ((0.08, 1.0), (0.75, 4 / 3), 0.5)


def boxes(height: int, width: int, count: int) -> np.ndarray:
    drawn = [random_box(0, 0, draw, height, width, *POLICY) for draw in range(count)]
    return np.array([(box.top, box.left, box.height, box.width, box.flipped) for box in drawn])


@pytest.mark.parametrize(("height", "width"), [(100, 100), (375, 500), (500, 333), (40, 400), (1, 1), (3, 2)])
def test_boxes_are_inside_the_image(height: int, width: int):
    top, left, tall, across, _ = boxes(height, width, 500).T
    assert (tall > 0).all() and (across > 0).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + tall <= height + 1e-9).all() and (left + across <= width + 1e-9).all()


@pytest.mark.parametrize(("height", "width"), [(100, 100), (375, 500), (500, 333), (40, 400), (1, 1), (3, 2)])
def test_native_boxes_are_those_of_the_reference(height: int, width: int):
    """Up to the last bits, in which the C library's exp and log may differ from Python's."""
    cropping = CropPolicy(random=True, seed=5, scale=(0.2, 0.9), ratio=(0.6, 1.5), flip=0.3)
    policy = native_policy(cropping, 7)
    for draw in [*range(300), 12 | 3 << REPEAT_SHIFT]:
        mine = random_box(5, 7, draw, height, width, cropping.scale, cropping.ratio, cropping.flip)
        found = native_box(policy, draw, height, width, 224)
        assert found.flipped == mine.flipped
        assert astuple(found) == pytest.approx(astuple(mine), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 250)])
def test_boxes_have_torchvisions_distribution(height: int, width: int):
    top, left, tall, across, flipped = boxes(height, width, 4000).T
    theirs = RandomResizedCrop(8)
    image = np.zeros((3, height, width), np.uint8)
    import torch

    torch.manual_seed(0)
    drawn = [theirs.make_params([torch.from_numpy(image)]) for _ in range(4000)]
    their = {name: np.array([params[name] for params in drawn]) for name in ("top", "left", "height", "width")}
    for mine, other in ((top, "top"), (left, "left"), (tall, "height"), (across, "width")):
        for quantile in (0.1, 0.5, 0.9):
            expected = np.quantile(their[other], quantile)
            assert np.quantile(mine, quantile) == pytest.approx(expected, abs=0.04 * max(height, width))
    assert flipped.mean() == pytest.approx(0.5, abs=0.03)


def test_a_crop_is_the_same_part_of_every_stored_size():
    for draw in range(300):
        big = random_box(5, 2, draw, 1200, 1600, *POLICY)
        small = random_box(5, 2, draw, 300, 400, *POLICY)
        assert (big.top, big.left, big.height, big.width) == pytest.approx(
            (4 * small.top, 4 * small.left, 4 * small.height, 4 * small.width), abs=1e-9
        )
        assert big.flipped == small.flipped


def test_keys_depend_on_seed_epoch_and_draw():
    keys = {int(crop_key(seed, epoch, draw)) for seed in range(20) for epoch in range(20) for draw in range(20)}
    assert len(keys) == 8000


def test_integers_have_the_keys_of_crops():
    draws = np.array([0, 7, 12 | 3 << REPEAT_SHIFT])
    found = integers((5, 2), draws, 3, 1000).tolist()
    assert found == [
        _scramble((crop_key(5, 2, draw) + (1 << 32) + 3) & (1 << 64) - 1) % 1000 for draw in draws.tolist()
    ]


def centre_box(height: int, width: int, size: int, crop_pct: float) -> Box:
    return native_box(native_policy(CropPolicy(random=False, centre=crop_pct), 0), 0, height, width, size)


def test_the_centre_crop():
    assert centre_box(256, 256, 224, 0.875) == Box(16, 16, 224, 224, reach=1)
    assert centre_box(256, 341, 224, 0.875) == Box(16, 58, 224, 224, reach=1)  # 58.5, rounded to even
    assert centre_box(512, 512, 224, 0.875) == Box(32, 32, 448, 448, reach=2)
    assert centre_box(64, 64, 64, 1.0) == Box(0, 0, 64, 64, reach=1)


@pytest.mark.parametrize(("size", "crop_pct"), [(64, 0.875), (96, 0.9), (224, 0.875), (32, 1.0), (60, 0.95)])
@pytest.mark.parametrize("shape", [(64, 64), (375, 500), (500, 333), (301, 299), (90, 1000)])
def test_the_centre_crop_is_timms(size: int, crop_pct: float, shape: tuple[int, int]):
    pixels = np.random.default_rng(size).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = create_transform(size, crop_pct=crop_pct, interpolation="bilinear", normalize=False)(image).numpy()
    ours = np.asarray(cut(image, centre_box(*shape, size, crop_pct), size)).transpose(2, 0, 1)
    different = np.abs(ours.astype(int) - theirs)
    # Pillow stores boxes in float32, so the last bits of weights differ.
    assert different.max() <= 2 and different.mean() < 0.2


def test_cut_takes_the_box_and_flips_it():
    ramp = Image.fromarray(np.arange(64, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2))
    assert np.asarray(cut(ramp, Box(8, 16, 32, 32), 32))[0, :, 0].tolist() == list(range(16, 48))
    assert np.asarray(cut(ramp, Box(8, 16, 32, 32, flipped=True), 32))[0, :, 0].tolist() == list(range(47, 15, -1))
    halves = np.asarray(cut(ramp, Box(8.5, 16.5, 32, 32), 32))[3, 1:-1, 0]  # the mean of two pixels
    assert np.abs(halves - (np.arange(17, 47) + 0.5)).max() <= 0.5


def test_orders_are_permutations_with_their_own_keys():
    orders = [CropPolicy(True, seed).draws(1000, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(1000))
    assert len({tuple(order) for order in orders}) == 4  # with FFCV's seed + epoch, (0, 1) and (1, 0) would be equal
    assert (CropPolicy(True, 0).draws(1000, 0) == orders[0]).all()


def test_repeats_follow_each_other_with_their_own_crops():
    draws = CropPolicy(True, seed=3, repeats=3).draws(100, 0)
    rows = draws & ROW_MASK
    assert len(draws) == 100 and len(set(draws)) == 100
    assert (rows[0:99:3] == rows[1:99:3]).all() and (rows[0:99:3] == rows[2:99:3]).all()
    assert set(draws[:3] >> REPEAT_SHIFT) == {0, 1, 2}
    assert len(set(rows)) == 34
