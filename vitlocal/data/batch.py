"""Sources: what hands the trainer its batches. One interface over FFCV, torchvision and DALI.

Shape letters: B batch, S size (the crop side fed to the model, px).
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from vitlocal.config import Config
from vitlocal.data.crops import Cropping
from vitlocal.data.manifest import Manifest, described, work_name
from vitlocal.data.shares import WHOLE, Share
from vitlocal.errors import ConfigError
from vitlocal.machine import cores
from vitlocal.plan import Feed
from vitlocal.progress import Position


@dataclass(frozen=True)
class Batch:
    """This process's part of one global batch, on the device. On a CPU the pixels stand until the next is asked for.

    Where several processes train together, the last batch of an epoch may leave nothing for one of them.
    """

    images: torch.Tensor  # (B, 3, S, S) uint8, RGB, channels-last
    labels: torch.Tensor  # (B,) int64
    ids: torch.Tensor  # (B,) int64, rows of the split, on the CPU
    places: np.ndarray  # (B,) int64, in the global batch (of a pass that leaves out damaged images: as it was asked)
    total: int  # images of the global batch

    @classmethod
    def whole(cls, images: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor) -> Batch:
        """A batch that one process has alone."""
        return cls(images, labels, ids, np.arange(len(ids)), len(ids))

    @classmethod
    def empty(cls, size: int, device: torch.device, total: int) -> Batch:
        """What a process gets of a batch that is too small for all."""
        images = torch.empty((0, 3, size, size), dtype=torch.uint8, device=device)
        none = torch.empty(0, dtype=torch.int64)
        return cls(images, none.to(device), none, none.numpy(), total)

    def __len__(self) -> int:
        return len(self.ids)


class Rows:
    """The subsets of a split's rows that feeds name by a number; 0 stands for all ``whole`` rows."""

    def __init__(self, whole: int):
        self.whole = whole
        self.kept: dict[int, np.ndarray] = {}

    def keep(self, number: int, rows: np.ndarray) -> None:
        """From now on ``number`` stands for ``rows`` (m,) int64, and earlier numbers for nothing."""
        if number not in self.kept:
            self.kept = {number: rows}

    def of(self, number: int) -> np.ndarray | None:
        return self.kept[number] if number else None

    def count(self, number: int) -> int:
        return len(self.kept[number]) if number else self.whole


class Source(Protocol):
    """A split of a data set, read one pass at a time."""

    classes: tuple[str, ...]
    count: int
    rows: Rows
    damaged: Collection[int]  # rows that were left out so far, where that is asked for
    side: int | None  # long edge that images have at most, px, where they were stored with one

    def open(self, feed: Feed, at: Position) -> AbstractContextManager[Iterator[Batch]]:
        """One pass: from ``at`` to the end of its epoch, in the epoch's order, over the rows of ``feed.subset``.

        Leaving the context early gives up what was read ahead. Raises in the consumer what went wrong in the readers.
        """
        ...

    def close(self) -> None: ...


def full_batches(source: Source, feed: Feed, epoch: int = 0) -> Iterator[Batch]:
    """Batches of ``feed`` without end, from the start of ``epoch`` on; those that are not full are left out.

    Raises ConfigError where there is no full one.
    """
    if (count := source.rows.count(feed.subset)) < feed.batch_size:
        raise ConfigError(
            f"train.batch_size, or a method's own: {feed.batch_size} is more than the {count} images, so that there is "
            "nothing to measure; use smaller batches"
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


def load_manifest(root: str, split: str) -> Manifest:
    """The split's manifest, or one made up for files that FFCV wrote.

    Raises ConfigError where there is neither, or the split is still being written.
    """
    path = Path(root) / f"{split}.json"
    if path.exists():
        return Manifest.load(path)
    # Ours, but not, or no longer, whole?
    ours = (Path(root) / work_name(split)).exists() or any("." not in file.stem for file in Path(root).glob("*.json"))
    manifest = None if ours else described(root, split)
    if manifest is None:
        command = f"python write_dataset.py --split {split} --out {root}{_as_written(root)}"
        raise ConfigError(f"data.root: {path} is not there. Write it: {command}")
    return manifest


def _as_written(root: str) -> str:
    """The writer's options for another split of what lies in ``root``, as far as is known."""
    there = next((path for split in ("train", "val") if (path := Path(root) / f"{split}.json").exists()), None)
    if there is None:
        return ""
    other = Manifest.load(there)
    # Of several files, ImageNet's, each split has its own by default.
    sides = f" --sides {other.files[0].side}:{other.files[0].format}" if len(other.files) == 1 else ""
    return f" --source {shlex.quote(other.source.spec)}{sides}"


def open_sources(config: Config, device: torch.device, share: Share = WHOLE, local_world_size: int = 1) -> Sources:
    """The training and validation sources that ``data.loader`` names; both splits must have one set of classes.

    ``share`` is what this process reads of every batch; it has a part of the cores, which ``local_world_size`` share.

    Raises ConfigError where the data folder or the original images are not there, DataError where files are
    damaged.
    """
    augment = config.augment
    train = Cropping(
        random=True, seed=config.run.seed, scale=augment.crop_scale, ratio=augment.crop_ratio, flip=augment.flip,
        repeats=augment.repeats,
    )  # fmt: skip
    val = Cropping(random=False, centre=config.evaluate.crop_pct)
    workers = config.data.workers or max(1, cores() // local_world_size)
    if config.data.loader in ("native", "ffcv"):
        from vitlocal.data.loader import Decoder, FFCVSource  # importing ffcv takes seconds

        decoder = Decoder(workers)
        opened = []
        for split, cropping in (("train", train), ("val", val)):
            manifest = load_manifest(config.data.root, split)
            opened.append(
                FFCVSource(
                    config.data.root, manifest, cropping, config.data.side_ratio, device, decoder,
                    config.data.on_error, share,
                )
            )  # fmt: skip
    else:
        if config.data.loader == "dali":
            from vitlocal.data.peers.dali import DALISource as Originals  # an extra, not installed everywhere
        else:
            from vitlocal.data.peers.torchvision import TorchvisionSource as Originals

        opened = [
            Originals(config.data.root, config.data.source, split, cropping, device, workers, share)
            for split, cropping in (("train", train), ("val", val))
        ]
    sources = Sources(*opened)
    if sources.train.classes != sources.val.classes:
        odd = sorted(set(sources.train.classes) ^ set(sources.val.classes))
        raise ConfigError(
            f"data.root: the classes of train ({len(sources.train.classes)}) and val ({len(sources.val.classes)}) "
            f"in {config.data.root} differ, in {', '.join(odd[:5]) or 'their order'}; write both splits from one source"
        )
    return sources
