"""Batch augmentation on the device: RandAugment, normalisation, random erasing, mixup and cutmix.

What is drawn is drawn on the host from a generator keyed by (seed, step), so that a step repeats bit for bit after
a restart and the device is never waited for. Shape letters: B batch, S size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as ops

from vitlocal.config import AugmentConfig

OPERATIONS = 2  # of RandAugment, an image
MAGNITUDE_STD = 0.5  # timm's rand-m9-mstd0.5-inc1, which DeiT trains with


@dataclass(frozen=True)
class Mixed:
    """Augmented images with their labels: the target is ``share`` × labels + (1 - ``share``) × others."""

    images: Tensor  # (B, 3, S, S) float32, normalised, channels-last
    labels: Tensor  # (B,) int64
    others: Tensor  # (B,) int64
    share: float


class Normalize(torch.nn.Module):
    """uint8 pixels → float32 with ImageNet's mean and deviation, in one multiply-add."""

    def __init__(self) -> None:
        super().__init__()
        deviation = torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1)
        mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * deviation), persistent=False)
        self.register_buffer("shift", -mean / deviation, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)


def step_generator(seed: int, step: int) -> np.random.Generator:
    """The host's random numbers for one step."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, step, 0xA061))))


class Augment(torch.nn.Module):
    """Images as they come from a source → what a training step sees."""

    def __init__(self, config: AugmentConfig):
        super().__init__()
        self.config = config
        self.normalize = Normalize()

    def forward(self, images: Tensor, labels: Tensor, draw: np.random.Generator) -> Mixed:
        """``images`` (B, 3, S, S) uint8 and ``labels`` (B,) on one device; ``draw`` from :func:`step_generator`."""
        config = self.config
        if config.randaugment:
            images = randaugment(images, config.randaugment, draw)
        pixels = self.normalize(images)
        if config.erase:
            pixels = erase(pixels, config.erase, draw)
        return self._mix(pixels, labels, draw)

    def _mix(self, pixels: Tensor, labels: Tensor, draw: np.random.Generator) -> Mixed:
        """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), each image with its mirror place in the batch."""
        config = self.config
        chosen, cut = draw.random(2), draw.random(2)
        on = (config.mixup > 0 or config.cutmix > 0) and chosen[0] < config.mix_chance and len(labels) > 1
        if not on:
            return Mixed(pixels, labels, labels, 1.0)
        cutting = config.cutmix > 0 and (config.mixup == 0 or chosen[1] < config.cutmix_chance)
        alpha = config.cutmix if cutting else config.mixup
        share = float(draw.beta(alpha, alpha))
        others = labels.flip(0)
        if not cutting:
            return Mixed(torch.lerp(pixels.flip(0), pixels, share), labels, others, share)
        size = pixels.shape[-1]
        side = round(size * math.sqrt(1 - share))
        top, left = (int(part * (size + 1)) - side // 2 for part in cut)
        rows = slice(max(0, top), min(size, top + side))
        columns = slice(max(0, left), min(size, left + side))
        flipped = pixels.flip(0)  # a copy: the box must not be overwritten while it is read
        pixels[..., rows, columns] = flipped[..., rows, columns]
        area = max(0, rows.stop - rows.start) * max(0, columns.stop - columns.start)
        return Mixed(pixels, labels, others, 1 - area / size**2)


def erase(pixels: Tensor, chance: float, draw: np.random.Generator) -> Tensor:
    """Random erasing with pixel noise (Zhong et al. 2020; timm's areas 2–33 %, ratios 0.3–3.3)."""
    count, size = len(pixels), pixels.shape[-1]
    chosen = draw.random(count) < chance
    area = draw.uniform(0.02, 1 / 3, count) * size**2
    ratio = np.exp(draw.uniform(math.log(0.3), math.log(3.3), count))
    height = np.clip(np.sqrt(area * ratio), 1, size - 1).round()
    width = np.clip(np.sqrt(area / ratio), 1, size - 1).round()
    top = np.floor(draw.random(count) * (size - height + 1))
    left = np.floor(draw.random(count) * (size - width + 1))
    noise_seed = int(draw.integers(2**62))
    if not chosen.any():
        return pixels
    box = np.stack([np.where(chosen, top, size), top + height, left, left + width]).astype(np.int64)
    top, bottom, left, right = torch.from_numpy(box).to(pixels.device, non_blocking=True)[..., None]  # (B, 1) each
    along = torch.arange(size, device=pixels.device)
    inside = ((along >= top) & (along < bottom))[:, None, :, None] & ((along >= left) & (along < right))[:, None, None]
    generator = torch.Generator(pixels.device).manual_seed(noise_seed)
    noise = torch.empty_like(pixels).normal_(generator=generator)
    return torch.where(inside, noise, pixels)


# --- RandAugment ------------------------------------------------------------------------------------------

_AFFINE = {"interpolation": InterpolationMode.BILINEAR, "fill": [128.0]}


def _affine(images: Tensor, angle: float = 0.0, shift: tuple[int, int] = (0, 0), shear: tuple = (0.0, 0.0)) -> Tensor:
    return ops.affine(images, angle, list(shift), 1.0, list(shear), **_AFFINE)


# Name → (images uint8, level in [0, 1] of the largest magnitude, sign ±1) → images. The "increasing" set of
# RandAugment (Cubuk et al. 2020), with timm's ranges: a larger level always means a larger change.
RANDAUGMENT = {
    "autocontrast": lambda x, level, sign: ops.autocontrast(x),
    "equalize": lambda x, level, sign: ops.equalize(x),
    "invert": lambda x, level, sign: ops.invert(x),
    "rotate": lambda x, level, sign: _affine(x, angle=sign * 30 * level),
    "posterize": lambda x, level, sign: ops.posterize(x, max(1, 4 - int(4 * level))),
    "solarize": lambda x, level, sign: ops.solarize(x, 255 - int(255 * level)),
    "solarize_add": lambda x, level, sign: torch.where(
        x < 128, (x.int() + int(110 * level)).clamp(0, 255).to(x.dtype), x
    ),
    "saturation": lambda x, level, sign: ops.adjust_saturation(x, max(0.1, 1 + sign * 0.9 * level)),
    "contrast": lambda x, level, sign: ops.adjust_contrast(x, max(0.1, 1 + sign * 0.9 * level)),
    "brightness": lambda x, level, sign: ops.adjust_brightness(x, max(0.1, 1 + sign * 0.9 * level)),
    "sharpness": lambda x, level, sign: ops.adjust_sharpness(x, max(0.1, 1 + sign * 0.9 * level)),
    "shear_x": lambda x, level, sign: _affine(x, shear=(math.degrees(math.atan(sign * 0.3 * level)), 0.0)),
    "shear_y": lambda x, level, sign: _affine(x, shear=(0.0, math.degrees(math.atan(sign * 0.3 * level)))),
    "translate_x": lambda x, level, sign: _affine(x, shift=(round(sign * 0.45 * level * x.shape[-1]), 0)),
    "translate_y": lambda x, level, sign: _affine(x, shift=(0, round(sign * 0.45 * level * x.shape[-1]))),
}


def randaugment(images: Tensor, magnitude: float, draw: np.random.Generator) -> Tensor:
    """Two random operations an image, each done half of the time, as timm's ``rand-m{magnitude}-mstd0.5-inc1``.

    Images that drew one operation and sign go through it together, at one magnitude drawn for the group
    (timm draws it for each image; with a deviation of 0.5 in 10 the difference is slight). ``images``
    (B, 3, S, S) uint8; returns the same, a new tensor.
    """
    names = list(RANDAUGMENT)
    images = images.clone(memory_format=torch.channels_last)
    for _ in range(OPERATIONS):
        choice = draw.integers(len(names), size=len(images))
        sign = draw.integers(2, size=len(images)) * 2 - 1
        applied = draw.random(len(images)) < 0.5
        levels = np.clip(draw.normal(magnitude, MAGNITUDE_STD, (len(names), 2)), 0, 10) / 10
        for number, name in enumerate(names):
            for side in (-1, 1):
                members = np.flatnonzero(applied & (choice == number) & (sign == side))
                if len(members):
                    places = torch.from_numpy(members).to(images.device, non_blocking=True)
                    changed = RANDAUGMENT[name](images[places], float(levels[number, max(side, 0)]), side)
                    images[places] = changed
    return images
