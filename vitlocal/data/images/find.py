"""Detects the kind of a source and opens it."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitlocal.data.images.classes import normalized, require_known_classes, with_classes
from vitlocal.data.images.files import file_classes, open_files
from vitlocal.data.images.image_set import (
    KINDS,
    NO_CHOICE,
    ImageSet,
    SourceChoice,
    is_folder,
    known_split,
    listed,
    scan_folder,
    split_folder,
)
from vitlocal.data.images.parquet import ParquetImages, parquet_classes
from vitlocal.data.images.sample import IMAGES_PER_CLASS, SampleImages
from vitlocal.data.images.shards import has_shards
from vitlocal.data.images.torchvision import open_torchvision
from vitlocal.data.manifest import CLASSES_NAME
from vitlocal.errors import ConfigError

SOURCE_VARIABLE = "IMAGENET_DIR"
DEFAULT_SOURCE = "data/source"


@dataclass(frozen=True)
class Format:
    """How to read a folder in one format. Both functions take the folder, the split and the choice."""

    open: Callable[[Path, str, SourceChoice], ImageSet]  # ConfigError if the split is missing
    classes: Callable[[Path, str, SourceChoice], tuple[str, ...] | None]  # of a split; None: there is no such split


FILES = Format(open_files, file_classes)
PARQUET = Format(ParquetImages, parquet_classes)


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


def open_images(spec: str | None, split: str, choice: SourceChoice = NO_CHOICE) -> ImageSet:
    """Opens the `split` ('train', 'val' or an alias) of the source `spec`; None: that of `resolve_source`.

    The classes are those of the choice, else those of the training split. Raises ConfigError with what was found and
    the remedy if there is no such source or split, if it is empty, or if another split of it cannot be used with it.
    """
    spec = resolve_source(spec)
    split = known_split(split) or split
    kind, _, rest = spec.partition(":")
    used: tuple[str, ...] = ()  # fields of the choice that this kind of source has
    others: tuple[str, ...] | None = None  # the classes of the other split
    if kind == "sample":
        match = re.fullmatch(r"sample(?::([1-9]\d*)(?::(\d+))?)?", spec)
        if match is None:
            raise ConfigError(f"source '{spec}': expected 'sample', 'sample:N' or 'sample:N:SEED' with whole numbers")
        images: ImageSet = SampleImages(split, int(match[1] or IMAGES_PER_CLASS), int(match[2] or 0))
    elif kind == "torchvision":
        used = ("subset",)
        images = open_torchvision(rest, split, choice)
    else:
        root, other = _folder(spec), "val" if split == "train" else "train"
        format = format_of(root, split)
        used = ("image", "label", "subset") if format is PARQUET else ()
        images = format.open(root, split, choice)
        # Both splits are looked at before hours are spent on the first.
        others = format_of(root, other).classes(root, other, choice)
        if split == "train" and others is None:
            images.notes += ("this source has no split 'val'; a run needs one",)
    if unused := [f"--{name}" for name in ("image", "label", "subset") if getattr(choice, name) and name not in used]:
        raise ConfigError(f"source '{spec}' has no columns or subsets to choose from; remove {' and '.join(unused)}")
    if not len(images):
        raise ConfigError(f"source '{spec}' has no images in the split '{split}'; name another source")
    return _with_known_classes(images, split, others, choice)


def _with_known_classes(images: ImageSet, split: str, others: tuple[str, ...] | None, choice: SourceChoice) -> ImageSet:
    """The images with the chosen classes, else those of the training split. ``others``: classes of the other split."""
    classes = choice.classes or (others if split != "train" else None) or images.classes
    known = set(map(normalized, images.classes))  # also names of ClassLabel that no image has
    images = with_classes(images, classes, choice.classes is not None)
    if odd := [name for name in classes if "\n" in name]:
        raise ConfigError(
            f"source '{images.spec}' has classes whose names have several lines, which {CLASSES_NAME} cannot hold: "
            f"{listed(odd, 3)}; rename them"
        )
    counts = np.bincount(images.labels, minlength=len(classes))
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    if split == "train" and (unknown := [name for name in absent if normalized(name) not in known]):
        raise ConfigError(
            f"--classes names classes without images in {images.spec} ({len(unknown)}): {listed(unknown, 3)}"
        )
    if split == "train" and others and not choice.classes:
        require_known_classes(others, classes, f"source '{images.spec}', split 'val'")
    if absent:
        count = f"{len(absent)} class{'es have' if len(absent) > 1 else ' has'}"
        images.notes += (f"{count} no images in the split '{split}': {listed(absent, 3)}",)
    return images


def format_of(root: Path, split: str) -> Format:
    """The format of a split in a folder. A folder of the split comes before shards, and they come before tars."""
    folder = split_folder(root, split)
    if folder is not None and not any(entry.name.endswith(".parquet") for entry in scan_folder(folder)):
        return FILES
    return PARQUET if has_shards(root) else FILES


def _folder(spec: str) -> Path:
    try:
        root = Path(spec).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"source '{spec}': {error}; name another folder") from None
    if not is_folder(root):
        if root.exists():
            if root.name.endswith((".tar", ".tar.gz", ".tgz", ".zip")) and not root.name.startswith("ILSVRC2012"):
                raise ConfigError(f"source '{spec}' is an archive; unpack it, and name the folder that has its splits")
            raise ConfigError(f"source '{spec}' is a file; name its folder: '{root.parent}'")
        raise ConfigError(f"source '{spec}' does not exist; expected {KINDS}")
    if all(entry.name.startswith(".") for entry in scan_folder(root)):
        raise ConfigError(f"source '{root}' is an empty folder; expected {KINDS}")
    inner = [root / name for name in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")]  # as Kaggle packs ImageNet
    return next((folder for folder in inner if not split_folder(root, "train") and is_folder(folder)), root)
