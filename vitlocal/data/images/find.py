"""Detects the kind of a source and opens it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vitlocal.data.images.folder import FolderImages
from vitlocal.data.images.image_set import KINDS, SPLIT_NAMES, ImageSet, split_folder
from vitlocal.data.images.parquet import ParquetImages, shards_by_split
from vitlocal.data.images.tars import TarImages
from vitlocal.data.images.torchvision import open_torchvision
from vitlocal.errors import ConfigError

SOURCE_VARIABLE = "IMAGENET_DIR"
DEFAULT_SOURCE = "data/source"


def resolve_source(spec: str | None) -> str:
    """The source: ``spec`` if given, else the variable IMAGENET_DIR, else the folder data/source."""
    spec = spec or os.environ.get(SOURCE_VARIABLE) or (DEFAULT_SOURCE if os.path.isdir(DEFAULT_SOURCE) else None)
    if spec:
        return spec
    raise ConfigError(
        f"no images to read: --source is not given, the variable {SOURCE_VARIABLE} is not set, and the folder "
        f"{DEFAULT_SOURCE} does not exist; expected one of them to be {KINDS}. "
        "To try it without any data: --source sample"
    )


def open_images(spec: str | None, split: str, *, seed: int = 0) -> ImageSet:
    """Opens the `split` ('train', 'val' or an alias) of the source `spec`; None: that of `resolve_source`.

    `seed` is for the built-in sample: 'sample', 'sample:N' (N training images for each class) or 'sample:N:SEED', which
    overrides it. Raises ConfigError with what was found and the remedy if there is no such source or split.
    """
    spec = resolve_source(spec)
    split = next((ours for ours, names in SPLIT_NAMES.items() if split in names), split)
    kind, _, rest = spec.partition(":")
    if kind == "sample":
        return _open_sample(spec, split, seed)
    if kind == "torchvision":
        return open_torchvision(rest, split)
    root = Path(spec).expanduser().absolute()
    if not root.exists():
        hint = " (did you mean 'sample'?)" if spec.lower().startswith("samp") else ""
        raise ConfigError(f"source '{spec}' does not exist{hint}; expected {KINDS}")
    if not root.is_dir():
        raise ConfigError(f"source '{spec}' is a file; name its folder: '{root.parent}'")
    try:
        return _open_folder(root, split)
    except OSError as error:
        raise ConfigError(f"source '{spec}' cannot be read: {error}; check its permissions") from error


def _open_sample(spec: str, split: str, seed: int) -> ImageSet:
    from vitlocal.data.images.sample import IMAGES_PER_CLASS, SampleImages

    numbers = spec.split(":")[1:]
    if len(numbers) > 2 or not all(re.fullmatch("[0-9]+", number) for number in numbers):
        raise ConfigError(f"source '{spec}': expected 'sample', 'sample:N' or 'sample:N:SEED' with whole numbers")
    per_class = int(numbers[0]) if numbers else IMAGES_PER_CLASS
    return SampleImages(split, per_class, int(numbers[1]) if len(numbers) == 2 else seed)


def _open_folder(root: Path, split: str) -> ImageSet:
    entries = sorted(entry for entry in os.listdir(root) if not entry.startswith("."))
    if not entries:
        raise ConfigError(f"source '{root}' is an empty folder; expected {KINDS}")
    folder = split_folder(root, split)
    if folder is not None and not any(name.endswith(".parquet") for name in os.listdir(folder)):
        return FolderImages(root, split)
    if shards_by_split(root):
        return ParquetImages(root, split)
    if any(re.fullmatch(r"ILSVRC2012_img_\w+\.tar", entry) for entry in entries):
        return TarImages(root, split)
    return FolderImages(root, split)
