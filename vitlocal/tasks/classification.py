"""Image classification: cross-entropy with augmentation and mixing, and top-1 and top-5 accuracy.

Shape letters: B batch, C classes, S image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlocal.data.augment import Augment, AugmentParams, send
from vitlocal.data.batch import Batch, Source
from vitlocal.plan import Feed
from vitlocal.progress import Position

ROWS = {"even": 0, "odd": 1}  # evaluate.rows: the rows that are counted, by their remainder


class ClassificationLoss(nn.Module):
    """The loss of a batch of uint8 images: everything that a training step differentiates, in one graph."""

    def __init__(
        self,
        model: nn.Module,
        augment: Augment,
        label_smoothing: float = 0.0,
        precision: torch.dtype = torch.float32,
        outputs: frozenset[str] = frozenset(),
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


@torch.inference_mode()
def evaluate_accuracy(
    model: nn.Module,
    predict: Callable[[Tensor, bool], Tensor],
    source: Source,
    feed: Feed,
    device: torch.device,
    *,
    rows: str = "all",
    limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> Accuracy | None:
    """The accuracy over the whole split, each image once. None if ``stop``, called before each batch, returns true.

    ``predict`` gives the logits (B, C) of uint8 images, and knows whether the batch is a whole one. ``rows``: "all",
    "even" or "odd" rows are counted. ``limit``: number of batches at most. With several processes, each evaluates its
    share of every batch, and ``total`` sums over all of them.
    """
    training = model.training
    model.eval()
    try:
        sums = torch.zeros(3, len(source.classes), dtype=torch.int64, device=device)  # top-1, top-5, images
        with source.open(feed, Position()) as batches:
            for batch in islice(batches, limit):
                if stop():
                    return None
                if not len(batch):
                    continue
                logits = predict(batch.images, batch.total == feed.batch_size and len(batch) == len(batch.places))
                best = logits.float().topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
                right = best == batch.labels[:, None]
                counted = _counted(batch, rows)
                found = torch.stack([right[:, 0] * counted, right.any(dim=1) * counted, counted])
                sums.index_add_(1, batch.labels, found)
        counts = total(sums).cpu().numpy()  # device sync, once per pass
        top1, top5, count = counts.sum(axis=1).tolist()
        return Accuracy(100 * top1 / max(count, 1), 100 * top5 / max(count, 1), counts[[0, 2]].T)
    finally:
        model.train(training)


def _counted(batch: Batch, rows: str) -> Tensor:
    """1 for each image that is counted, 0 for the others: (B,) int64."""
    if rows == "all":
        return torch.ones_like(batch.labels)
    return send((batch.ids.cpu() % 2 == ROWS[rows]).long(), batch.labels.device)
