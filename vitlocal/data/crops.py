"""Where crops are cut and in which order images come. All sources use the same rules.

A random crop comes from a counter-based generator (SplitMix64, Steele et al. 2014) with the key (seed, epoch, draw), in
coordinates relative to the image. So it is the same part of the photo in every stored size, for any number of workers,
and after a restart. A *draw* is a row of the split and, above bit 40, the number of its repeat in the epoch.

``native/crops.c`` computes the same boxes in C, bit for bit. The sources that read original images use this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

REPEAT_SHIFT = 40
ROW_MASK = (1 << REPEAT_SHIFT) - 1
ATTEMPTS = 10  # before the fallback to a centre crop, as in torchvision's RandomResizedCrop

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class CropPolicy:
    """Random resized crops in random order, for training, or centre crops in order, for evaluation."""

    random: bool
    seed: int = 0
    scale: tuple[float, float] = (0.08, 1.0)  # area of the box, as a fraction of the image
    ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height of the box
    flip: float = 0.5  # probability
    repeats: int = 1  # how often a row follows itself in an epoch
    centre: float = 0.875  # side of the centre crop, as a fraction of the short edge

    def draws(self, count: int, epoch: int, start: int = 0, rows: np.ndarray | None = None) -> np.ndarray:
        """The draws of an epoch over ``count`` rows, in order, from place ``start``: (n,) int64.

        With ``rows`` (m,) int64, the epoch has these rows only.
        """
        if rows is not None:
            places = self.draws(len(rows), epoch, start)
            return rows[places & ROW_MASK] | (places & ~ROW_MASK)
        if self.random:
            return epoch_order(count, self.seed, epoch, self.repeats)[start:].astype(np.int64)
        return np.arange(start, count, dtype=np.int64)

    def box(self, epoch: int, draw: int, height: int, width: int) -> Box:
        """The box that is cut from an image of ``height`` x ``width`` px."""
        if self.random:
            return random_box(self.seed, epoch, draw, height, width, self.scale, self.ratio, self.flip)
        return centre_box(height, width, self.centre)


@dataclass(frozen=True)
class Box:
    """A part of an image, in pixels, not rounded."""

    top: float
    left: float
    height: float
    width: float
    flipped: bool = False


def _scramble(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


def crop_key(seed: int, epoch: int, draw: int) -> int:
    """The generator's key (64 bits) for one draw. All arguments are non-negative integers."""
    key = _scramble((seed + _GOLDEN) & _WORD)
    key = _scramble(((key ^ epoch) + _GOLDEN) & _WORD)
    return _scramble(((key ^ draw) + _GOLDEN) & _WORD)


def _uniform(key: int, counter: int) -> float:
    return (_scramble((key + (counter + 1) * _GOLDEN) & _WORD) >> 11) * 2.0**-53  # in [0, 1)


def random_box(
    seed: int, epoch: int, draw: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float],
    flip: float,
) -> Box:  # fmt: skip
    """A random resized crop of an image of ``height`` x ``width`` px, as in torchvision's RandomResizedCrop.

    The area is uniform in ``scale``, the ratio of width to height log-uniform in ``ratio``. After ten failed attempts
    the box is the largest centre crop of a legal ratio. Unlike torchvision's, the box is not rounded to whole pixels,
    because that would select another part of the photo in each stored size.
    """
    key = crop_key(seed, epoch, draw)
    shape = width / height
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    flipped = _uniform(key, 0) < flip
    for attempt in range(ATTEMPTS):
        area = scale[0] + (scale[1] - scale[0]) * _uniform(key, 4 * attempt + 1)
        wide = math.exp(log_low + (log_high - log_low) * _uniform(key, 4 * attempt + 2))
        part_w, part_h = math.sqrt(area * wide / shape), math.sqrt(area / wide * shape)
        if part_w <= 1 and part_h <= 1:
            left = _uniform(key, 4 * attempt + 3) * (1 - part_w)
            top = _uniform(key, 4 * attempt + 4) * (1 - part_h)
            return Box(top * height, left * width, part_h * height, part_w * width, flipped)
    tall, across = min(1.0, shape / ratio[0]) * height, min(1.0, ratio[1] / shape) * width
    return Box((height - tall) / 2, (width - across) / 2, tall, across, flipped)


def replacement(seed: int, epoch: int, draw: int, attempt: int, count: int) -> int:
    """The row of ``count`` that replaces a draw whose image does not decode."""
    return _scramble((crop_key(seed, epoch, draw) + (1 << 32) + attempt) & _WORD) % count


def centre_box(height: int, width: int, part: float) -> Box:
    """The central square with a side of ``part`` x the short edge."""
    side = part * min(height, width)
    return Box((height - side) / 2, (width - side) / 2, side, side)


def cut(image: Image.Image, box: Box, size: int) -> Image.Image:
    """The box of an RGB image, resized by Pillow to ``size`` x ``size`` px: bilinear, with antialiasing."""
    from PIL import Image  # the native loader imports this module and needs no Pillow

    left, top = math.floor(box.left), math.floor(box.top)
    right = max(min(math.ceil(box.left + box.width), image.width), left + 1)
    bottom = max(min(math.ceil(box.top + box.height), image.height), top + 1)
    part = image.crop((left, top, right, bottom))
    x, y = box.left - left, box.top - top
    inside = x, y, min(x + box.width, part.width), min(y + box.height, part.height)
    part = part.resize((size, size), Image.Resampling.BILINEAR, box=inside)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if box.flipped else part


def epoch_order(count: int, seed: int, epoch: int, repeats: int = 1) -> np.ndarray:
    """The draws of an epoch, (count,) int64: a permutation of the rows with the key (seed, epoch).

    With ``repeats`` = r, each row comes r times in a row and the epoch still has ``count`` draws, so it shows about
    count / r different images (repeated augmentation, Hoffer et al. 2020).
    """
    rows = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, 0x0DE2)))).permutation(count)
    if repeats == 1:
        return rows
    rows = rows[: -(-count // repeats)]
    draws = rows[:, None] | (np.arange(repeats, dtype=np.int64)[None, :] << REPEAT_SHIFT)
    return draws.reshape(-1)[:count]
