"""Where crops are cut: one function for every source, keyed by what is cropped and not by who asks when.

A crop is drawn from a counter-based generator (SplitMix64, Steele et al. 2014) keyed by (seed, epoch, draw), in
coordinates relative to the image. So it is the same part of the photo in every stored size of it, for any number
of workers, and after a restart. A *draw* is a row's id and, above bit 40, which of its repeats in the epoch it is.
"""

from __future__ import annotations

import numba
import numpy as np

REPEAT_SHIFT = 40
ROW_MASK = (1 << REPEAT_SHIFT) - 1
ATTEMPTS = 10  # as torchvision's RandomResizedCrop, before it falls back to a centre crop

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_jit = numba.njit(nogil=True, error_model="numpy")


@_jit
def _scramble(word):
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@_jit
def crop_key(seed, epoch, draw):
    """The generator's key (uint64) for one presentation of one image; all three are non-negative integers."""
    key = _scramble(np.uint64(seed) + _GOLDEN)
    key = _scramble((key ^ np.uint64(epoch)) + _GOLDEN)
    return _scramble((key ^ np.uint64(draw)) + _GOLDEN)


@_jit
def _uniform(key, counter):
    bits = _scramble(key + np.uint64(counter + 1) * _GOLDEN)
    return np.float64(bits >> np.uint64(11)) * 2.0**-53  # in [0, 1)


@_jit
def random_box(seed, epoch, draw, height, width, scale_low, scale_high, ratio_low, ratio_high, flip_chance):
    """The pixels of a random resized crop: (top, left, rows, columns, flipped).

    As torchvision's RandomResizedCrop: an area in [scale_low, scale_high] of the image's, a ratio of width to
    height log-uniform in [ratio_low, ratio_high], ten attempts, then the largest centre crop of a legal ratio.
    """
    key = crop_key(seed, epoch, draw)  # a uint64 past 2**63 would not come back from Python
    shape = width / height
    flipped = _uniform(key, 0) < flip_chance
    for attempt in range(ATTEMPTS):
        area = scale_low + (scale_high - scale_low) * _uniform(key, 4 * attempt + 1)
        log_ratio = np.log(ratio_low) + (np.log(ratio_high) - np.log(ratio_low)) * _uniform(key, 4 * attempt + 2)
        ratio = np.exp(log_ratio)
        part_w, part_h = np.sqrt(area * ratio / shape), np.sqrt(area / ratio * shape)
        if part_w <= 1 and part_h <= 1:
            left = _uniform(key, 4 * attempt + 3) * (1 - part_w)
            top = _uniform(key, 4 * attempt + 4) * (1 - part_h)
            return (*pixel_box(height, width, top, left, part_h, part_w), flipped)
    part_w = min(1.0, ratio_high / shape)
    part_h = min(1.0, shape / ratio_low)
    return (*pixel_box(height, width, (1 - part_h) / 2, (1 - part_w) / 2, part_h, part_w), flipped)


@_jit
def pixel_box(height, width, top, left, part_h, part_w):
    """Rounds a relative box to pixels inside an image of height × width: (top, left, rows, columns)."""
    rows = max(1, min(height, int(np.rint(part_h * height))))
    columns = max(1, min(width, int(np.rint(part_w * width))))
    return (
        min(int(np.rint(top * height)), height - rows),
        min(int(np.rint(left * width)), width - columns),
        rows,
        columns,
    )


@_jit
def centre_box(height, width, part):
    """The central square whose side is ``part`` of the short edge: (top, left, rows, columns)."""
    side = max(1, int(np.rint(part * min(height, width))))
    return (height - side) // 2, (width - side) // 2, side, side


def epoch_order(count: int, seed: int, epoch: int, repeats: int = 1) -> np.ndarray:
    """The draws of an epoch, ``(count,)`` int64: a permutation of the rows keyed by (seed, epoch).

    With ``repeats`` of r each row follows itself r times and the epoch still has ``count`` draws, so it shows
    about count / r different images (repeated augmentation, Hoffer et al. 2020, as the paper's code samples).
    """
    rows = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, 0x0DE2)))).permutation(count)
    if repeats == 1:
        return rows
    rows = rows[: -(-count // repeats)]
    draws = rows[:, None] | (np.arange(repeats, dtype=np.int64)[None, :] << REPEAT_SHIFT)
    return draws.reshape(-1)[:count]
