"""RandAugment and three-augment by groups: the images that share an operation go through one call.

Eager steps on a CPU run this version, because no image pays for an operation of another. It is also the reference for
``augment_graph.py``, which issues a twelfth of the operations.

Shape letters: B batch, S size, V variants: each operation with a negative and with a positive sign.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as ops

from vitlocal.data.random_keys import MAGNITUDE, OPERATION, THREE, generator, uniform
from vitlocal.data.transfer import send

OPERATIONS = 2  # RandAugment: operations for each image
MAGNITUDE_STD = 0.5  # of timm's rand-m9-mstd0.5-inc1


# --- RandAugment ------------------------------------------------------------------------------------------------------


def _solarize_add(x: Tensor, added: int) -> Tensor:
    return torch.where(x < 128, (x.int() + added).clamp(0, 255).to(x.dtype), x)


def _sharpness(x: Tensor, factor: float) -> Tensor:
    # Pillow's: a 3×3 blur with weight 5 in the middle; borders stay. (torchvision's version waits for the device.)
    blurred = x.float()
    inner = blurred[..., 1:-1, 1:-1]
    inner.copy_((9 * F.avg_pool2d(x.float(), 3, 1) + 4 * inner) / 13)
    return torch.lerp(blurred, x.float(), factor).round().clamp(0, 255).to(x.dtype)


# Name → (images (n, 3, S, S) uint8, the operation's argument) → images. See the sets of operations below.
COLOURS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "autocontrast": lambda x, _: ops.autocontrast(x),
    "equalize": lambda x, _: ops.equalize(x),
    "invert": lambda x, _: ops.invert(x),
    "posterize": lambda x, bits: ops.posterize(x, bits),
    "solarize": lambda x, threshold: ops.solarize(x, threshold) if threshold < 256 else x,
    "solarize_add": lambda x, added: _solarize_add(x, added),
    "saturation": lambda x, factor: ops.adjust_saturation(x, factor),
    "contrast": lambda x, factor: ops.adjust_contrast(x, factor),
    "brightness": lambda x, factor: ops.adjust_brightness(x, factor),
    "sharpness": lambda x, factor: _sharpness(x, factor),
}
LEVELLESS = ("autocontrast", "equalize", "invert")  # operations without a magnitude
ENHANCEMENTS = ("saturation", "contrast", "brightness", "sharpness")


def _rotation(degrees: float) -> list[list[float]]:
    angle = math.radians(degrees)
    return [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]


# Name → argument → rows of the 2×3 matrix from output to input coordinates, which run from -1 to 1. Shears keep the
# first row or column in place, as in Pillow.
MOVES = {
    "rotate": _rotation,
    "shear_x": lambda slope: [[1, slope, slope], [0, 1, 0]],
    "shear_y": lambda slope: [[1, 0, 0], [slope, 1, slope]],
    "translate_x": lambda shift: [[1, 0, shift], [0, 1, 0]],
    "translate_y": lambda shift: [[1, 0, 0], [0, 1, shift]],
}
MOVING = 2 * len(COLOURS)  # the first variant that moves an image
CUTTING = MOVING + 2 * len(MOVES)  # the first variant that is a cutout


class OperationSet(NamedTuple):
    """The operations that RandAugment chooses from: those of COLOURS, then of MOVES, and perhaps cutout."""

    arguments: dict[str, Callable[[float, int], float]]  # name → (level = magnitude / 10, sign ±1) → argument
    fixed: bool  # every drawn operation is applied, at the magnitude itself; else half of them, at random magnitudes
    padding: tuple[float, ...]  # what moves and cutouts fill with, by channel, 0 to 255

    @property
    def chance(self) -> float:
        """The probability that a drawn operation is applied."""
        return 1.0 if self.fixed else 0.5


# timm's "increasing" operations (rand-m9-mstd0.5-inc1, which DeiT uses): a larger level means a larger change.
TIMM = OperationSet(
    {
        **dict.fromkeys(LEVELLESS, lambda level, sign: 0),
        "posterize": lambda level, sign: 4 - int(4 * level),
        "solarize": lambda level, sign: 255 - int(255 * level),
        "solarize_add": lambda level, sign: int(110 * level),
        **dict.fromkeys(ENHANCEMENTS, lambda level, sign: max(0.1, 1 + 0.9 * sign * level)),
        "rotate": lambda level, sign: 30 * sign * level,
        **dict.fromkeys(("shear_x", "shear_y"), lambda level, sign: 0.3 * sign * level),
        # 0.45 of the width, which is 2
        **dict.fromkeys(("translate_x", "translate_y"), lambda level, sign: 0.9 * sign * level),
    },
    fixed=False,
    padding=tuple(255 * mean for mean in IMAGENET_DEFAULT_MEAN),
)
# Those of big_vision's pp/autoaugment.py, at magnitudes up to 30. The change is smallest near a level of 0.5 for
# enhancements, at high levels for posterize and solarize. Its pixels are of images of 224 px.
BIG_VISION = OperationSet(
    {
        **TIMM.arguments,
        "posterize": lambda level, sign: min(8, int(4 * level)),
        "solarize": lambda level, sign: min(256, int(256 * level)),
        **dict.fromkeys(ENHANCEMENTS, lambda level, sign: 1.8 * level + 0.1),
        **dict.fromkeys(("translate_x", "translate_y"), lambda level, sign: 2 * 100 / 224 * sign * level),
        "cutout": lambda level, sign: int(40 * level) / 224,  # half of the side, as a fraction of the image's
    },
    fixed=True,
    padding=(128.0, 128.0, 128.0),
)
OPERATION_SETS = {"timm": TIMM, "big_vision": BIG_VISION}


def inside(boxes: Tensor, size: int) -> Tensor:
    """The mask of the pixels in boxes (..., 4): first and last + 1 row and column. (..., S, S) bool."""
    top, bottom, left, right = boxes[..., None].unbind(-2)  # (..., 1) each
    along = torch.arange(size, device=boxes.device)
    rows, columns = (along >= top) & (along < bottom), (along >= left) & (along < right)
    return rows[..., :, None] & columns[..., None, :]


def move(images: Tensor, matrices: np.ndarray, padding: Sequence[float] = TIMM.padding) -> Tensor:
    """Images (n, 3, S, S) uint8 moved by ``matrices`` (n, 2, 3), bilinear, padded with the colour ``padding``."""
    theta = send(matrices.astype(np.float32), images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    fill = torch.stack([torch.full((), level, device=images.device) for level in padding])
    fill = fill.view(1, 3, 1, 1)
    moved = F.grid_sample(images.float() - fill, grid, align_corners=False) + fill  # zeros outside: the fill
    return moved.round().clamp(0, 255).to(images.dtype)


class Turn(NamedTuple):
    """The operations of one turn."""

    variants: np.ndarray  # (B,) int: twice the operation's number, plus 1 with a positive sign
    applied: np.ndarray  # (B,) bool
    arguments: list[Any]  # (V,) of the operations
    centres: np.ndarray  # (B, 2) the row and the column of a cutout, as fractions of the size

    def holes(self, size: int) -> np.ndarray:
        """The boxes of cutouts in images of ``size`` px, (B, 4) int64; empty for other images."""
        chosen = (self.applied & (self.variants >= CUTTING))[:, None]
        half, centres = round(self.arguments[-1] * size), (self.centres * size).astype(np.int64)
        return np.where(chosen, np.clip(centres[:, [0, 0, 1, 1]] + [-half, half, -half, half], 0, size), 0)


def draw_turns(
    magnitude: float, seed: int, step: int, places: np.ndarray, strength: float = 1.0, operations: OperationSet = TIMM
) -> list[Turn]:
    """The operations of RandAugment for ``places`` of the global batch; see :func:`randaugment`."""
    names = list(operations.arguments)
    scaled = operations.fixed or np.isin(names, LEVELLESS)  # strength scales the probability, not the magnitude
    chances = np.broadcast_to(operations.chance * np.where(scaled, strength, 1.0), len(names))
    draws = uniform((seed, step, OPERATION), places, 5 * OPERATIONS)
    strengths, signs = generator((seed, step, MAGNITUDE)), np.tile([-1, 1], len(names))
    turns = []
    for turn in range(OPERATIONS):
        choice, sign, applied = draws[:, 3 * turn : 3 * turn + 3].T
        variants = 2 * (choice * len(names)).astype(int) + (sign >= 0.5)
        if operations.fixed:
            levels = np.full(2 * len(names), magnitude / 10)
        else:
            levels = np.clip(strengths.normal(magnitude * strength, MAGNITUDE_STD, 2 * len(names)), 0, 10) / 10
        arguments = [
            operations.arguments[names[variant // 2]](float(levels[variant]), int(signs[variant]))
            for variant in range(2 * len(names))
        ]
        first = 3 * OPERATIONS + 2 * turn
        turns.append(Turn(variants, applied < chances[variants // 2], arguments, draws[:, first : first + 2]))
    return turns


def randaugment(
    images: Tensor, magnitude: float, seed: int, step: int, places: np.ndarray, strength: float = 1.0,
    operations: OperationSet = TIMM,
) -> Tensor:  # fmt: skip
    """Applies two random operations to each image, each with probability 0.5, as timm's ``rand-m9-mstd0.5-inc1``.

    ``images`` (B, 3, S, S) uint8 are the ``places`` of the global batch; returns a new tensor. ``strength`` scales the
    magnitude, or the probability of operations without one. Departures from timm: images with the same colour operation
    and sign share one magnitude and one call; geometric operations share one call, bilinear, on the crop.

    With BIG_VISION, both operations are applied, as big_vision's ``randaug(2, magnitude)``, and ``strength`` scales
    their probability: a low magnitude is not a small change. Departures from big_vision: moves are bilinear; lengths
    scale with the image; contrast blends with the mean grey, as Pillow's, not with a constant.
    """
    images, names = images.clone(memory_format=torch.channels_last), list(operations.arguments)
    for turn in draw_turns(magnitude, seed, step, places, strength, operations):
        # Sorted by variant, so that a group is a slice: one copy to the device, one gather, one scatter.
        group = np.where(turn.applied & (turn.variants < CUTTING), np.minimum(turn.variants, MOVING), -1)
        order = np.argsort(group, kind="stable")
        ends = np.searchsorted(group[order], np.arange(-1, MOVING + 1), side="right")
        rows = send(order, images.device)
        ordered = images[rows]
        for variant, (first, last) in enumerate(pairwise(ends[:-1])):
            if first < last:
                operation = COLOURS[names[variant // 2]]
                ordered[first:last] = operation(ordered[first:last], turn.arguments[variant])
        if (first := ends[-2]) < len(order):
            moving = turn.variants[order[first:]]
            matrices = [MOVES[names[variant // 2]](turn.arguments[variant]) for variant in moving]
            ordered[first:] = move(ordered[first:], np.array(matrices), operations.padding)
        images[rows] = ordered
        if "cutout" in names:
            images = fill_holes(images, send(turn.holes(images.shape[-1]), images.device), operations.padding)
    return images


def fill_holes(images: Tensor, holes: Tensor, padding: Sequence[float]) -> Tensor:
    """Cutout (DeVries and Taylor 2017): images (B, 3, S, S) with ``holes`` (B, 4) of the colour ``padding``, grey."""
    return torch.where(inside(holes, images.shape[-1])[:, None], int(padding[0]), images)


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
