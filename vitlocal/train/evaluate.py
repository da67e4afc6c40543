"""Accuracy on the validation split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vitlocal.data.source import Source
from vitlocal.plan import Feed, Position
from vitlocal.train.step import Step


@dataclass(frozen=True)
class Accuracy:
    """In percent of all images of the split."""

    top1: float
    top5: float


@torch.inference_mode()
def evaluate(
    model: nn.Module, source: Source, feed: Feed, step: Step, stop: Callable[[], bool] = lambda: False
) -> Accuracy | None:
    """Runs the model over the whole split, each image once, in the step's precision and normalisation.

    Several processes take their shares of each batch, and all get the accuracy over all images.

    None where ``stop``, asked before each batch, said so.
    """
    training = model.training
    model.eval()
    try:
        hits = torch.zeros(2, dtype=torch.int64, device=step.device)
        count = 0
        logits_of = step.forward_of(model)
        with source.open(feed, Position()) as batches:
            for batch in batches:
                if stop():
                    return None
                if not len(batch):
                    continue
                logits = logits_of(batch.images, batch.total == feed.batch_size and len(batch) == len(batch.places))
                best = logits.float().topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
                right = best == batch.labels[:, None]
                hits += torch.stack([right[:, 0].sum(), right.sum()])
                count += len(batch)
        sums = step.ranks.total(torch.cat([hits, torch.tensor([count], device=step.device)]))
        top1, top5, count = sums.tolist()  # device sync, once a pass
        return Accuracy(100 * top1 / count, 100 * top5 / count)
    finally:
        model.train(training)
