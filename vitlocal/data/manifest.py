"""The manifest of a split, ``{split}.json``: what its .beton files hold and where that came from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vitlocal.data.beton import check_beton
from vitlocal.errors import ConfigError, DataError

VERSION = 1
FILE_NAME = re.compile(r"(?P<split>[a-z]+)_(?P<side>[0-9]+)_(?P<format>raw|jpg)\.beton")


@dataclass(frozen=True)
class PlannedFile:
    """What is known of a .beton file before it is written."""

    file: str  # name within the data folder
    side: int  # the stored long edge
    format: str  # "raw" | "jpg"
    quality: int | None  # of JPEG; None for raw
    sampling: int | None  # of a JPEG's chroma, 420 or 444; None for raw, and where it is not known
    keep: int | None  # 1: JPEGs that need not shrink stay as they came, 0: they do not; None as for sampling
    page_size: int


@dataclass(frozen=True)
class BetonFile(PlannedFile):
    """One .beton file of a split."""

    bytes: int
    checksum: str  # of the whole file, see checksum()
    max_width: int
    max_height: int


@dataclass(frozen=True)
class SourceInfo:
    """The images that a split was written from."""

    spec: str  # what open_images takes to open them again
    length: int  # images in the source, with those that were skipped
    fingerprint: str  # of its entries and labels, in order


@dataclass(frozen=True)
class Skipped:
    """An image of the source that could not be read, and so is in no file."""

    entry: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """A split: row i of every file is the image ``entries[i]``."""

    split: str
    count: int
    classes: tuple[str, ...]
    files: tuple[BetonFile, ...]
    source: SourceInfo
    skipped: tuple[Skipped, ...]
    entries: tuple[str, ...]
    version: int = VERSION

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all: under another name, then renamed, and all flushed to disk."""
        path = Path(path)
        members = {"version": self.version, **asdict(self)}
        lines = ",\n".join(f"{json.dumps(name)}: {_dump(value)}" for name, value in members.items())
        temporary = path.with_name(f".{path.name}.writing")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(f"{{\n{lines}\n}}\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Reads and checks a manifest.

        Raises ConfigError where there is none, DataError where it is damaged or of a newer version.
        """
        path = Path(path)
        command = f"python write_dataset.py --split {path.stem} --out {path.parent}"
        again = f"Remove it and write the split again: {command}"
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"{path} does not exist: the folder holds no finished split {path.stem!r}. Write it with "
                f"{command}, or give another data folder."
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is damaged: {error}. {again}") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its rights.") from error
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is damaged: not JSON ({error}). {again}") from None
        try:
            version = _member(content, "version", int)
            if version > VERSION:
                raise DataError(
                    f"{path} has manifest version {version}, written by a newer vitlocal; this one reads "
                    f"up to {VERSION}. Update vitlocal, or write the split again into another folder."
                )
            return cls._of(content)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error}. {again}") from None

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Manifest:
        manifest = cls(
            split=_member(content, "split", str),
            count=_member(content, "count", int),
            classes=_strings(content, "classes"),
            files=tuple(_record(BetonFile, file) for file in _member(content, "files", list)),
            source=_record(SourceInfo, _member(content, "source", dict)),
            skipped=tuple(_record(Skipped, skip) for skip in _member(content, "skipped", list)),
            entries=_strings(content, "entries"),
            version=_member(content, "version", int),
        )
        if len(manifest.entries) != manifest.count:
            raise ValueError(f"count is {manifest.count}, but it lists {len(manifest.entries)} entries")
        if manifest.source.length != manifest.count + len(manifest.skipped):
            raise ValueError(
                f"the source's length is {manifest.source.length}, but {manifest.count} rows and "
                f"{len(manifest.skipped)} skipped images are listed"
            )
        if not manifest.files:
            raise ValueError("it lists no files")
        for file in manifest.files:
            if file.format not in ("raw", "jpg") or Path(file.file).name != file.file:
                raise ValueError(f"it lists the file {file.file!r} of format {file.format!r}")
        return manifest


def work_name(split: str) -> str:
    """The folder, within the data folder, in which a split lies while it is being written."""
    return f".{split}.writing"


def described(folder: str | os.PathLike[str], split: str) -> Manifest | None:
    """The manifest of a split whose files were written by FFCV itself, from what they say; None where there are none.

    Files are known by their names, ``{split}_{side}_{raw|jpg}.beton``; classes are called by their numbers, of
    which all splits in the folder have one set. Raises DataError where files are damaged or differ in rows.
    """
    found = {path: match for path in sorted(Path(folder).glob("*.beton")) if (match := FILE_NAME.fullmatch(path.name))}
    if not any(match["split"] == split for match in found.values()):
        return None
    heads = {path: check_beton(path) for path in found}
    classes = tuple(str(label) for label in range(max(head.max_label for head in heads.values()) + 1))
    mine = {path: head for path, head in heads.items() if found[path]["split"] == split}
    counts = {head.count for head in mine.values()}
    if len(counts) > 1:
        told = ", ".join(f"{path.name}: {head.count}" for path, head in mine.items())
        raise DataError(f"{folder}: the files of split {split!r} differ in rows ({told}); write them from one data set")
    count = counts.pop()
    files = tuple(
        BetonFile(
            path.name, int(found[path]["side"]), "jpg" if "jpg" in head.modes else "raw", None, None, None,
            head.page_size, head.bytes, "", head.max_width, head.max_height,
        )
        for path, head in mine.items()
    )  # fmt: skip
    entries = tuple(f"row {row}" for row in range(count))
    return Manifest(split, count, classes, files, SourceInfo("", count, ""), (), entries)


def checksum(path: str | os.PathLike[str]) -> str:
    """``crc32:`` and the CRC-32 (as in zip and gzip) of the whole file in 8 hexadecimal digits.

    CRC-32 because it is found without reading a file again: those of the parts of a file, the head of
    which is written last, give that of the whole, and an interrupted write carries it on.
    """
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"crc32:{value:08x}"


def joined_crc32(first: int, second: int, length: int) -> int:
    """The CRC-32 of two strings joined, from those of both and the second's length.

    Appending a zero byte multiplies a CRC by x^8 modulo the polynomial, in GF(2); bit 31 is x^0.
    """

    def product(a: int, b: int) -> int:
        total = 0
        for bit in range(31, -1, -1):
            if a >> bit & 1:
                total ^= b
            b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
        return total

    shift, power = 1 << 31, 1 << 23  # x^0, x^8
    while length:
        if length & 1:
            shift = product(shift, power)
        power = product(power, power)
        length >>= 1
    return product(shift, first) ^ second


def flush_folder(folder: Path) -> None:
    """Makes the renames within ``folder`` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dump(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value:  # an item a line, so that grep and diff are of use
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    return json.dumps(value)


def _member(content: Any, name: str, kind: type) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"expected an object with {name!r}, got {type(content).__name__}")
    if name not in content:
        raise ValueError(f"{name!r} is missing")
    value = content[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name!r} is {value!r:.80}, expected {kind.__name__}")
    return value


def _strings(content: Any, name: str) -> tuple[str, ...]:
    values = _member(content, name, list)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name!r} holds something that is not a string")
    return tuple(values)


def _record(kind: type, content: Any) -> Any:
    types = {"int": int, "str": str}
    values = {}
    for field in fields(kind):
        optional = str(field.type).endswith(" | None")
        if optional and isinstance(content, dict) and content.get(field.name) is None:  # or missing, in old ones
            values[field.name] = None
        else:
            values[field.name] = _member(content, field.name, types[str(field.type).removesuffix(" | None")])
    return kind(**values)
