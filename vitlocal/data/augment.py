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
from torch.nn import functional as F
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
    """Random erasing with pixel noise (Zhong et al. 2020; timm's areas 2–33 %, ratios 0.3–3.33).

    A box that would be longer than the image is cut to it, where timm draws again.
    """
    count, size = len(pixels), pixels.shape[-1]
    chosen = draw.random(count) < chance
    area = draw.uniform(0.02, 1 / 3, count) * size**2
    ratio = np.exp(draw.uniform(math.log(0.3), -math.log(0.3), count))
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


# --- RandAugment ------------------------------------------------------------------------------------------------------

# Every operation is of the "increasing" set of RandAugment (Cubuk et al. 2020), with timm's ranges: a larger level in
# [0, 1] always means a larger change. ``sign`` is ±1 and, where it means nothing, ignored.


def _solarize_add(x: Tensor, level: float) -> Tensor:
    return torch.where(x < 128, (x.int() + int(110 * level)).clamp(0, 255).to(x.dtype), x)


def _sharpness(x: Tensor, factor: float) -> Tensor:
    # Pillow's: away from, or towards, a 3×3 blur with weight 5 in the middle; borders stay. (torchvision's makes its
    # kernel on the host at each call, and so waits for the device.)
    blurred = x.float()
    inner = blurred[..., 1:-1, 1:-1]
    inner.copy_((9 * F.avg_pool2d(x.float(), 3, 1) + 4 * inner) / 13)
    return torch.lerp(blurred, x.float(), factor).round().clamp(0, 255).to(x.dtype)


def _enhancement(level: float, sign: int) -> float:
    return max(0.1, 1 + sign * 0.9 * level)


# Name → (images (n, 3, S, S) uint8, level, sign) → images.
COLOURS = {
    "autocontrast": lambda x, level, sign: ops.autocontrast(x),
    "equalize": lambda x, level, sign: ops.equalize(x),
    "invert": lambda x, level, sign: ops.invert(x),
    "posterize": lambda x, level, sign: ops.posterize(x, 4 - int(4 * level)),
    "solarize": lambda x, level, sign: ops.solarize(x, 255 - int(255 * level)),
    "solarize_add": lambda x, level, sign: _solarize_add(x, level),
    "saturation": lambda x, level, sign: ops.adjust_saturation(x, _enhancement(level, sign)),
    "contrast": lambda x, level, sign: ops.adjust_contrast(x, _enhancement(level, sign)),
    "brightness": lambda x, level, sign: ops.adjust_brightness(x, _enhancement(level, sign)),
    "sharpness": lambda x, level, sign: _sharpness(x, _enhancement(level, sign)),
}


def _rotation(level: float) -> list[list[float]]:
    angle = math.radians(30 * level)
    return [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]


# Name → signed level → where an output pixel is read from: rows of a 2×3 matrix, in coordinates from -1 to 1. Shears
# keep the first row or column in place, as Pillow's do.
MOVES = {
    "rotate": _rotation,
    "shear_x": lambda level: [[1, 0.3 * level, 0.3 * level], [0, 1, 0]],
    "shear_y": lambda level: [[1, 0, 0], [0.3 * level, 1, 0.3 * level]],
    "translate_x": lambda level: [[1, 0, 0.9 * level], [0, 1, 0]],  # 0.45 of the width, which is 2
    "translate_y": lambda level: [[1, 0, 0], [0, 1, 0.9 * level]],
}


def move(images: Tensor, matrices: np.ndarray) -> Tensor:
    """Images (n, 3, S, S) uint8 moved by matrices (n, 2, 3), bilinear; what comes from outside is ImageNet's mean."""
    theta = torch.from_numpy(matrices.astype(np.float32)).to(images.device, non_blocking=True)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    fill = torch.stack([torch.full((), 255 * mean, device=images.device) for mean in IMAGENET_DEFAULT_MEAN])
    fill = fill.view(1, 3, 1, 1)
    moved = F.grid_sample(images.float() - fill, grid, align_corners=False) + fill  # zeros outside: the fill
    return moved.round().clamp(0, 255).to(images.dtype)


def randaugment(images: Tensor, magnitude: float, draw: np.random.Generator) -> Tensor:
    """Two random operations an image, each done half of the time, as timm's ``rand-m{magnitude}-mstd0.5-inc1``.

    Images that drew one operation on colours and one sign go through it together, at one magnitude drawn for the group
    (timm draws it for each image; with a deviation of 0.5 in 10 the difference is slight), and all that move are
    moved in one call. timm runs before the crop is an array and with bicubic filters, this bilinear on the crop.
    ``images`` (B, 3, S, S) uint8; returns the same, a new tensor.
    """
    names = [*COLOURS, *MOVES]
    images = images.clone(memory_format=torch.channels_last)
    for _ in range(OPERATIONS):
        choice = draw.integers(len(names), size=len(images))
        sign = draw.integers(2, size=len(images)) * 2 - 1
        applied = draw.random(len(images)) < 0.5
        levels = np.clip(draw.normal(magnitude, MAGNITUDE_STD, (len(names), 2)), 0, 10) / 10
        for number, name in enumerate(COLOURS):
            for side in (-1, 1):
                members = np.flatnonzero(applied & (choice == number) & (sign == side))
                if len(members):
                    places = torch.from_numpy(members).to(images.device, non_blocking=True)
                    images[places] = COLOURS[name](images[places], float(levels[number, max(side, 0)]), side)
        members = np.flatnonzero(applied & (choice >= len(COLOURS)))
        if len(members):
            matrices = [MOVES[names[choice[i]]](float(sign[i] * levels[choice[i], max(sign[i], 0)])) for i in members]
            places = torch.from_numpy(members).to(images.device, non_blocking=True)
            images[places] = move(images[places], np.array(matrices))
    return images
