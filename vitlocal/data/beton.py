"""FFCV's .beton format, version 2: its layout, the head of a file, and files in memory.

A file holds a header, one descriptor for each field, one metadata row for each sample, the encoded images, and a table
of allocations, which says which bytes belong to which sample. FFCV's cache reads whole pages, so an image never crosses
a multiple of the page size, counted from the start of the file. Files of latents have arrays in place of the images.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vitlocal.data.fields import ARGUMENT_BYTES, ARRAY, NAME_BYTES, TENSOR, FieldType
from vitlocal.data.fields import IMAGE as IMAGE_FIELD
from vitlocal.data.fields import INT as INT_FIELD
from vitlocal.data.native import ROW, read_parts
from vitlocal.errors import DataError
from vitlocal.machine import memory
from vitlocal.reading import open_regular

VERSION = 2
JPG, RAW = 0, 1  # `mode` of an image
MODES = {"jpg": JPG, "raw": RAW}

_HEADER = {"version": "<u2", "num_fields": "<u2", "page_size": "<u4", "num_samples": "<u8", "alloc_table_ptr": "<u8"}
HEADER = np.dtype(list(_HEADER.items()), align=True)
FIELD = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", NAME_BYTES)), ("arguments", ("<u1", (ARGUMENT_BYTES,)))], align=True
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
LABEL = np.dtype("<i8")
PHOTO = FieldType(IMAGE_FIELD)
LATENT = "latent"  # the name of the field that files of latents have in place of the image

MIN_PAGE = 1 << 21
MAX_EDGE = 65500  # of JPEG; width and height are stored in 16 bits

Fields = Mapping[str, FieldType]  # those beside image and label
NO_FIELDS: Fields = {}


def page_size_for(largest: int, default: int = 1 << 23) -> int:
    """The page size in bytes, a power of two, that holds an image of ``largest`` bytes."""
    return max(default, 1 << (largest - 1).bit_length())


def metadata_type(fields: Fields = NO_FIELDS, first: FieldType = PHOTO) -> np.dtype:
    """A row of metadata in our files: f0 is ``first``, f1 the label, and the further ``fields`` follow."""
    return _metadata_type([first, FieldType(INT_FIELD), *fields.values()])


def _metadata_type(fields: Iterable[FieldType]) -> np.dtype:
    return np.dtype([("", IMAGE if field.type_id == IMAGE_FIELD else field.column) for field in fields], align=True)


def data_start(rows: int, fields: Fields = NO_FIELDS, first: FieldType = PHOTO) -> int:
    """The offset of the first image in a file with ``rows`` rows of metadata.

    FFCV starts the images on a new page. Here they share the first page with the metadata, which saves 8 MiB.
    """
    head = HEADER.itemsize + (2 + len(fields)) * FIELD.itemsize
    return -(-(head + rows * metadata_type(fields, first).itemsize) // 4096) * 4096


def head_bytes(
    metadata: np.ndarray, fields: Fields, page_size: int, allocations_at: int, first: FieldType = PHOTO
) -> bytes:
    """The start of a file: header, field descriptors and ``metadata`` (n,) of :func:`metadata_type`."""
    named = {"image" if first == PHOTO else LATENT: first, "label": FieldType(INT_FIELD), **fields}
    header = np.zeros(1, HEADER)
    header["version"], header["num_fields"], header["page_size"] = VERSION, len(named), page_size
    header["num_samples"], header["alloc_table_ptr"] = len(metadata), allocations_at
    described = np.zeros(len(named), FIELD)
    for row, (name, field) in zip(described, named.items(), strict=True):
        row["type_id"], row["arguments"] = field.type_id, field.arguments
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return header.tobytes() + described.tobytes() + metadata.tobytes()


_REMEDY = "Remove the .beton files and the .json file of its split, and write the split again with the same command"


class MappedFile:
    """A .beton file of ours or of FFCV in memory, checked except for its pixels.

    ``bytes`` (uint8) is the file, ``rows`` (n,) of native.ROW are its images, and ``labels`` (n,) int64 are less than
    ``classes``, if given. The images are its first field of images. The labels are its integers named "label", else its
    first ones. ``fields`` are the others, which :meth:`values` reads.

    A file without images has its array "latent" in their place: ``latent`` is its type, and ``rows`` has the offset and
    the bytes of each array. Their values are not checked.

    Raises DataError with the file, the problem and the remedy. The check detects a file that is cut off anywhere,
    because the table of allocations ends it.
    """

    def __init__(self, path: Path, classes: int | None = None):
        self.path = path
        self._require(path.exists(), "does not exist")
        self.fields: dict[str, FieldType] = {}
        self.latent: FieldType | None = None
        self._columns: dict[str, np.ndarray] = {}
        try:
            with open_regular(path) as file:
                self.page_size, self.rows, self.labels = self._read(file, classes)
                self.bytes = np.memmap(file, np.uint8, mode="r")
            self.bytes.filename = str(path)  # for messages
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror or error}; check its disk, or restore it"
            ) from error

    def values(self, name: str, rows: np.ndarray) -> Any:
        """The values of a further field for ``rows`` (B,) int64; see :meth:`FieldType.read`."""
        return self.fields[name].read(self.read, self._columns[name][rows])

    def read(self, offsets: np.ndarray, sizes: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The parts of the file at ``offsets`` (n,) of ``sizes`` (n,), joined in ``out``: (bytes,) uint8.

        Raises DataError if they cannot be read.
        """
        self.check()
        return read_parts(self.bytes, offsets, sizes, out)

    def check(self) -> None:
        """Raises DataError if the file has become shorter. What is missing of its last page would read as zeros."""
        mapping: Any = self.bytes.base
        try:
            length = mapping.size()
        except OSError as error:  # its server is gone
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}; restore it") from error
        if length < len(self.bytes):
            raise DataError(f"{self.path} became shorter: it had {len(self.bytes)} bytes and has {length}; restore it")

    def _require(self, holds: bool | np.bool_, what: str) -> None:
        if not holds:
            raise DataError(f"{self.path}: {what}. {_REMEDY}")

    def _described(self, descriptors: np.ndarray) -> dict[str, FieldType]:
        """The type of each field, by name."""
        fields = {}
        for type_id, name, arguments in zip(*(descriptors[part] for part in FIELD.names or ()), strict=True):
            text = name.tobytes().split(b"\0")[0].decode("latin-1")
            self._require(type_id <= TENSOR, f"has a field {text!r} of an unknown type {type_id}")
            self._require(text not in fields, f"has two fields named {text!r}")
            try:
                fields[text] = FieldType.stored(int(type_id), arguments)
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{self.path}: damaged: the type of the field {text!r}: {error}. {_REMEDY}") from error
        return fields

    def _read(self, file: BinaryIO, classes: int | None) -> tuple[int, np.ndarray, np.ndarray]:
        """The page size, the images and the labels."""
        length, require = os.fstat(file.fileno()).st_size, self._require

        def read(dtype: np.dtype, count: int, what: str) -> np.ndarray:
            fits = count <= (length - file.tell()) // dtype.itemsize
            require(fits, f"cut off: its {length} bytes end in its {what}")
            # A file with holes may have any length.
            require(4 * count * dtype.itemsize <= memory(), f"needs more memory than there is for its {what}")
            return np.frombuffer(file.read(count * dtype.itemsize), dtype)

        header = read(HEADER, 1, "header")[0]
        version, page = int(header["version"]), int(header["page_size"])
        count, table_at = int(header["num_samples"]), int(header["alloc_table_ptr"])
        require(version == VERSION, f"not a .beton file of FFCV: format version {version}, expected {VERSION}")
        valid_page = page >= MIN_PAGE and not page & (page - 1)
        require(valid_page, f"not a .beton file of FFCV: page size {page}, expected a power of two from {MIN_PAGE}")
        fields = self._described(read(FIELD, int(header["num_fields"]), "field descriptors"))
        images = [name for name, field in fields.items() if field.type_id == IMAGE_FIELD]
        integers = [name for name, field in fields.items() if field.type_id == INT_FIELD]
        found = {name: field.type_id for name, field in fields.items()}
        latents = [LATENT] * (not images and LATENT in fields and fields[LATENT].type_id == ARRAY)
        self.latent = fields[LATENT] if latents else None
        payload = (images + latents)[:1]
        both = bool(payload and integers)
        expected = f"an RGBImageField, or an NDArrayField {LATENT!r}, and an IntField"
        require(both, f"has fields (name: type) {found}, expected {expected}")
        require(count > 0, "holds no images")
        require(table_at > 0, "was never finished: it has no table of allocations")

        metadata = read(_metadata_type(fields.values()), count, f"metadata of {count} rows")
        columns = {name: metadata[f"f{place}"] for place, name in enumerate(fields)}
        image, label = columns.pop(payload[0]), columns.pop("label" if "label" in integers else integers[0])
        self.fields, self._columns = {name: fields[name] for name in columns if name not in images}, columns
        # Each image and each value that is not a number has an allocation. FFCV may have allocated some twice.
        stored = {name: field for name, field in self.fields.items() if not field.is_number}
        least = count * (len(images or latents) + len(stored))
        start, end = file.tell(), table_at + least * ALLOCATION.itemsize
        require(length >= end, f"cut off: {length} bytes, expected {end}")
        allocations, rest = divmod(length - table_at, ALLOCATION.itemsize)
        whole = table_at >= start and not rest and (allocations == least or len(stored) + len(images or latents) > 1)
        require(whole, f"damaged: {length} bytes, but its table of {least} allocations at {table_at} ends at {end}")
        file.seek(table_at)
        table = read(ALLOCATION, allocations, "table of allocations")

        table = table[table["size"] > 0]  # an empty value begins where the next image does
        require(len(table) > 0, "damaged: its table of allocations is empty")
        ptr, size, places = table["ptr"], table["size"], image if self.latent else image["data_ptr"]

        def require_inside(ptr: np.ndarray, size: np.ndarray, what: str) -> None:
            inside = (ptr >= start) & (ptr <= table_at) & (size <= table_at - np.minimum(ptr, table_at))
            require(inside.all(), f"damaged: {what} lies outside of the bytes {start}..{table_at}")

        require_inside(ptr, size, "an image")
        for name, field in stored.items():
            require_inside(*field.spans(columns[name]), f"a value of {name!r}")
        in_page = (ptr & np.uint64(page - 1)) + size <= page
        require(in_page.all(), f"damaged: an image crosses the border of a page of {page} bytes")
        if not np.array_equal(ptr, places):  # FFCV's writer with several processes leaves the table unordered
            order = np.argsort(ptr, kind="stable")
            order = order[np.minimum(np.searchsorted(ptr, places, sorter=order), len(ptr) - 1)]
            require(np.array_equal(ptr[order], places), "damaged: an image is not in the table of allocations")
            size = size[order]

        rows = np.zeros(count, ROW)
        rows["offset"], rows["bytes"] = places, size
        if self.latent is not None:
            require((size == self.latent.spans(image)[1]).all(), f"damaged: a latent is not of {self.latent}")
        else:
            raw, width, height = image["mode"] == RAW, image["width"], image["height"]
            valid = (image["mode"] <= RAW) & (width > 0) & (height > 0)
            require(valid.all(), "damaged: an image has an unknown mode or no area")
            whole_pixels = size[raw] == 3 * width[raw].astype(np.uint64) * height[raw]
            require(whole_pixels.all(), "damaged: a raw image is not of width x height x 3 bytes")
            rows["raw"], rows["width"], rows["height"] = raw, width, height
        low, high = int(label.min()), int(label.max())
        fitting = classes is None or (low >= 0 and high < classes)
        require(fitting, f"has labels {low}..{high}, expected 0..{(classes or 0) - 1}")
        return page, rows, label
