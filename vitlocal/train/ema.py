"""An exponential moving average of the weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from vitlocal.progress import Length, Progress


class ModelEma:
    """A copy of a model whose weights follow it: w <- decay * w + (1 - decay) * new.

    The ``decay`` is a constant per step, or None if it follows from ``length``: the training after which the average
    has forgotten all but 1/e of a weight.
    """

    def __init__(self, trained: nn.Module, decay: float | None = None, length: Length | None = None):
        self.decay: Any = decay
        self._length = length
        self.model = copy.deepcopy(trained).eval().requires_grad_(False)

    def decay_between(self, before: Progress, after: Progress) -> float:
        """The decay of a step that leads from ``before`` to ``after``."""
        if self._length is None:
            return self.decay
        elapsed = self._length.elapsed(after) - self._length.elapsed(before)
        return math.exp(-max(0.0, elapsed) / self._length.value)

    @torch.no_grad()
    def update(self, trained: nn.Module, decay: float) -> None:
        """Moves the average towards ``trained``; buffers are copied."""
        averages: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averages, list(trained.parameters()), 1 - decay)
        for mine, buffer in zip(self.model.buffers(), trained.buffers(), strict=True):
            mine.copy_(buffer)
