"""The manifest of a split, ``{split}.json``: its .beton files, its images, and the source that they came from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import zlib
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from vitlocal.data.beton import check_beton
from vitlocal.errors import ConfigError, DataError

VERSION = 1
FILE_NAME = re.compile(r"(?P<split>[a-z]+)_(?P<side>[0-9]+)_(?P<format>raw|jpg)\.beton")


@dataclass(frozen=True)
class BetonFile:
    """A .beton file of a split. A file that is not written yet has no bytes."""

    file: str  # name within the data folder
    side: int  # long edge of the stored images, px
    format: str  # "raw" | "jpg"
    quality: int | None  # of JPEG; None for raw
    sampling: int | None  # chroma sampling of JPEG, 420 or 444; None for raw, or if it is unknown
    keep: int | None  # 1: small JPEGs are stored unchanged, 0: all are encoded again; None as for sampling
    page_size: int
    bytes: int = 0
    checksum: str = ""  # see checksum()
    max_width: int = 0
    max_height: int = 0


@dataclass(frozen=True)
class SourceInfo:
    """The images that a split was written from."""

    spec: str  # for open_images
    length: int  # images in the source, including skipped images
    fingerprint: str  # digest of its entries and labels, in order


@dataclass(frozen=True)
class Skipped:
    """An image of the source that could not be read. It is in no file."""

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
        """Writes the file atomically: under another name, flushed to disk, then renamed."""
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

        Raises ConfigError if it does not exist, DataError if it is damaged or from a newer version.
        """
        path = Path(path)
        command = f"python write_dataset.py --split {path.stem} --out {path.parent}"
        again = f"Remove it and write the split again: {command}"
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"{path} does not exist: the folder has no finished split {path.stem!r}. Write it with "
                f"{command}, or name another data folder."
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is damaged: {error}. {again}") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is damaged: not JSON ({error}). {again}") from None
        try:
            version = _member(content, "version", int)
            if version > VERSION:
                raise DataError(
                    f"{path} has manifest version {version} of a newer vitlocal; this vitlocal reads versions "
                    f"up to {VERSION}. Update vitlocal, or write the split again into another folder."
                )
            manifest = _record(cls, content)
            manifest._check()
            return manifest
        except (TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error}. {again}") from None

    def _check(self) -> None:
        if len(self.entries) != self.count:
            raise ValueError(f"count is {self.count}, but it lists {len(self.entries)} entries")
        if self.source.length != self.count + len(self.skipped):
            raise ValueError(
                f"the source's length is {self.source.length}, but {self.count} rows and "
                f"{len(self.skipped)} skipped images are listed"
            )
        if not self.files:
            raise ValueError("it lists no files")
        for file in self.files:
            if file.format not in ("raw", "jpg") or Path(file.file).name != file.file:
                raise ValueError(f"it lists the file {file.file!r} of format {file.format!r}")


def load_manifest(root: str, split: str) -> Manifest:
    """The manifest of a split in the data folder ``root``; made from the files themselves if FFCV wrote them.

    Raises ConfigError if there are no files, or if the split is still being written.
    """
    folder, path = Path(root), Path(root) / f"{split}.json"
    if path.exists():
        return Manifest.load(path)
    ours = (folder / work_name(split)).exists() or any("." not in file.stem for file in folder.glob("*.json"))
    manifest = None if ours else manifest_of_ffcv_files(root, split)
    if manifest is None:
        command = f"python write_dataset.py --split {split} --out {root}{_options_of_other_split(folder)}"
        raise ConfigError(f"data.root: {path} does not exist. Write it: {command}")
    return manifest


def _options_of_other_split(folder: Path) -> str:
    """The options of write_dataset.py for the source of the other split in ``folder``, if there is one."""
    existing = next((path for split in ("train", "val") if (path := folder / f"{split}.json").exists()), None)
    if existing is None:
        return ""
    other = Manifest.load(existing)
    # A split with several files has ImageNet's default files, and the other split has its own defaults.
    sides = f" --sides {other.files[0].side}:{other.files[0].format}" if len(other.files) == 1 else ""
    return f" --source {shlex.quote(other.source.spec)}{sides}"


def work_name(split: str) -> str:
    """The hidden folder, within the data folder, in which a split is written."""
    return f".{split}.writing"


def manifest_of_ffcv_files(folder: str | os.PathLike[str], split: str) -> Manifest | None:
    """A manifest for files that FFCV itself wrote, named ``{split}_{side}_{raw|jpg}.beton``; None if there are none.

    Class names are label numbers; all splits in the folder share them. Raises DataError if files are damaged or have
    different numbers of rows.
    """
    found = {path: match for path in sorted(Path(folder).glob("*.beton")) if (match := FILE_NAME.fullmatch(path.name))}
    if not any(match["split"] == split for match in found.values()):
        return None
    heads = {path: check_beton(path) for path in found}
    classes = tuple(str(label) for label in range(max(head.max_label for head in heads.values()) + 1))
    mine = {path: head for path, head in heads.items() if found[path]["split"] == split}
    counts = {head.count for head in mine.values()}
    if len(counts) > 1:
        rows = ", ".join(f"{path.name}: {head.count}" for path, head in mine.items())
        raise DataError(
            f"{folder}: the files of split {split!r} have different numbers of rows ({rows}); write them from one data "
            "set"
        )
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
    """``crc32:`` and the CRC-32 of the whole file in 8 hexadecimal digits. The writer joins those of the parts."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"crc32:{value:08x}"


def joined_crc32(first: int, second: int, length: int) -> int:
    """The CRC-32 of two joined strings, from the CRC-32 of each and the length of the second.

    A zero byte at the end multiplies a CRC by x^8 modulo the polynomial, in GF(2). Bit 31 is x^0.
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
    """Flushes renames within ``folder`` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dump(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value:  # one item on each line, for grep and diff
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    return json.dumps(value)


def _record(kind: Any, content: Any) -> Any:
    """An object of JSON as the dataclass ``kind``. Raises ValueError."""
    return kind(**{name: _member(content, name, type_) for name, type_ in get_type_hints(kind).items()})


def _member(content: Any, name: str, kind: Any) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"expected an object with {name!r}, got {type(content).__name__}")
    optional = type(None) in get_args(kind)
    if optional and content.get(name) is None:  # old manifests lack it
        return None
    if name not in content:
        raise ValueError(f"{name!r} is missing")
    return _value(get_args(kind)[0] if optional else kind, content[name], name)


def _value(kind: Any, value: Any, name: str) -> Any:
    items = get_args(kind)  # of a tuple
    expected = list if items else dict if is_dataclass(kind) else kind
    if not isinstance(value, expected) or isinstance(value, bool):
        raise ValueError(f"{name!r} is {value!r:.80}, expected {expected.__name__}")
    if items and all(type(item) is items[0] for item in value):  # ImageNet has a million entries
        return tuple(value)
    if items:
        return tuple(_value(items[0], item, name) for item in value)
    return _record(kind, value) if is_dataclass(kind) else value
