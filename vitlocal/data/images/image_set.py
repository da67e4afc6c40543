"""What every kind of source is, and the names that splits go by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vitlocal.errors import ConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid")}  # first is ours

KINDS = (
    "a folder of <split>/<class>/<image>, a folder with the ILSVRC2012 tars, a folder of parquet shards "
    "named <split>-….parquet, 'torchvision:NAME' or 'sample'"
)


@runtime_checkable
class ImageSet(Protocol):
    """Images with labels. Picklable and copyable; files are opened where they are read, on first use."""

    spec: str  # what `open_images(spec, split)` takes to open it again
    classes: tuple[str, ...]  # names; a label is an index into them
    labels: np.ndarray  # (n,) int64
    holds_files: bool  # images are read() as the files that they came in; else they are arrays, and load() is direct

    def __len__(self) -> int: ...

    def entry(self, index: int) -> str:
        """The row's name, unique in the set, for messages and manifests."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image as stored; sets that hold arrays give PNG."""
        ...

    def load(self, index: int) -> Image.Image:
        """The image upright, in RGB."""
        ...


def split_folder(root: Path, split: str) -> Path | None:
    names = SPLIT_NAMES.get(split, (split,))
    return next((root / name for name in names if (root / name).is_dir()), None)


def known_split(name: str) -> str | None:
    """The split that a folder or shard is named for, under our name for it."""
    for ours, names in SPLIT_NAMES.items():
        if name in names:
            return ours
    return name if name == "test" else None


def listed(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "nothing"


def require_same_classes(where: str, classes: Sequence[str], other: str, others: Sequence[str]) -> None:
    """Raises unless both splits have the same classes: else equal labels would mean different things."""
    if set(classes) == set(others):
        return
    missing, surplus = sorted(set(others) - set(classes)), sorted(set(classes) - set(others))
    raise ConfigError(
        f"{where} and {other} must have the same classes, got {len(classes)} and {len(others)}: "
        f"only in {where}: {listed(surplus, 3)}; only in {other}: {listed(missing, 3)}; add or remove these"
    )
