"""Any indexable object of images and labels as an image set."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitlocal.data.fields import FieldType
from vitlocal.data.images.image_set import ImageSet, read_file
from vitlocal.data.images.pixels import to_rgb
from vitlocal.data.manifest import MOST_UNNAMED, PYTHON_SOURCE
from vitlocal.errors import ConfigError, DataError, UndecodableImage

EXPECTED = (
    "expected a file's bytes or path, a PIL image, or uint8 pixels (no ToTensor): an array (H, W, 3) or a tensor "
    "(3, H, W)"
)


class IndexedImages(ImageSet):
    """The rows of ``dataset``: tuples (image, label, values of ``fields`` …), or mappings with those names.

    An image is the bytes or the path of a file, a PIL image, an array (H, W, 3) or (H, W) uint8, or a tensor (3, H, W)
    uint8. Files of Hugging Face's ``Image(decode=False)`` are taken too. Labels are whole numbers, or names.

    ``labels`` has a label for each row, and rows may then be images alone. None: the labels are those of
    ``dataset.targets``, of a column, or of each row in turn.
    """

    in_order = True  # one thread reads the dataset, which may not allow more

    def __init__(
        self, dataset: Any, split: str, *, image: str = "image", label: str = "label",
        labels: Sequence[Any] | np.ndarray | None = None, classes: Sequence[str] | None = None,
        fields: Mapping[str, FieldType] | None = None,
    ):  # fmt: skip
        self.spec, self.split = PYTHON_SOURCE, split
        self._dataset, self._image, self._label, self.fields = dataset, image, label, dict(fields or {})
        self._last: tuple[int, Any] | None = None
        self._has_labels = labels is not None
        found = self._labels() if labels is None else labels
        if len(found) != len(dataset):
            raise ConfigError(f"labels: got {len(found)}, expected one for each of the {len(dataset)} rows")
        self.labels, self.classes = _numbered(list(found), classes or _class_names(dataset, label))

    def _labels(self) -> Sequence[Any]:
        """The labels, without decoding images if the dataset has them apart."""
        if self._label in (getattr(self._dataset, "column_names", None) or ()):  # of Hugging Face
            return self._dataset[self._label][:]
        targets = getattr(self._dataset, "targets", None)  # of torchvision
        changed = getattr(self._dataset, "target_transform", None) is not None
        if targets is not None and not changed and len(targets) == len(self._dataset):
            return targets
        try:
            return [self._part(index, self._label, 1) for index in range(len(self._dataset))]
        except OSError as error:
            raise DataError(
                f"the rows of the dataset are read for their labels, and one fails: {error}. Pass labels=, so that "
                "only its image counts as damaged"
            ) from error

    def _row(self, index: int) -> Any:
        """The row, read once for its image and its further values."""
        if self._last is None or self._last[0] != index:
            try:
                self._last = index, self._dataset[range(len(self._dataset))[index]]
            except LookupError as error:
                raise ConfigError(
                    f"row {index} of the dataset does not exist ({error!r}), although its length is "
                    f"{len(self._dataset)}; expected rows from 0 to its length"
                ) from error
        return self._last[1]

    def _part(self, index: int, name: str, place: int) -> Any:
        row = self._row(index)
        if isinstance(row, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)) or _is_tensor(
            row
        ):
            if self._has_labels and place == 0:
                return row
            what = f"an image ({type(row).__name__}), not a tuple (image, label)"
            raise ConfigError(f"row {index} of the dataset is {what}; pass the labels of all rows as labels=")
        try:
            return row[name] if isinstance(row, Mapping) else row[place]
        except (KeyError, IndexError, TypeError) as error:
            has = f"a mapping with {', '.join(map(repr, row))}" if isinstance(row, Mapping) else f"{type(row).__name__}"
            raise ConfigError(
                f"row {index} of the dataset is {has}; expected {name!r} in it, or as item {place} of a tuple"
            ) from error

    def entry(self, index: int) -> str:
        return f"{self.split}/{range(len(self))[index]}"

    def read(self, index: int) -> bytes:
        value = self._part(index, self._image, 0)
        if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):  # of Hugging Face
            value = value["bytes"] or value["path"]
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value)
        if isinstance(value, (str, os.PathLike)):
            return read_file(os.fspath(Path(value).expanduser()))
        image = _pixels(value, self.entry(index))
        return b"P6 %d %d 255\n" % image.size + image.tobytes()  # PPM: as fast as a copy

    def values(self, index: int) -> list[bytes]:
        found = []
        for place, (name, field) in enumerate(self.fields.items(), 2):
            value = self._part(index, name, place)
            try:
                found.append(field.encode(value))
            except (TypeError, ValueError, OverflowError) as error:
                raise ConfigError(f"fields: {name!r} of row {index}: {error}") from error
        return found


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "permute")


def _pixels(value: Any, name: str) -> Image.Image:
    """An image in memory, in RGB."""
    shape = tuple(getattr(value, "shape", ()))
    if _is_tensor(value):
        value = (value.permute(1, 2, 0) if value.ndim == 3 else value).cpu().numpy()
    if isinstance(value, np.ndarray):
        channels = value.shape[2] if value.ndim == 3 else 1
        if value.dtype != np.uint8 or value.ndim not in (2, 3) or channels not in (1, 3, 4) or not value.size:
            raise UndecodableImage(f"{name}: got {value.dtype} of shape {shape}, {EXPECTED}")
        value = Image.fromarray(value[:, :, 0] if value.ndim == 3 and channels == 1 else value)
    if not isinstance(value, Image.Image):
        raise UndecodableImage(f"{name}: got {type(value).__name__}, {EXPECTED}")
    try:
        value.load()  # it may be a file that is only open
        return to_rgb(value)
    except (OSError, ValueError, SyntaxError) as error:
        raise UndecodableImage(f"{name}: its image does not decode ({error})") from error


def _numbered(labels: list[Any], classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels as numbers (n,) int64, and the names of the classes."""
    if labels and all(isinstance(label, str) for label in labels):
        names = tuple(classes or sorted(set(labels)))
        number = {name: place for place, name in enumerate(names)}
        if unknown := sorted(set(labels) - set(names)):
            raise ConfigError(f"classes: the label {unknown[0]!r} is not among the {len(names)} classes")
        return np.array([number[label] for label in labels], np.int64), names
    numbers = np.array([_number(label, row) for row, label in enumerate(labels)], np.int64)
    count = int(numbers.max(initial=-1)) + 1
    if classes is None and count > MOST_UNNAMED:
        raise ConfigError(f"labels: got {count - 1}, which would be {count} classes; name them with classes=")
    names = tuple(classes) if classes else tuple(map(str, range(count)))
    if count > len(names):
        raise ConfigError(f"classes: got {len(names)} names, but labels up to {count - 1}")
    return numbers, names


def _number(label: Any, row: int) -> int:
    try:
        number = int(label)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0 or number != label or number >= 2**63:
        raise ConfigError(f"labels: got {label!r} in row {row}, expected whole numbers from 0, or names in all rows")
    return number


def _class_names(dataset: Any, label: str) -> Sequence[str] | None:
    """The names of the classes, if the dataset has them as torchvision or Hugging Face do."""
    feature = (getattr(dataset, "features", None) or {}).get(label) if hasattr(dataset, "column_names") else None
    names = getattr(feature, "names", None) or getattr(dataset, "classes", None)
    if not names and hasattr(dataset, "dataset"):  # torch.utils.data.Subset
        return _class_names(dataset.dataset, label)
    return tuple(map(str, names)) if names else None
