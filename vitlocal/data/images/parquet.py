"""Parquet shards in the layout of Hugging Face."""

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from vitlocal.data.images.image_set import (
    NO_CHOICE,
    SPLIT_NAMES,
    ImageSet,
    SourceChoice,
    known_split,
    listed,
    split_folder,
)
from vitlocal.errors import ConfigError, DataError, UndecodableImage

CACHED_BYTES = 256 << 20  # of row groups; at least one is cached


class ParquetImages(ImageSet):
    """Parquet shards with a column of images ({bytes, path} or bytes) and a column of labels.

    Row groups are read completely, and the last ones are cached. That is fast in the order of the rows and slow in
    random order, so write such a source to .beton files before you train on it.
    """

    def __init__(self, root: Path, split: str, choice: SourceChoice = NO_CHOICE) -> None:
        shards = shards_by_split(root)
        if not shards.get(split):
            raise ConfigError(
                f"source '{root}' has no split '{split}': expected shards named {split}-00000-of-….parquet, "
                f"found {listed(sorted(shards))}; rename or download them"
            )
        self.spec = str(root)
        self._paths = [str(path) for path in shards[split]]
        self._names = [path.relative_to(root).as_posix() for path in shards[split]]
        labels, groups, rows = [], [], []
        for shard, path in enumerate(self._paths):
            with _open_shard(path) as file:
                if shard == 0:
                    self._image, label, names = _columns(file.schema_arrow, path)
                try:
                    column = file.read([label], use_threads=False).column(0)
                except Exception as error:  # Arrow raises OSError, ArrowInvalid and others on damaged data
                    raise ConfigError(
                        f"{path}: its column '{label}' cannot be read ({error}); download it again"
                    ) from error
                if column.null_count or not re.fullmatch("u?int(8|16|32|64)", str(column.type)):
                    raise ConfigError(
                        f"{path}: expected integers in column '{label}', got {column.type} with {column.null_count} "
                        f"empty; name a source whose split '{split}' has labels"
                    )
                labels.append(column.to_numpy().astype(np.int64))
                for group in range(file.num_row_groups):
                    groups.append((shard, group))
                    rows.append(file.metadata.row_group(group).num_rows)
        self.labels = np.concatenate(labels)
        low, high = int(self.labels.min(initial=0)), int(self.labels.max(initial=-1))
        if low < 0 or (names and high >= len(names)):
            raise ConfigError(
                f"source '{root}': split '{split}' has labels {low}..{high}, expected "
                f"0..{len(names) - 1 if names else 'K-1'}; name a source whose split has labels (a test "
                "split often has none)"
            )
        self.classes = tuple(names or map(str, range(high + 1)))
        self._shards_and_groups = groups  # of each row group
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)  # first row of each row group
        self._shard_rows = np.concatenate([[0], np.cumsum([len(part) for part in labels[:-1]])]).astype(np.int64)
        self._groups: OrderedDict[int, Any] = OrderedDict()  # row group -> Arrow array of its images' bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict()}

    def entry(self, index: int) -> str:
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._shard_rows, index, side="right")) - 1
        return f"{self._names[shard]}/{index - int(self._shard_rows[shard])}"

    def read(self, index: int) -> bytes:
        index = range(len(self))[index]
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        data = self._bytes_of(group)[index - int(self._starts[group])].as_py()
        if data is None:
            raise UndecodableImage(
                f"{self.entry(index)}: its row has only the path of an image; download shards that embed the "
                "images, or skip such rows with --on-error skip"
            )
        return data

    def _bytes_of(self, group: int) -> Any:
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        shard, number = self._shards_and_groups[group]
        try:
            with _open_shard(self._paths[shard]) as file:
                table = file.read_row_group(number, columns=[self._image], use_threads=False)
            column = table.column(0).combine_chunks()
        except Exception as error:  # Arrow raises OSError, ArrowInvalid and others on damaged data
            raise DataError(f"{self._paths[shard]} cannot be read: {error}; download it again") from error
        if hasattr(column.type, "num_fields") and column.type.num_fields:
            column = column.field("bytes")
        self._groups[group] = column
        while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > CACHED_BYTES:
            self._groups.popitem(last=False)
        return column


def has_shards(root: Path) -> bool:
    return bool(shards_by_split(root))


def parquet_classes(root: Path, split: str, choice: SourceChoice) -> tuple[str, ...] | None:
    """The classes of a split; None without its shards."""
    return ParquetImages(root, split, choice).classes if shards_by_split(root).get(split) else None


def shards_by_split(root: Path) -> dict[str, list[Path]]:
    """The shards of each split: <split>-….parquet or <split>/….parquet in `root`, else in root/data."""
    shards: dict[str, list[Path]] = {}
    for folder in (root, root / "data"):
        for path in sorted(folder.glob("*.parquet")):
            word = re.split(r"[-_.]", path.stem)[0]
            shards.setdefault(known_split(word) or word, []).append(path)
        for split in SPLIT_NAMES:
            inner = split_folder(folder, split)
            if inner is not None and split not in shards and (paths := sorted(inner.glob("*.parquet"))):
                shards[split] = paths
        if shards:
            break
    return shards


def _open_shard(path: str) -> Any:
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except Exception as error:
        raise ConfigError(f"{path} is not a complete parquet file ({error}); download it again") from error


def _columns(schema: Any, path: str) -> tuple[str, str, list[str]]:
    """The names of the columns of image bytes and of labels, and the class names if the schema has them."""
    from pyarrow import types

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        features = {}  # another program wrote the file
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}

    def pick(kind: str, *usual: str) -> str:
        named = [name for name in schema.names if kinds.get(name) == kind]
        columns = [name for name in usual if name in schema.names and (not named or name in named)] or named
        if not columns:
            raise ConfigError(
                f"{path}: expected a column {' or '.join(usual)}, found {listed(schema.names)}; rename it"
            )
        return columns[0]

    image, label = pick("Image", "image", "img"), pick("ClassLabel", "label", "labels", "fine_label")
    kind = schema.field(image).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        image = f"{image}.bytes"
    elif not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise ConfigError(f"{path}: expected encoded images in column '{image}', got {kind}; name another source")
    names = features.get(label, {}).get("names") if label in features else None
    return image, label, [str(name) for name in names or []]
