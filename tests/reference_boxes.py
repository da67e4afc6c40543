"""Random resized crops in Python, with which tests compare those of the native code."""

from __future__ import annotations

import math

from vitlocal.data.crops import Box

ATTEMPTS = 10  # before the fallback to a centre crop, as in torchvision's RandomResizedCrop

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


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
