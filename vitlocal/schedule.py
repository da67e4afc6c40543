"""The learning-rate schedule."""

import math
from dataclasses import dataclass, replace

from vitlocal.progress import Length, Progress


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate of a step, from the progress at its end: a warm-up, then a decay from ``peak`` to ``end``.

    ``kind``: "cosine", "linear" or "constant". ``length``: the length of the schedule; None: the budget. ``by``:
    "step", or "epoch" for a rate that changes after each epoch only.
    """

    kind: str
    peak: float
    end: float = 0.0
    warmup: Length | None = None  # linear, from zero
    length: Length | None = None
    by: str = "step"

    def __call__(self, progress: Progress) -> float:
        if self.by == "epoch":
            # timm's scheduler, as the paper's code calls it: it changes the rate after an epoch and passes that epoch's
            # number. A step that ends with an epoch still belongs to it.
            progress = replace(progress, epoch=max(0.0, math.ceil(progress.epoch - 1e-9) - 2.0))
        part = progress.fraction if self.length is None else min(1.0, self.length.fraction_done(progress))
        left = {"cosine": (1 + math.cos(math.pi * part)) / 2, "linear": 1 - part, "constant": 1.0}[self.kind]
        end = min(self.end, self.peak)
        rate = end + (self.peak - end) * left
        if self.warmup is not None and self.warmup.value:
            rate *= min(1.0, max(self.warmup.fraction_done(progress), 1e-3))
        return rate
