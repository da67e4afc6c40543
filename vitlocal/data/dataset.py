"""The decoder for other loaders: a map-style dataset, a DataLoader around our loader, and crops of JPEGs in memory.

Shape letters: B batch, S size.
"""

import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vitlocal.data.arguments import whole
from vitlocal.data.beton import MappedFile
from vitlocal.data.crops import CropPolicy
from vitlocal.data.loader import Loader
from vitlocal.data.native import BOX, ROW, DecoderThreads, Encoder, native_policy
from vitlocal.errors import ConfigError, DataError


@functools.lru_cache(maxsize=4)
def _threads(count: int, process: int) -> DecoderThreads:
    """Decoder threads of this process: those of a process do not exist in its forks."""
    return DecoderThreads(count)


def _batch(count: int, size: int) -> np.ndarray:
    return torch.empty((count, size, size, 3), dtype=torch.uint8).numpy()


class BetonDataset(Dataset):
    """A split as a map-style dataset, for PyTorch's DataLoader with samplers and worker processes.

    An item is an image (3, S, S) uint8, or what ``transform`` makes of it, and a label. ``__getitems__`` decodes all
    items of a batch with one call. It can be pickled. Each process opens the file for itself.

    Args:
        root, split, size, seed, scale, ratio, flip, crop_pct, file, side_ratio: as for :class:`vitlocal.Loader`.
        crop: "random" or "centre"; None: random for the split train. Random crops depend on the seed, the epoch
            (:meth:`set_epoch`) and the row.
        num_threads: threads that decode, in each process.
        transform: a function of each image, a tensor.
    """

    def __init__(
        self, root: str | Path, split: str | None = None, size: int = 224, *, crop: str | None = None, seed: int = 0,
        scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3), flip: float = 0.5,
        crop_pct: float = 0.875, file: str = "auto", side_ratio: float = 1.5, num_threads: int = 1,
        transform: Callable[[torch.Tensor], Any] | None = None,
    ):  # fmt: skip
        if callable(crop):
            raise ConfigError("crop: a function is for vitlocal.Loader; expected random or centre")
        # It checks the arguments, and is not kept: it holds threads, which a worker process would not have.
        loader = Loader(
            root, split, 1, size, crop=crop, seed=seed, scale=scale, ratio=ratio, flip=flip, crop_pct=crop_pct,
            file=file, side_ratio=side_ratio, num_workers=1, rank=0, world_size=1,
        )  # fmt: skip
        loader.close()
        self.classes, self.size, self.transform, self.num_threads = loader.classes, size, transform, num_threads
        self.crops, self.path, self._count = loader.crops, loader.root / loader.choose(size).file, loader.count
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay alive see it change
        self._file: MappedFile | None = None

    def set_epoch(self, epoch: int) -> None:
        """Random crops are those of this epoch from now on, in all worker processes."""
        self._epoch.fill_(epoch)

    @property
    def file(self) -> MappedFile:
        if self._file is None:
            self._file = MappedFile(self.path, len(self.classes))
        return self._file

    @property
    def targets(self) -> list[int]:
        """The labels of all rows, as torchvision's datasets have them."""
        return self.file.labels.tolist()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        rows = np.array([operator.index(index) for index in indices], np.int64)
        rows[rows < 0] += self._count
        if ((rows < 0) | (rows >= self._count)).any():
            raise IndexError(f"rows {list(indices)[:5]}: expected numbers below {self._count}")
        crops, policy = _batch(len(rows), self.size), native_policy(self.crops, int(self._epoch))
        threads = _threads(self.num_threads, os.getpid())
        self.file.check()
        for place, problem in threads.decode(self.file.bytes, self.file.rows, rows, policy, crops).items():
            raise DataError(f"{self.path}: row {rows[place]} {problem}. Write the file again")
        images = torch.from_numpy(crops).permute(0, 3, 1, 2)  # (B, 3, S, S), a view: channels-last
        labels = self.file.labels[rows].tolist()
        return [
            (image if self.transform is None else self.transform(image), label)
            for image, label in zip(images, labels, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class _Epochs(IterableDataset):
    """The epochs of a loader as a dataset of batches."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.loader)

    def __len__(self) -> int:
        return self.loader.num_samples  # some libraries count examples by it


class LoaderAsDataLoader(DataLoader):
    """A DataLoader whose batches are those of a :class:`vitlocal.Loader`; see :func:`as_dataloader`."""

    # Accelerate leaves it as it is: the loader already reads the part of this process.
    _is_accelerate_prepared = True

    def __init__(self, loader: Loader):
        super().__init__(_Epochs(loader), batch_size=None, num_workers=0, collate_fn=tuple)
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


def as_dataloader(loader: Loader) -> LoaderAsDataLoader:
    """A ``torch.utils.data.DataLoader`` of the loader's batches, for libraries that accept nothing else.

    It adds no process and no copy. Each ``iter()`` is the loader's next epoch. Lightning and Accelerate do not divide
    its batches: with several processes, open the loader after they have started, so that it reads its own part.
    """
    if not isinstance(loader, Loader):
        raise ConfigError(f"as_dataloader: got {type(loader).__name__}, expected a vitlocal.Loader")
    return LoaderAsDataLoader(loader)


def decode_crops(
    jpegs: Sequence[bytes], boxes: Any = None, size: int = 224, *, flips: Any = None, num_threads: int = 0
) -> torch.Tensor:
    """Crops of JPEGs in memory, (B, 3, S, S) uint8, RGB, in channels-last memory.

    Only the part of each JPEG that its box needs is decoded, at the largest useful reduction. It is resized as by
    ``torchvision.transforms.v2.functional.resized_crop``: bilinear, with antialiasing. EXIF rotations are ignored.

    Args:
        jpegs: B files, in bytes.
        boxes: (B, 4): top, left, height and width in px of each JPEG, as torchvision's ``crop`` takes them. They need
            not be whole. None: whole images.
        size: side S of the crops, px.
        flips: (B,): which crops are mirrored; None: none.
        num_threads: threads that decode; 0: one per core.

    Raises ConfigError for wrong arguments, DataError for bytes that are not a whole JPEG and boxes outside of it.
    """
    if not 1 <= whole("size", size) <= 4096:
        raise ConfigError(f"size: got {size}, expected a side of 1 to 4096 px")
    for jpeg in jpegs:
        if not isinstance(jpeg, (bytes, bytearray, memoryview)):
            raise ConfigError(f"jpegs: got {type(jpeg).__name__}, expected the bytes of each file")
    jpegs = [bytes(jpeg) for jpeg in jpegs]
    crops = _batch(len(jpegs), size)
    images = torch.from_numpy(crops).permute(0, 3, 1, 2)  # (B, 3, S, S), a view: channels-last
    if not jpegs:
        return images
    rows, encoder = np.zeros(len(jpegs), ROW), Encoder()
    for number, jpeg in enumerate(jpegs):
        photo = encoder.inspect(jpeg)
        if photo is None:
            raise DataError(f"decode_crops: image {number} is not a JPEG")
        rows[number]["width"], rows[number]["height"] = photo["width"], photo["height"]
    rows["bytes"] = lengths = [len(jpeg) for jpeg in jpegs]
    rows["offset"] = np.cumsum([0, *lengths[:-1]])
    chosen = np.zeros(len(jpegs), BOX)
    if boxes is None:
        chosen["height"], chosen["width"] = rows["height"], rows["width"]
    else:
        given = np.asarray(boxes, np.float64)
        if given.shape != (len(jpegs), 4):
            raise ConfigError(f"boxes: got the shape {given.shape}, expected ({len(jpegs)}, 4)")
        chosen["top"], chosen["left"], chosen["height"], chosen["width"] = given.T
    if flips is not None:
        if np.shape(flips) != (len(jpegs),):
            raise ConfigError(f"flips: got the shape {np.shape(flips)}, expected ({len(jpegs)},)")
        chosen["flipped"] = np.asarray(flips) != 0
    file, draws = np.frombuffer(b"".join(jpegs), np.uint8), np.arange(len(jpegs))
    policy = native_policy(CropPolicy(random=True), 0)
    problems = _threads(num_threads, os.getpid()).decode(file, rows, draws, policy, crops, boxes=chosen)
    for place, problem in problems.items():
        raise DataError(f"decode_crops: image {place} {problem}")
    return images
