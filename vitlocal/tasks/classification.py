"""Image classification: cross-entropy with augmentation and mixing, and top-1 and top-5 accuracy.

Shape letters: B batch, C classes, S image size.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlocal.data.augment import Augment, AugmentParams


class ClassificationLoss(nn.Module):
    """The loss of a batch of uint8 images: everything that a training step differentiates, in one graph."""

    def __init__(
        self, model: nn.Module, augment: Augment, label_smoothing: float, precision: torch.dtype, outputs: Set[str]
    ):
        super().__init__()
        self.model: Any = model
        self.augment = augment
        self.label_smoothing, self.precision, self.outputs = label_smoothing, precision, outputs
        self.input_size: int | None = None  # px; larger images are resized to it

    def forward(
        self, images: Tensor, labels: Tensor, params: AugmentParams, noise: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The cross-entropies of all images, summed and multiplied by ``weight`` (0-D), and the further outputs.

        ``images`` (B, 3, S, S) uint8, ``labels`` (B,), ``noise`` (B, L, 2) for drop path. Further outputs are None
        unless they are in ``outputs``: "correct" (B,) bool, whether the highest logit is that of the image's own label
        (not of the label mixed into it); "attention_variance" (B,), see
        :meth:`VisionTransformer.forward_with_attention_variance`.
        """
        pixels = self.resize(self.augment(images, params))
        operands = (pixels,) if noise is None else (pixels, noise)
        variance = None
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            if "attention_variance" in self.outputs:
                logits, variance = self.model.forward_with_attention_variance(*operands)
            else:
                logits = self.model(*operands)
        logits = logits.float()
        correct = logits.detach().argmax(dim=1) == labels if "correct" in self.outputs else None
        loss = self._cross_entropy(logits, labels)
        if params.mix is not None:
            share = params.mix[1]
            loss = share * loss + (1 - share) * self._cross_entropy(logits, labels.flip(0))
        return weight * loss, correct, variance

    def resize(self, pixels: Tensor) -> Tensor:
        """Resizes images (B, 3, S, S) to the input size, if that is smaller (bilinear, antialiased)."""
        size = self.input_size
        if size is None or size >= pixels.shape[-1]:
            return pixels
        return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy in percent of the counted images."""

    top1: float
    top5: float
    by_class: np.ndarray  # (C, 2) int64: correct images and all images of each class
