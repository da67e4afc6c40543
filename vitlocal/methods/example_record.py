"""Records the results of each training example, on the device. (Reading a configuration must not import PyTorch.)"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

WRONG, RIGHT = 1, 2  # in a record; 0: not seen


def forgetting(record: np.ndarray) -> np.ndarray:
    """The number of times that each example was forgotten, (n,) int64, from its results (E, n): WRONG or RIGHT.

    Counts right followed by wrong. An example that was never right counts E, and an example that was not seen -1.
    """
    epochs, count = record.shape
    times, before = np.zeros(count, np.int64), np.zeros(count, record.dtype)
    for seen in record:
        times += (before == RIGHT) & (seen == WRONG)
        before = np.where(seen > 0, seen, before)
    times[~(record == RIGHT).any(axis=0)] = epochs
    times[~(record > 0).any(axis=0)] = -1
    return times


class ExampleRecord:
    """The correctness of ``count`` examples in each epoch, and their summed attention variance.

    Each process notes its own examples. Notes never wait for the device.
    """

    def __init__(self, count: int):
        self._count = count
        self._epochs: dict[int, Tensor] = {}  # by epoch: (n,) uint8
        self._variance: Tensor | None = None  # (n,) float64, summed over epochs

    def note(self, epoch: int, ids: Tensor, correct: Tensor, variance: Tensor | None) -> None:
        """Records a step: ``ids`` (B,) int64, ``correct`` (B,) bool and, if measured, ``variance`` (B,)."""
        device = correct.device
        if epoch not in self._epochs:
            self._epochs[epoch] = torch.zeros(self._count, dtype=torch.uint8, device=device)
        if next(iter(self._epochs.values())).device != device:  # from a checkpoint
            self._epochs = {each: record.to(device) for each, record in self._epochs.items()}
        ids = ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids
        self._epochs[epoch].index_copy_(0, ids, correct.to(torch.uint8) + WRONG)
        if variance is not None:
            if self._variance is None:
                self._variance = torch.zeros(self._count, dtype=torch.float64, device=device)
            self._variance = self._variance.to(device).index_add_(0, ids, variance.double())

    def tensors(self) -> dict[str, Tensor]:
        """The notes of this process: ``records`` (E, n) uint8, and ``attention_variance`` (n,) if it is measured."""
        if not self._epochs:
            return {}
        records = torch.stack([record for _, record in sorted(self._epochs.items())])
        return {"records": records} | ({} if self._variance is None else {"attention_variance": self._variance})

    def state_dict(self) -> dict[str, Any]:
        """The kind of notes that there are, which is the same on every process."""
        return {"epochs": sorted(self._epochs), "attention_variance": self._variance is not None}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor] | None) -> None:
        """Restores :meth:`state_dict`, with the notes ``tensors``, or without notes."""
        rows = tensors["records"] if tensors else torch.zeros(len(state["epochs"]), self._count, dtype=torch.uint8)
        self._epochs = {epoch: row.to(torch.uint8, copy=True) for epoch, row in zip(state["epochs"], rows, strict=True)}
        self._variance = torch.zeros(self._count, dtype=torch.float64) if state["attention_variance"] else None
        if self._variance is not None and tensors:
            self._variance.copy_(tensors["attention_variance"])
