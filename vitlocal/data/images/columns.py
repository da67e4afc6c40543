"""The columns of parquet shards that hold images and labels, and the classes that the labels mean."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitlocal.data.apart import Crashed, read_apart, read_footer
from vitlocal.data.images.classes import normalized, numbered_by_rank
from vitlocal.data.images.image_set import LARGEST_FILE, SourceChoice, listed
from vitlocal.errors import ConfigError, first_line
from vitlocal.reading import LARGEST_TEXT

# The usual names of columns, the best first. Most are those of data sets on Hugging Face and of webdataset.
IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
LABEL_NAMES = (
    "label", "labels", "fine_label", "fine_labels", "cls", "class", "classes", "target", "targets", "class_label",
    "class_id", "label_id", "category", "category_id", "class_name", "label_name", "y",
)  # fmt: skip


class RowGroup(NamedTuple):
    shard: int
    number: int  # in its shard
    rows: int
    size: int  # bytes
    large: int  # bytes of its images, if they are more than photos may have; else 0


class Table(NamedTuple):
    """What shards hold, without the images."""

    image: str  # the path of the column of bytes
    reads: tuple[str, ...]
    notes: tuple[str, ...]
    labels: np.ndarray  # (n,) int64
    classes: tuple[str, ...]
    groups: list[RowGroup]


def open_shard(path: str) -> Any:
    """A ParquetFile that reads a column in small parts. ConfigError if the file is not complete."""
    from pyarrow.parquet import ParquetFile

    with _complete(path):
        return ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


@contextmanager
def _complete(path: str) -> Iterator[None]:
    """Turns errors of a block that reads a shard into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # Arrow raises OSError, ArrowInvalid and others on damaged data
        raise _incomplete(path, error) from error


def _incomplete(path: str | Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} is not a complete parquet file ({first_line(error)}); download it again")


def read_table(root: Path, paths: Sequence[str], split: str, choice: SourceChoice) -> Table:
    """Finds the columns in the first shard and reads the labels of all. Raises ConfigError if they are of no use."""
    names: list[list[str] | None] = []  # the class names of each shard
    columns: list[np.ndarray] = []
    groups: list[RowGroup] = []
    try:
        read_apart(read_footer, [str(root / name) for name in paths])
    except Crashed as error:
        raise _incomplete(root / paths[error.index], error) from None
    for number, name in enumerate(paths):
        path = str(root / name)
        with open_shard(path) as file, _complete(path):
            schema = file.schema_arrow
            features = _features(schema)
            if number == 0:
                image = _image_column(schema, features, choice, path)
                label = _label_column(schema, features, choice, path)
                place = _place_of_bytes(schema.field(image).type)
            elif {image, label} - set(schema.names) or _place_of_bytes(schema.field(image).type) != place:
                raise ConfigError(
                    f"{path}: expected the columns '{image}' and '{label}' of the types in {paths[0]}, found "
                    f"{_described(schema, features)}; download it again"
                )
            columns.append(_label_values(file, label, path, split))
            stated = features.get(label, {}).get("names")
            names.append([str(name) for name in stated] if isinstance(stated, list) and stated else None)
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                large = _too_large(about, f"{image}{place}")
                groups.append(RowGroup(number, group, about.num_rows, about.total_byte_size, large))
            if sum(group.rows for group in groups if group.shard == number) != len(columns[-1]):
                raise ConfigError(f"{path}: its row groups have other rows than its labels; download it again")
    labels, classes, notes = _numbered(columns, names, [str(root / name) for name in paths], split)
    reads = (f"images: column '{image}'", f"labels: column '{label}'")
    return Table(f"{image}{place}", reads, notes, labels, classes, groups)


def _chunks(about: Any, path: str) -> list[Any]:
    """What a row group says about the column ``path``: a list of one, or empty."""
    return [column for column in map(about.column, range(about.num_columns)) if column.path_in_schema == path]


def _too_large(about: Any, path: str) -> int:
    """The unpacked bytes of a column of a row group if they cannot be those of photos; else 0.

    A photo has at most LARGEST_FILE bytes, and compression makes it hardly smaller. So a large column that compression
    made ten times smaller holds something else.
    """
    chunks = _chunks(about, path)
    size, packed = (sum(getattr(c, f"total_{kind}_size") for c in chunks) for kind in ("uncompressed", "compressed"))
    return size if size > LARGEST_FILE * about.num_rows or size > max(LARGEST_FILE, 10 * packed) else 0


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face's library notes about each column; empty if another program wrote the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return {}


def _kind(features: dict[str, dict[str, Any]], name: str) -> str | None:
    kind = features.get(name, {}).get("_type")
    return None if kind == "Value" else kind


def _place_of_bytes(kind: Any) -> str | None:
    """Where a column of this type has the bytes of images, below its own name; None if it has none."""
    from pyarrow import types

    below = ".bytes" if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else ""
    kind = kind.field("bytes").type if below else kind
    return below if types.is_binary(kind) or types.is_large_binary(kind) else None


def _image_column(schema: Any, features: dict[str, dict[str, Any]], choice: SourceChoice, path: str) -> str:
    usable = [
        name
        for name in schema.names
        if _kind(features, name) in (None, "Image") and _place_of_bytes(schema.field(name).type) is not None
    ]
    typed = [name for name in usable if _kind(features, name) == "Image"] or usable
    return _pick("image", choice.image, usable, IMAGE_NAMES, typed, f"{path}: {_described(schema, features)}")


def _label_column(schema: Any, features: dict[str, dict[str, Any]], choice: SourceChoice, path: str) -> str:
    def holds_labels(kind: str) -> bool:
        return bool(re.fullmatch(r"u?int(8|16|32|64)|bool|(large_)?string|dictionary<values=(large_)?string.*", kind))

    usable = [
        name
        for name in schema.names
        if _kind(features, name) in (None, "ClassLabel") and holds_labels(str(schema.field(name).type))
    ]
    typed = [name for name in usable if _kind(features, name) == "ClassLabel"]
    return _pick("label", choice.label, usable, LABEL_NAMES, typed, f"{path}: {_described(schema, features)}")


def _pick(what: str, stated: str | None, usable: list[str], usual: Sequence[str], typed: list[str], found: str) -> str:
    """The stated column, else the first with a usual name, else the only one of the type."""
    if stated is not None:
        if stated in usable:
            return stated
        raise ConfigError(f"--{what} {stated}: expected a column of {what}s: {listed(usable)}, in {found}")
    for name in usual:
        for column in usable:
            if column.lower() == name:
                return column
    if len(typed) != 1:
        problem = f"no column has a usual name of {what}s" if usable else f"no column can hold {what}s"
        problem = f"{len(typed)} columns could have the {what}s" if typed else problem
        raise ConfigError(f"{problem} in {found}; choose one with --{what} NAME")
    return typed[0]


def _described(schema: Any, features: dict[str, dict[str, Any]]) -> str:
    kinds = [(name, _kind(features, name) or str(schema.field(name).type)) for name in schema.names]
    return "columns " + ", ".join(f"'{name}' ({kind if len(kind) < 60 else kind[:59] + '…'})" for name, kind in kinds)


def _label_values(file: Any, label: str, path: str, split: str) -> np.ndarray:
    """The labels of a shard: (n,) int64, or (n,) object of strings."""
    from pyarrow import types

    groups = map(file.metadata.row_group, range(file.num_row_groups))
    size = sum(chunk.total_uncompressed_size for about in groups for chunk in _chunks(about, label))
    if size > LARGEST_TEXT:
        raise ConfigError(f"{path}: its column '{label}' has {size} bytes, expected at most {LARGEST_TEXT} of labels")
    try:
        column = file.read([label], use_threads=False).column(0)
        kind = column.type
        if types.is_dictionary(kind):
            column, kind = column.cast(kind.value_type), kind.value_type
        text = types.is_string(kind) or types.is_large_string(kind)
        values = column.drop_null() if text else column.drop_null().cast("int64")
    except Exception as error:  # Arrow raises OSError, ArrowInvalid and others on damaged data
        raise ConfigError(f"{path}: its column '{label}' cannot be read ({error}); download it again") from error
    if column.null_count:
        raise ConfigError(
            f"{path}: {column.null_count} of {len(column)} rows have no value in column '{label}'; {split} has "
            "no labels there, so name another column with --label NAME, or another source"
        )
    return values.to_numpy(zero_copy_only=False) if text else values.to_numpy()


def _numbered(
    columns: list[np.ndarray], names: list[list[str] | None], paths: list[str], split: str
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Labels, classes and notes. The classes have the order of the first shard's names, else that of the values."""
    if len({column.dtype.kind for column in columns}) > 1:
        raise ConfigError(f"{paths[0]}: its labels have another type than those of other shards; download them again")
    if columns[0].dtype == object:
        words, labels = np.unique(np.concatenate(columns), return_inverse=True)
        classes, label_of_word = np.unique([normalized(str(word)) for word in words], return_inverse=True)
        return label_of_word[labels].astype(np.int64), tuple(classes.tolist()), ()
    first = names[0]
    for values, shard_names, path in zip(columns, names, paths, strict=True):
        low, high = int(values.min(initial=0)), int(values.max(initial=-1))
        if low < 0 or (shard_names and high >= len(shard_names)):
            expected = f"0..{len(shard_names) - 1 if shard_names else 'K-1'}"
            raise ConfigError(
                f"{path}: {split} has labels {low}..{high}, expected {expected}; name a source whose split "
                "has labels (a test split often has none)"
            )
        if set(shard_names or ()) != set(first or ()):
            one, other = (sorted(set(a or ()) - set(b or ())) for a, b in ((first, shard_names), (shard_names, first)))
            raise ConfigError(
                f"{paths[0]} and {path} have different classes: {listed(one, 3)} only in the first, {listed(other, 3)} "
                "only in the second; they are shards of different data sets, so remove or download them again"
            )
    if first is None:
        return numbered_by_rank(np.concatenate(columns))
    label_of = {name: label for label, name in enumerate(first)}
    parts = [
        values if shard_names == first else np.array([label_of[name] for name in shard_names or ()], np.int64)[values]
        for values, shard_names in zip(columns, names, strict=True)
    ]
    return np.concatenate(parts).astype(np.int64), tuple(first), ()
