"""The classes of validation images that lie in one folder or tar, from the list that comes with them."""

import base64
import csv
import io
import os
import tarfile
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from vitlocal.data.apart import Crashed, read_apart, read_synsets
from vitlocal.data.images.image_set import unreadable
from vitlocal.data.images.pixels import photo_suffixes
from vitlocal.errors import ConfigError
from vitlocal.reading import LARGEST_TEXT, open_regular, read_whole

TINY, KAGGLE = "val_annotations.txt", "LOC_val_solution.csv"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
LARGEST_PART = 1 << 26  # bytes of a file of the devkit; they have less than 1 MB
EXPECTED_LISTS = (
    f"Kaggle's {KAGGLE}, Tiny ImageNet's {TINY}, or ILSVRC2012_devkit_t12.tar.gz from image-net.org (with {TRUTH})"
)


class Solution(NamedTuple):
    """The class of each image. Images are named without the suffixes of photos."""

    path: Path
    classes: dict[str, str]


def image_id(path: str) -> str:
    """An image's name in a solution."""
    name = os.path.basename(path)
    return name[: name.rindex(".")] if name.lower().endswith(photo_suffixes()) else name


def find_solution(folder: Path, root: Path) -> Solution | None:
    """The list for the images of a folder: in it, in the source's root, or above it in the layout of Kaggle."""
    for place in dict.fromkeys((folder, root, *(root.parents[:3] if root.name == "CLS-LOC" else ()))):
        if (path := place / TINY).is_file():
            return _read_lines(path, csv.reader(io.StringIO(_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE))
        if (path := place / KAGGLE).is_file():
            return _read_lines(path, islice(csv.reader(io.StringIO(_text(path))), 1, None))
        if found := _read_devkit(place):
            return found
    return None


def _text(path: Path) -> str:
    try:
        return read_whole(path).decode("utf-8-sig")
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file ({error}); download it again") from error


def _read_lines(path: Path, lines: Iterable[list[str]]) -> Solution:
    """Lines are: image, class and perhaps boxes."""
    classes: dict[str, str] = {}
    try:
        rows = list(filter(None, lines))
    except csv.Error as error:
        raise ConfigError(f"{path} is not a list of images and classes ({error}); download it again") from error
    for line in rows:
        words = line[1].split() if len(line) > 1 else []
        image = image_id(line[0])
        if not words or classes.get(image, words[0]) != words[0]:
            raise ConfigError(
                f"{path}: expected one class for each image, got {line[:2]} after {len(classes)} images; "
                "download it again"
            )
        classes[image] = words[0]
    return Solution(path, classes)


def _read_devkit(place: Path) -> Solution | None:
    """The list of the ILSVRC2012 devkit, packed or unpacked."""
    devkits = sorted(place.glob("ILSVRC2012_devkit*"))
    folders = [folder for base in (place, *devkits) for folder in (base, base / "data") if (folder / TRUTH).is_file()]
    packed = [path for path in devkits if path.name.endswith((".tar.gz", ".tgz"))]
    found: dict[str, bytes] = {}
    if not folders and not packed:
        return None
    where = folders[0] if folders else packed[0]
    try:
        if folders:
            found = {name: read_whole(where / name, LARGEST_PART) for name in (TRUTH, META) if (where / name).is_file()}
        else:
            before = -1
            with open_regular(where) as opened, tarfile.open(fileobj=opened) as tar:
                for member in tar:
                    # A negative size of a member leads tarfile back to it, and a small file may unpack to terabytes.
                    if not before < member.offset < LARGEST_TEXT or not 0 <= member.size < LARGEST_PART:
                        raise tarfile.TarError(f"a file of {member.size} bytes at {member.offset}")
                    before = member.offset
                    file = tar.extractfile(member) if member.isfile() else None
                    if file and os.path.basename(member.name) in (TRUTH, META):
                        found[os.path.basename(member.name)] = file.read()
    except Exception as error:  # tarfile, gzip and zlib raise many kinds of errors on damaged data
        if isinstance(error, OSError) and error.errno:  # of the disk; gzip raises others
            raise unreadable(where, error) from error
        raise ConfigError(f"{where} cannot be read: {error}; download it again") from error
    for name in (TRUTH, META):
        if name not in found:
            raise ConfigError(f"{where} lacks {name}; download ILSVRC2012_devkit_t12.tar.gz from image-net.org again")
    if find_spec("scipy") is None:
        raise ConfigError("reading the devkit's meta.mat needs scipy; pip install scipy")
    try:
        (wnids,) = read_apart(read_synsets, [base64.b64encode(found[META]).decode()])
        if isinstance(wnids, str):
            raise ValueError(wnids)
        numbers = enumerate(found[TRUTH].split(), 1)
        return Solution(where, {f"ILSVRC2012_val_{k:08}": wnids[str(int(number))] for k, number in numbers})
    except (Crashed, KeyError, ValueError) as error:
        raise ConfigError(
            f"{where}: its ground truth and meta.mat do not match ({error!r}); download it again"
        ) from error
