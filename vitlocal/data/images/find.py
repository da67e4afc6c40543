"""Detects the kind of a source and opens it."""

import os
import re
from pathlib import Path

from vitlocal.data.images.folder import FolderImages
from vitlocal.data.images.image_set import KINDS, ImageSet, known_split, split_folder
from vitlocal.data.images.parquet import ParquetImages, shards_by_split
from vitlocal.data.images.sample import IMAGES_PER_CLASS, SampleImages
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


def open_images(spec: str | None, split: str) -> ImageSet:
    """Opens the `split` ('train', 'val' or an alias) of the source `spec`; None: that of `resolve_source`.

    Raises ConfigError with what was found and the remedy if there is no such source or split, or if it is empty.
    """
    spec = resolve_source(spec)
    split = known_split(split) or split
    kind, _, rest = spec.partition(":")
    if kind == "sample":
        match = re.fullmatch(r"sample(?::([1-9]\d*)(?::(\d+))?)?", spec)
        if match is None:
            raise ConfigError(f"source '{spec}': expected 'sample', 'sample:N' or 'sample:N:SEED' with whole numbers")
        images: ImageSet = SampleImages(split, int(match[1] or IMAGES_PER_CLASS), int(match[2] or 0))
    elif kind == "torchvision":
        images = open_torchvision(rest, split)
    else:
        images = _open_folder(spec, split)
    if not len(images):
        raise ConfigError(f"source '{spec}' has no images in the split '{split}'; name another source")
    return images


def _open_folder(spec: str, split: str) -> ImageSet:
    root = Path(spec).expanduser().absolute()
    if not root.exists():
        raise ConfigError(f"source '{spec}' does not exist; expected {KINDS}")
    if not root.is_dir():
        raise ConfigError(f"source '{spec}' is a file; name its folder: '{root.parent}'")
    entries = [entry for entry in os.listdir(root) if not entry.startswith(".")]
    if not entries:
        raise ConfigError(f"source '{root}' is an empty folder; expected {KINDS}")
    folder = split_folder(root, split)
    if folder is not None and not any(folder.glob("*.parquet")):
        return FolderImages(root, split)
    if shards_by_split(root):
        return ParquetImages(root, split)
    if any(re.fullmatch(r"ILSVRC2012_img_\w+\.tar", entry) for entry in entries):
        return TarImages(root, split)
    return FolderImages(root, split)
