"""The ILSVRC2012 tars, read in place as downloaded."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitlocal.data.images.image_set import SUFFIXES, ImageSet, listed, read_file, require_same_classes
from vitlocal.errors import ConfigError, DataError


@dataclass(frozen=True)
class _Member:
    """A file in a tar, with the offset of its bytes in the outermost file."""

    name: str
    offset: int
    size: int


def _members(descriptor: int, start: int, end: int, where: str) -> Iterator[_Member]:
    """Lists the regular files of the tar in bytes [start, end). Reads only headers, of ustar, GNU and pax archives.

    It is much faster than `tarfile`, which matters for the 1.28 million headers of ImageNet. Names have at most 100
    bytes there.
    """
    offset = start
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
        if header[156:157] in (b"0", b"\0"):
            yield _Member(os.fsdecode(header[:100].rstrip(b"\0")), body, size)


class TarImages(ImageSet):
    """ImageNet as downloaded: ILSVRC2012_img_{train,val}.tar, read in place.

    Opening it indexes the members, from their headers, with several threads. Rows and entries equal those of the
    unpacked images: by class, then by name.
    """

    def __init__(self, root: Path, split: str) -> None:
        path = root / f"ILSVRC2012_img_{split}.tar"
        if not path.is_file():
            found = sorted(name for name in os.listdir(root) if name.startswith("ILSVRC2012"))
            raise ConfigError(
                f"source '{root}' has no split '{split}': expected {path.name}, found {listed(found)}; "
                "download it from image-net.org to this folder"
            )
        self.spec, self._path = str(root), str(path)
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: it reads only headers
            size = path.stat().st_size
            rows = _train_rows(file.fileno(), size, path) if split == "train" else _val_rows(file.fileno(), size, path)
        rows.sort(key=lambda row: (row[0], row[1].name))
        self.classes = tuple(sorted({wnid for wnid, _ in rows}))
        train = root / "ILSVRC2012_img_train.tar"
        if split != "train" and train.is_file():
            with open(train, "rb", buffering=0) as file:
                tars = _members(file.fileno(), 0, train.stat().st_size, str(train))
                inner = [_class_of(tar.name) for tar in tars]
            require_same_classes(path.name, self.classes, train.name, inner)
        self.labels = np.unique([wnid for wnid, _ in rows], return_inverse=True)[1].astype(np.int64)
        self._names = [os.path.basename(member.name) for _, member in rows]
        self._offsets = np.array([member.offset for _, member in rows], np.int64)
        self._sizes = np.array([member.size for _, member in rows], np.int64)

    def entry(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        size = int(self._sizes[index])
        data = read_file(self._path, int(self._offsets[index]), size)
        if len(data) < size:
            raise DataError(f"{self.entry(index)}: expected {size} bytes, got {len(data)}: {self._path} was cut off")
        return data


def _train_rows(descriptor: int, length: int, path: Path) -> list[tuple[str, _Member]]:
    """The class and the file of each image. The outer tar holds one tar for each class, named after it."""

    def rows_of(tar: _Member) -> list[tuple[str, _Member]]:
        where = f"{path}, {tar.name}"
        members = _members(descriptor, tar.offset, tar.offset + tar.size, where)
        rows = [(_class_of(tar.name), member) for member in members if member.name.lower().endswith(SUFFIXES)]
        if not rows:
            raise ConfigError(f"{where} has no images; download {path.name} again")
        return rows

    with ThreadPoolExecutor(16) as pool:  # they wait for the disk
        return [row for rows in pool.map(rows_of, _members(descriptor, 0, length, str(path))) for row in rows]


def _val_rows(descriptor: int, length: int, path: Path) -> list[tuple[str, _Member]]:
    """The class and the file of each image. They are in one tar, ordered by name. The devkit has their classes."""
    members = _members(descriptor, 0, length, str(path))
    images = sorted((m for m in members if m.name.lower().endswith(SUFFIXES)), key=lambda member: member.name)
    wnids = _validation_wnids(path.parent)
    if len(wnids) != len(images):
        raise ConfigError(
            f"{path} has {len(images)} images, but the devkit's ground truth has {len(wnids)} lines; "
            "download both again"
        )
    return list(zip(wnids, images, strict=True))


def _class_of(tar_name: str) -> str:
    return os.path.basename(tar_name).removesuffix(".tar")


def _validation_wnids(root: Path) -> list[str]:
    """The class of each validation image, in the order of their names, from the devkit (packed or unpacked)."""
    from scipy.io import loadmat

    folder, packed = root / "ILSVRC2012_devkit_t12", root / "ILSVRC2012_devkit_t12.tar.gz"

    def read(name: str) -> bytes:
        if folder.is_dir():
            return (folder / "data" / name).read_bytes()
        with tarfile.open(packed) as tar:
            file = tar.extractfile(f"{folder.name}/data/{name}")
            return file.read() if file else b""

    try:
        table = np.atleast_1d(loadmat(io.BytesIO(read("meta.mat")), squeeze_me=True)["synsets"])
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if int(row["num_children"]) == 0}
        return [wnids[int(line)] for line in read("ILSVRC2012_validation_ground_truth.txt").split()]
    except Exception as error:  # damaged files raise many kinds of errors
        raise ConfigError(
            f"source '{root}' lacks a whole {packed.name}, which has the classes of the validation images ({error!r}); "
            "download it from image-net.org to this folder"
        ) from error
