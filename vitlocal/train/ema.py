"""An exponential moving average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from vitlocal.config import TrainConfig
from vitlocal.progress import Length, Progress


class ModelEma:
    """Keeps ``model``, a copy of the trained model whose weights follow it: w ← decay · w + (1 - decay) · new.

    ``decay`` is stated a step, or as the ``length`` of training in which the average forgets, to 1/e.
    """

    def __init__(self, trained: nn.Module, decay: float | None, length: Length | None = None):
        self.decay, self.length = decay, length
        self.model = copy.deepcopy(trained).eval().requires_grad_(False)

    def decay_between(self, before: Progress, after: Progress) -> float:
        """The decay of a step that led from ``before`` to ``after``."""
        if self.decay is not None:
            return self.decay
        assert self.length is not None
        return math.exp(-max(0.0, self.length.elapsed(after) - self.length.elapsed(before)) / self.length.value)

    @torch.no_grad()
    def update(self, trained: nn.Module, decay: float) -> None:
        mine, new = list(self.model.parameters()), [p.detach() for p in trained.parameters()]
        torch._foreach_lerp_(mine, new, 1 - decay)
        for kept, buffer in zip(self.model.buffers(), trained.buffers(), strict=True):
            kept.copy_(buffer)


def build_ema(trained: nn.Module, config: TrainConfig) -> ModelEma | None:
    """The average that the recipe wants, if any."""
    if config.ema_decay is None and config.ema_length is None:
        return None
    return ModelEma(trained, config.ema_decay, config.ema_length)
