"""Batches, and the sources that deliver them.

Shape letters: B batch, S size (the side of a crop, px).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from vitlocal.data.crops import CropPolicy
from vitlocal.data.fields import LatentForm
from vitlocal.data.shares import WHOLE, BatchSlice, Share
from vitlocal.data.soft_labels import SoftLabels, SoftTargets
from vitlocal.errors import ConfigError
from vitlocal.plan import Feed
from vitlocal.progress import Position


@dataclass(frozen=True)
class Batch:
    """This process's part of one global batch, on the device. On a CPU, the pixels are valid until the next batch.

    With several processes, the last batch of an epoch may leave nothing for some of them.
    """

    images: torch.Tensor  # (B, 3, S, S) uint8, RGB, channels-last; latents: (B, 2C, h, w) float16, mean and std
    labels: torch.Tensor  # (B,) int64
    ids: torch.Tensor  # (B,) int64, rows of the split, on the CPU
    places: np.ndarray  # (B,) int64, in the global batch (longer than B if damaged images are left out)
    total: int  # images of the global batch
    soft: SoftTargets | None = None  # on the device

    @classmethod
    def whole(cls, images: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor) -> Batch:
        """A batch of a single process."""
        return cls(images, labels, ids, np.arange(len(ids)), len(ids))

    @classmethod
    def empty(cls, size: int, device: torch.device, total: int) -> Batch:
        """The part of a process that gets no image of a batch."""
        images = torch.empty((0, 3, size, size), dtype=torch.uint8, device=device)
        none = torch.empty(0, dtype=torch.int64)
        return cls(images, none.to(device), none, none.numpy(), total)

    def __len__(self) -> int:
        return len(self.ids)


class RowSubsets:
    """The subsets of a split's ``all_rows`` rows that feeds select by a number; 0 selects all rows."""

    def __init__(self, all_rows: int):
        self.all_rows = all_rows
        self._rows: dict[int, np.ndarray] = {}

    def set(self, number: int, rows: np.ndarray) -> None:
        """From now on ``number`` selects ``rows`` (m,) int64. Earlier numbers are forgotten."""
        if number not in self._rows:
            self._rows = {number: rows}

    def get(self, number: int) -> np.ndarray | None:
        """The rows of subset ``number``, (m,) int64; None for all rows."""
        return self._rows[number] if number else None

    def count(self, number: int) -> int:
        return len(self._rows[number]) if number else self.all_rows


class Source:
    """A split of a data set, read one pass at a time. A kind of source adds ``_read``.

    ``side`` is the longest edge that images were stored with, px; None for original images. ``damaged`` has the rows
    that were skipped so far, with data.on_error=skip. ``latents`` describes the latents that it delivers in place of
    photos; None: photos.
    """

    latents: LatentForm | None = None

    def __init__(
        self, classes: tuple[str, ...], count: int, side: int | None, crops: CropPolicy, device: torch.device,
        share: Share = WHOLE,
    ):  # fmt: skip
        self.classes, self.count, self.side = classes, count, side
        self.crops, self.device, self.share = crops, device, share
        self.damaged: Collection[int] = ()
        self.soft_labels: SoftLabels | None = None
        self.rows = RowSubsets(count)

    @contextmanager
    def open(
        self, feed: Feed, at: Position, share: Share | None = None, drop_last: bool = False
    ) -> Iterator[Iterator[Batch]]:
        """One pass: from ``at`` to the end of its epoch, in the epoch's order, over the rows of ``feed.subset``.

        ``share`` replaces the source's own. ``drop_last`` leaves out a last batch that is not full. Leaving the context
        early discards what was read ahead. Errors of the readers are raised in the consumer.
        """
        subset = self.rows.get(feed.subset)
        draws = self.crops.draws(self.count, at.epoch, at.images, subset)
        if drop_last:
            draws = draws[: len(draws) // feed.batch_size * feed.batch_size]
        slices = (share or self.share).slices(draws, feed.batch_size)
        with closing(self._read(slices, at.epoch, feed.size, subset)) as batches:
            labels = self.soft_labels
            if labels is None:
                yield batches
            else:
                yield (replace(batch, soft=labels.read(at.epoch, batch.ids, self.device)) for batch in batches)

    def use_soft_labels(self, labels: SoftLabels) -> None:
        """From the next pass on, batches have soft targets. After the last epoch that has labels, crops repeat."""
        self.soft_labels, self.crops = labels, replace(self.crops, box_epochs=labels.facts.epochs)

    def vary_crops(self, variant: int) -> None:
        """From the next pass on, other random crops are cut, in the same order of images. 0: the first ones."""
        self.crops = replace(self.crops, variant=variant)

    def check_size(self, size: int) -> None:
        """Raises ConfigError if the source cannot deliver images of ``size`` px, DataError if its file is damaged."""

    def _read(
        self, slices: Iterator[BatchSlice], epoch: int, size: int, subset: np.ndarray | None
    ) -> Generator[Batch, None, None]:
        """The batches of a pass over the rows ``subset`` (m,) int64; None: all. Closing them ends it early."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the threads and processes that outlive a pass: none here."""


def full_batches(source: Source, feed: Feed, epoch: int = 0) -> Generator[Batch, None, None]:
    """Batches of ``feed`` without end, from the start of ``epoch``. Batches that are not full are left out.

    Raises ConfigError if the source has too few images for one full batch.
    """
    if (count := source.rows.count(feed.subset)) < feed.batch_size:
        raise ConfigError(
            f"train.batch_size, or the batch size of a method: {feed.batch_size} is more than the {count} images, so "
            "nothing can be measured; use smaller batches"
        )
    for number in itertools.count(epoch):
        with source.open(feed, Position(number)) as batches:
            yield from (batch for batch in batches if batch.total == feed.batch_size)


@dataclass(frozen=True)
class Sources:
    train: Source
    val: Source

    def close(self) -> None:
        self.train.close()
        self.val.close()
