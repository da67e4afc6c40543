from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vitlocal.config import AugmentConfig
from vitlocal.data.augment import RANDAUGMENT, Augment, Normalize, erase, randaugment, step_generator


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


@pytest.mark.parametrize("name", RANDAUGMENT)
def test_operations_keep_type_and_grow_with_the_level(name: str):
    ramp = torch.linspace(30, 200, 24).expand(24, 24)  # pure noise would be as far from itself at any shift
    x = (torch.stack([ramp, ramp.T, (ramp + ramp.T) / 2]) + images(4) / 10).to(torch.uint8)
    for sign in (-1, 1):
        weak, strong = (RANDAUGMENT[name](x, level, sign) for level in (0.1, 0.9))
        assert strong.shape == x.shape and strong.dtype == torch.uint8
        if name not in ("autocontrast", "equalize", "invert"):
            assert (strong.float() - x.float()).abs().mean() > (weak.float() - x.float()).abs().mean()


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
