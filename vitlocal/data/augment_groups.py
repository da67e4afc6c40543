"""RandAugment and three-augment by groups: the images that share an operation go through one call.

Eager steps on a CPU run this version, because no image pays for an operation of another. It is also the reference for
``augment_graph.py``, which issues a twelfth of the operations.

Shape letters: B batch, S size, V variants: each operation with a negative and with a positive sign.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as ops

from vitlocal.data.random_keys import MAGNITUDE, OPERATION, THREE, generator, uniform

OPERATIONS = 2  # RandAugment: operations for each image
MAGNITUDE_STD = 0.5  # of timm's rand-m9-mstd0.5-inc1, which DeiT uses


def send(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copies to a device. With CUDA neither side waits, and PyTorch reuses the pinned memory only after the copy."""
    values = torch.as_tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


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


class Turn(NamedTuple):
    """The operations of one turn."""

    variants: np.ndarray  # (B,) int: twice the operation's number, plus 1 with a positive sign
    applied: np.ndarray  # (B,) bool
    levels: np.ndarray  # (V,) magnitudes in [0, 1]
    signed: np.ndarray  # (V,) magnitudes with their sign

    def factor(self, variant: int) -> float:
        """The factor of brightness, contrast, saturation and sharpness."""
        return max(0.1, 1 + 0.9 * float(self.signed[variant]))


NAMES = [*COLOURS, *MOVES]
MOVING = 2 * len(COLOURS)  # the first variant that moves an image


def draw_turns(magnitude: float, seed: int, step: int, places: np.ndarray, strength: float = 1.0) -> list[Turn]:
    """The operations of RandAugment for ``places`` of the global batch; see :func:`randaugment`."""
    chances = np.array([0.5 * strength if name in LEVELLESS else 0.5 for name in NAMES])
    magnitude *= strength
    draws = uniform((seed, step, OPERATION), places, 3 * OPERATIONS)
    strengths = generator((seed, step, MAGNITUDE))
    turns = []
    for turn in range(OPERATIONS):
        choice, sign, applied = draws[:, 3 * turn : 3 * turn + 3].T
        variants = 2 * (choice * len(NAMES)).astype(int) + (sign >= 0.5)
        levels = np.clip(strengths.normal(magnitude, MAGNITUDE_STD, 2 * len(NAMES)), 0, 10) / 10
        signed = levels * np.tile([-1, 1], len(NAMES))
        turns.append(Turn(variants, applied < chances[variants // 2], levels, signed))
    return turns


def randaugment(
    images: Tensor, magnitude: float, seed: int, step: int, places: np.ndarray, strength: float = 1.0
) -> Tensor:
    """Applies two random operations to each image, each with probability 0.5, as timm's ``rand-m9-mstd0.5-inc1``.

    ``images`` (B, 3, S, S) uint8 are the ``places`` of the global batch; returns a new tensor. ``strength`` scales the
    magnitude, or the probability of operations without one. Departures from timm: images with the same colour operation
    and sign share one magnitude and one call; geometric operations share one call, bilinear, on the crop.
    """
    images = images.clone(memory_format=torch.channels_last)
    for turn in draw_turns(magnitude, seed, step, places, strength):
        # Sorted by variant, so that a group is a slice: one copy to the device, one gather, one scatter.
        group = np.where(turn.applied, np.minimum(turn.variants, MOVING), -1)
        order = np.argsort(group, kind="stable")
        ends = np.searchsorted(group[order], np.arange(-1, MOVING + 1), side="right")
        rows = send(order, images.device)
        ordered = images[rows]
        for variant, (first, last) in enumerate(pairwise(ends[:-1])):
            if first < last:
                operation, level = COLOURS[NAMES[variant // 2]], float(turn.levels[variant])
                ordered[first:last] = operation(ordered[first:last], level, turn.factor(variant))
        if (first := ends[-2]) < len(order):
            moving = turn.variants[order[first:]]
            matrices = [MOVES[NAMES[variant // 2]](float(turn.signed[variant])) for variant in moving]
            ordered[first:] = move(ordered[first:], np.array(matrices))
        images[rows] = ordered
    return images


# --- three-augment ----------------------------------------------------------------------------------------------------

JITTER = 0.3  # of brightness, contrast and saturation: factors from 1 - 0.3 to 1 + 0.3
BLUR = (0.1, 2.0)  # standard deviations, px of an image of 224 px
TAPS = 6  # pixels of the blur to either side: three of the largest standard deviations
GREY = (0.299, 0.587, 0.114)  # luma, as Pillow's


def draw_three(
    strength: float, seed: int, step: int, places: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For ``places`` of the global batch, see :func:`three_augment`: the first operation, (B,): 0 grey, 1 solarised,
    2 blurred, -1 none; the blur's standard deviation, (B,), px; and the factors of the jitter, (B, 3)."""
    draws = uniform((seed, step, THREE), places, 6)
    chosen = np.where(draws[:, 0] < strength, (draws[:, 1] * 3).astype(int), -1)
    deviations = (BLUR[0] + (BLUR[1] - BLUR[0]) * draws[:, 2]) * size / 224
    return chosen, deviations, 1 + strength * JITTER * (2 * draws[:, 3:] - 1)


def three_augment(images: Tensor, strength: float, seed: int, step: int, places: np.ndarray) -> Tensor:
    """Makes each image grey, solarised or blurred, then jitters brightness, contrast and saturation.

    As in DeiT III (Touvron et al. 2022, arXiv 2204.07118). ``images`` (B, 3, S, S) uint8 are the ``places`` of the
    global batch; returns a new tensor. ``strength`` is the probability of the first operation and scales the jitter.
    """
    chosen, every_deviation, factors = draw_three(strength, seed, step, places, images.shape[-1])
    # Sorted by operation, so that a group is a slice.
    order = np.argsort(chosen, kind="stable")
    ends = np.searchsorted(chosen[order], np.arange(-1, 3), side="right")
    deviations = every_deviation[order[ends[-2] :]]
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
