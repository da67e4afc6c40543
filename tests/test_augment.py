from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2 import functional as ops

from vitlocal.config import LARGEST_ERASED
from vitlocal.data import augment_groups
from vitlocal.data.augment import NOISE, Augment, AugmentParams, Normalize
from vitlocal.data.augment_groups import BIG_VISION, COLOURS, CUTTING, MOVES, TIMM, move, randaugment, three_augment
from vitlocal.data.random_keys import OPERATION, THREE, generator, uniform
from vitlocal.data.shares import Share


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


def drawn(augment: Augment, step: int, count: int = 12, size: int = 24) -> AugmentParams:
    return augment.draw(1, step, np.arange(count), count, size)


def augmented(augment: Augment, step: int, x: torch.Tensor) -> torch.Tensor:
    prepared = augment.prepare(x, 1, step, np.arange(len(x)))
    return augment(prepared, drawn(augment, step, len(x), x.shape[-1]))


def test_without_options_images_are_only_normalised():
    augment = Augment()
    assert drawn(augment, 0) == AugmentParams()
    assert torch.equal(augmented(augment, 0, images()), Normalize()(images()))


EVERYTHING = {"randaugment": 9, "mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25}


@pytest.mark.parametrize("options", [EVERYTHING, {"three_augment": True}], ids=["randaugment", "three-augment"])
def test_a_step_repeats_bit_for_bit_and_keeps_its_input(options: dict):
    augment = Augment(**options)
    for step in range(8):
        x = images()
        assert torch.equal(augmented(augment, step, x), augmented(augment, step, images()))
        assert torch.equal(x, images())
    assert not torch.equal(augmented(augment, 1, images()), augmented(augment, 2, images()))


@pytest.mark.parametrize("total", [12, 13])
def test_each_process_augments_its_share_as_one_process_would(total: int):
    augment, x = Augment(**EVERYTHING), images(total)
    for step in range(6):
        whole = augmented(augment, step, x)
        for rank in range(3):
            places = Share(rank, 3).places(total)
            part = augment.prepare(x[places], 1, step, places)
            torch.testing.assert_close(
                augment(part, augment.draw(1, step, places, total, 24)), whole[places], rtol=0, atol=1e-6
            )


def test_mixup_is_a_weighted_sum_with_the_mirror_image():
    augment = Augment(mixup=0.8)
    mix = drawn(augment, 5).mix
    share = float(mix[0])
    assert 0 < share < 1 and mix[1] == mix[0] and not mix[2:].any()
    plain = Normalize()(images())
    torch.testing.assert_close(augmented(augment, 5, images()), share * plain + (1 - share) * plain.flip(0))


def test_cutmix_pastes_a_box_and_shares_by_its_area():
    plain, augment = Normalize()(images()), Augment(cutmix=1.0)
    seen = set()
    for step in range(20):
        out, share = augmented(augment, step, images()), float(drawn(augment, step).mix[1])
        pasted = (out == plain.flip(0)).all(1)  # (B, S, S)
        assert pasted[0].float().mean() == pytest.approx(1 - share, abs=1e-6)
        assert (pasted | (out == plain).all(1)).all()
        seen.add(round(share, 3))
    assert len(seen) > 10


def test_no_mixing_of_a_single_image_or_with_probability_0():
    for augment, count in ((Augment(mixup=1), 1), (Augment(mixup=1, mixup_prob=0), 12)):
        assert drawn(augment, 0, count).mix.tolist() == [1, 1, 0, 0, 0, 0]


def test_erasing_replaces_boxes_by_noise():
    plain, augment = Normalize()(images(200)), Augment(random_erasing=0.25)
    out = augmented(augment, 0, images(200))
    assert out.is_contiguous(memory_format=torch.channels_last)
    changed = (out != plain).any(1)  # (B, S, S)
    touched = changed.flatten(1).any(1)
    assert 0.15 < touched.float().mean() < 0.35
    area = changed[touched].float().mean((1, 2))
    assert 0.01 < area.min() and area.max() < 0.45
    rows = changed[touched].any(2).sum(1) * changed[touched].any(1).sum(1)
    assert torch.equal(rows, changed[touched].sum((1, 2)))  # boxes
    assert 3 * LARGEST_ERASED**2 <= NOISE < 3 * (LARGEST_ERASED + 1) ** 2
    noise = out.permute(0, 2, 3, 1)[changed]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    boxes = [out[i].flatten() for i in touched.nonzero()[:2, 0]]
    assert not torch.equal(*boxes)  # each its own noise


def apply(name: str, x: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    argument = TIMM.arguments[name](level, sign)
    return COLOURS[name](x, argument) if name in COLOURS else move(x, np.array([MOVES[name](argument)] * len(x)))


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
        factor = 1 + sign * 0.9 * level
        theirs = adjust_sharpness(x, factor).int()
        assert (COLOURS["sharpness"](x, factor).int() - theirs).abs().max() <= 1


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_pillows(name: str):
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
    mine = apply(name, x[None], level, 1)[0].permute(1, 2, 0).numpy().astype(int)
    inside = theirs.min(2) > 0  # Pillow fills with black, and does not blend with it
    inside[[0, -1]] = inside[:, [0, -1]] = False
    inside &= np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1)
    assert inside.mean() > 0.3
    assert np.abs(mine - theirs)[inside].max() <= 4


def test_randaugment_changes_most_images_and_not_all():
    x = images(200)
    out = randaugment(x, 9, 0, 0, np.arange(200))
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)
    changed = (out != x).flatten(1).any(1).float().mean()
    assert 0.5 < changed < 0.9  # two operations, each done half of the time; some leave noise as it is


def plain_big_vision(image: np.ndarray, name: str, magnitude: float, sign: int, centre: np.ndarray) -> np.ndarray:
    """An image (S, S, 3) through one operation of big_vision's autoaugment.py, by Pillow: the slow twin.

    The constants of that file are for images of 224 px, so they are scaled. Where a move leaves nothing, all are 128.
    """
    photo, size, level = Image.fromarray(image), len(image), magnitude / 10
    enhance = {"saturation": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}
    if name in enhance:
        return np.asarray(getattr(ImageEnhance, enhance[name])(photo).enhance(level * 1.8 + 0.1))
    if name in ("autocontrast", "equalize", "invert"):
        return np.asarray(getattr(ImageOps, name)(photo))
    if name == "posterize":
        shift = max(0, 8 - int(level * 4))
        return image >> shift << shift
    if name == "solarize":
        return np.where(image.astype(int) < int(level * 256), image, 255 - image)
    if name == "solarize_add":
        return np.where(image < 128, np.clip(image.astype(int) + int(level * 110), 0, 255), image)
    if name == "cutout":
        half, (row, column) = round(int(level * 40) * size / 224), (centre * size).astype(int)
        done = image.copy()
        done[max(0, row - half) : row + half, max(0, column - half) : column + half] = 128
        return done
    shift, shear = sign * 100 * level * size / 224, sign * 0.3 * level
    affine = {
        "shear_x": (1, shear, 0, 0, 1, 0), "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, shift),
    }  # fmt: skip
    if name == "rotate":
        return np.asarray(photo.rotate(sign * 30 * level, Image.BILINEAR, fillcolor=(128,) * 3))
    return np.asarray(photo.transform(photo.size, Image.AFFINE, affine[name], Image.BILINEAR, fillcolor=(128,) * 3))


@pytest.mark.parametrize("magnitude", [2.0, 9.0, 15.0, 26.0])
def test_big_visions_operations_equal_pillows(magnitude: float, monkeypatch: pytest.MonkeyPatch):
    """One turn, in which every image gets an operation."""
    monkeypatch.setattr(augment_groups, "OPERATIONS", 1)
    x, places, names = images(160, 32), np.arange(160), list(BIG_VISION.arguments)
    x = torch.nn.functional.avg_pool2d(x.float(), 9, 1, 4).to(torch.uint8)  # smooth: moves interpolate
    out = randaugment(x, magnitude, 0, 3, places, 1.0, BIG_VISION).permute(0, 2, 3, 1).numpy()
    draws = uniform((0, 3, OPERATION), places, 5)
    chosen = [names[int(draw * 16)] for draw in draws[:, 0]]
    assert set(chosen) == set(names) and len(names) == 16
    for number, name in enumerate(chosen):
        image, sign = x[number].permute(1, 2, 0).numpy(), 1 if draws[number, 1] >= 0.5 else -1
        expected = plain_big_vision(image, name, magnitude, sign, draws[number, 3:])
        error = np.abs(out[number].astype(int) - expected)
        if name in MOVES:  # Pillow does not blend with the padding
            edge = (error > 4).any(2)
            assert edge.mean() < 0.15 and np.median(error) <= 1, name
        else:
            assert error.max() <= max(2, magnitude / 5), name  # grey levels are rounded, then enhanced


def test_strength_scales_the_probability_of_big_visions_operations():
    x, places = images(400), np.arange(400)
    unchanged = []
    for strength in (0.0, 0.25, 1.0):
        turns = augment_groups.draw_turns(15, 0, 0, places, strength, BIG_VISION)
        assert [turn.applied.mean() for turn in turns] == pytest.approx([strength] * 2, abs=0.06)
        assert any((turn.variants >= CUTTING).any() for turn in turns)
        unchanged.append((randaugment(x, 15, 0, 0, places, strength, BIG_VISION) == x).flatten(1).all(1).float().mean())
    assert unchanged[0] == 1 and unchanged[1] > 0.5 > 0.1 > unchanged[2]


def test_random_numbers_are_keyed_by_what_they_are_for_and_by_place():
    keys = [(seed, step, what) for seed in range(4) for step in range(4) for what in range(4)]
    firsts = {float(uniform(key, np.arange(1), 1)[0, 0]) for key in keys}
    assert len(firsts) == len(keys)
    whole = uniform((1, 2, 3), np.arange(1000), 5)
    assert np.array_equal(whole[[7, 3]], uniform((1, 2, 3), np.array([7, 3]), 5))
    assert np.array_equal(whole[:, :2], uniform((1, 2, 3), np.arange(1000), 2))
    assert 0 <= whole.min() and whole.max() < 1 and abs(whole.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(whole.T) - np.eye(5)).max() < 0.12
    draws = {tuple(generator((seed, step)).random(2)) for seed in range(5) for step in range(5)}
    assert len(draws) == 25 and np.array_equal(generator((1, 2)).random(3), generator((1, 2)).random(3))


def plain_three_augment(image: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """One image through torchvision's operations: the slow twin."""
    size = image.shape[-1]
    changed = image.float() / 255
    if int(draws[1] * 3) == 0:
        changed = ops.rgb_to_grayscale(changed, 3)
    elif int(draws[1] * 3) == 1:
        changed = ops.solarize(image, 128).float() / 255
    else:
        padded = torch.nn.functional.pad(changed[None], (8,) * 4, mode="replicate")[0]
        changed = ops.gaussian_blur(padded, [13, 13], [(0.1 + 1.9 * draws[2]) * size / 224] * 2)[:, 8:-8, 8:-8]
    brightness, contrast, saturation = 0.7 + 0.6 * draws[3:]
    changed = ops.adjust_brightness(changed, brightness)
    changed = ops.adjust_contrast(changed, contrast)
    return (255 * ops.adjust_saturation(changed, saturation)).round().to(torch.uint8)


def test_three_augment_equals_torchvision_operations():
    x, places = images(24, 32), np.arange(100, 124)
    out = three_augment(x, 1.0, 5, 7, places)
    draws = uniform((5, 7, THREE), places, 6)
    assert len(set((draws[:, 1] * 3).astype(int))) == 3
    for number in range(24):
        expected = plain_three_augment(x[number], draws[number])
        assert (out[number].int() - expected.int()).abs().max() <= 1, number


def test_strength_0_only_normalises():
    x = images()
    for options in (EVERYTHING, {"three_augment": True}):
        augment = Augment(**options)
        for step in range(4):
            prepared = augment.prepare(x, 1, step, np.arange(12), 0.0)
            done = augment(prepared, augment.draw(1, step, np.arange(12), 12, 24, 0.0))
            torch.testing.assert_close(done, Normalize()(x), atol=1e-5, rtol=0)


def test_strength_scales_the_probability_of_mixing():
    augment = Augment(mixup=0.8)
    mixed = sum(augment.mixture(generator((step,)), 8, 24, 0.25)[0] != 1 for step in range(400))
    assert 70 < mixed < 130
