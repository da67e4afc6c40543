"""FFCV's .beton format, version 2: its layout, the head of a file, and a check that reads no pixels.

A file holds a header, one descriptor for each field, one metadata row for each sample, the encoded images, and a table
of allocations, which says which bytes belong to which sample. FFCV's cache reads whole pages, so an image never crosses
a multiple of the page size, counted from the start of the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vitlocal.data.native import ROW
from vitlocal.errors import DataError

VERSION = 2
JPG, RAW = 0, 1  # `mode` of an image
MODES = {"jpg": JPG, "raw": RAW}
FLOAT_FIELD, INT_FIELD, IMAGE_FIELD = 0, 1, 2  # `type_id` of a field

_HEADER = {"version": "<u2", "num_fields": "<u2", "page_size": "<u4", "num_samples": "<u8", "alloc_table_ptr": "<u8"}
HEADER = np.dtype(list(_HEADER.items()), align=True)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
LABEL = np.dtype("<i8")
METADATA = np.dtype([("", IMAGE), ("", LABEL)], align=True)  # f0 is the image, f1 the label

MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31
MAX_EDGE = 65500  # of JPEG; width and height are stored in 16 bits

_FIELDS = (("image", IMAGE_FIELD), ("label", INT_FIELD))
_METADATA_START = HEADER.itemsize + len(_FIELDS) * FIELD.itemsize


def page_size_for(largest: int, default: int = 1 << 23) -> int:
    """The page size in bytes, a power of two, that holds an image of ``largest`` bytes."""
    page = default
    while page < largest:
        page *= 2
    if page > MAX_PAGE:
        raise DataError(f"an image of {largest} bytes exceeds the largest page, {MAX_PAGE} bytes; store a smaller side")
    return page


def data_start(rows: int) -> int:
    """The offset of the first image in a file with ``rows`` rows of metadata.

    FFCV starts the images on a new page. Here they share the first page with the metadata, which saves 8 MiB.
    """
    return -(-(_METADATA_START + rows * METADATA.itemsize) // 4096) * 4096


def head_bytes(metadata: np.ndarray, page_size: int, allocations_at: int) -> bytes:
    """The start of a file: header, field descriptors and ``metadata`` (n,) of METADATA."""
    header = np.zeros(1, HEADER)
    header["version"], header["num_fields"], header["page_size"] = VERSION, len(_FIELDS), page_size
    header["num_samples"], header["alloc_table_ptr"] = len(metadata), allocations_at
    fields = np.zeros(len(_FIELDS), FIELD)
    for field, (name, type_id) in zip(fields, _FIELDS, strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return header.tobytes() + fields.tobytes() + metadata.tobytes()


@dataclass(frozen=True)
class BetonInfo:
    """The head of a .beton file."""

    count: int
    bytes: int
    page_size: int
    modes: frozenset[str]  # of "raw" and "jpg"
    max_width: int
    max_height: int
    max_label: int


_REMEDY = "Remove the .beton files and the .json file of its split, and write the split again with the same command"


def check_beton(path: str | os.PathLike[str], classes: int | None = None) -> BetonInfo:
    """Checks a .beton file except its pixels; raises as :func:`read_beton` does."""
    return read_beton(path, classes)[0]


def read_beton(path: str | os.PathLike[str], classes: int | None = None) -> tuple[BetonInfo, np.ndarray, np.ndarray]:
    """Checks a .beton file of ours or of FFCV, except its pixels.

    Returns its head, its images as (n,) of native.ROW, and their labels, (n,) int64. Labels must be less than
    ``classes``, if given. Raises DataError with the file, the problem and the remedy. The check detects a file that is
    cut off anywhere, because the table of allocations ends it.
    """
    path = Path(path)

    def wrong(what: str) -> DataError:
        return DataError(f"{path}: {what}. {_REMEDY}")

    try:
        with open(path, "rb") as file:
            return _check(file, classes, wrong)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. {_REMEDY}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error


def _check(
    file: BinaryIO, classes: int | None, wrong: Callable[[str], DataError]
) -> tuple[BetonInfo, np.ndarray, np.ndarray]:
    length = os.fstat(file.fileno()).st_size

    def read(dtype: np.dtype, count: int, what: str) -> np.ndarray:
        if count > (length - file.tell()) // dtype.itemsize:
            raise wrong(f"cut off: its {length} bytes end in its {what}")
        return np.frombuffer(file.read(count * dtype.itemsize), dtype)

    header = read(HEADER, 1, "header")[0]
    version, page = int(header["version"]), int(header["page_size"])
    count, table_at = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if version != VERSION:
        raise wrong(f"not a .beton file of FFCV: format version {version}, expected {VERSION}")
    if page < MIN_PAGE or page & (page - 1):
        raise wrong(f"not a .beton file of FFCV: page size {page}, expected a power of two from {MIN_PAGE}")
    if int(header["num_fields"]) != len(_FIELDS):
        raise wrong(f"has {int(header['num_fields'])} fields, expected two, image and label")
    fields = read(FIELD, len(_FIELDS), "field descriptors")
    names = [field["name"].tobytes().split(b"\0")[0].decode("latin-1") for field in fields]
    found = dict(zip(names, (int(field["type_id"]) for field in fields), strict=True))
    if found != dict(_FIELDS):
        raise wrong(f"has fields (name: type) {found}, expected an RGBImageField and an IntField: {dict(_FIELDS)}")
    if count == 0:
        raise wrong("holds no images")
    if table_at == 0:
        raise wrong("was never finished: it has no table of allocations")

    columns = np.dtype([("", {"image": IMAGE, "label": LABEL}[name]) for name in names], align=True)
    metadata = read(columns, count, f"metadata of {count} rows")
    image, label = metadata[f"f{names.index('image')}"], metadata[f"f{names.index('label')}"]
    start = file.tell()
    expected = table_at + count * ALLOCATION.itemsize
    if length < expected:
        raise wrong(f"cut off: {length} bytes, expected {expected}")
    if length > expected or table_at < start:
        raise wrong(f"damaged: {length} bytes, but its table of {count} allocations at {table_at} ends at {expected}")
    file.seek(table_at)
    table = read(ALLOCATION, count, "table of allocations")

    ptr, size = table["ptr"], table["size"]
    outside = (ptr < start) | (ptr > table_at) | (size > table_at - np.minimum(ptr, table_at)) | (size == 0)
    if outside.any():
        at = int(np.argmax(outside))
        raise wrong(f"damaged: an image of {int(size[at])} bytes at {int(ptr[at])} lies outside {start}..{table_at}")
    if ((ptr & np.uint64(page - 1)) + size > page).any():
        raise wrong(f"damaged: an image crosses the border of a page of {page} bytes")
    wanted = image["data_ptr"]
    if not np.array_equal(ptr, wanted):  # FFCV's writer with several processes leaves the table unordered
        order = np.argsort(ptr, kind="stable")
        place = np.minimum(np.searchsorted(ptr, wanted, sorter=order), count - 1)
        if not np.array_equal(ptr[order[place]], wanted):
            raise wrong("damaged: an image is not in the table of allocations")
        size = size[order[place]]

    mode, width, height = image["mode"], image["width"], image["height"]
    if (mode > RAW).any() or (width == 0).any() or (height == 0).any():
        raise wrong("damaged: an image has an unknown mode or no area")
    if (size[mode == RAW] != 3 * width[mode == RAW].astype(np.uint64) * height[mode == RAW]).any():
        raise wrong("damaged: a raw image is not of width x height x 3 bytes")
    low, high = int(label.min()), int(label.max())
    if classes is not None and (low < 0 or high >= classes):
        raise wrong(f"has labels {low}..{high}, expected 0..{classes - 1}")
    rows = np.zeros(count, ROW)
    rows["offset"], rows["bytes"], rows["raw"] = wanted, size, mode == RAW
    rows["width"], rows["height"] = width, height
    modes = frozenset(name for name, code in MODES.items() if (mode == code).any())
    return BetonInfo(count, length, page, modes, int(width.max()), int(height.max()), high), rows, label
