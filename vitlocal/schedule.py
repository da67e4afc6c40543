"""The schedule of the learning rate: plain arithmetic, without PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vitlocal.progress import Length, Progress

LEAST_WARMUP = 1e-3  # fraction of the peak at which the warm-up starts


def scaled_lr(lr: float, batch_size: int, lr_batch: int) -> float:
    """``lr`` scaled from batches of ``lr_batch`` to ``batch_size`` images, linearly; 0 turns the scaling off."""
    return lr * (batch_size / lr_batch if lr_batch else 1.0)


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate of a step: ``LRSchedule("cosine", 1e-3, 1e-5, Length.parse("5%"))(progress)``.

    The rate falls from ``peak`` to ``end`` over ``length`` (None: over the budget). Over ``warmup``, it is multiplied
    by a factor that rises to 1. With ``by="epoch"`` it changes once per epoch, as timm's scheduler does in the code of
    arXiv 2211.05187. The progress is that at the end of the step.
    """

    name: str  # "cosine", "linear" or "constant"
    peak: float
    end: float
    warmup: Length
    length: Length | None = None
    by: str = "step"  # or "epoch"

    @property
    def final(self) -> float:
        """The rate at the end of ``length``: ``end``, but never above the peak."""
        return min(self.end, self.peak)

    def __call__(self, progress: Progress) -> float:
        if self.by == "epoch":
            # timm's scheduler moves after an epoch, to the value for that epoch's number.
            # A step that ends with an epoch still belongs to that epoch.
            progress = replace(progress, epoch=max(0.0, math.ceil(progress.epoch - 1e-9) - 2.0))
        done = progress.fraction if self.length is None else min(1.0, self.length.fraction_done(progress))
        left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[self.name]
        rate = self.final + (self.peak - self.final) * left
        if self.warmup.value:
            rate *= min(1.0, max(self.warmup.fraction_done(progress), LEAST_WARMUP))
        return rate
