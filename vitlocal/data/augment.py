"""Batch augmentation on the device: RandAugment or three-augment, normalisation, random erasing, mixup and cutmix.

Random numbers come from the host, with the key (seed, step) and the sample's place in the global batch. So a step
repeats bit for bit after a restart, several processes draw the same numbers as one, and nothing waits for the device.

Shape letters: B batch, S size.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as ops

from vitlocal.data.random_keys import generator, uniform

OPERATIONS = 2  # RandAugment: operations for each image
MAGNITUDE_STD = 0.5  # of timm's rand-m9-mstd0.5-inc1, which DeiT uses
NOISE = 1 << 21  # normal numbers for erased pixels, 8 MB on the device

# The purpose of a random number, a part of its key.
ERASE, MIX, OPERATION, MAGNITUDE, DROP_PATH, THREE = range(6)


class AugmentParams(NamedTuple):
    """The random values of one step for its part of the batch, on the device. None if the recipe does not use them."""

    boxes: Tensor | None = None  # (B, 4) int64: first and last + 1 row and column to erase; empty if none
    noise: Tensor | None = None  # (B,) int64: the start of a sample's pixels in the table of noise
    mix: Tensor | None = None  # (6,) float32: share of the pixels, share of the labels, and the pasted box as in boxes


class Normalize(torch.nn.Module):
    """Maps uint8 pixels to float32 with ImageNet's mean and standard deviation, in one multiply-add."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        deviation = torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1)
        mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * deviation), persistent=False)
        self.register_buffer("shift", -mean / deviation, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)


class Augment(torch.nn.Module):
    """Augments the images of a source for a training step.

    Args:
        randaugment: magnitude of RandAugment, 0 to 10; 0: off.
        three_augment: three-augment instead of RandAugment.
        mixup, cutmix: their alphas; 0: off.
        mixup_prob: probability that a batch is mixed.
        cutmix_prob: probability of cutmix if both are on.
        random_erasing: probability of random erasing, with pixel noise.
    """

    table: Tensor

    def __init__(
        self, *, randaugment: float = 0.0, three_augment: bool = False, mixup: float = 0.0, cutmix: float = 0.0,
        mixup_prob: float = 1.0, cutmix_prob: float = 0.5, random_erasing: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.randaugment, self.three_augment, self.random_erasing = randaugment, three_augment, random_erasing
        self.mixup, self.cutmix, self.mixup_prob, self.cutmix_prob = mixup, cutmix, mixup_prob, cutmix_prob
        self.mixes = mixup > 0 or cutmix > 0
        self.normalize = Normalize()
        table = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)) if random_erasing else torch.empty(0)
        self.register_buffer("table", table, persistent=False)

    def draw(
        self, seed: int, step: int, places: np.ndarray, total: int, size: int, strength: float = 1.0
    ) -> AugmentParams:
        """The random values for :meth:`forward`, on this module's device, for ``places`` of a batch of ``total``.

        ``strength`` scales the probabilities of erasing and mixing.
        """
        boxes, noise, mix, device = None, None, None, self.normalize.scale.device
        if self.random_erasing:
            box, part = erased_boxes(uniform((seed, step, ERASE), places, 6), self.random_erasing * strength, size)
            boxes, noise = send(box, device), send((part * (NOISE - 3 * size * size + 1)).astype(np.int64), device)
        if self.mixes:
            mix = send(self.mixture(generator((seed, step, MIX)), total, size, strength), device)
        return AugmentParams(boxes, noise, mix)

    def mixture(self, draw: np.random.Generator, total: int, size: int, strength: float = 1.0) -> np.ndarray:
        """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) for one batch: (6,) float32, see AugmentParams.mix.

        Each image is mixed with the image of its mirror place. Labels mix in the share of the pixels that it keeps.
        """
        chosen, cut = draw.random(2), draw.random(2)
        if chosen[0] >= self.mixup_prob * strength or total < 2:
            return np.array([1, 1, 0, 0, 0, 0], np.float32)
        cutting = self.cutmix > 0 and (self.mixup == 0 or chosen[1] < self.cutmix_prob)
        alpha = self.cutmix if cutting else self.mixup
        share = float(draw.beta(alpha, alpha))
        if not cutting:
            return np.array([share, share, 0, 0, 0, 0], np.float32)
        side = round(size * math.sqrt(1 - share))
        top, left = (int(part * (size + 1)) - side // 2 for part in cut)
        box = np.clip([top, top + side, left, left + side], 0, size)
        area = (box[1] - box[0]) * (box[3] - box[2])
        return np.array([1, 1 - area / size**2, *box], np.float32)

    def prepare(self, images: Tensor, seed: int, step: int, places: np.ndarray, strength: float = 1.0) -> Tensor:
        """RandAugment or three-augment: (B, 3, S, S) uint8 to a new tensor. Without them, ``images`` itself.

        ``strength`` scales the magnitude of RandAugment, or the probability and the jitter of three-augment.
        """
        if self.three_augment:
            return three_augment(images, strength, seed, step, places)
        if self.randaugment and strength:
            return randaugment(images, self.randaugment, seed, step, places, strength)
        return images

    def forward(self, images: Tensor, drawn: AugmentParams) -> Tensor:
        """(B, 3, S, S) uint8 to float32, normalised, erased and mixed, channels-last."""
        pixels = self.normalize(images)
        if drawn.boxes is not None and drawn.noise is not None:
            pixels = erase(pixels, drawn.boxes, drawn.noise, self.table)
        return pixels if drawn.mix is None else paste(pixels, drawn.mix)


def send(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Starts a host-to-device copy; neither side waits. PyTorch reuses the pinned memory only after the copy."""
    values = torch.as_tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _inside(boxes: Tensor, size: int) -> Tensor:
    """The mask of the pixels in boxes (..., 4): (..., S, S) bool."""
    top, bottom, left, right = boxes[..., None].unbind(-2)  # (..., 1) each
    along = torch.arange(size, device=boxes.device)
    rows, columns = (along >= top) & (along < bottom), (along >= left) & (along < right)
    return rows[..., :, None] & columns[..., None, :]


def paste(pixels: Tensor, mix: Tensor) -> Tensor:
    """``pixels`` (B, 3, S, S) mixed with the batch in reverse order, by ``mix`` (see AugmentParams)."""
    mirrored = pixels.flip(0)
    blended = torch.lerp(mirrored, pixels, mix[0])
    return torch.where(_inside(mix[2:], pixels.shape[-1]), mirrored, blended)


def erased_boxes(draws: np.ndarray, chance: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of random erasing, (B, 4) int64, and a uniform number for the noise, (B,).

    Zhong et al. 2020, with timm's areas (2–33 %) and ratios (0.3–3.33). ``draws`` (B, 6) are uniform in [0, 1). A box
    that is longer than the image is cut to it; timm draws again.
    """
    chosen, area, ratio, top, left, rest = draws.T
    area = (0.02 + (1 / 3 - 0.02) * area) * size**2
    ratio = np.exp(math.log(0.3) * (1 - 2 * ratio))
    height = np.clip(np.sqrt(area * ratio), 1, size - 1).round()
    width = np.clip(np.sqrt(area / ratio), 1, size - 1).round()
    top = np.floor(top * (size - height + 1))
    left = np.floor(left * (size - width + 1))
    boxes = np.stack([top, top + height, left, left + width], axis=1)
    return np.where(chosen[:, None] < chance, boxes, 0).astype(np.int64), rest


def erase(pixels: Tensor, boxes: Tensor, noise: Tensor, table: Tensor) -> Tensor:
    """``pixels`` (B, 3, S, S) with noise in ``boxes`` (B, 4), from ``table`` at the offsets ``noise`` (B,)."""
    count, size = len(pixels), pixels.shape[-1]
    length = 3 * size * size
    rows = table.as_strided((len(table) - length + 1, length), (1, 1))  # every run of the table, as a view
    filling = rows[noise].view(count, size, size, 3).permute(0, 3, 1, 2)  # channels-last, as pixels
    return torch.where(_inside(boxes, size)[:, None], filling, pixels)


# --- RandAugment ------------------------------------------------------------------------------------------------------

# The "increasing" operations of RandAugment (Cubuk et al. 2020) with timm's ranges: a larger level in [0, 1] means a
# larger change.


def _solarize_add(x: Tensor, level: float) -> Tensor:
    return torch.where(x < 128, (x.int() + int(110 * level)).clamp(0, 255).to(x.dtype), x)


def _sharpness(x: Tensor, factor: float) -> Tensor:
    # Pillow's: a 3×3 blur with weight 5 in the middle; borders stay. (torchvision's version waits for the device.)
    blurred = x.float()
    inner = blurred[..., 1:-1, 1:-1]
    inner.copy_((9 * F.avg_pool2d(x.float(), 3, 1) + 4 * inner) / 13)
    return torch.lerp(blurred, x.float(), factor).round().clamp(0, 255).to(x.dtype)


# Name → (images (n, 3, S, S) uint8, level, factor of an enhancement) → images.
COLOURS = {
    "autocontrast": lambda x, level, factor: ops.autocontrast(x),
    "equalize": lambda x, level, factor: ops.equalize(x),
    "invert": lambda x, level, factor: ops.invert(x),
    "posterize": lambda x, level, factor: ops.posterize(x, 4 - int(4 * level)),
    "solarize": lambda x, level, factor: ops.solarize(x, 255 - int(255 * level)),
    "solarize_add": lambda x, level, factor: _solarize_add(x, level),
    "saturation": lambda x, level, factor: ops.adjust_saturation(x, factor),
    "contrast": lambda x, level, factor: ops.adjust_contrast(x, factor),
    "brightness": lambda x, level, factor: ops.adjust_brightness(x, factor),
    "sharpness": lambda x, level, factor: _sharpness(x, factor),
}
LEVELLESS = ("autocontrast", "equalize", "invert")  # operations without a magnitude


def _rotation(level: float) -> list[list[float]]:
    angle = math.radians(30 * level)
    return [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]


# Name → signed level → rows of the 2×3 matrix from output to input coordinates, which run from -1 to 1. Shears keep the
# first row or column in place, as in Pillow.
MOVES = {
    "rotate": _rotation,
    "shear_x": lambda level: [[1, 0.3 * level, 0.3 * level], [0, 1, 0]],
    "shear_y": lambda level: [[1, 0, 0], [0.3 * level, 1, 0.3 * level]],
    "translate_x": lambda level: [[1, 0, 0.9 * level], [0, 1, 0]],  # 0.45 of the width, which is 2
    "translate_y": lambda level: [[1, 0, 0], [0, 1, 0.9 * level]],
}


def move(images: Tensor, matrices: np.ndarray) -> Tensor:
    """Images (n, 3, S, S) uint8 moved by ``matrices`` (n, 2, 3), bilinear, padded with ImageNet's mean."""
    theta = send(matrices.astype(np.float32), images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    fill = torch.stack([torch.full((), 255 * mean, device=images.device) for mean in IMAGENET_DEFAULT_MEAN])
    fill = fill.view(1, 3, 1, 1)
    moved = F.grid_sample(images.float() - fill, grid, align_corners=False) + fill  # zeros outside: the fill
    return moved.round().clamp(0, 255).to(images.dtype)


def randaugment(
    images: Tensor, magnitude: float, seed: int, step: int, places: np.ndarray, strength: float = 1.0
) -> Tensor:
    """Applies two random operations to each image, each with probability 0.5, as timm's ``rand-m9-mstd0.5-inc1``.

    ``images`` (B, 3, S, S) uint8 are the ``places`` of the global batch; returns a new tensor. ``strength`` scales the
    magnitude, or the probability of operations without one. Departures from timm: images with the same colour operation
    and sign share one magnitude and one call; geometric operations share one call, bilinear, on the crop.
    """
    names, moving = [*COLOURS, *MOVES], 2 * len(COLOURS)
    chances = np.array([0.5 * strength if name in LEVELLESS else 0.5 for name in names])
    magnitude *= strength
    images = images.clone(memory_format=torch.channels_last)
    draws = uniform((seed, step, OPERATION), places, 3 * OPERATIONS)
    strengths = generator((seed, step, MAGNITUDE))
    for turn in range(OPERATIONS):
        choice, sign, applied = draws[:, 3 * turn : 3 * turn + 3].T
        variants = 2 * (choice * len(names)).astype(int) + (sign >= 0.5)  # odd ones have a positive sign
        levels = np.clip(strengths.normal(magnitude, MAGNITUDE_STD, 2 * len(names)), 0, 10) / 10
        signed = levels * np.tile([-1, 1], len(names))
        # Sorted by variant, so that a group is a slice: one copy to the device, one gather, one scatter.
        group = np.where(applied < chances[variants // 2], np.minimum(variants, moving), -1)
        order = np.argsort(group, kind="stable")
        ends = np.searchsorted(group[order], np.arange(-1, moving + 1), side="right")
        rows = send(order, images.device)
        ordered = images[rows]
        for variant, (first, last) in enumerate(pairwise(ends[:-1])):
            if first < last:
                operation, factor = COLOURS[names[variant // 2]], max(0.1, 1 + 0.9 * float(signed[variant]))
                ordered[first:last] = operation(ordered[first:last], float(levels[variant]), factor)
        if (first := ends[-2]) < len(order):
            matrices = [MOVES[names[variant // 2]](float(signed[variant])) for variant in variants[order[first:]]]
            ordered[first:] = move(ordered[first:], np.array(matrices))
        images[rows] = ordered
    return images


# --- three-augment ----------------------------------------------------------------------------------------------------

JITTER = 0.3  # of brightness, contrast and saturation: factors from 1 - 0.3 to 1 + 0.3
BLUR = (0.1, 2.0)  # standard deviations, px of an image of 224 px
TAPS = 6  # pixels of the blur to either side: three of the largest standard deviations
GREY = (0.299, 0.587, 0.114)  # luma, as Pillow's


def three_augment(images: Tensor, strength: float, seed: int, step: int, places: np.ndarray) -> Tensor:
    """Makes each image grey, solarised or blurred, then jitters brightness, contrast and saturation.

    As in DeiT III (Touvron et al. 2022, arXiv 2204.07118). ``images`` (B, 3, S, S) uint8 are the ``places`` of the
    global batch; returns a new tensor. ``strength`` is the probability of the first operation and scales the jitter.
    """
    draws = uniform((seed, step, THREE), places, 6)
    chosen = np.where(draws[:, 0] < strength, (draws[:, 1] * 3).astype(int), -1)
    factors = 1 + strength * JITTER * (2 * draws[:, 3:] - 1)  # (B, 3)
    # Sorted by operation, so that a group is a slice.
    order = np.argsort(chosen, kind="stable")
    ends = np.searchsorted(chosen[order], np.arange(-1, 3), side="right")
    deviations = (BLUR[0] + (BLUR[1] - BLUR[0]) * draws[order[ends[-2] :], 2]) * images.shape[-1] / 224
    rows = send(order, images.device)
    x = images[rows].float()
    grey, solarised, blurred = (x[first:last] for first, last in pairwise(ends))
    grey.copy_(_grey(grey))
    solarised.copy_(torch.minimum(solarised, 255 - solarised))  # integers above 127 are inverted
    if len(blurred):
        blurred.copy_(_blurred(deviations, blurred))
    sent = send(factors[order].astype(np.float32), x.device)
    brightness, contrast, saturation = sent[..., None, None, None].unbind(1)  # (B, 1, 1, 1) each
    x.mul_(brightness).clamp_(0, 255)
    torch.lerp(_grey(x).mean(dim=(1, 2, 3), keepdim=True), x, contrast, out=x).clamp_(0, 255)
    torch.lerp(_grey(x), x, saturation, out=x)
    done = torch.empty_like(images, memory_format=torch.channels_last)
    done[rows] = x.round_().clamp_(0, 255).to(images.dtype)
    return done


def _grey(x: Tensor) -> Tensor:
    """(n, 1, S, S) of (n, 3, S, S)."""
    red, green, blue = x.split(1, dim=1)  # weights are numbers, so nothing is copied to the device
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def _blurred(deviations: np.ndarray, x: Tensor) -> Tensor:
    """(n, 3, S, S) float, each image blurred by a Gaussian of its own deviation (n,), px; edges are repeated."""
    count, channels, size, _ = x.shape
    reach = min(TAPS, size - 1)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviations[:, None]) ** 2)
    taps = (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32).repeat(channels, axis=0)
    kernels = send(taps, x.device)[:, None]  # (3n, 1, taps)
    planes = F.pad(x.reshape(1, count * channels, size, size), (reach,) * 4, mode="replicate")
    planes = F.conv2d(planes, kernels[..., None, :], groups=count * channels)
    return F.conv2d(planes, kernels[..., None], groups=count * channels).view_as(x)
