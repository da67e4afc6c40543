"""The torchvision source: original images through PyTorch's DataLoader and Pillow, with the native loader's crops.

It is the comparison that users know, and the slow reference for tests of the native loader.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from collections.abc import Generator, Iterator
from itertools import tee
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitlocal.data.batch import Batch
from vitlocal.data.crops import ROW_MASK, CropPolicy, cut
from vitlocal.data.images import ImageSet
from vitlocal.data.native import native_box, native_policy
from vitlocal.data.peers.originals import OriginalsSource
from vitlocal.data.shares import BatchSlice
from vitlocal.errors import STOP_SIGNALS, DataError, first_line

# (draw, epoch, size): everything that a crop depends on, so that worker processes serve all passes.
Request = tuple[int, int, int]
Crop = tuple[np.ndarray, int, int]  # ((S, S, 3) uint8, label, row)


class CropDataset(Dataset):
    """Maps a :data:`Request` to a :data:`Crop`, or to the error if the image cannot be read.

    The error is not raised here, because DataLoader would make its traceback the message.
    """

    def __init__(self, images: ImageSet, rows: np.ndarray, crops: CropPolicy):
        self.images, self.rows, self.crops = images, rows, crops

    def __getitem__(self, request: Request) -> Crop | DataError:
        draw, epoch, size = request
        row = draw & ROW_MASK
        index = int(self.rows[row])
        try:
            image = self.images.load(index)
        except DataError as error:
            return error
        box = native_box(native_policy(self.crops, epoch), draw, image.height, image.width, size)
        return np.asarray(cut(image, box, size)), int(self.images.labels[index]), row


def start_worker(number: int) -> None:
    os.setsid()
    threading.Thread(target=end_with_trainer, daemon=True).start()


def end_with_trainer() -> None:
    """Ends this worker when the trainer ends. Its parent, the server, would live as long as its workers."""
    if (trainer := multiprocessing.parent_process()) is not None:
        trainer.join()
        os._exit(1)


def start_server() -> None:
    """Starts the server that forks the workers. They inherit that stop signals are blocked.

    Ctrl-C and schedulers signal all processes. The trainer ends the workers itself, after its step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def collate(items: list[Crop | DataError]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    crops, labels, rows = zip(*items, strict=True)
    return torch.from_numpy(np.stack(crops)), torch.tensor(labels), torch.tensor(rows)


class Requests:
    """The batches of a pass, which DataLoader asks for one by one. They are set before each pass."""

    batches: Iterator[list[Request]]

    def __iter__(self) -> Iterator[list[Request]]:
        return self.batches


class TorchvisionSource(OriginalsSource):
    """A split of original images, read by ``workers`` processes. See :class:`OriginalsSource` for the arguments."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.requests = Requests()
        start_server()
        self.loader: DataLoader = DataLoader(
            CropDataset(self.images, self.numbers, self.crops),
            batch_sampler=self.requests,
            collate_fn=collate,
            worker_init_fn=start_worker,
            num_workers=self.workers,
            # Workers start once. Forking a process that runs threads is not safe.
            persistent_workers=True,
            multiprocessing_context="forkserver",
            pin_memory=self.device.type == "cuda",
        )

    def vary_crops(self, variant: int) -> None:
        super().vary_crops(variant)
        self.loader.dataset.crops = self.crops  # type: ignore[attr-defined]  # before its workers start

    def _read(
        self, slices: Iterator[BatchSlice], epoch: int, size: int, subset: np.ndarray | None
    ) -> Generator[Batch, None, None]:
        asked, slices = tee(slices)
        self.requests.batches = (
            [(draw, epoch, size) for draw in part.draws.tolist()] for part in asked if len(part.draws)
        )
        read = iter(self.loader)
        for part in slices:
            if not len(part.draws):
                yield Batch.empty(size, self.device, part.total)
                continue
            try:
                batch = next(read)
            except RuntimeError as error:  # its own errors: those of images are in the batch
                raise DataError(
                    f"a process that reads images has ended: {first_line(error)}. Perhaps memory ran out; use fewer "
                    "data.workers, and run the same command again"
                ) from error
            if isinstance(batch, DataError):
                raise batch
            crops, labels, rows = batch
            # Host-to-device copies, from pinned memory.
            pixels = crops.permute(0, 3, 1, 2).to(self.device, non_blocking=True)  # (B, 3, S, S), channels-last
            labels = labels.to(self.device, non_blocking=True)
            yield Batch(pixels, labels, rows, part.places, part.total)

    def close(self) -> None:
        self.loader._iterator = None  # the workers end with it; DataLoader has no public method for that
