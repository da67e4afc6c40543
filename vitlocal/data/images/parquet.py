"""Parquet shards as image sets."""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from vitlocal.data.images.columns import RowGroup, Table, open_shard, read_table
from vitlocal.data.images.image_set import LARGEST_FILE, NO_CHOICE, ImageSet, SourceChoice
from vitlocal.data.images.pixels import SKIP
from vitlocal.data.images.shards import find_shards, missing_split
from vitlocal.errors import ConfigError, DataError, UndecodableImage

MOST_GROUPS = 2  # row groups in memory
FREED_BYTES = 16 << 20  # images that are read before Arrow returns what it no longer uses
Record = bytes | int | None  # the bytes of an image, or the size of one that is too large


class ParquetImages(ImageSet):
    """Parquet shards with a column of images ({bytes, path} or bytes) and a column of labels.

    Rows are read fast in their order. For a row in another order, its row group is read up to it, so write such a
    source to .beton files before you train on it. Copies share what is in memory.
    """

    in_order = True

    def __init__(self, root: Path, split: str, choice: SourceChoice = NO_CHOICE) -> None:
        shards = find_shards(root, split, choice)
        if shards is None:
            raise missing_split(root, split)
        table = read_table(root, shards.paths, shards.words, choice)
        self.spec = str(root)
        self.labels, self.classes = table.labels, table.classes
        self.reads, self.left_out, self.notes = (
            shards.reads + table.reads,
            shards.left_out,
            shards.notes + table.notes,
        )
        self._names, self._groups = shards.paths, table.groups
        rows = np.array([group.rows for group in table.groups], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)  # first row of each row group
        shard_rows = np.bincount([group.shard for group in table.groups], rows, len(shards.paths))
        self._shard_starts = np.concatenate([[0], np.cumsum(shard_rows)]).astype(np.int64)
        self._store = _RowGroups([str(root / name) for name in shards.paths], table)

    def stamps(self) -> np.ndarray:
        times = [os.stat(os.path.join(self.spec, name)).st_mtime_ns for name in self._names]
        stamps = np.array([(group.size, times[group.shard]) for group in self._groups], np.int64).reshape(-1, 2)
        return np.repeat(stamps, np.diff(self._starts), axis=0)

    def entry(self, index: int) -> str:
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._shard_starts, index, side="right")) - 1
        return f"{self._names[shard]}/{index - int(self._shard_starts[shard])}"

    def read(self, index: int) -> bytes:
        index = range(len(self))[index]
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        data = self._store.read(group, index - int(self._starts[group]))
        if isinstance(data, bytes):
            return data
        if data is None:
            raise UndecodableImage(
                f"{self.entry(index)}: its row has only the path of an image; download shards that embed the "
                f"images, or skip such rows: {SKIP}"
            )
        raise UndecodableImage(f"{self.entry(index)}: has {data} bytes, expected at most {LARGEST_FILE}")

    def release(self, index: int) -> None:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        self._store.release(group, index - int(self._starts[group]))


def parquet_classes(root: Path, split: str, choice: SourceChoice) -> tuple[str, ...] | None:
    """The classes of a split, without reading images; None without its shards."""
    shards = find_shards(root, split, choice)
    if shards is None:
        return None
    try:
        return read_table(root, shards.paths, shards.words, choice).classes
    except ConfigError:
        if shards.split == split:
            raise
        return None  # a test split that may have no labels does not matter unless it is opened


class _OpenGroup:
    """A row group that is read row by row, so that little more than the rows themselves is in memory."""

    def __init__(self, file: Any, number: int, column: str) -> None:
        self.rows: dict[int, Record] = {}
        self.next = self._unfreed = 0
        # Arrow cannot make arrays of more than 2 GiB, so it makes one for each row.
        self._batches = file.iter_batches(1, [number], [column], use_threads=False)

    def read(self, row: int, first: int) -> Record:
        """A row, not before ``next`` unless it is in ``rows``. On the way to it, rows from ``first`` on are kept."""
        from pyarrow import default_memory_pool

        while self.next <= row:
            column: Any = next(self._batches).column(0)
            if column.type.num_fields:
                column = column.flatten()[column.type.get_field_index("bytes")]  # null if the struct is null
            data = column[0].as_buffer()
            large = data is not None and data.size > LARGEST_FILE
            if self.next >= min(row, first):
                self.rows[self.next] = None if data is None else data.size if large else data.to_pybytes()
            self.next += 1
            self._unfreed += 0 if data is None else data.size
            if self._unfreed > FREED_BYTES:  # for each array, Arrow reserves the rest of its page
                self._unfreed = 0
                default_memory_pool().release_unused()
        return self.rows[row]


class _RowGroups:
    """The row groups in memory: at most two, for any number of threads and of copies of the image set."""

    def __init__(self, paths: list[str], table: Table) -> None:
        self.__setstate__((paths, table.image, table.groups))

    def __getstate__(self) -> tuple[list[str], str, list[RowGroup]]:
        return self._paths, self._column, self._groups  # another process has its own row groups

    def __setstate__(self, state: tuple[list[str], str, list[RowGroup]]) -> None:
        self._paths, self._column, self._groups = state
        self._process, self._lock = os.getpid(), threading.Lock()
        self._open: OrderedDict[int, _OpenGroup] = OrderedDict()  # the last one was used last
        self._released = 0, 0  # rows before this row of this row group need not be kept
        self._file: tuple[str, Any] = ("", None)  # the last shard: opening one of many row groups takes long

    def read(self, number: int, row: int) -> Record:
        if self._process != os.getpid():
            self.__setstate__(self.__getstate__())  # a thread of the parent may have held the lock at the fork
        path = self._paths[self._groups[number].shard]
        if large := self._groups[number].large:  # it is not read
            return large
        with self._lock:
            group = self._open.pop(number, None)
            try:
                if group is None or (row < group.next and row not in group.rows):
                    group = None  # frees its rows before others are read
                    while len(self._open) >= MOST_GROUPS:
                        self._open.popitem(last=False)
                    if self._file[0] != path:
                        self._file = path, open_shard(path)
                    group = _OpenGroup(self._file[1], self._groups[number].number, self._column)
                data = group.read(row, self._released[1] if self._released[0] == number else 0)
            except MemoryError:
                raise
            except ConfigError as error:  # the shard was there when the set was opened
                raise DataError(str(error)) from error
            except Exception as error:  # Arrow raises OSError, ArrowInvalid and others on damaged data
                self._file = "", None
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DataError(f"{path} cannot be read: {reason}; download it again") from error
            self._open[number] = group
            return data

    def release(self, number: int, row: int) -> None:
        """Frees the row groups before ``number``, and its rows before ``row``."""
        with self._lock:
            self._released = number, row
            for before in [open_number for open_number in self._open if open_number < number]:
                del self._open[before]
            if number in self._open:
                rows = self._open[number].rows
                for before in [kept for kept in rows if kept < row]:
                    del rows[before]
