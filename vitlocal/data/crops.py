"""Where crops are cut and in which order images come. All sources use the same rules.

``native/crops.c`` computes the boxes. A *draw* is a row of the split and, above bit 40, the number of its repeat in the
epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vitlocal.data.random_keys import generator, other_seed

if TYPE_CHECKING:
    from PIL import Image

REPEAT_SHIFT = 40
ROW_MASK = (1 << REPEAT_SHIFT) - 1


@dataclass(frozen=True)
class CropPolicy:
    """Random resized crops, for training, or centre crops, for evaluation.

    Their order is random if ``shuffle`` says so; None: that of random crops is, that of centre crops is not.
    """

    random: bool
    seed: int = 0
    scale: tuple[float, float] = (0.08, 1.0)  # area of the box, as a fraction of the image
    ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height of the box
    flip: float = 0.5  # probability
    repeats: int = 1  # how often a row follows itself in an epoch
    centre: float = 0.875  # timm's crop_pct: size of the centre crop, as a fraction of the resized short edge
    shuffle: bool | None = None
    variant: int = 0  # other boxes and flips in the same order: after a run has gone back to a checkpoint
    box_epochs: int = 0  # boxes and flips repeat after so many epochs; 0: never

    @property
    def box_seed(self) -> int:
        """The seed of boxes and flips."""
        return other_seed(self.seed, self.variant)

    def box_epoch(self, epoch: int) -> int:
        """The epoch whose boxes and flips are those of ``epoch``."""
        return epoch % self.box_epochs if self.box_epochs else epoch

    @property
    def shuffles(self) -> bool:
        return self.random if self.shuffle is None else self.shuffle

    def draws(self, count: int, epoch: int, start: int = 0, rows: np.ndarray | None = None) -> np.ndarray:
        """The draws of an epoch over ``count`` rows, in order, from place ``start``: (n,) int64.

        A random order is a permutation with the key (seed, epoch). With ``repeats`` = r, each row comes r times in a
        row and the epoch still has ``count`` draws, so it shows about count / r different images (repeated
        augmentation, Hoffer et al. 2020). With ``rows`` (m,) int64, the epoch has these rows only.
        """
        if rows is not None:
            places = self.draws(len(rows), epoch, start)
            return rows[places & ROW_MASK] | (places & ~ROW_MASK)
        if self.shuffles:
            order = generator((self.seed, epoch, 0x0DE2)).permutation(count)
        else:
            order = np.arange(count, dtype=np.int64)
        if self.repeats > 1:
            repeats = np.arange(self.repeats, dtype=np.int64) << REPEAT_SHIFT
            order = (order[: -(-count // self.repeats), None] | repeats).reshape(-1)[:count]
        return order[start:]


@dataclass(frozen=True)
class Box:
    """A part of an image, in pixels, not rounded."""

    top: float
    left: float
    height: float
    width: float
    flipped: bool = False
    reach: float = 0.0  # pixels around the box that the filter reads too

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The whole pixels of an image that it reaches, at least one: top, left, bottom and right."""
        top, left = max(math.floor(self.top - self.reach), 0), max(math.floor(self.left - self.reach), 0)
        bottom = max(min(math.ceil(self.top + self.height + self.reach), height), top + 1)
        return top, left, bottom, max(min(math.ceil(self.left + self.width + self.reach), width), left + 1)


def centre_squares(image: Image.Image, sides: Sequence[int]) -> list[np.ndarray]:
    """The central square of an RGB image at each of ``sides`` px: arrays (S, S, 3) uint8.

    The short edge becomes S as in ADM (Dhariwal and Nichol 2021), whose crops DiT was trained on. The image is halved
    by the mean of 2 x 2 pixels while its short edge is at least 2 S, and the rest is bicubic with antialiasing. Smaller
    images are enlarged. Of panoramas above 32:1, which could take gigabytes, only the middle is resized.
    """
    from PIL import Image

    width, height = (min(edge, 32 * min(image.size)) for edge in image.size)
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    squares = {}
    for side in sorted(sides, reverse=True):  # a smaller side continues from the halved image of a larger one
        while min(image.size) >= 2 * side:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = side / min(image.size)
        width, height = round(scale * image.width), round(scale * image.height)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        top, left = (height - side) // 2, (width - side) // 2
        squares[side] = pixels[top : top + side, left : left + side]
    return [squares[side] for side in sides]


def cut(image: Image.Image, box: Box, size: int) -> Image.Image:
    """The box of an RGB image, resized by Pillow to ``size`` x ``size`` px: bilinear, with antialiasing."""
    from PIL import Image  # the native loader imports this module and needs no Pillow

    top, left, bottom, right = box.pixels(image.height, image.width)
    part = image.crop((left, top, right, bottom))
    x, y = box.left - left, box.top - top
    inside = x, y, min(x + box.width, part.width), min(y + box.height, part.height)
    part = part.resize((size, size), Image.Resampling.BILINEAR, box=inside)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if box.flipped else part
