"""Where images come from: folders, the ILSVRC2012 tars, parquet shards, torchvision's sets, the sample.

`open_images` finds out what a source is. Each kind is an `ImageSet`: it knows all labels without decoding an
image, reads any row at random, and may be pickled into worker processes, where it opens its files anew.
"""

from __future__ import annotations

import functools
import inspect
import io
import json
import os
import re
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vitlocal.errors import ConfigError, DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
SOURCE_VARIABLE = "IMAGENET_DIR"
DEFAULT_SOURCE = "data/source"
TORCHVISION_ROOT = "data/torchvision"
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid")}  # first is ours

KINDS = (
    "a folder of <split>/<class>/<image>, a folder with the ILSVRC2012 tars, a folder of parquet shards "
    "named <split>-….parquet, 'torchvision:NAME' or 'sample'"
)


@runtime_checkable
class ImageSet(Protocol):
    """Encoded images with labels. Picklable; files are opened in the process that reads, on first use."""

    spec: str  # what `open_images(spec, split)` takes to open it again
    classes: tuple[str, ...]  # names; a label is an index into them
    labels: np.ndarray  # (n,) int64

    def __len__(self) -> int: ...

    def entry(self, index: int) -> str:
        """The row's name, unique in the set, for messages and manifests."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image as stored; sets that hold arrays give PNG."""
        ...

    def load(self, index: int) -> Image.Image:
        """The image upright, in RGB."""
        ...


# Decoding


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Decodes an image of any format that Pillow reads to RGB, turned upright by its EXIF orientation.

    16-bit values are scaled, not clipped; transparent parts are laid on white; an animation gives its
    first frame. Raises a DataError that names `name` if the bytes are no image, or not a whole one.
    """
    try:
        try:
            return _decode(data)
        except UserWarning:  # where warnings are errors: a broken EXIF block does not spoil the pixels
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                return _decode(data)
    except Exception as error:  # the decoders raise nearly anything on corrupt data
        if not data:
            problem = "it is empty"
        elif isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
            problem = f"too large to decode safely: {error}"
        else:
            problem = str(error) or type(error).__name__
        raise DataError(
            f"{name}: expected a whole image, got {len(data)} bytes that do not decode ({problem}); "
            "restore the file, or leave such images out with --on-error skip"
        ) from error


def _decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns a loaded image upright and converts it to RGB; returns an upright RGB image itself, uncopied."""
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits; Pillow's convert would clip at 255
        deep = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    elif image.mode == "F":  # of 0..1 or of 0..255
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        image = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    return image.convert("RGB")  # Pillow's reader has inverted the inks of a CMYK JPEG, as Adobe writes them


_TURNS = {  # what brings an image of each EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block does not spoil the pixels
        return 1


def _read_at(descriptor: int, offset: int, size: int, name: str) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # a read may be cut short by 2 GiB limits or signals
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise DataError(f"{name}: expected {size} bytes, got {len(data)}: its file has been cut short; restore it")
        data += more
    return data


class _Descriptor:
    """A file opened on first use, pickled as its path; `pread` has no position, so forks may share it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def fileno(self) -> int:
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)
        return self._file.fileno()

    def read_ahead(self, on: bool) -> None:
        """Whether the system fetches more than is asked; off while only headers are wanted."""
        if hasattr(os, "posix_fadvise"):
            advice = os.POSIX_FADV_NORMAL if on else os.POSIX_FADV_RANDOM
            os.posix_fadvise(self.fileno(), 0, 0, advice)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __reduce__(self) -> tuple[type[_Descriptor], tuple[str]]:
        return _Descriptor, (self.path,)

    def __del__(self) -> None:
        self.close()


# Finding the source


def resolve_source(spec: str | None) -> str:
    """The source that --source names, else the variable IMAGENET_DIR, else the folder data/source."""
    if spec:
        return spec
    if os.environ.get(SOURCE_VARIABLE):
        return os.environ[SOURCE_VARIABLE]
    if os.path.isdir(DEFAULT_SOURCE):
        return DEFAULT_SOURCE
    raise ConfigError(
        f"no images to read: --source is not given, the variable {SOURCE_VARIABLE} is not set, and there is "
        f"no folder {DEFAULT_SOURCE}; expected one of them to be {KINDS}. "
        "To try it without any data: --source sample"
    )


def open_images(spec: str | None, split: str, *, seed: int = 0) -> ImageSet:
    """Opens the `split` ('train', 'val' or an alias) of the source `spec`; None takes `resolve_source`'s.

    `seed` is that of the built-in sample: 'sample', 'sample:N' (N training images a class) or
    'sample:N:SEED', whose own seed wins. Raises a ConfigError that says what was found and what to do if
    there is no such source or split.
    """
    spec = resolve_source(spec)
    split = next((ours for ours, names in SPLIT_NAMES.items() if split in names), split)
    kind, _, rest = spec.partition(":")
    if kind == "sample":
        return _open_sample(spec, split, seed)
    if kind == "torchvision":
        return _open_torchvision(rest, split)
    root = Path(spec).expanduser().absolute()
    if not root.exists():
        hint = " (a name and not a folder? did you mean 'sample'?)" if spec.lower().startswith("samp") else ""
        raise ConfigError(f"source '{spec}' does not exist{hint}; expected {KINDS}")
    if not root.is_dir():
        raise ConfigError(f"source '{spec}' is a file; give the folder that holds it: '{root.parent}'")
    try:
        return _open_folder(root, split)
    except OSError as error:
        raise ConfigError(f"source '{spec}' cannot be read: {error}; check its permissions") from error


def _open_sample(spec: str, split: str, seed: int) -> ImageSet:
    from vitlocal.data.sample import IMAGES_PER_CLASS, SampleImages

    numbers = spec.split(":")[1:]
    if len(numbers) > 2 or not all(re.fullmatch("[0-9]+", number) for number in numbers):
        raise ConfigError(f"source '{spec}': expected 'sample', 'sample:N' or 'sample:N:SEED' with whole numbers")
    per_class = int(numbers[0]) if numbers else IMAGES_PER_CLASS
    return SampleImages(split, per_class, int(numbers[1]) if len(numbers) == 2 else seed)


def _open_folder(root: Path, split: str) -> ImageSet:
    entries = sorted(entry for entry in os.listdir(root) if not entry.startswith("."))
    if not entries:
        raise ConfigError(f"source '{root}' is an empty folder; expected {KINDS}")
    folder = _split_folder(root, split)
    if folder is not None and not any(name.endswith(".parquet") for name in os.listdir(folder)):
        return FolderImages(root, split)
    if _shards(root):
        return ParquetImages(root, split)
    if any(re.fullmatch(r"ILSVRC2012_img_\w+\.tar", entry) for entry in entries):
        return TarImages(root, split)
    return FolderImages(root, split)


def _split_folder(root: Path, split: str) -> Path | None:
    names = SPLIT_NAMES.get(split, (split,))
    return next((root / name for name in names if (root / name).is_dir()), None)


def _known_split(name: str) -> str | None:
    """The split that a folder or shard is named for, under our name for it."""
    for ours, names in SPLIT_NAMES.items():
        if name in names:
            return ours
    return name if name == "test" else None


def _some(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "nothing"


def _same_classes(where: str, classes: Sequence[str], other: str, others: Sequence[str]) -> None:
    """Raises unless both splits have the same classes: else equal labels would mean different things."""
    if set(classes) == set(others):
        return
    missing, surplus = sorted(set(others) - set(classes)), sorted(set(classes) - set(others))
    raise ConfigError(
        f"{where} and {other} must have the same classes, got {len(classes)} and {len(others)}: "
        f"only in {where}: {_some(surplus, 3)}; only in {other}: {_some(missing, 3)}; add or remove these"
    )


# Folders


class FolderImages:
    """Images in root/<split>/<class>/, at any depth below the class; rows go by class, then by path."""

    def __init__(self, root: Path, split: str) -> None:
        self.spec = str(root)
        folder = _split_folder(root, split)
        if folder is None:
            folders = _class_folders(root)
            named = [name for name in folders if _known_split(name)]
            if split != "train" or named or not folders:
                found = [f"{name}/" for name in folders] or sorted(os.listdir(root))
                raise ConfigError(
                    f"source '{root}' has no split '{split}': expected a folder "
                    f"{' or '.join(SPLIT_NAMES.get(split, (split,)))} in it, or {KINDS.split(', ', 1)[1]}; "
                    f"found {_some(found)}. Move the images there, or name another --source or --split"
                )
            if len(folders) == 1 and _class_folders(root / folders[0]):
                raise ConfigError(
                    f"source '{root}' has but one folder, '{folders[0]}', with folders in it; expected folders "
                    f"of classes or splits. Did you mean '{root / folders[0]}'?"
                )
            folder = root  # root/<class>/ without splits
        self.classes = tuple(_class_folders(folder))
        if not self.classes:
            loose = sum(name.lower().endswith(SUFFIXES) for name in os.listdir(folder))
            found = f"{loose} images without a class folder" if loose else "no folders"
            raise ConfigError(f"'{folder}': expected one folder a class with its images, found {found}; sort them so")
        for other in ("train", "val"):
            sibling = _split_folder(root, other)
            if other != split and folder != root and sibling is not None:
                others = _class_folders(sibling)
                if others:
                    _same_classes(str(folder), self.classes, str(sibling), others)
        self.folder = str(folder)
        self._paths: list[str] = []
        counts = []
        for name in self.classes:
            paths = sorted(_image_paths(self.folder, name))
            if not paths:
                raise ConfigError(
                    f"class folder '{folder / name}' has no images ({', '.join(SUFFIXES)}); "
                    "add some, or remove the folder from every split"
                )
            self._paths += paths
            counts.append(len(paths))
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def __len__(self) -> int:
        return len(self._paths)

    def entry(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        path = os.path.join(self.folder, self._paths[index])
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; restore the file") from error

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.read(index), self.entry(index))


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _image_paths(folder: str, below: str) -> Iterator[str]:
    """Paths relative to `folder` of the images under its subfolder `below`; links are followed."""
    with os.scandir(os.path.join(folder, below)) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # such as ._name.jpg, which macOS leaves behind
                continue
            path = f"{below}/{entry.name}"
            if entry.name.lower().endswith(SUFFIXES):
                yield path
            elif entry.is_dir():
                yield from _image_paths(folder, path)


# The ILSVRC2012 tars


@dataclass(frozen=True)
class _Member:
    """A file in a tar: where its bytes lie in the (outermost) file."""

    name: str
    offset: int
    size: int


def _members(descriptor: int, start: int, end: int, where: str) -> Iterator[_Member]:
    """Lists the regular files of the tar in bytes [start, end) by reading nothing but its headers.

    Much faster than `tarfile`, which matters for the 1.28 million headers of ImageNet. Reads ustar, GNU and
    pax archives.
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
                f"{where}: no tar header at byte {offset}; the file is damaged, download it again"
            ) from None
        body = offset + 512
        offset = body + -(-size // 512) * 512
        if body + size > end:
            raise ConfigError(
                f"{where}: cut short: it should reach byte {body + size}, but ends at {end}; download it again"
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
        elif kind not in (b"g", b"K"):  # those go with the member to come
            long_name = None


class TarImages:
    """ImageNet as downloaded: ILSVRC2012_img_{train,val}.tar, read in place.

    The index of the members is made on opening, by seeking over the headers with a few threads. Rows and
    entries are those of the same images unpacked: by class, then by name.
    """

    def __init__(self, root: Path, split: str) -> None:
        path = root / f"ILSVRC2012_img_{split}.tar"
        if not path.is_file():
            found = sorted(name for name in os.listdir(root) if name.startswith("ILSVRC2012"))
            raise ConfigError(
                f"source '{root}' has no split '{split}': expected {path.name}, found {_some(found)}; "
                "download it from image-net.org to this folder"
            )
        self.spec = str(root)
        self._file = _Descriptor(str(path))
        self._file.read_ahead(False)
        rows = self._train_rows(path) if split == "train" else self._val_rows(root, path)
        self._file.read_ahead(True)
        if not rows:
            raise ConfigError(f"{path}: no images in it; download it again")
        rows.sort(key=lambda row: (row[0], row[1].name))
        self.classes = tuple(sorted({wnid for wnid, _ in rows}))
        train = root / "ILSVRC2012_img_train.tar"
        if split != "train" and train.is_file():
            outer = _Descriptor(str(train))
            inner = [_class_of(tar.name) for tar in _members(outer.fileno(), 0, train.stat().st_size, str(train))]
            _same_classes(path.name, self.classes, train.name, inner)
        places = {wnid: label for label, wnid in enumerate(self.classes)}
        self.labels = np.array([places[wnid] for wnid, _ in rows], np.int64)
        self._names = [os.path.basename(member.name) for _, member in rows]
        self._offsets = np.array([member.offset for _, member in rows], np.int64)
        self._sizes = np.array([member.size for _, member in rows], np.int64)

    def _train_rows(self, path: Path) -> list[tuple[str, _Member]]:
        """One tar a class, named for it, in the tar."""
        descriptor = self._file.fileno()

        def rows_of(tar: _Member) -> list[tuple[str, _Member]]:
            wnid = _class_of(tar.name)
            where = f"{path}, {tar.name}"
            members = _members(descriptor, tar.offset, tar.offset + tar.size, where)
            rows = [(wnid, member) for member in members if member.name.lower().endswith(SUFFIXES)]
            if not rows:
                raise ConfigError(f"{where}: no images in it; download {path.name} again")
            return rows

        tars = list(_members(descriptor, 0, path.stat().st_size, str(path)))
        for tar in tars:
            if not tar.name.endswith(".tar"):
                raise ConfigError(f"{path}: expected one tar a class in it, found '{tar.name}'; download it again")
        with ThreadPoolExecutor(16) as pool:  # the time goes into waiting for the disk
            return [row for rows in pool.map(rows_of, tars) for row in rows]

    def _val_rows(self, root: Path, path: Path) -> list[tuple[str, _Member]]:
        """All images in one tar, in the order of the names; their classes are in the devkit."""
        members = _members(self._file.fileno(), 0, path.stat().st_size, str(path))
        images = sorted((m for m in members if m.name.lower().endswith(SUFFIXES)), key=lambda member: member.name)
        wnids = _validation_wnids(root)
        if len(wnids) != len(images):
            raise ConfigError(
                f"{path} has {len(images)} images, but the devkit's ground truth has {len(wnids)} lines; "
                "download both again"
            )
        return list(zip(wnids, images, strict=True))

    def __len__(self) -> int:
        return len(self._names)

    def entry(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        try:
            descriptor = self._file.fileno()
            return _read_at(descriptor, int(self._offsets[index]), int(self._sizes[index]), self.entry(index))
        except OSError as error:
            raise DataError(f"{self._file.path} cannot be read: {error.strerror}; restore the file") from error

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.read(index), self.entry(index))


def _class_of(tar_name: str) -> str:
    return os.path.basename(tar_name).removesuffix(".tar")


def _validation_wnids(root: Path) -> list[str]:
    """The class of each validation image in the order of their names, from the devkit (packed or not)."""
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
            f"source '{root}' lacks ILSVRC2012_devkit_t12.tar.gz, which tells the classes of the validation "
            "images; download it from image-net.org to this folder"
        )
    for name in (truth, meta):
        if name not in found:
            raise ConfigError(f"{where} lacks {name}; download ILSVRC2012_devkit_t12.tar.gz from image-net.org again")

    loadmat = _scipy_loadmat()
    try:
        table = np.atleast_1d(loadmat(io.BytesIO(found[meta]), squeeze_me=True)["synsets"])
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if int(row["num_children"]) == 0}
        return [wnids[int(line)] for line in found[truth].split()]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"{where}: its ground truth and meta.mat do not fit each other ({error!r}); download it again"
        ) from error


def _scipy_loadmat() -> Any:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ConfigError(f"reading the devkit's meta.mat needs scipy ({error}); pip install scipy") from error
    return loadmat


# Parquet shards


CACHED_BYTES = 256 << 20  # of row groups, at least one


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"reading parquet shards needs pyarrow ({error}); pip install pyarrow") from error
    return pyarrow.parquet


def _shards(root: Path) -> dict[str, list[Path]]:
    """The shards by split: <split>-….parquet or <split>/….parquet in `root`, else in root/data."""
    shards: dict[str, list[Path]] = {}
    for folder in (root, root / "data"):
        for path in sorted(folder.glob("*.parquet")):
            word = re.split(r"[-_.]", path.stem)[0]
            shards.setdefault(_known_split(word) or word, []).append(path)
        for split in (*SPLIT_NAMES, "test"):
            inner = _split_folder(folder, split)
            if inner is not None and split not in shards:
                paths = sorted(inner.glob("*.parquet"))
                if paths:
                    shards[split] = paths
        if shards:
            break
    return shards


class ParquetImages:
    """Hugging Face's layout: parquet shards with a column of images ({bytes, path} or bytes), one of labels.

    Row groups are read whole and the last ones kept (up to `CACHED_BYTES`): quick in the order of the rows,
    slow at random, so write such a source to .beton files before training on it.
    """

    def __init__(self, root: Path, split: str) -> None:
        parquet = _parquet()
        shards = _shards(root)
        if not shards.get(split):
            raise ConfigError(
                f"source '{root}' has no split '{split}': expected shards named {split}-00000-of-….parquet, "
                f"found {_some(sorted(shards))}; rename or download them"
            )
        self.spec = str(root)
        self._root = root
        self._paths = [str(path) for path in shards[split]]
        self._names = [path.relative_to(root).as_posix() for path in shards[split]]
        first = _open_shard(parquet, self._paths[0])
        self._image, label, names = _columns(first.schema_arrow, self._paths[0])

        labels, shard_of, group_of, rows = [], [], [], []
        for shard, path in enumerate(self._paths):
            file = first if shard == 0 else _open_shard(parquet, path)
            try:
                column = file.read([label], use_threads=False).column(0)
            except Exception as error:
                raise ConfigError(
                    f"{path}: its column '{label}' cannot be read ({error}); download it again"
                ) from error
            if column.null_count or not _is_integer(column.type):
                raise ConfigError(
                    f"{path}: expected whole numbers in column '{label}', got {column.type} with "
                    f"{column.null_count} empty; name a source whose split '{split}' has labels"
                )
            labels.append(column.to_numpy().astype(np.int64))
            for group in range(file.metadata.num_row_groups):
                shard_of.append(shard)
                group_of.append(group)
                rows.append(file.metadata.row_group(group).num_rows)
            file.close()
        self.labels = np.concatenate(labels)
        if not len(self.labels):
            raise ConfigError(f"source '{root}': the shards of split '{split}' have no rows; download them again")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or (names and high >= len(names)):
            raise ConfigError(
                f"source '{root}': split '{split}' has labels {low}..{high}, expected "
                f"0..{len(names) - 1 if names else 'K-1'}; name a source whose split has labels (a test "
                "split often has none)"
            )
        self.classes = tuple(names) if names else tuple(str(k) for k in range(high + 1))
        self._check_train(parquet, shards, split)
        self._shard_of = np.array(shard_of, np.int64)  # of each row group
        self._group_of = np.array(group_of, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)  # first row of each row group
        self._shard_rows = np.array([self._starts[np.searchsorted(shard_of, s)] for s in range(len(self._paths))])
        self._forget()

    def _check_train(self, parquet: Any, shards: dict[str, list[Path]], split: str) -> None:
        """Compares with the training split's class names, or where none are stored, takes their number."""
        if split == "train" or not shards.get("train"):
            return
        first = _open_shard(parquet, str(shards["train"][0]))
        _, label, names = _columns(first.schema_arrow, str(shards["train"][0]))
        first.close()
        if names:
            if list(self.classes) != list(names):
                _same_classes(f"split '{split}'", self.classes, "split 'train'", names)
                raise ConfigError(f"source '{self.spec}': splits '{split}' and 'train' order their classes differently")
            return
        most = 0
        for path in shards["train"]:
            file = _open_shard(parquet, str(path))
            most = max(most, int(file.read([label], use_threads=False).column(0).to_numpy().max(initial=0)) + 1)
            file.close()
        if len(self.classes) > most:
            raise ConfigError(
                f"source '{self.spec}': split '{split}' has labels up to {len(self.classes) - 1}, "
                f"but 'train' only up to {most - 1}; expected the same classes in both"
            )
        self.classes = tuple(str(k) for k in range(most))

    def _forget(self) -> None:
        self._process = os.getpid()
        self._files: dict[int, Any] = {}
        self._groups: OrderedDict[int, Any] = OrderedDict()  # row group -> Arrow array of its images' bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_groups": OrderedDict(), "_process": -1}

    def __len__(self) -> int:
        return len(self.labels)

    def entry(self, index: int) -> str:
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._shard_rows, index, side="right")) - 1
        return f"{self._names[shard]}/{index - int(self._shard_rows[shard])}"

    def read(self, index: int) -> bytes:
        index = range(len(self))[index]
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        data = self._bytes_of(group)[index - int(self._starts[group])].as_py()
        if data is None:
            raise DataError(
                f"{self.entry(index)}: its row stores no image, only a path to one; download shards that "
                "embed the images, or leave such rows out with --on-error skip"
            )
        return data

    def _bytes_of(self, group: int) -> Any:
        if self._process != os.getpid():  # after a fork: Arrow's handles are the parent's
            self._forget()
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        shard = int(self._shard_of[group])
        try:
            if shard not in self._files:
                for file in self._files.values():
                    file.close()
                self._files = {shard: _open_shard(_parquet(), self._paths[shard])}
            file = self._files[shard]
            table = file.read_row_group(int(self._group_of[group]), columns=[self._image], use_threads=False)
            column = table.column(0).combine_chunks()
        except Exception as error:  # Arrow raises OSError, ArrowInvalid and others on corrupt data
            raise DataError(f"{self._paths[shard]} cannot be read: {error}; download it again") from error
        if hasattr(column.type, "num_fields") and column.type.num_fields:
            column = column.field("bytes")
        self._groups[group] = column
        while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > CACHED_BYTES:
            self._groups.popitem(last=False)
        return column

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.read(index), self.entry(index))


def _open_shard(parquet: Any, path: str) -> Any:
    try:
        return parquet.ParquetFile(path)
    except Exception as error:
        raise ConfigError(f"{path} is not a whole parquet file ({error}); download it again") from error


def _is_integer(kind: Any) -> bool:
    from pyarrow import types

    return types.is_integer(kind)


def _columns(schema: Any, path: str) -> tuple[str, str, list[str]]:
    """The column of the images' bytes, that of the labels, and the class names if the schema tells them."""
    from pyarrow import types

    features: dict[str, Any] = {}
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        pass  # written by something else
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}

    def pick(kind: str, *usual: str) -> str:
        named = [name for name in schema.names if kinds.get(name) == kind]
        columns = [name for name in usual if name in schema.names and (not named or name in named)] or named
        if not columns:
            raise ConfigError(f"{path}: expected a column {' or '.join(usual)}, found {_some(schema.names)}; rename it")
        return columns[0]

    image, label = pick("Image", "image", "img"), pick("ClassLabel", "label", "labels", "fine_label")
    kind = schema.field(image).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        image = f"{image}.bytes"
    elif not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise ConfigError(f"{path}: expected encoded images in column '{image}', got {kind}; name another source")
    names = features.get(label, {}).get("names") if label in features else None
    return image, label, [str(name) for name in names or []]


# torchvision's sets


class TorchvisionImages:
    """A set of torchvision.datasets by its name; the dataset is built anew in each process that reads."""

    def __init__(self, spec: str, name: str, root: str, split: str, arguments: dict[str, Any]) -> None:
        self.spec = spec
        self._name, self._root, self._split, self._arguments = name, root, split, arguments
        dataset = self._dataset
        self.labels = _dataset_labels(dataset, spec)
        if not len(self.labels):
            raise ConfigError(f"source '{spec}', split '{split}' is empty; name another source")
        self.classes = _dataset_classes(dataset, int(self.labels.max()) + 1)

    @functools.cached_property
    def _dataset(self) -> Any:
        from torchvision import datasets

        return getattr(datasets, self._name)(**self._arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_dataset"}

    def __len__(self) -> int:
        return len(self.labels)

    def entry(self, index: int) -> str:
        return f"{self._split}/{range(len(self))[index]}"

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        self.load(index).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def load(self, index: int) -> Image.Image:
        index = range(len(self))[index]
        try:
            return to_rgb(self._dataset[index][0])
        except Exception as error:
            raise DataError(
                f"{self.entry(index)} of {self.spec} cannot be read ({error}); "
                f"remove '{self._root}' to download it anew"
            ) from error


def _open_torchvision(rest: str, split: str) -> ImageSet:
    """'NAME' or 'NAME:ROOT'; the split becomes torchvision's train=…, split=… by the set's signature."""
    name, _, given = rest.partition(":")
    root = str(Path(given).expanduser().absolute()) if given else TORCHVISION_ROOT
    spec = f"torchvision:{name}:{root}" if given else f"torchvision:{name}"
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ConfigError(f"source '{spec}' needs torchvision ({error}); pip install torchvision") from error
    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and name in datasets.__all__):
        raise ConfigError(
            f"source '{spec}': torchvision.datasets has no '{name}'; expected a name such as CIFAR10, "
            "Flowers102, Food101 or Imagenette, in this spelling"
        )
    if split not in SPLIT_NAMES:
        raise ConfigError(f"source '{spec}' has no split '{split}'; expected 'train' or 'val'")
    takes = inspect.signature(kind.__init__).parameters
    base: dict[str, Any] = {"root": root} if "root" in takes else {}
    if "train" in takes:
        choices = [{"train": split == "train"}]
    elif "split" in takes:
        words = ("train", "trainval") if split == "train" else ("val", "valid", "validation", "test")
        choices = [{"split": word} for word in words]
    elif "random_offset" in takes:  # FakeData: other seeds, other images
        size = int(takes["size"].default)
        base |= {"image_size": (3, 32, 32)}  # all are made once for their labels
        choices = [{"random_offset": 0 if split == "train" else size}]
    elif split == "train":
        choices = [{}]
    else:
        raise ConfigError(f"source '{spec}' is one set without splits, so it has no '{split}'; name another source")
    downloads = [{"download": False}, {"download": True}] if "download" in takes else [{}]
    refusals: list[str] = []
    for download in downloads:
        if download.get("download"):
            os.makedirs(root, exist_ok=True)
        for choice in choices:
            arguments = {**base, **choice, **download}
            try:
                images = TorchvisionImages(spec, name, root, split, arguments)
            except ConfigError:
                raise
            except Exception as error:  # RuntimeError: not there; ValueError: no such split; URLError: no network …
                if not (isinstance(error, ValueError) and "split" in str(error)):
                    refusals.append(f"{type(error).__name__}: {error}")
                continue
            images._arguments.pop("download", None)  # it is there now; workers only read
            return images
    problem = refusals[-1] if refusals else "no such split"
    raise ConfigError(
        f"source '{spec}', split '{split}' could not be opened from '{root}': {problem}. Download it there "
        f"with torchvision on a machine with a network, or name its folder: torchvision:{name}:FOLDER"
    )


def _dataset_labels(dataset: Any, spec: str) -> np.ndarray:
    """(n,) int64 labels from wherever the set keeps them, else by reading every item once."""
    count = len(dataset)
    for name in ("targets", "labels", "_labels", "_samples", "samples"):
        kept = getattr(dataset, name, None)
        if kept is None or not hasattr(kept, "__len__") or len(kept) != count or not count:
            continue
        if name.endswith("samples"):
            kept = [item[1] for item in kept]
        try:
            labels = np.asarray(kept)
        except ValueError:
            continue
        if labels.ndim == 1 and labels.dtype.kind in "iu":
            return labels.astype(np.int64)
    labels = [dataset[index][1] for index in range(count)]
    try:
        flat = np.array([int(label) for label in labels], np.int64)
    except (TypeError, ValueError):
        raise ConfigError(
            f"source '{spec}': expected one class an image, got {labels[0]!r}; name another set"
        ) from None
    return flat


def _dataset_classes(dataset: Any, least: int) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if names is None and isinstance(getattr(dataset, "class_to_idx", None), dict):
        names = sorted(dataset.class_to_idx, key=dataset.class_to_idx.get)
    if names is None or len(names) < least:
        return tuple(str(k) for k in range(least))
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in names)
