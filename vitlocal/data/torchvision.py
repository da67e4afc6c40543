"""The torchvision source: the original images, through PyTorch's DataLoader and Pillow, with the same crops.

The comparison that users know, and the slow twin that the FFCV source is tested with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitlocal.data.crops import ROW_MASK, Cropping, cut
from vitlocal.data.images import ImageSet
from vitlocal.data.originals import open_originals
from vitlocal.data.source import Batch
from vitlocal.errors import DataError
from vitlocal.plan import Feed, Position

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
        self.draws, self.epoch, self.feed = np.empty(0, np.int64), 0, Feed(0, 1)

    def __iter__(self) -> Iterator[list[Request]]:
        size = self.feed.batch_size
        for start in range(0, len(self.draws), size):
            yield [(draw, self.epoch, self.feed.size) for draw in self.draws[start : start + size].tolist()]

    def __len__(self) -> int:
        return -(-len(self.draws) // self.feed.batch_size)


class TorchvisionSource:
    """A split read from its original images; rows are those of the manifest, where the data folder has one."""

    def __init__(self, root: str, spec: str | None, split: str, cropping: Cropping, device: torch.device, workers: int):
        images, rows = open_originals(root, spec, split)
        self.classes, self.count = tuple(images.classes), len(rows)
        self.cropping, self.device, self.damaged = cropping, device, ()
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
        draws = self.cropping.draws(self.count, at.epoch, at.images)
        self.batches.draws, self.batches.epoch, self.batches.feed = draws, at.epoch, feed
        yield self._read()

    def _read(self) -> Iterator[Batch]:
        for batch in self.loader:
            if isinstance(batch, DataError):
                raise batch
            crops, labels, rows = batch
            pixels = crops.permute(0, 3, 1, 2)  # (B, 3, S, S), a view: channels-last
            yield Batch(
                pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True), rows
            )  # host-to-device copies, from pinned memory

    def close(self) -> None:
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # DataLoader has no public way; a reader left open keeps them
            self.loader._iterator = None
