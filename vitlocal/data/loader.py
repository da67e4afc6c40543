"""The native loader: ``.beton`` files to batches of crops, for the trainer and for any other loop.

Shape letters: B batch, S size.
"""

import os
import sys
import weakref
from collections.abc import Generator, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitlocal.data.arguments import check, pair, usable_device, whole
from vitlocal.data.batch import Batch
from vitlocal.data.beton import MappedFile
from vitlocal.data.beton_source import BetonSource, open_manifest, split_of
from vitlocal.data.costs import DecodingCosts
from vitlocal.data.crops import ROW_MASK, CropPolicy
from vitlocal.data.fields import require_fields
from vitlocal.data.reader import PREFETCH, ChooseBoxes, EpochReader, LoaderResources
from vitlocal.data.shares import BatchSlice, EqualShare, Share
from vitlocal.errors import ConfigError, shown
from vitlocal.machine import decoder_threads
from vitlocal.plan import Feed
from vitlocal.progress import Position

STATE_VERSION = 1
INDICES = 1  # the number of the subset that ``indices`` selects
MAX_REPORTED = 5  # damaged images that are named at the end of a pass


class EpochSampler:
    """``loader.sampler``, as training scripts use it: ``set_epoch``, and the rows of the next epoch."""

    def __init__(self, loader: "Loader"):
        self._loader = weakref.proxy(loader)

    def set_epoch(self, epoch: int) -> None:
        """See :meth:`Loader.set_epoch`."""
        self._loader.set_epoch(epoch)

    def __len__(self) -> int:
        return self._loader.rows.count(self._loader.feed.subset)

    def __iter__(self) -> Iterator[int]:
        loader = self._loader
        draws = loader.crops.draws(loader.count, loader.next_position.epoch, 0, loader.rows.get(loader.feed.subset))
        return iter((draws & ROW_MASK).tolist())


class Loader(BetonSource):
    """Batches of crops from a written data folder, or from one .beton file of ours or of FFCV.

        loader = vitlocal.Loader("data/imagenet", "train", batch_size=256, size=224, seed=0)
        for images, labels in loader: ...

    Images are (B, 3, S, S), RGB, in channels-last memory. Labels are (B,) int64. Both are on ``device``. Each
    ``iter()`` is one epoch, and the next ``iter()`` is the next epoch. Order and crops depend on the seed, the epoch
    and the image alone. So they repeat bit for bit with any number of workers and processes, and after a restart.

    Args:
        root: a folder that the writer filled, or a .beton file.
        split: the split in the folder; None: "val" if the name of the file says val or test, else "train". "train" has
            random order, random crops and ``drop_last``, unless other arguments say otherwise. Other splits have none
            of them.
        batch_size: images in a batch of this process, as in PyTorch's DataLoader.
        size: side S of the crops, px. It may change: see :meth:`set_size`.
        shuffle: a new random order in each epoch.
        seed: of the order, the crops and the flips.
        indices: the rows to read, in this order unless they are shuffled; None: all. A row that comes twice has the
            same crop twice.
        drop_last: leave the last batch of an epoch out if it is not full.
        repeats: how often each image comes in a row, with different crops (Hoffer et al. 2020). An epoch has the same
            number of crops, so fewer images.
        scale, ratio, flip: random resized crops: bounds of the area as a fraction of the image, bounds of width /
            height, and the probability of a horizontal flip.
        crop: "random" resized crops, "centre" crops by timm's rule, or a function of the rows (B,) int64 and the epoch.
            It returns boxes as fractions of each image, (B, 4): top, left, height and width, or (B, 5) with a
            flip (0 or 1). It is called in a thread.
        crop_pct: the size of a centre crop, as a fraction of the resized short edge.
        num_workers: threads that decode; 0: one for each core of this process, and two fewer if the device is not the
            CPU. It is never the calling thread.
        prefetch: batches that wait, decoded.
        device: "cpu" or an accelerator, where batches are. Copies to a CUDA device overlap the training step.
        dtype: torch.uint8 (0 to 255), or a floating-point type.
        mean, std: of each channel, in the range 0 to 1. Floating-point images are (x / 255 - mean) / std; without them,
            x / 255.
        rank, world_size: this process, and their number; None: those of torch.distributed if it is initialized, else
            one process. Each reads its own part of the global batch of ``batch_size`` x ``world_size`` images. All
            processes have the same number of batches; without ``drop_last``, the last may be smaller, or empty.
        share: other parts of the global batches than consecutive equal ones; it replaces rank and world_size.
        on_error: at a damaged image: "raise", or "skip". "skip" replaces it by another image if the order is random,
            and else leaves it out.
        file: the name of the file to read; "auto": the fastest that is large enough for the size.
        side_ratio: a file is large enough for random crops if its longest edge has ``side_ratio`` x ``size`` px.
        return_ids: the last item of each batch is the rows, (B,) int64, on the CPU.
        fields: further fields of the file to return, by name, after the labels. Numbers and arrays are tensors on the
            CPU. Bytes and JSON are lists.
        copy: batches belong to the caller. False: on a CPU, a batch is valid until the next, and memory is bounded.
        resources: ``other.resources``, to share the decoder threads and open files of another loader.

    Raises ConfigError (a ValueError) for a wrong argument, DataError (a RuntimeError) for damaged data.
    """

    def __init__(
        self, root: str | Path, split: str | None = None, batch_size: int = 256, size: int = 224, *,
        shuffle: bool | None = None, seed: int = 0, indices: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        drop_last: bool | None = None, repeats: int = 1, scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3), flip: float = 0.5, crop: str | ChooseBoxes | None = None,
        crop_pct: float = 0.875, num_workers: int = 0, prefetch: int = PREFETCH, device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.uint8, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
        rank: int | None = None, world_size: int | None = None, share: Share | None = None, on_error: str = "raise",
        file: str = "auto", side_ratio: float = 1.5, return_ids: bool = False, fields: Sequence[str] = (),
        copy: bool = True, resources: LoaderResources | None = None,
    ):  # fmt: skip
        split = split or split_of(root)
        train = split == "train"
        crop = crop or ("random" if train else "centre")
        num_workers, prefetch = whole("num_workers", num_workers), whole("prefetch", prefetch)
        seed, repeats, (low, high), (narrow, wide) = (
            whole("seed", seed), whole("repeats", repeats), pair("scale", scale), pair("ratio", ratio),
        )  # fmt: skip
        device = usable_device(device)
        check(
            seed=(seed, 0 <= seed < 2**63, "a whole number from 0"),
            repeats=(repeats, repeats >= 1, "at least 1"),
            scale=(scale, 0 < low <= high <= 1, "two fractions of the area, such as (0.08, 1)"),
            ratio=(ratio, 0 < narrow <= wide, "two ratios of width and height, such as (3/4, 4/3)"),
            flip=(flip, 0 <= flip <= 1, "a probability"),
            crop=(crop, callable(crop) or crop in ("random", "centre"), "random, centre or a function"),
            crop_pct=(crop_pct, 0 < crop_pct <= 1, "a fraction above 0"),
            num_workers=(num_workers, num_workers >= 0, "a number of threads, or 0 for one per core"),
            prefetch=(prefetch, prefetch >= 1, "at least 1"),
            on_error=(on_error, on_error in ("raise", "skip"), "raise or skip"),
            dtype=(
                dtype,
                isinstance(dtype, torch.dtype) and (dtype == torch.uint8 or dtype.is_floating_point),
                "torch.uint8 or a floating-point type",
            ),
        )
        folder, manifest = open_manifest(root, split, file)
        crops = CropPolicy(
            random=crop != "centre", seed=seed, scale=(low, high), ratio=(narrow, wide), flip=flip, repeats=repeats,
            centre=crop_pct, shuffle=train if shuffle is None else shuffle,
        )  # fmt: skip
        costs = DecodingCosts.load(folder, manifest)
        super().__init__(folder, manifest, crops, device, costs, side_ratio, share or _share(rank, world_size))
        self.resources = resources or LoaderResources(
            num_workers or decoder_threads(device.type != "cpu", int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        )
        self._closed, self._finds_share = False, share is None and rank is None
        self._choose_boxes = crop if callable(crop) else None
        self._skip_damaged, self._prefetch, self._copy = on_error == "skip", prefetch, copy
        self._drop_last = train if drop_last is None else drop_last
        self._return_ids, self._fields = return_ids, (fields,) if isinstance(fields, str) else tuple(fields)
        self._normalize = _normalization(dtype, mean, std, self.device)
        self._dtype = dtype
        if indices is not None:
            self.rows.set(INDICES, _rows(indices, self.count))
        self._subset = INDICES if indices is not None else 0
        self.set_size(size, batch_size)
        for stored in self.manifest.files if self._fields else ():
            require_fields(self._fields, self._open_file(stored.file).fields, self.root / stored.file)
        self.sampler = EpochSampler(self)
        self._position, self._next_epoch, self._iteration = Position(), 0, 0
        self._resume: Position | None = None  # where the next iter() starts, if it is not the start of the next epoch
        self._epochs: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    # --- the loop ---

    @property
    def num_samples(self) -> int:
        """The number of rows to read, over all processes."""
        return self.rows.count(self._subset)

    @property
    def images_per_epoch(self) -> int:
        """The images of an epoch's batches, over all processes; fewer than the rows if the last batch is dropped."""
        return len(self) * self.feed.batch_size if self._drop_last else self.num_samples

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        full, rest = divmod(self.num_samples, self.feed.batch_size)
        return full + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self._closed:
            raise ConfigError("the loader is closed; make a new one")
        if self._finds_share and _share(None, None).world > self.share.world:
            raise ConfigError(
                "the loader was opened before torch.distributed was initialized, so it reads all images of "
                "each batch; open it afterwards, or pass rank and world_size"
            )
        start = self.next_position
        self._position, self._resume, self._next_epoch = start, None, start.epoch + 1
        self._iteration += 1
        epoch = self._batches(start, self.feed, self._iteration)
        self._epochs.add(epoch)
        return epoch

    def _batches(self, start: Position, feed: Feed, iteration: int) -> Generator[tuple[Any, ...], None, None]:
        """The rest of an epoch. The position moves before each batch is given to the caller."""
        end = self.num_samples
        with self.open(feed, start, drop_last=self._drop_last) as batches:
            images = start.images
            for batch in batches:
                images += batch.total
                ended = end - images < (feed.batch_size if self._drop_last else 1)
                if iteration == self._iteration:  # an older iterator may still be in use
                    self._position = Position(start.epoch + 1) if ended else Position(start.epoch, images)
                item = self._item(batch, feed.size)
                del batch
                yield item
                del item
        if iteration == self._iteration:
            self._position = Position(start.epoch + 1)

    def _item(self, batch: Batch, size: int) -> tuple[Any, ...]:
        images = batch.images
        if self._normalize is not None:
            scale, shift = self._normalize
            images = torch.addcmul(shift, images, scale).to(self._dtype)
        further: list[Any] = []
        if self._fields:
            file, ids = self._open_file(self.choose(size).file), batch.ids.numpy()
            further = [file.values(name, ids) for name in self._fields]
        return (images, batch.labels, *further, *([batch.ids] if self._return_ids else []))

    def set_size(self, size: int, batch_size: int | None = None) -> None:
        """From the next ``iter()`` on, crops have ``size`` px, and batches ``batch_size`` images (None: as before).

        To change them inside an epoch, leave the loop and continue from its position. No image is lost or repeated,
        unless ``drop_last`` leaves some out at the end of the epoch:

            loader.set_size(160, batch_size=512)
            loader.position = loader.position
        """
        size, images = whole("size", size), whole("batch_size", self.batch_size if batch_size is None else batch_size)
        check(size=(size, 1 <= size <= 4096, "a side of 1 to 4096 px"), batch_size=(images, images >= 1, "at least 1"))
        if self._drop_last and images * self.share.world > self.num_samples:
            raise ConfigError(
                f"batch_size: {images} in {self.share.world} processes is more than the {self.num_samples} images, "
                "and drop_last leaves out batches that are not full; use a smaller one, or drop_last=False"
            )
        self.feed = Feed(size, images * self.share.world, self._subset)

    @property
    def size(self) -> int:
        """The side of the crops from the next ``iter()`` on, px."""
        return self.feed.size

    @property
    def batch_size(self) -> int:
        """The images in a batch of this process."""
        return self.feed.batch_size // self.share.world

    # --- positions ---

    @property
    def position(self) -> Position:
        """The start of the next batch: its epoch, and the images of all processes before it in the epoch.

        If it is set, the next ``iter()`` starts there.
        """
        return self._position if self._resume is None else self._resume

    @position.setter
    def position(self, position: Position) -> None:
        if not isinstance(position, Position):
            raise ConfigError(f"position: got {position!r}, expected Position(epoch, images), such as loader.position")
        at = Position(whole("epoch", position.epoch), whole("images", position.images))
        inside = at.epoch >= 0 and 0 <= at.images < max(1, self.num_samples)
        check(position=(at, inside, f"an epoch from 0 and images below {self.num_samples}"))
        self._resume = at

    @property
    def next_position(self) -> Position:
        """Where the next ``iter()`` starts."""
        return Position(self._next_epoch) if self._resume is None else self._resume

    def set_epoch(self, epoch: int) -> None:
        """The next ``iter()`` is the epoch ``epoch``. A position in that epoch, just set or loaded, stays."""
        if self._resume is None or self._resume.epoch != epoch:
            self.position = Position(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it depends on: plain values, for a checkpoint of any process.

        Inside a loop, it is the position after the current batch. A restart goes on there, also after a ``break``; the
        same process would go on with the next epoch. The size and the files are not part of it.
        """
        order = (self.crops.shuffles, self.crops.repeats, self.rows.get(self._subset))
        digest = sha256(repr(order[:2]).encode() + (b"" if order[2] is None else order[2].tobytes())).hexdigest()[:16]
        position = self.position
        return {
            "version": STATE_VERSION, "epoch": position.epoch, "images": position.images, "seed": self.crops.seed,
            "samples": self.num_samples, "order": digest, "data": self._fingerprint(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next ``iter()`` continues at a saved position. It may have another size and number of processes.

        Raises ConfigError if the state is of another version, other data, or another order.
        """
        mine = self.state_dict()
        for name, meaning in {
            "version": "version of the state", "data": "data (the names and labels of its images)", "seed": "seed",
            "samples": "number of images", "order": "order (shuffle, repeats or indices)",
        }.items():  # fmt: skip
            if state.get(name) != mine[name]:
                raise ConfigError(
                    f"the state of a loader has another {meaning}: {state.get(name)!r}, here {mine[name]!r}; "
                    "open the loader as it was opened before"
                )
        if not {"epoch", "images"} <= state.keys():
            raise ConfigError(f"the state of a loader has no epoch or images: {state}")
        self.position = Position(state["epoch"], state["images"])

    def _fingerprint(self) -> str:
        """A digest of the images' names and labels."""
        source = self.manifest.source
        if source.fingerprint:
            skipped = "\n".join(image.entry for image in self.manifest.skipped)
            return sha256((source.fingerprint + skipped).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        file = self._open_file(self.manifest.files[0].file)  # of FFCV, without a manifest
        return sha256(np.ascontiguousarray(file.labels).tobytes()).hexdigest()[:16]

    # --- reading ---

    def check_size(self, size: int) -> None:
        self._open_file(self.choose(size).file)

    def _open_file(self, name: str) -> MappedFile:
        file = self.resources.file(self.root / name, len(self.classes))
        self.check_count(file.path, len(file.rows))
        return file

    def _read(
        self, slices: Iterator[BatchSlice], epoch: int, size: int, subset: np.ndarray | None
    ) -> Generator[Batch, None, None]:
        file = self._open_file(self.choose(size).file)
        reader = EpochReader(
            self.resources, file, self.crops, epoch, size, self.device, subset=subset, owned=self._copy,
            skip_damaged=self._skip_damaged, choose_boxes=self._choose_boxes, prefetch=self._prefetch,
        )  # fmt: skip
        try:
            yield from reader.batches(slices)
        finally:
            self._report(file, reader.damaged)

    def _report(self, file: MappedFile, damaged: dict[int, str]) -> None:
        """Prints the rows of ``file`` that a pass has skipped, with what is wrong with them. Each row is named once."""
        if not damaged:  # nothing to do, perhaps while Python ends
            return
        new = sorted(set(damaged).difference(self.damaged))
        self.damaged = {*self.damaged, *new}
        for row in new[:MAX_REPORTED]:
            name = shown(self.manifest.entries[row])
            print(f"{file.path}: skipped row {row} ({name}): it {damaged[row]}", file=sys.stderr)
        if len(new) > MAX_REPORTED:
            print(f"{file.path}: skipped {len(new) - MAX_REPORTED} more damaged images", file=sys.stderr)

    def close(self) -> None:
        """Ends all threads. Epochs that are not finished end. Resources that others share stay open."""
        for epoch in list(self._epochs):
            epoch.close()
        if not self._closed:
            self._closed = True
            del self.resources  # the last owner ends the decoder's threads

    def __reduce__(self) -> Any:
        raise TypeError("a Loader has threads and cannot be copied or pickled; open one there, or use BetonDataset")

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _share(rank: int | None, world_size: int | None) -> Share:
    """The part of each batch that this process reads."""
    distributed = torch.distributed
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank and world_size: got {rank} and {world_size}; give both or neither")
    if rank is None and distributed.is_available() and distributed.is_initialized():
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
    rank, world_size = (0, 1) if rank is None or world_size is None else (rank, world_size)
    check(world_size=(world_size, world_size >= 1, "at least 1"))
    check(rank=(rank, 0 <= rank < world_size, f"0 to {world_size - 1}, below world_size"))
    return EqualShare(rank, world_size)


def _rows(indices: Any, count: int) -> np.ndarray:
    """The rows that a user selects, (m,) int64."""
    rows = np.atleast_1d(np.asarray(indices))
    kinds = rows.dtype.kind in "iu" and rows.ndim == 1 and len(rows) > 0
    check(indices=(indices if len(rows) < 10 else f"{len(rows)} of {rows.dtype}", kinds, "a list of row numbers"))
    low, high = int(rows.min()), int(rows.max())
    check(indices=(f"{low} to {high}", low >= 0 and high < count, f"rows from 0 to {count - 1}"))
    return rows.astype(np.int64)


def _normalization(
    dtype: torch.dtype, mean: Sequence[float] | None, std: Sequence[float] | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The factor and the summand (1, 3, 1, 1) that turn pixels into floating-point images; None for uint8."""
    if dtype == torch.uint8:
        check(mean=(mean, mean is None, "None for torch.uint8"), std=(std, std is None, "None for torch.uint8"))
        return None
    centre, spread = (
        torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        for values in ((0.0,) * 3 if mean is None else mean, (1.0,) * 3 if std is None else std)
    )
    check(
        mean=(mean, centre.numel() == 3 and (centre.abs() <= 1).all(), "three numbers from 0 to 1"),
        std=(std, spread.numel() == 3 and (spread > 0).all() and (spread <= 1).all(), "three numbers from 0 to 1"),
    )
    return 1 / (255 * spread), -centre / spread
