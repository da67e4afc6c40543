"""The further fields of a .beton file, as FFCV stores them: numbers, arrays, bytes and JSON beside image and label."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vitlocal.errors import ConfigError

FLOAT, INT, IMAGE, BYTES, ARRAY, JSON, TENSOR = range(7)  # FFCV's `type_id`
_KINDS = {"float": FLOAT, "int": INT, "bytes": BYTES, "array": ARRAY, "json": JSON}
_SPAN = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_COLUMNS = {FLOAT: np.dtype("<f8"), INT: np.dtype("<i8"), BYTES: _SPAN, ARRAY: np.dtype("<u8"), JSON: _SPAN}
ARGUMENT_BYTES = 1024  # of a field's description
_ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
NAME_BYTES = 16
LARGEST_VALUE = 1 << 32  # bytes of an array, as of a page

EXPECTED = "expected int, float, bytes, json, or an array's (dtype, shape)"
CENTRE_SQUARE = "centre square"  # the crop of latents: vitlocal.data.crops.centre_squares


@dataclass(frozen=True)
class FieldType:
    """The type of a further field. Arrays have a ``dtype`` and a ``shape`` that all samples share."""

    type_id: int
    dtype: np.dtype = np.dtype(np.uint8)
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, name: str, given: Any) -> "FieldType":
        """The type that a user gives: "int", "float", "bytes", "json", or the (dtype, shape) of an array."""
        if isinstance(given, str) and given in _KINDS and given != "array":
            return cls(_KINDS[given])
        try:
            if isinstance(given, str):
                raise TypeError
            dtype, shape = given
            found = cls(ARRAY, np.dtype(dtype), tuple(int(side) for side in shape))
            torch.from_numpy(np.zeros(1, found.dtype))  # else it could be stored, but not read
        except (TypeError, ValueError):
            raise ConfigError(f"fields: {name!r} has the type {given!r}, {EXPECTED}") from None
        if not found.shape or min(found.shape) < 1:
            raise ConfigError(f"fields: {name!r} has the shape {found.shape}, expected one without zeros")
        return found

    @classmethod
    def stored(cls, type_id: int, arguments: np.ndarray) -> "FieldType":
        """The type that the descriptor of a file says. ``arguments`` is (1024,) uint8."""
        if type_id not in (ARRAY, TENSOR):
            return cls(type_id)
        head = arguments[: _ARRAY_ARGUMENTS.itemsize].view(_ARRAY_ARGUMENTS)[0]
        text = arguments[_ARRAY_ARGUMENTS.itemsize :][: int(head["type_length"])].tobytes()
        ((_, name),) = json.loads(text)
        found = cls(ARRAY, np.dtype(name), tuple(int(side) for side in head["shape"] if side))
        if found.dtype.kind not in "biufc" or found.dtype.itemsize * math.prod(found.shape) > LARGEST_VALUE:
            raise ValueError(f"{found}, expected numbers of at most {LARGEST_VALUE} bytes")
        return found

    def __str__(self) -> str:
        kinds = {number: name for name, number in _KINDS.items()}
        return f"{self.dtype} {list(self.shape)}" if self.type_id == ARRAY else kinds[self.type_id]

    @property
    def column(self) -> np.dtype:
        """The field's part of a metadata row."""
        return _COLUMNS[self.type_id]

    @property
    def is_number(self) -> bool:
        return self.type_id in (FLOAT, INT)

    @property
    def arguments(self) -> np.ndarray:
        """The description of an array for the file, (1024,) uint8; zeros for other types."""
        found = np.zeros(ARGUMENT_BYTES, np.uint8)
        if self.type_id == ARRAY:
            head = np.zeros(1, _ARRAY_ARGUMENTS)
            head["shape"][0, : len(self.shape)] = self.shape
            text = json.dumps(self.dtype.descr).encode("ascii")
            head["type_length"] = len(text)
            described = head.tobytes() + text
            found[: len(described)] = np.frombuffer(described, np.uint8)
        return found

    def encode(self, value: Any) -> bytes:
        """The bytes of a value. Raises ValueError or TypeError if it has another type."""
        if self.type_id == INT:
            if int(value) != value:
                raise ValueError(f"expected a whole number, got {value!r}")
            return np.array(int(value), "<i8").tobytes()
        if self.type_id == FLOAT:
            return np.array(float(value), "<f8").tobytes()
        if self.type_id == JSON:
            return json.dumps(value).encode() + b"\0"  # FFCV's mark of the end
        if self.type_id == BYTES:
            if isinstance(value, np.ndarray) and value.dtype != np.uint8:
                raise TypeError(f"expected bytes, got an array of {value.dtype}")
            return value.tobytes() if isinstance(value, np.ndarray) else bytes(memoryview(value))
        array = np.asarray(value)
        stored = array.astype(self.dtype)
        exact = array.dtype.kind in "fc" or np.array_equal(stored, array)  # fractions may be rounded
        if array.shape != self.shape or not exact or (array.dtype.kind in "fc" and self.dtype.kind not in "fc"):
            raise ValueError(f"expected {self.dtype} of shape {self.shape}, got {array.dtype} of shape {array.shape}")
        return stored.tobytes()

    def spans(self, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the values of a metadata ``column`` (n,) are in the file: offsets and sizes, (n,) uint64."""
        if self.type_id == ARRAY:
            size = self.dtype.itemsize * math.prod(self.shape)
            return column, np.full(len(column), size, np.uint64)
        return column["ptr"], column["size"]

    def read(self, read: Callable[[np.ndarray, np.ndarray], np.ndarray], column: np.ndarray) -> Any:
        """The values of a metadata ``column`` (B,). ``read`` joins parts of the file: see :meth:`MappedFile.read`.

        Numbers are a tensor (B,), arrays a tensor (B, *shape), bytes and JSON a list.
        """
        if self.is_number:
            return torch.from_numpy(column.copy())
        offsets, sizes = self.spans(column)
        joined = read(offsets, sizes)
        if self.type_id == ARRAY:
            values = joined.view(self.dtype).reshape(-1, *self.shape)
            return torch.from_numpy(values.astype(self.dtype.newbyteorder("="), copy=False))
        found = np.split(joined, np.cumsum(sizes.astype(np.int64)))[:-1]
        if self.type_id == BYTES:
            return [part.tobytes() for part in found]
        return [json.loads(part.tobytes().split(b"\0")[0]) for part in found]


@dataclass(frozen=True)
class LatentForm:
    """The latents that a split stores instead of photos, and the autoencoder that made them."""

    channels: int  # C
    stride: int  # px of the image per latent cell, in each direction
    scaling_factor: float  # the model is fed (mean + std x noise) x scaling_factor
    autoencoder: str  # its digest; "" if it is unknown
    crop: str = CENTRE_SQUARE

    def field(self, side: int) -> FieldType:
        """The stored array of a photo of ``side`` px: [plain, mirrored][mean of C channels, their std].

        Its float16 values are stored as int16 of the same bits, because numba, and so FFCV's loader, has no float16.
        """
        cells = side // self.stride
        return FieldType(ARRAY, np.dtype("<i2"), (2, 2 * self.channels, cells, cells))

    def is_stored_as(self, found: FieldType | None, side: int) -> bool:
        """Whether a file's array is that of a photo of ``side`` px. Files of FFCV may have float16."""
        expected = self.field(side)
        return found is not None and found in (expected, replace(expected, dtype=np.dtype("<f2")))


def field_types(given: Mapping[str, Any] | None) -> dict[str, FieldType]:
    """The types of the fields that a user gives by name. ConfigError for a wrong name or type."""
    if not isinstance(given or {}, Mapping):
        raise ConfigError(f"fields: got {given!r}, expected a mapping from names to types")
    for name in given or {}:
        if (
            not isinstance(name, str)
            or "\0" in name
            or not name.isascii()
            or not 0 < len(name) <= NAME_BYTES
            or name in ("image", "label")
        ):
            raise ConfigError(
                f"fields: got the name {name!r}, expected 1 to {NAME_BYTES} ASCII characters, not image or label"
            )
    return {name: FieldType.of(name, kind) for name, kind in (given or {}).items()}


def require_fields(wanted: Sequence[str], present: Mapping[str, FieldType], path: object) -> None:
    """Raises ConfigError unless a file has all ``wanted`` fields."""
    if missing := [name for name in wanted if name not in present]:
        has = ", ".join(present) or "none"
        raise ConfigError(f"fields: {path} has no field {missing[0]!r}; its fields beside image and label: {has}")
