"""Multiply-adds of the model in each shape."""

from __future__ import annotations

import copy

from torch import nn

from vitlocal.models.counts import count_macs
from vitlocal.models.shape import set_shape
from vitlocal.plan import WHOLE_MODEL, Shape


class MacCounter:
    """Counts the multiply-adds of a forward pass of one image, for any image size and shape; each is counted once."""

    def __init__(self, model: nn.Module):
        self._model = copy.deepcopy(model).to("meta")  # without data, so that the model itself keeps its shape
        self._counts: dict[tuple[int, Shape], int] = {}

    def __call__(self, size: int, shape: Shape = WHOLE_MODEL) -> int:
        """Multiply-adds at ``size`` px in ``shape``."""
        if (size, shape) not in self._counts:
            set_shape(self._model, shape)
            self._counts[size, shape] = count_macs(self._model, shape.input_size or size)
        return self._counts[size, shape]
