"""The protocol of all image sources, how they read files and folders, and the names of splits."""

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vitlocal.data.fields import FieldType
from vitlocal.data.images.pixels import REMEDY, decode_rgb
from vitlocal.errors import DataError, UndecodableImage, shown
from vitlocal.reading import open_regular

LARGEST_FILE = 1 << 29  # bytes of an image file: larger than any photo, so a larger one is another kind of file
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}

KINDS = (
    "a folder of <split>/<class>/<image>, a folder with the ILSVRC2012 tars, a folder of parquet shards "
    "named <split>-….parquet, 'torchvision:NAME' or 'sample'"
)


class SourceChoice(NamedTuple):
    """The part of a source to read, if it has several."""

    image: str | None = None  # column of the images; None: found by its name or type
    label: str | None = None  # column of the labels
    subset: str | None = None  # configuration of a data set, as Hugging Face calls it; variant of a torchvision set
    classes: tuple[str, ...] | None = None  # the classes to read, in the order of their labels; None: all of them


NO_CHOICE = SourceChoice()


@runtime_checkable
class ImageSet(Protocol):
    """Images with labels. It can be pickled and copied. Files are opened on first use."""

    spec: str  # for `open_images(spec, split)`
    classes: tuple[str, ...]  # names; a label is an index into them
    labels: np.ndarray  # (n,) int64
    holds_files: bool = True  # read() returns the original files; else images are arrays, and load() is faster
    in_order: bool = False  # reading rows one by one in their order is much faster, so the writer does
    reads: tuple[str, ...] = ()  # what it reads, if there was a choice: "labels: column 'fine_label'"
    left_out: Mapping[str, int] = {}  # files that are not read, by reason: {".heic": 3, "hidden": 1}
    notes: tuple[str, ...] = ()  # sentences about what a user may not expect
    fields: Mapping[str, FieldType] = {}  # further fields to store

    def __len__(self) -> int:
        return len(self.labels)

    def stamps(self) -> np.ndarray | None:
        """Bytes and time of modification (ns) of the file that holds each row: (n, 2) int64. None: not from files.

        Rows of an archive have its member's values, rows of a shard the bytes of their row group and its shard's time.
        """
        return None

    def entry(self, index: int) -> str:
        """The row's name, unique in the set, for messages and manifests."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image; PNG if the set holds arrays."""
        ...

    def values(self, index: int) -> list[bytes]:
        """The row's values of the further fields, encoded."""
        return []

    def release(self, index: int) -> None:
        """Frees memory for the rows before ``index``, which need not be read again soon."""
        return

    def load(self, index: int) -> Image.Image:
        """The upright image in RGB."""
        return decode_rgb(self.read(index), self.entry(index))


def read_file(path: str, offset: int = 0, size: int = -1) -> bytes:
    """The ``size`` bytes of a file from ``offset`` on, fewer at its end; -1: all of a file as small as a photo."""
    try:
        with open_regular(path) as file:
            if size < 0:
                require_photo_size(path, os.fstat(file.fileno()).st_size)
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise unreadable(path, error) from error


def require_photo_size(name: str, size: int) -> None:
    """Raises UndecodableImage, before the file is read, if it is larger than any photo."""
    if size > LARGEST_FILE:
        raise UndecodableImage(f"{shown(name)}: {size} bytes, expected a photo of at most {LARGEST_FILE}; {REMEDY}")


def unreadable(path: str | Path, error: OSError) -> DataError:
    """The error for a file or folder that the system does not let us read. It must never count as absent or empty."""
    return DataError(
        f"{shown(path)} cannot be read: {error.strerror or error}; restore it, or check its disk and permissions"
    )


def is_folder(path: str | Path) -> bool:
    """Whether it is a folder or a link to one. DataError if the system cannot tell, for example for a stale handle."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in LEADS_NOWHERE:
            return False
        raise unreadable(path, error) from error


LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # a path or link to nothing; other errors are of a disk


def scan_folder(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder. DataError if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise unreadable(folder, error) from error


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split, with any usual name, in upper or lower case."""
    if not is_folder(root):
        return None
    found = {entry.name for entry in scan_folder(root)}
    for usual in SPLIT_NAMES.get(split, (split,)):
        for name in sorted(found, reverse=True):  # lower case first
            if name.lower() == usual and is_folder(root / name):
                return root / name
    return None


def known_split(name: str) -> str | None:
    """Our name for the split that a folder or shard is named after, if any."""
    return next((ours for ours, names in SPLIT_NAMES.items() if name.lower() in names), None)


def listed(names: Sequence[str], most: int = 6) -> str:
    first = ", ".join(f"'{shown(name)}'" for name in names[:most])
    return f"{first} and {len(names) - most} more" if len(names) > most else first or "nothing"
