"""Accuracy on the validation split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from vitlocal.data.augment import send
from vitlocal.data.batch import Batch, Source
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.train.step import Step

PARTS = {"even": 0, "odd": 1}  # evaluate.rows: which rows count


@dataclass(frozen=True)
class Accuracy:
    """In percent of all images that were counted."""

    top1: float
    top5: float
    by_class: np.ndarray  # (C, 2) int64: images whose class came first, and images, of each class


@torch.inference_mode()
def evaluate(
    model: nn.Module, source: Source, feed: Feed, step: Step, stop: Callable[[], bool] = lambda: False,
    part: str = "all", limit: int | None = None,
) -> Accuracy | None:  # fmt: skip
    """Runs the model over the whole split, each image once, in the step's precision and normalisation.

    Several processes take their shares of each batch, and all get the accuracy over all images. ``part``: see
    ``evaluate.rows``; ``limit``: no more batches than this. None where ``stop``, asked before each batch, said so.
    """
    training = model.training
    model.eval()
    try:
        sums = torch.zeros(3, len(source.classes), dtype=torch.int64, device=step.device)  # top-1, top-5, images
        logits_of = step.forward_of(model)
        with source.open(feed, Position()) as batches:
            for batch in islice(batches, limit):
                if stop():
                    return None
                if not len(batch):
                    continue
                logits = logits_of(batch.images, batch.total == feed.batch_size and len(batch) == len(batch.places))
                best = logits.float().topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
                right = best == batch.labels[:, None]
                counted = _counted(batch, part)
                found = torch.stack([right[:, 0] * counted, right.any(dim=1) * counted, counted])
                sums.index_add_(1, batch.labels, found)
        sums = step.ranks.total(sums).cpu().numpy()  # device sync, once a pass
        top1, top5, count = sums.sum(axis=1).tolist()
        return Accuracy(100 * top1 / max(count, 1), 100 * top5 / max(count, 1), sums[[0, 2]].T)
    finally:
        model.train(training)


def _counted(batch: Batch, part: str) -> Tensor:
    """1 for each image that counts, 0 for the others: (B,) int64."""
    if part == "all":
        return torch.ones_like(batch.labels)
    return send((batch.ids.cpu() % 2 == PARTS[part]).long(), batch.labels.device)
