"""Batch augmentation on the device: RandAugment or three-augment, normalisation, random erasing, mixup and cutmix.

Random numbers come from the host, with the key (seed, step) and the sample's place in the global batch. So a step
repeats bit for bit after a restart, several processes draw the same numbers as one, and nothing waits for the device.

Shape letters: B batch, S size.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from vitlocal.data import augment_graph, augment_groups
from vitlocal.data.augment_groups import OPERATION_SETS, inside
from vitlocal.data.random_keys import ERASE, MIX, generator, uniform
from vitlocal.data.transfer import send

NOISE = 1 << 21  # normal numbers for erased pixels, 8 MB on the device


class AugmentParams(NamedTuple):
    """The random values of one step for its part of the batch, on the device. None if the recipe does not use them."""

    boxes: Tensor | None = None  # (B, 4) int64: first and last + 1 row and column to erase; empty if none
    noise: Tensor | None = None  # (B,) int64: the start of a sample's pixels in the table of noise
    mix: Tensor | None = None  # (6,) float32: share of the pixels, share of the labels, and the pasted box as in boxes
    operations: Tensor | None = None  # (B, V) float32: RandAugment or three-augment, see augment_graph.py

    def part(self, chosen: Tensor) -> "AugmentParams":
        """The values of the samples ``chosen`` (n,) int64."""
        boxes, noise, operations = (
            None if values is None else values[chosen] for values in (self.boxes, self.noise, self.operations)
        )
        return AugmentParams(boxes, noise, self.mix, operations)


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
        randaugment: magnitude of RandAugment, 0 to 10 (big_vision: 30); 0: off.
        randaugment_ops: its set of operations, "timm" or "big_vision".
        three_augment: three-augment instead of RandAugment.
        mixup, cutmix: their alphas; 0: off.
        mixup_prob: probability that a batch is mixed.
        cutmix_prob: probability of cutmix if both are on.
        random_erasing: probability of random erasing, with pixel noise.
    """

    table: Tensor

    def __init__(
        self, *, randaugment: float = 0.0, randaugment_ops: str = "timm", three_augment: bool = False,
        mixup: float = 0.0, cutmix: float = 0.0, mixup_prob: float = 1.0, cutmix_prob: float = 0.5,
        random_erasing: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.randaugment, self.three_augment, self.random_erasing = randaugment, three_augment, random_erasing
        self.operation_set = OPERATION_SETS[randaugment_ops]
        self.mixup, self.cutmix, self.mixup_prob, self.cutmix_prob = mixup, cutmix, mixup_prob, cutmix_prob
        self.mixes = mixup > 0 or cutmix > 0
        self.normalize = Normalize()
        table = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)) if random_erasing else torch.empty(0)
        self.register_buffer("table", table, persistent=False)

    @property
    def in_forward(self) -> bool:
        """Whether :meth:`forward` does RandAugment and three-augment too. Otherwise :meth:`prepare` has done them.

        Steps on an accelerator have a constant number of operations (``augment_graph.py``). Steps on a CPU go by groups
        of images (``augment_groups.py``), which is less work.
        """
        return self.normalize.scale.device.type != "cpu"

    def draw(
        self, seed: int, step: int, places: np.ndarray, total: int, size: int, strength: float = 1.0,
        operations: float | None = None,
    ) -> AugmentParams:  # fmt: skip
        """The random values for :meth:`forward`, on this module's device, for ``places`` of a batch of ``total``.

        ``strength`` scales the probabilities of erasing and mixing. ``operations`` is the ``strength`` of
        :meth:`prepare` if :meth:`forward` is to do its work, see :attr:`in_forward`.
        """
        boxes, noise, mix, device = None, None, None, self.normalize.scale.device
        if self.random_erasing:
            box, part = erased_boxes(uniform((seed, step, ERASE), places, 6), self.random_erasing * strength, size)
            boxes, noise = send(box, device), send((part * (NOISE - 3 * size * size + 1)).astype(np.int64), device)
        if self.mixes:
            mix = send(self.mixture(generator((seed, step, MIX)), total, size, strength), device)
        values = None if operations is None else self._operations(seed, step, places, size, operations)
        return AugmentParams(boxes, noise, mix, values)

    def _operations(self, seed: int, step: int, places: np.ndarray, size: int, strength: float) -> Tensor | None:
        """The values of RandAugment or three-augment, also at strength 0: compiled steps stay the same."""
        if self.three_augment:
            values = augment_graph.draw_three_augment(strength, seed, step, places, size)
        elif self.randaugment:
            values = augment_graph.draw_randaugment(
                self.randaugment, seed, step, places, size, strength, self.operation_set
            )
        else:
            return None
        return send(values, self.normalize.scale.device)

    def _operate(self, images: Tensor, values: Tensor) -> Tensor:
        if self.three_augment:
            return augment_graph.three_augment(images, values)
        return augment_graph.randaugment(images, values, self.operation_set)

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

        ``strength`` scales the magnitude of RandAugment (of big_vision's: its probability), or the probability and the
        jitter of three-augment.
        """
        if self.in_forward:
            values = self._operations(seed, step, places, images.shape[-1], strength)
            return images if values is None else self._operate(images, values)
        if self.three_augment:
            return augment_groups.three_augment(images, strength, seed, step, places)
        if self.randaugment and strength:
            return augment_groups.randaugment(
                images, self.randaugment, seed, step, places, strength, self.operation_set
            )
        return images

    def forward(self, images: Tensor, drawn: AugmentParams) -> Tensor:
        """(B, 3, S, S) uint8 to float32, normalised, erased and mixed, channels-last."""
        pixels = self.normalize(images if drawn.operations is None else self._operate(images, drawn.operations))
        if drawn.boxes is not None and drawn.noise is not None:
            pixels = erase(pixels, drawn.boxes, drawn.noise, self.table)
        return pixels if drawn.mix is None else paste(pixels, drawn.mix)


def paste(pixels: Tensor, mix: Tensor) -> Tensor:
    """``pixels`` (B, 3, S, S) mixed with the batch in reverse order, by ``mix`` (see AugmentParams)."""
    mirrored = pixels.flip(0)
    blended = torch.lerp(mirrored, pixels, mix[0])
    return torch.where(inside(mix[2:], pixels.shape[-1]), mirrored, blended)


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
    return torch.where(inside(boxes, size)[:, None], filling, pixels)
