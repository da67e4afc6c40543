"""The ILSVRC2012 tars, read in place: as downloaded, or one for each class."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vitlocal.data.images.classes import normalized
from vitlocal.data.images.image_set import ImageSet, listed, read_file, require_photo_size, unreadable
from vitlocal.data.images.listing import THREADS, LeftOut, system_reason
from vitlocal.data.images.pixels import photo_suffixes, suffix_reason
from vitlocal.data.images.solutions import EXPECTED_LISTS, find_solution, image_id
from vitlocal.data.images.tar_index import BLOCK, RECORD, Member, read_index
from vitlocal.errors import ConfigError, DataError
from vitlocal.reading import open_regular

DOWNLOADED = "ILSVRC2012_img_{}.tar"  # of a split


class ClassTar(NamedTuple):
    """A tar of images. The tar of a class may lie in another one, in bytes [start, end)."""

    path: Path
    name: str  # of its class; "": images of all classes
    start: int = 0
    end: int | None = None


class Row(NamedTuple):
    """An image in a tar."""

    name: str  # of its class; "": a list has it
    member: Member
    path: Path  # of the outermost tar

    @property
    def entry(self) -> str:
        return f"{self.name}/{self.member.name}".lstrip("/")


def class_tars(tars: Sequence[Path], split: str, left_out: LeftOut) -> list[ClassTar]:
    """The tars with images: those in the outer tar of the training split, else the given ones."""
    if [tar.name for tar in tars] != [DOWNLOADED.format(split)]:
        return [ClassTar(path, normalized(path.name[: -len(".tar")])) for path in tars]
    (path,) = tars
    if split != "train":
        return [ClassTar(path, "")]
    inner = []
    for member in read_index(str(path), 0, None, str(path), left_out):
        name = member.name.rpartition("/")[2]
        if reason := _reason(member.name):
            left_out.add(reason)
        elif not name.endswith(".tar"):
            raise ConfigError(
                f"{path}: expected one tar for each class in it, found '{member.name}'; download it again"
            )
        else:
            inner.append(ClassTar(path, normalized(name[: -len(".tar")]), member.offset, member.offset + member.size))
    return inner


def ends_at(tar: ClassTar, offset: int) -> bool:
    """Whether the last member ends ``offset`` bytes after the start: only zeros follow, of at most one record."""
    try:
        with open_regular(tar.path) as file:
            end = os.fstat(file.fileno()).st_size if tar.end is None else tar.end
            rest, place = end - tar.start - offset, tar.start + offset
            if not (offset and 0 < rest <= 2 * BLOCK + RECORD):
                return False
            last, after = os.pread(file.fileno(), BLOCK, place - BLOCK), os.pread(file.fileno(), rest, place)
            return any(last) and not any(after)
    except OSError as error:
        raise unreadable(tar.path, error) from error


def class_rows(tar: ClassTar, split: str) -> tuple[list[Row], LeftOut]:
    """The images in one tar, in its order, and what it holds besides."""
    left, suffixes = LeftOut(), photo_suffixes()
    where = f"{tar.path}, {tar.name}.tar" if tar.end is not None else str(tar.path)
    rows = []
    for member in read_index(str(tar.path), tar.start, tar.end, where, left):
        if reason := _reason(member.name):
            left.add(reason)
        elif member.name.lower().endswith(suffixes):
            rows.append(Row(tar.name, member, tar.path))
        else:
            left.add(suffix_reason(member.name))
    if not rows and (split == "train" or not tar.name):
        raise ConfigError(f"{where} has no images, found {left}; remove it, or download it again")
    return rows, left


def index_tars(tars: Sequence[Path], split: str, left_out: LeftOut) -> list[Row]:
    """The images of a split's tars, by class, then by name. Reads the headers with several threads."""
    inner = class_tars(tars, split, left_out)
    rows: list[Row] = []
    with ThreadPoolExecutor(THREADS) as pool:  # they wait for the disk
        for found, left in pool.map(lambda tar: class_rows(tar, split), inner):
            rows += found
            left_out.update(left)
    return sorted(rows, key=lambda row: (row.name, row.member.name))


def _reason(name: str) -> str | None:
    return next(filter(None, map(system_reason, name.split("/"))), None) if "/" in name else system_reason(name)


class TarImages(ImageSet):
    """Images in tars, read in place. Rows and entries equal those of the unpacked images: by class, then by name."""

    _opened: BinaryIO | None = None  # the tar, if it is only one

    def __init__(self, root: Path, rows: list[Row], left_out: LeftOut) -> None:
        self.spec, self.left_out = str(root), left_out.counts()
        if rows and not rows[0].name:
            rows = self._with_classes(root, rows)
        paths: dict[Path, int] = {}
        self._numbers = np.array([paths.setdefault(row.path, len(paths)) for row in rows], np.int64)  # of the files
        self._files = [str(path) for path in paths]
        self._entries = [row.entry for row in rows]
        places = np.array([row.member[1:] for row in rows], np.int64).reshape(-1, 3)
        self._offsets, self._sizes, self._seconds = places.T.copy()
        classes, labels = np.unique([row.name for row in rows], return_inverse=True)
        self.classes, self.labels = tuple(classes.tolist()), labels.astype(np.int64)

    def _with_classes(self, root: Path, rows: list[Row]) -> list[Row]:
        """The rows of a tar without classes, with those of a list, by class, then by name."""
        path = rows[0].path
        solution = find_solution(path.parent, root)
        if solution is None:
            raise ConfigError(
                f"source '{root}' lacks ILSVRC2012_devkit_t12.tar.gz with the classes of the images in {path.name}: "
                f"expected {EXPECTED_LISTS}; download it from image-net.org to this folder"
            )
        classes = solution.classes
        if classes.keys() != {image_id(row.member.name) for row in rows} or len(rows) != len(classes):
            strange = [row.member.name for row in rows if image_id(row.member.name) not in classes]
            raise ConfigError(
                f"{path} has {len(rows)} images, but {solution.path} has {len(classes)} lines; images without "
                f"a line: {listed(strange, 3)}; download both again"
            )
        rows = [row._replace(name=classes[image_id(row.member.name)]) for row in rows]
        return sorted(rows, key=lambda row: (row.name, row.member.name))

    def stamps(self) -> np.ndarray:
        return np.stack([self._sizes, self._seconds * 10**9], axis=1)

    def entry(self, index: int) -> str:
        return self._entries[index]

    def read(self, index: int) -> bytes:
        name, size = self._entries[index], int(self._sizes[index])
        require_photo_size(name, size)
        path = self._files[self._numbers[index]]
        data = self._read(path, int(self._offsets[index]), size)
        if len(data) < size:
            raise DataError(f"{path}, {name}: expected {size} bytes, got {len(data)}: the tar was cut off; restore it")
        return data

    def _read(self, path: str, offset: int, size: int) -> bytes:
        if len(self._files) > 1:  # a process may not keep so many open
            return read_file(path, offset, size)
        try:
            self._opened = file = self._opened or open_regular(path)
            return os.pread(file.fileno(), size, offset)  # it has no position, so forks may share the file
        except OSError as error:
            raise unreadable(path, error) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __del__(self) -> None:
        if self._opened is not None:
            self._opened.close()
