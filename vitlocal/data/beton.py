"""FFCV's .beton format, version 2: its layout, the head of a file, and files in memory.

A file holds a header, one descriptor for each field, one metadata row for each sample, the encoded images, and a table
of allocations, which says which bytes belong to which sample. FFCV's cache reads whole pages, so an image never crosses
a multiple of the page size, counted from the start of the file.
"""

import os
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

MIN_PAGE = 1 << 21
MAX_EDGE = 65500  # of JPEG; width and height are stored in 16 bits

_FIELDS = (("image", IMAGE_FIELD), ("label", INT_FIELD))
_METADATA_START = HEADER.itemsize + len(_FIELDS) * FIELD.itemsize


def page_size_for(largest: int, default: int = 1 << 23) -> int:
    """The page size in bytes, a power of two, that holds an image of ``largest`` bytes."""
    return max(default, 1 << (largest - 1).bit_length())


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


_REMEDY = "Remove the .beton files and the .json file of its split, and write the split again with the same command"


class MappedFile:
    """A .beton file of ours or of FFCV in memory, checked except for its pixels.

    ``bytes`` (uint8) is the file, ``rows`` (n,) of native.ROW are its images, and ``labels`` (n,) int64 are less than
    ``classes``, if given. Raises DataError with the file, the problem and the remedy. The check detects a file that is
    cut off anywhere, because the table of allocations ends it.
    """

    def __init__(self, path: Path, classes: int | None = None):
        self.path = path
        self._require(path.exists(), "does not exist")
        with open(path, "rb") as file:
            self.page_size, self.rows, self.labels = self._read(file, classes)
        self.bytes = np.memmap(path, np.uint8, mode="r")

    def _require(self, holds: bool | np.bool_, what: str) -> None:
        if not holds:
            raise DataError(f"{self.path}: {what}. {_REMEDY}")

    def _read(self, file: BinaryIO, classes: int | None) -> tuple[int, np.ndarray, np.ndarray]:
        """The page size, the images and the labels."""
        length, require = os.fstat(file.fileno()).st_size, self._require

        def read(dtype: np.dtype, count: int, what: str) -> np.ndarray:
            fits = count <= (length - file.tell()) // dtype.itemsize
            require(fits, f"cut off: its {length} bytes end in its {what}")
            return np.frombuffer(file.read(count * dtype.itemsize), dtype)

        header = read(HEADER, 1, "header")[0]
        version, page = int(header["version"]), int(header["page_size"])
        count, table_at = int(header["num_samples"]), int(header["alloc_table_ptr"])
        require(version == VERSION, f"not a .beton file of FFCV: format version {version}, expected {VERSION}")
        valid_page = page >= MIN_PAGE and not page & (page - 1)
        require(valid_page, f"not a .beton file of FFCV: page size {page}, expected a power of two from {MIN_PAGE}")
        number = int(header["num_fields"])
        require(number == len(_FIELDS), f"has {number} fields, expected two, image and label")
        fields = read(FIELD, number, "field descriptors")
        names = [field["name"].tobytes().split(b"\0")[0].decode("latin-1") for field in fields]
        found, wanted = dict(zip(names, fields["type_id"].tolist(), strict=True)), dict(_FIELDS)
        require(
            found == wanted, f"has fields (name: type) {found}, expected an RGBImageField and an IntField: {wanted}"
        )
        require(count > 0, "holds no images")
        require(table_at > 0, "was never finished: it has no table of allocations")

        columns = np.dtype([("", {"image": IMAGE, "label": LABEL}[name]) for name in names], align=True)
        metadata = read(columns, count, f"metadata of {count} rows")
        image, label = metadata[f"f{names.index('image')}"], metadata[f"f{names.index('label')}"]
        start, end = file.tell(), table_at + count * ALLOCATION.itemsize
        require(length >= end, f"cut off: {length} bytes, expected {end}")
        whole = length == end and table_at >= start
        require(whole, f"damaged: {length} bytes, but its table of {count} allocations at {table_at} ends at {end}")
        file.seek(table_at)
        table = read(ALLOCATION, count, "table of allocations")

        ptr, size, places = table["ptr"], table["size"], image["data_ptr"]
        inside = (ptr >= start) & (ptr <= table_at) & (size > 0) & (size <= table_at - np.minimum(ptr, table_at))
        require(inside.all(), f"damaged: an image lies outside of the bytes {start}..{table_at}")
        in_page = (ptr & np.uint64(page - 1)) + size <= page
        require(in_page.all(), f"damaged: an image crosses the border of a page of {page} bytes")
        if not np.array_equal(ptr, places):  # FFCV's writer with several processes leaves the table unordered
            order = np.argsort(ptr, kind="stable")
            order = order[np.minimum(np.searchsorted(ptr, places, sorter=order), count - 1)]
            require(np.array_equal(ptr[order], places), "damaged: an image is not in the table of allocations")
            size = size[order]

        raw, width, height = image["mode"] == RAW, image["width"], image["height"]
        known = (image["mode"] <= RAW) & (width > 0) & (height > 0)
        require(known.all(), "damaged: an image has an unknown mode or no area")
        whole_pixels = size[raw] == 3 * width[raw].astype(np.uint64) * height[raw]
        require(whole_pixels.all(), "damaged: a raw image is not of width x height x 3 bytes")
        low, high = int(label.min()), int(label.max())
        fitting = classes is None or (low >= 0 and high < classes)
        require(fitting, f"has labels {low}..{high}, expected 0..{(classes or 0) - 1}")
        rows = np.zeros(count, ROW)
        rows["offset"], rows["bytes"], rows["raw"] = places, size, raw
        rows["width"], rows["height"] = width, height
        return page, rows, label
