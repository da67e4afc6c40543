from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vitlocal.config import AugmentConfig
from vitlocal.data.augment import COLOURS, MOVES, Augment, Normalize, erase, move, randaugment, step_generator


def images(count: int = 12, size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return made.contiguous(memory_format=torch.channels_last)


def test_normalisation():
    x = images()
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    out = Normalize()(x)
    torch.testing.assert_close(out, (x / 255 - mean) / deviation, atol=1e-5, rtol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_nothing_asked_is_nothing_done():
    labels = torch.arange(12)
    mixed = Augment(AugmentConfig())(images(), labels, step_generator(0, 0))
    assert mixed.share == 1 and torch.equal(mixed.images, Normalize()(images()))


EVERYTHING = AugmentConfig(randaugment=9, mixup=0.8, cutmix=1.0, erase=0.25)


def test_a_step_repeats_bit_for_bit_and_leaves_its_input_alone():
    augment, labels = Augment(EVERYTHING), torch.arange(12)
    for step in range(8):
        first, x = images(), images()
        one = augment(x, labels, step_generator(1, step))
        two = augment(first, labels, step_generator(1, step))
        assert torch.equal(one.images, two.images) and one.share == two.share
        assert torch.equal(x, images())
    assert not torch.equal(one.images, augment(images(), labels, step_generator(1, 99)).images)


def test_mixup_is_a_weighted_sum_with_the_mirror_place():
    labels = torch.arange(12)
    mixed = Augment(AugmentConfig(mixup=0.8))(images(), labels, step_generator(0, 5))
    plain = Normalize()(images())
    assert 0 < mixed.share < 1
    assert torch.equal(mixed.others, labels.flip(0))
    torch.testing.assert_close(mixed.images, mixed.share * plain + (1 - mixed.share) * plain.flip(0))


def test_cutmix_pastes_a_box_and_shares_by_its_area():
    plain = Normalize()(images())
    seen = set()
    for step in range(20):
        mixed = Augment(AugmentConfig(cutmix=1.0))(images(), torch.arange(12), step_generator(0, step))
        pasted = (mixed.images == plain.flip(0)).all(1)  # (B, S, S)
        assert pasted[0].float().mean() == pytest.approx(1 - mixed.share, abs=1e-6)
        kept = (mixed.images == plain).all(1)
        assert (pasted | kept).all()
        seen.add(round(mixed.share, 3))
    assert len(seen) > 10


def test_erasing_replaces_boxes_by_noise():
    plain = Normalize()(images(200))
    out = erase(plain, 0.25, step_generator(0, 0))
    changed = (out != plain).any(1)  # (B, S, S)
    touched = changed.flatten(1).any(1)
    assert 0.15 < touched.float().mean() < 0.35
    area = changed[touched].float().mean((1, 2))
    assert 0.01 < area.min() and area.max() < 0.45
    rows = changed[touched].any(2).sum(1) * changed[touched].any(1).sum(1)
    assert torch.equal(rows, changed[touched].sum((1, 2)))  # boxes
    assert torch.equal(erase(plain, 0.0, step_generator(0, 0)), plain)


def apply(name: str, x: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    if name in COLOURS:
        return COLOURS[name](x, level, sign)
    return move(x, np.array([MOVES[name](sign * level)] * len(x)))


@pytest.mark.parametrize("name", [*COLOURS, *MOVES])
def test_operations_keep_type_and_grow_with_the_level(name: str):
    ramp = torch.linspace(30, 200, 24).expand(24, 24)  # pure noise would be as far from itself at any shift
    x = (torch.stack([ramp, ramp.T, (ramp + ramp.T) / 2]) + images(4) / 10).to(torch.uint8)
    for sign in (-1, 1):
        weak, strong = (apply(name, x, level, sign) for level in (0.1, 0.9))
        assert strong.shape == x.shape and strong.dtype == torch.uint8
        if name not in ("autocontrast", "equalize", "invert"):
            assert (strong.float() - x.float()).abs().mean() > (weak.float() - x.float()).abs().mean()


def test_sharpness_is_torchvisions():
    from torchvision.transforms.v2.functional import adjust_sharpness

    x = images(4)
    for level, sign in ((0.5, 1), (0.9, -1)):
        theirs = adjust_sharpness(x, 1 + sign * 0.9 * level).int()
        assert (COLOURS["sharpness"](x, level, sign).int() - theirs).abs().max() <= 1


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_pillows(name: str):
    from PIL import Image

    size, level = 24, 0.6
    ramp = torch.linspace(30, 200, size).expand(size, size)
    x = torch.stack([ramp, ramp.T, (ramp + ramp.T) / 2]).to(torch.uint8)
    shift, shear = 0.45 * level * size, 0.3 * level
    affine = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift),
    }
    image = Image.fromarray(x.permute(1, 2, 0).numpy())
    if name == "rotate":
        theirs = image.rotate(30 * level, Image.BILINEAR)
    else:
        theirs = image.transform(image.size, Image.AFFINE, affine[name], Image.BILINEAR)
    theirs = np.asarray(theirs).astype(int)
    mine = move(x[None], np.array([MOVES[name](level)]))[0].permute(1, 2, 0).numpy().astype(int)
    inside = theirs.min(2) > 0  # Pillow fills with black, and does not blend with it
    inside[[0, -1]] = inside[:, [0, -1]] = False
    inside &= np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1)
    assert inside.mean() > 0.3
    assert np.abs(mine - theirs)[inside].max() <= 4


def test_randaugment_changes_most_images_and_not_all():
    x = images(200)
    out = randaugment(x, 9, step_generator(0, 0))
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)
    changed = (out != x).flatten(1).any(1).float().mean()
    assert 0.5 < changed < 0.9  # two operations, each done half of the time; some leave noise as it is


def test_generators_are_keyed():
    draws = {tuple(step_generator(seed, step).random(2)) for seed in range(5) for step in range(5)}
    assert len(draws) == 25
    assert np.array_equal(step_generator(1, 2).random(3), step_generator(1, 2).random(3))
