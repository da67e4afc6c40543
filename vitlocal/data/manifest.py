"""The manifest of a split, ``{split}.json``: its .beton files, its images, and the source that they came from."""

from __future__ import annotations

import json
import re
import shlex
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vitlocal.data.beton import MappedFile
from vitlocal.data.fields import LatentForm
from vitlocal.errors import ConfigError, DataError
from vitlocal.jsonl import replacing
from vitlocal.paths import WRITE
from vitlocal.reading import open_regular, read_whole

VERSION = 1
PYTHON_SOURCE = "a dataset in Python"  # the spec of images that vitlocal.write stored
MOST_UNNAMED = 100_000  # classes that labels may have without names
LATENT_FLAGS = "--format latent --vae FOLDER"  # in commands that a user can complete
CLASSES_NAME = "classes.txt"  # one class per line, in the order of the labels, as timm's --class-map
# Our names, and those of ffcv-imagenet: the largest side, the fraction of JPEGs and their quality.
FILE_NAME = re.compile(
    r"(?P<split>[a-z]+)_(?P<side>[0-9]+)_((raw|jpg|latent)\.beton|[0-9]+(\.[0-9]+)?_[0-9]+\.(ffcv|beton))"
)
FILE_SUFFIXES = (".beton", ".ffcv")


@dataclass(frozen=True)
class BetonFile:
    """A .beton file of a split. A file that is not written yet has no bytes."""

    file: str  # name within the data folder
    side: int  # long edge of the stored images, px; of latents: edge of the square photo
    format: str  # "raw" | "jpg" | "latent"
    quality: int | None  # of JPEG; None for others
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
    sizes: str = ""  # digest of the sizes of its files; "": it holds no files, or the manifest is old
    times: str = ""  # digest of the times of modification of its files
    image: str | None = None  # column, label column and subset that were asked for
    label: str | None = None
    subset: str | None = None
    classes_chosen: bool = False  # by a file: the classes are not those of the source
    reads: tuple[str, ...] = ()  # what was read, if there was a choice
    left_out: Mapping[str, int] = field(default_factory=dict)  # files that were not read, by reason
    fields: Mapping[str, str] = field(default_factory=dict)  # types of the further fields, by name


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
    latents: LatentForm | None = None  # None: the files hold photos

    def save(self, path: Path) -> None:
        """Writes the file as a whole or not at all, and the folder's entry of it to disk."""
        members = {"version": VERSION, **asdict(self)}
        if self.latents is None:
            del members["latents"]
        lines = ",\n".join(f"{json.dumps(name)}: {_dump(value)}" for name, value in members.items())
        with replacing(path) as file:
            file.write(f"{{\n{lines}\n}}\n")

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads and checks a manifest.

        Raises ConfigError if it does not exist, DataError if it is damaged or from a newer version.
        """
        command = f"{WRITE} --split {path.stem} --out {path.parent}"
        try:
            content = json.loads(read_whole(path))
            if content["version"] > VERSION:
                raise DataError(
                    f"{path} has manifest version {content['version']} of a newer vitlocal; this vitlocal reads "
                    f"versions up to {VERSION}. Update vitlocal, or write the split again into another folder."
                )
            files = tuple(_record(BetonFile, file) for file in content["files"])
            source = _record(SourceInfo, content["source"])
            source = replace(source, reads=tuple(source.reads))
            skipped = tuple(_record(Skipped, image) for image in content["skipped"])
            classes, entries = tuple(content["classes"]), tuple(content["entries"])
            latents = _record(LatentForm, content["latents"]) if "latents" in content else None
            manifest = cls(content["split"], content["count"], classes, files, source, skipped, entries, latents)
            texts = all(isinstance(text, str) for text in (*classes, *entries))
            whole = all(type(number) is int for file in files for number in (file.side, file.bytes, file.page_size))
            if manifest.split != path.stem or not texts or not whole:
                raise ValueError("it has another split, or values of another type")
            if not manifest.count == len(entries) == source.length - len(skipped):
                raise ValueError(
                    f"the count is {manifest.count}, but {len(entries)} entries and {len(skipped)} skipped images of "
                    f"{source.length} are listed"
                )
            names = [f"{manifest.split}_{file.side}_{file.format}.beton" for file in files]
            if not names or names != [file.file for file in files]:
                raise ValueError(f"its files should be {names}")
            if any((file.format == "latent") != (latents is not None) for file in files):
                raise ValueError("its files and its member latents do not agree")
            return manifest
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"{path} does not exist: the folder has no finished split {path.stem!r}. Write it with "
                f"{command}, or name another data folder."
            ) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}; restore it") from error
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{path} is damaged: {error!r}. Remove it and write the split again: {command}") from None


def load_manifest(root: str, split: str) -> Manifest:
    """The manifest of a split in the data folder ``root``; made from the files themselves if FFCV wrote them.

    Raises ConfigError if there are no files, or if the split is still being written.
    """
    folder, path = Path(root), Path(root) / f"{split}.json"
    if path.exists():
        return Manifest.load(path)
    ours = (folder / work_name(split)).exists() or written_splits(folder)
    manifest = None if ours else manifest_of_ffcv_files(folder, split)
    if manifest is None:
        command = f"{WRITE} --split {split} --out {root}{_options_of_other_split(folder)}"
        both = "" if written_splits(folder) else " --source PHOTOS, and the same for the other split"
        raise ConfigError(f"data.root: {path} does not exist. Write it: {command}{both}")
    return manifest


def written_splits(folder: Path) -> list[str]:
    """The finished splits in a data folder that have a manifest."""
    return [split for split in ("train", "val") if (folder / f"{split}.json").exists()]


def _options_of_other_split(folder: Path) -> str:
    """The options of write_dataset.py for the source of the other split in ``folder``, if there is one."""
    for path in (folder / "train.json", folder / "val.json"):
        if path.exists():
            other = Manifest.load(path)
            # A split with several files has ImageNet's default files, and the other split has its own defaults.
            sides = f" --sides {other.files[0].side}:{other.files[0].format}" if len(other.files) == 1 else ""
            if other.latents is not None:
                sides = f" --sides {','.join(str(file.side) for file in other.files)} {LATENT_FLAGS}"
            source = other.source
            if source.spec == PYTHON_SOURCE:
                return " --source PHOTOS, or vitlocal.write, which wrote the other split"
            classes = str(folder / CLASSES_NAME) if source.classes_chosen else None
            return (
                source_flags(source.spec, image=source.image, label=source.label, subset=source.subset, classes=classes)
                + sides
            )
    return ""


def source_flags(source: str | None, **choice: str | None) -> str:
    """The flags that name a source and a choice in it, for a command that a user can copy; with a space in front."""
    given = {"source": source, **choice}
    return "".join(f" --{name} {shlex.quote(value)}" for name, value in given.items() if value)


def work_name(split: str) -> str:
    """The hidden folder, within the data folder, in which a split is written."""
    return f".{split}.writing"


def manifest_of_ffcv_files(folder: Path, split: str) -> Manifest | None:
    """A manifest for files that FFCV itself wrote, named as ours or as ffcv-imagenet's; None if there are none.

    Class names are label numbers; all splits in the folder share them. Raises DataError if files are damaged or have
    different numbers of rows.
    """
    names = [match for path in sorted(folder.glob("*_*.*")) if (match := FILE_NAME.fullmatch(path.name))]
    if not any(name["split"] == split for name in names):
        return None
    mapped = [(name, MappedFile(folder / name[0])) for name in names]
    classes = _numbers(folder, max(int(file.labels.max()) for _, file in mapped) + 1)
    mine = [(name, file) for name, file in mapped if name["split"] == split]
    counts = {name[0]: len(file.rows) for name, file in mine}
    if len(set(counts.values())) > 1:
        raise DataError(
            f"{folder}: the files of split {split!r} have different numbers of rows ({counts}); write them from one "
            "data set"
        )
    files = tuple(_described(file, name[0], int(name["side"])) for name, file in mine)
    forms = {latent_form(file, int(name["side"])) for name, file in mine}
    if len(forms) > 1:
        raise DataError(
            f"{folder}: the files of split {split!r} hold photos and latents, or different latents: "
            f"{', '.join(counts)}; keep one kind in each data folder"
        )
    return _bare_manifest(split, len(mine[0][1].rows), classes, files, forms.pop())


def latent_form(file: MappedFile, side: int) -> LatentForm | None:
    """The latents of a file that no manifest describes, fed to the model as they are; None if it holds photos.

    Raises DataError if its arrays are no latents of squares of ``side`` px.
    """
    if file.latent is None:
        return None
    shape = file.latent.shape
    channels, cells = (shape[1] // 2, shape[3]) if len(shape) == 4 else (1, 1)
    form = LatentForm(channels, max(1, side // cells), 1.0, "")
    if not form.is_stored_as(file.latent, side):
        raise DataError(
            f"{file.path} has latents of {file.latent}, expected float16 or its bits as int16, [2, 2 x channels, "
            f"{side} / stride, {side} / stride]: plain and mirrored, mean and standard deviation. Write it in that form"
        )
    return form


def manifest_of_file(path: Path, split: str) -> Manifest:
    """A manifest for one file that no manifest describes. Class names are label numbers."""
    file = MappedFile(path)
    side = file.latent.shape[-1] if file.latent else int(max(file.rows["width"].max(), file.rows["height"].max()))
    classes = _numbers(path, int(file.labels.max()) + 1)
    return _bare_manifest(split, len(file.rows), classes, (_described(file, path.name, side),), latent_form(file, side))


def _numbers(path: Path, count: int) -> tuple[str, ...]:
    """The names of classes without names."""
    if count > MOST_UNNAMED:
        raise DataError(
            f"{path}: has a label {count - 1}, which would be {count} classes without names, expected labels below "
            f"{MOST_UNNAMED}. Write the files with labels from 0"
        )
    return tuple(map(str, range(count)))


def _described(file: MappedFile, name: str, side: int) -> BetonFile:
    form = "latent" if file.latent else "raw" if file.rows["raw"].all() else "jpg"
    return BetonFile(name, side, form, None, None, None, file.page_size, len(file.bytes))


def _bare_manifest(
    split: str, count: int, classes: tuple[str, ...], files: tuple[BetonFile, ...], latents: LatentForm | None
) -> Manifest:
    entries = tuple(f"row {row}" for row in range(count))
    return Manifest(split, count, classes, files, SourceInfo("", count, ""), (), entries, latents)


def checksum(path: Path) -> str:
    """``crc32:`` and the CRC-32 of the whole file in 8 hexadecimal digits. The writer joins those of the parts."""
    value = 0
    with open_regular(path) as file:
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


def _dump(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value:  # one item on each line, for grep and diff
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    return json.dumps(value)


def _record(kind: Any, content: dict[str, Any]) -> Any:
    """An object of JSON as the dataclass ``kind``. Raises KeyError if a member is missing that may not be None."""
    content = dict.fromkeys(("quality", "sampling", "keep")) | content  # old manifests lack them
    required = [member.name for member in fields(kind) if member.default is MISSING is member.default_factory]
    known = {member.name for member in fields(kind)} & set(content)
    return kind(**{name: content[name] for name in known | set(required)})
