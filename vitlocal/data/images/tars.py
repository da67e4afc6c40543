"""The ILSVRC2012 tars, read in place as downloaded."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vitlocal.data.images.image_set import NO_CHOICE, SUFFIXES, ImageSet, SourceChoice, listed
from vitlocal.errors import ConfigError, DataError


@dataclass(frozen=True)
class _Member:
    """A file in a tar, with the offset of its bytes in the outermost file."""

    name: str
    offset: int
    size: int


def _members(descriptor: int, start: int, end: int, where: str) -> Iterator[_Member]:
    """Lists the regular files of the tar in bytes [start, end). Reads only headers, of ustar, GNU and pax archives.

    It is much faster than `tarfile`, which matters for the 1.28 million headers of ImageNet.
    """
    offset, long_name = start, None
    while offset + 512 <= end:
        header = os.pread(descriptor, 512, offset)
        if header.count(0) == 512:
            return
        try:
            if int(header[148:156].rstrip(b" \0"), 8) != 256 + sum(header[:148]) + sum(header[156:]):
                raise ValueError
            field = header[124:136]
            size = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b" \0") or b"0", 8)
        except ValueError:
            raise ConfigError(
                f"{where}: no tar header at byte {offset}: the file is damaged; download it again"
            ) from None
        body = offset + 512
        offset = body + -(-size // 512) * 512
        if body + size > end:
            raise ConfigError(
                f"{where}: cut off: expected at least {body + size} bytes, found {end}; download it again"
            )
        kind = header[156:157]
        if kind == b"L":  # GNU: the next member's name
            long_name = os.pread(descriptor, size, body).rstrip(b"\0")
        elif kind == b"x":  # pax: records "<length> <key>=<value>\n" on the next member
            match = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", os.pread(descriptor, size, body))
            long_name = match[1] if match else None
        elif kind in (b"0", b"\0"):
            name = long_name or header[:100].rstrip(b"\0")
            if long_name is None and header[257:263] == b"ustar\0" and header[345] != 0:
                name = header[345:500].rstrip(b"\0") + b"/" + name
            long_name = None
            yield _Member(os.fsdecode(name), body, size)
        elif kind not in (b"g", b"K"):  # they describe the next member
            long_name = None


class TarImages(ImageSet):
    """ImageNet as downloaded: ILSVRC2012_img_{train,val}.tar, read in place.

    Opening it indexes the members, from their headers, with several threads. Rows and entries equal those of the
    unpacked images: by class, then by name.
    """

    def __init__(self, root: Path, split: str, choice: SourceChoice = NO_CHOICE) -> None:
        path = root / f"ILSVRC2012_img_{split}.tar"
        if not path.is_file():
            found = sorted(name for name in os.listdir(root) if name.startswith("ILSVRC2012"))
            raise ConfigError(
                f"source '{root}' has no split '{split}': expected {path.name}, found {listed(found)}; "
                "download it from image-net.org to this folder"
            )
        self.spec = str(root)
        self._file = _Descriptor(str(path))
        advise = getattr(os, "posix_fadvise", lambda *_: None)
        advise(self._file.fileno(), 0, 0, getattr(os, "POSIX_FADV_RANDOM", 0))  # no read-ahead: it reads only headers
        rows = self._train_rows(path) if split == "train" else self._val_rows(root, path)
        advise(self._file.fileno(), 0, 0, getattr(os, "POSIX_FADV_NORMAL", 0))
        rows.sort(key=lambda row: (row[0], row[1].name))
        self.classes = tuple(sorted({wnid for wnid, _ in rows}))
        self.labels = np.unique([wnid for wnid, _ in rows], return_inverse=True)[1].astype(np.int64)
        self._names = [os.path.basename(member.name) for _, member in rows]
        self._offsets = np.array([member.offset for _, member in rows], np.int64)
        self._sizes = np.array([member.size for _, member in rows], np.int64)

    def _train_rows(self, path: Path) -> list[tuple[str, _Member]]:
        """The outer tar holds one tar for each class, named after it."""
        descriptor = self._file.fileno()

        def rows_of(tar: _Member) -> list[tuple[str, _Member]]:
            wnid = _class_of(tar.name)
            where = f"{path}, {tar.name}"
            members = _members(descriptor, tar.offset, tar.offset + tar.size, where)
            rows = [(wnid, member) for member in members if member.name.lower().endswith(SUFFIXES)]
            if not rows:
                raise ConfigError(f"{where} has no images; download {path.name} again")
            return rows

        tars = list(_members(descriptor, 0, path.stat().st_size, str(path)))
        for tar in tars:
            if not tar.name.endswith(".tar"):
                raise ConfigError(
                    f"{path}: expected one tar for each class in it, found '{tar.name}'; download it again"
                )
        with ThreadPoolExecutor(16) as pool:  # they wait for the disk
            return [row for rows in pool.map(rows_of, tars) for row in rows]

    def _val_rows(self, root: Path, path: Path) -> list[tuple[str, _Member]]:
        """All images are in one tar, ordered by name. The devkit has their classes."""
        members = _members(self._file.fileno(), 0, path.stat().st_size, str(path))
        images = sorted((m for m in members if m.name.lower().endswith(SUFFIXES)), key=lambda member: member.name)
        wnids = _validation_wnids(root)
        if len(wnids) != len(images):
            raise ConfigError(
                f"{path} has {len(images)} images, but the devkit's ground truth has {len(wnids)} lines; "
                "download both again"
            )
        return list(zip(wnids, images, strict=True))

    def entry(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        try:
            descriptor = self._file.fileno()
            return _read_at(descriptor, int(self._offsets[index]), int(self._sizes[index]), self.entry(index))
        except OSError as error:
            raise DataError(f"{self._file.path} cannot be read: {error.strerror}; restore the file") from error


def has_tars(root: Path) -> bool:
    return any(re.fullmatch(r"ILSVRC2012_img_\w+\.tar", name) for name in os.listdir(root))


def tar_classes(root: Path, split: str, choice: SourceChoice) -> tuple[str, ...] | None:
    """The classes of a split; None without its tar."""
    path = root / f"ILSVRC2012_img_{split}.tar"
    if not path.is_file():
        return None
    if split != "train":
        return tuple(sorted(set(_validation_wnids(root))))
    outer = _Descriptor(str(path))
    return tuple(sorted(_class_of(tar.name) for tar in _members(outer.fileno(), 0, path.stat().st_size, str(path))))


def _class_of(tar_name: str) -> str:
    return os.path.basename(tar_name).removesuffix(".tar")


def _validation_wnids(root: Path) -> list[str]:
    """The class of each validation image, in the order of their names, from the devkit (packed or unpacked)."""
    truth, meta = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
    packed = sorted(root.glob("ILSVRC2012_devkit*.tar.gz"))
    folders = [folder for folder in sorted(root.glob("ILSVRC2012_devkit*")) if (folder / truth).is_file()]
    found: dict[str, bytes] = {}
    where: Path
    if folders:
        where = folders[0]
        found = {name: (where / name).read_bytes() for name in (truth, meta) if (where / name).is_file()}
    elif packed:
        where = packed[0]
        try:
            with tarfile.open(where) as tar:
                for member in tar:
                    name = next((name for name in (truth, meta) if member.name.endswith(name)), None)
                    file = tar.extractfile(member) if name and member.isfile() else None
                    if name and file:
                        found[name] = file.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ConfigError(f"{where} cannot be read: {error}; download it again") from error
    else:
        raise ConfigError(
            f"source '{root}' lacks ILSVRC2012_devkit_t12.tar.gz with the classes of the validation images; "
            "download it from image-net.org to this folder"
        )
    for name in (truth, meta):
        if name not in found:
            raise ConfigError(f"{where} lacks {name}; download ILSVRC2012_devkit_t12.tar.gz from image-net.org again")

    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ConfigError(f"reading the devkit's meta.mat needs scipy ({error}); pip install scipy") from error
    try:
        table = np.atleast_1d(loadmat(io.BytesIO(found[meta]), squeeze_me=True)["synsets"])
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if int(row["num_children"]) == 0}
        return [wnids[int(line)] for line in found[truth].split()]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"{where}: its ground truth and meta.mat do not match ({error!r}); download it again"
        ) from error


def _read_at(descriptor: int, offset: int, size: int, name: str) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # limits of 2 GiB and signals may shorten a read
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise DataError(f"{name}: expected {size} bytes, got {len(data)}: its file was cut off; restore it")
        data += more
    return data


class _Descriptor:
    """A file that is opened on first use and pickled as its path. `pread` has no position, so forks may share it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def fileno(self) -> int:
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)
        return self._file.fileno()

    def __reduce__(self) -> tuple[type[_Descriptor], tuple[str]]:
        return _Descriptor, (self.path,)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()
