"""The torchvision source: the original images, through PyTorch's DataLoader and Pillow, with the same crops.

The comparison that users know, and the slow twin that the FFCV source is tested with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitlocal.data.batch import Batch, Rows
from vitlocal.data.crops import ROW_MASK, Cropping, cut
from vitlocal.data.images import ImageSet
from vitlocal.data.peers.originals import open_originals
from vitlocal.data.shares import WHOLE, Share, Slice
from vitlocal.errors import DataError
from vitlocal.plan import Feed
from vitlocal.progress import Position

# What is asked of a worker process: all that a crop depends on, so that workers live on from pass to pass.
Request = tuple[int, int, int]  # draw, epoch, size


class CropDataset(Dataset):
    """Crops by :data:`Request`: ``((S, S, 3) uint8, label, row)``, or the error where an image cannot be read.

    Not raised: DataLoader would hand on its traceback as the message.
    """

    def __init__(self, images: ImageSet, rows: np.ndarray, cropping: Cropping):
        self.images, self.rows, self.cropping = images, rows, cropping

    def __getitem__(self, request: Request) -> tuple[np.ndarray, int, int] | DataError:
        draw, epoch, size = request
        row = draw & ROW_MASK
        index = int(self.rows[row])
        try:
            image = self.images.load(index)
        except DataError as error:
            return error
        box = self.cropping.box(epoch, draw, image.height, image.width)
        crop = cut(image, box, size)
        return np.asarray(crop), int(self.images.labels[index]), row


def start_worker(number: int) -> None:
    # Ctrl-C and schedulers signal the whole process group: it is the trainer that ends the workers, after the step.
    os.setsid()


def collate(
    items: list[tuple[np.ndarray, int, int] | DataError],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    crops, labels, rows = zip(*items, strict=True)
    return torch.from_numpy(np.stack(crops)), torch.tensor(labels), torch.tensor(rows)


class Batches:
    """A batch sampler whose content is set before each pass."""

    def __init__(self) -> None:
        self.slices: Sequence[Slice] = ()
        self.epoch, self.size = 0, 0

    def __iter__(self) -> Iterator[list[Request]]:
        for part in self.slices:
            if len(part.draws):
                yield [(draw, self.epoch, self.size) for draw in part.draws.tolist()]

    def __len__(self) -> int:
        return sum(len(part.draws) > 0 for part in self.slices)


class TorchvisionSource:
    """A split read from its original images; rows are those of the manifest, where the data folder has one."""

    def __init__(
        self, root: str, spec: str | None, split: str, cropping: Cropping, device: torch.device, workers: int,
        share: Share = WHOLE,
    ):  # fmt: skip
        images, rows = open_originals(root, spec, split)
        self.classes, self.count = tuple(images.classes), len(rows)
        self.cropping, self.device, self.damaged, self.share = cropping, device, (), share
        self.rows, self.side = Rows(self.count), None
        self.batches = Batches()
        self.loader = DataLoader(
            CropDataset(images, rows, cropping),
            batch_sampler=self.batches,
            collate_fn=collate,
            worker_init_fn=start_worker,
            num_workers=workers,
            # Workers start once; forking a process that runs threads is not safe.
            persistent_workers=True,
            multiprocessing_context="forkserver",
            pin_memory=device.type == "cuda",
        )

    @contextmanager
    def open(self, feed: Feed, at: Position) -> Iterator[Iterator[Batch]]:
        draws = self.cropping.draws(self.count, at.epoch, at.images, self.rows.of(feed.subset))
        self.batches.slices = self.share.slices(draws, feed.batch_size)
        self.batches.epoch, self.batches.size = at.epoch, feed.size
        yield self._read()

    def _read(self) -> Iterator[Batch]:
        size, read = self.batches.size, iter(self.loader)
        for part in self.batches.slices:
            if not len(part.draws):
                yield Batch.empty(size, self.device, part.total)
                continue
            batch = next(read)
            if isinstance(batch, DataError):
                raise batch
            crops, labels, rows = batch
            pixels = crops.permute(0, 3, 1, 2)  # (B, 3, S, S), a view: channels-last
            yield Batch(
                pixels.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                rows,
                part.places,
                part.total,
            )  # fmt: skip  (host-to-device copies, from pinned memory)

    def close(self) -> None:
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # DataLoader has no public way; a reader left open keeps them
            self.loader._iterator = None
