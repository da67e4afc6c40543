"""An exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """Keeps ``model``, a copy of the trained model whose weights follow it: w ← decay · w + (1 - decay) · new."""

    def __init__(self, trained: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(trained).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, trained: nn.Module) -> None:
        mine, new = list(self.model.parameters()), [p.detach() for p in trained.parameters()]
        torch._foreach_lerp_(mine, new, 1 - self.decay)
        for kept, buffer in zip(self.model.buffers(), trained.buffers(), strict=True):
            kept.copy_(buffer)
