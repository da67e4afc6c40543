"""Measures a pass: its loss, images, seconds, and the time that it waits for data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vitlocal.data.batch import Batch
from vitlocal.errors import DataError
from vitlocal.train.budget import RunTimer
from vitlocal.train.distributed import ALONE, Ranks
from vitlocal.train.state import PassTotals


class PassMeter:
    """Adds up a pass in ``totals``. The loss is summed on the device and read only in :meth:`read`."""

    def __init__(self, timer: RunTimer, device: torch.device, ranks: Ranks = ALONE):
        self.totals = PassTotals()
        self._timer, self._ranks = timer, ranks
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._since: float | None = None  # training seconds when the pass was opened

    def begin(self, totals: PassTotals) -> None:
        """Measures the open pass, whose sums so far are ``totals``."""
        self._since = self._timer.train_seconds
        if totals is not self.totals:  # of a new pass, or from a checkpoint
            self.totals = totals
            self._loss_sum.fill_(totals.loss if self._ranks.first else 0.0)  # each process adds its own part from here

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches, and adds up the time spent waiting for them."""
        while True:
            before = self._timer.train_now()
            batch = next(batches, None)
            self.totals.wait_seconds += self._timer.train_now() - before
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, images: int, macs: int) -> None:
        """Adds a step: its mean loss (0-D, on the device), images of the global batch, and their multiply-adds."""
        self._loss_sum += loss.double() * images
        self.totals.images += images
        self.totals.macs += macs

    @property
    def images_per_second(self) -> float:
        return self.totals.images / max(self._seconds(), 1e-9)

    def read(self, step: int) -> None:
        """Brings ``totals`` up to date. Waits for the device. DataError if the loss is not finite."""
        self.totals.loss = check_loss(float(self._ranks.total(self._loss_sum)), step)
        self._loss_sum.fill_(self.totals.loss if self._ranks.first else 0.0)
        self.totals.seconds = self._seconds()
        self._since = None if self._since is None else self._timer.train_seconds

    def end(self) -> None:
        """Stops measuring time until the next :meth:`begin`."""
        self.totals.seconds = self._seconds()
        self._since = None

    def _seconds(self) -> float:
        open_for = 0.0 if self._since is None else self._timer.train_seconds - self._since
        return self.totals.seconds + open_for


def check_loss(loss: float, step: int) -> float:
    """``loss``, unless it is infinite or NaN, which raises DataError."""
    if loss - loss != 0:
        raise DataError(
            f"the loss is {loss} at step {step}: training has diverged. Lower train.lr, lengthen train.warmup or set "
            "train.clip_norm=1. The run's folder keeps the last checkpoint before this"
        )
    return loss
