"""The hidden folder of an unfinished write: the growing files, and the journal of what they safely hold.

The journal starts with a line of JSON that identifies the write. Each commit adds a block: a line of JSON, and the
rows, (F, K) of stored_row(). A block is written after its images have reached the disk. After a crash, the rest behind
the last complete block is cut off. If the source was moved, a line has its new path and the new digests of all blocks
before. The last line says that the files are complete.

Letters: F files, K readable rows of a chunk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vitlocal.data.beton import ALLOCATION, PHOTO, Fields, data_start, head_bytes, metadata_type
from vitlocal.data.fields import LatentForm
from vitlocal.data.manifest import BetonFile, Manifest, joined_crc32
from vitlocal.data.writer.encode import Chunk, stored_row
from vitlocal.errors import ConfigError, DataError
from vitlocal.jsonl import flush_folder

VERSION = "4"
FIELDS, NO_FIELDS = "further fields", "none"  # a part of a write's identity; journals of older versions lack it
COMMIT_SECONDS = 5.0  # the work that a kill -9 or a power cut can lose


@dataclass(frozen=True)
class _Block:
    """Source rows from start up to, not including, next, and the state of the files after them."""

    start: int
    next: int
    ends: tuple[int, ...]  # (F,) length of each file
    checksums: tuple[int, ...]  # (F,) CRC-32 of each file from data_start on
    rows: np.ndarray  # (F, K) of stored_row()
    skipped: dict[int, str]  # source rows, and why
    digests: tuple[str, ...] = ("", "")  # of the sizes and times of the rows' files


@dataclass(frozen=True)
class SourceState:
    """The files of a source, by which changed ones are found. ``stamps`` are those of an ImageSet."""

    spec: str
    stamps: np.ndarray | None

    def digests(self, start: int = 0, end: int | None = None) -> tuple[str, str]:
        """Digests of the sizes and of the times of some rows' files; both are empty without files."""
        if self.stamps is None:
            return "", ""
        sizes, times = (sha256(column.tobytes()).hexdigest()[:16] for column in self.stamps[start:end].T)
        return sizes, times


class SplitFiles:
    """The growing files of a split: ``append`` until all rows are in, then ``seal`` and ``publish``.

    Opening it resumes an earlier write in the folder ``work``. The files are published in the folder above, where they
    may replace others only if it ``replaces`` a split. ``length`` is the number of rows of the source. Writes with
    equal ``identity`` give the same files. A block with a skipped row that ``decodes`` now is written again, and so are
    all blocks behind it. ``state`` says which files of the source changed: their blocks are written again too.
    ``latents`` describes what the files hold in place of photos.
    """

    def __init__(
        self, work: Path, files: tuple[BetonFile, ...], length: int, identity: dict[str, str], state: SourceState,
        decodes: Callable[[int], bool] = lambda row: False, replaces: bool = False, fields: Fields | None = None,
        latents: LatentForm | None = None,
    ) -> None:  # fmt: skip
        self.work, self.files, self.length, self.state = work, files, length, state
        self._decodes, self._replaces, self.fields = decodes, replaces, fields or {}
        self.out, self.journal = work.parent, work / "journal"
        self.identity = {"journal version": VERSION, **identity}
        self._first = [PHOTO if latents is None else latents.field(file.side) for file in files]
        self.start, self._row = data_start(length, self.fields, self._first[0]), stored_row(len(self.fields))
        self.sealed: tuple[BetonFile, ...] = ()
        self.digests: tuple[str, ...] = ("", "")  # of the state in which the sealed files were written
        nothing = np.empty((len(files), 0), self._row)
        # An append ends with its block, so that an interruption at any point leaves a valid state.
        self._blocks = [_Block(0, 0, (self.start,) * len(files), (0,) * len(files), nothing, {})]
        self._journaled = 1  # blocks
        self._committed = time.monotonic()
        self._commit: Future[None] = Future()  # the last one
        self._commit.set_result(None)
        self._journal, self._journal_end = -1, 0
        self._descriptors: list[int] = []

    @property
    def next(self) -> int:
        """The first row of the source that the files lack."""
        return self._blocks[-1].next

    @property
    def skipped(self) -> dict[int, str]:
        """The rows of the source that do not decode, and why."""
        return {row: reason for block in self._blocks for row, reason in block.skipped.items()}

    @property
    def count(self) -> int:
        """The number of images in each file."""
        return self.next - len(self.skipped)

    @property
    def data_bytes(self) -> int:
        return sum(end - self.start for end in self._blocks[-1].ends)

    @property
    def needed(self) -> int:
        """An estimate of the bytes for the remaining rows, from the rows so far."""
        return self.data_bytes * (self.length - self.next) // max(1, self.next)

    def __enter__(self) -> SplitFiles:
        with ExitStack() as opened:
            self._open(opened)
            self._committer = opened.enter_context(ThreadPoolExecutor(1))  # it ends before the files are closed
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._opened:
            if kind is not None and not self.sealed:
                with suppress(OSError, DataError):  # the current error says more
                    self.commit(wait=True)  # so that these rows need not be encoded again
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            print(
                f"\nInterrupted after {self.next} of {self.length} images. The same command continues from there. "
                f"To start over, remove {self.work}",
                file=sys.stderr,
            )

    # --- resuming ---

    def _open(self, opened: ExitStack) -> None:
        def descriptor(path: Path) -> int:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            opened.callback(os.close, number)
            return number

        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._journal = descriptor(self.journal)
        except OSError as error:
            raise ConfigError(
                f"cannot write to the data folder {self.out}: {error.strerror} ({error.filename}). Correct that, or "
                "name another folder with --out."
            ) from error
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process writes to {self.work}; wait for it, or use another --out") from None
        except OSError:
            pass  # a file system without locks
        self._replay()
        if self.sealed:
            return
        for file, end in zip(self.files, self._blocks[-1].ends, strict=True):
            path, final = self.work / file.file, self.out / file.file
            if final.exists() and not self._replaces:
                raise ConfigError(f"{final} exists, but no manifest describes it. Remove it, or use another --out.")
            self._descriptors.append(descriptor(path))
            length = os.fstat(self._descriptors[-1]).st_size
            if length < end and end > self.start:
                raise DataError(
                    f"{path} has {length} bytes, but its journal says {end}: something else changed it. "
                    f"Remove the folder {self.work} to start over."
                )
            os.ftruncate(self._descriptors[-1], end)

    def _replay(self) -> None:
        """Restores the state from the journal, or starts a new journal."""
        with open(self.journal, "rb") as file:
            head = _line(file)
            if head is not None:
                if what := difference({FIELDS: NO_FIELDS, **head.get("identity", {})}, self.identity):
                    raise ConfigError(
                        f"{self.work} is an interrupted write of another configuration ({what}). "
                        "Repeat that command, remove the folder to start over, or use another --out."
                    )
                spec, ends = head["spec"], [file.tell()]  # of the head, and of what follows it
                while (line := _line(file)) is not None and self._replay_block(line, file):
                    if "spec" in line:
                        spec, ends[-1] = line["spec"], file.tell()
                    else:
                        ends.append(file.tell())
                moved, kept = spec != self.state.spec, len(ends)
                if self.sealed and moved:
                    self._require_same_sizes(self.digests, self.state.digests())
                    self.digests = self.state.digests()
                if not self.sealed:  # else the files may have their names already
                    kept = next((n for n, block in enumerate(self._blocks) if self._stale(block, moved)), kept)
                if kept < len(self._blocks):
                    first = self._blocks[kept].start
                    print(f"{self.work}: files changed or decode now; images from {first} on are written again")
                del self._blocks[kept:]
                self._journal_end = ends[kept - 1]
        self._journaled = len(self._blocks)
        os.ftruncate(self._journal, self._journal_end)
        if head is None:
            self._write_journal(_dump({"identity": self.identity, "spec": self.state.spec}))
        elif moved and not self.sealed:  # there, the files have other times
            digests = [self.state.digests(block.start, block.next) for block in self._blocks]
            self._write_journal(_dump({"spec": self.state.spec, "digests": digests}))

    def _stale(self, block: _Block, moved: bool) -> bool:
        """Whether the images of a block must be written again. ConfigError if they are from another source."""
        if block.next == 0:
            return False
        now = self.state.digests(block.start, block.next)
        if moved:
            self._require_same_sizes(block.digests, now)
        return (not moved and now != block.digests) or any(map(self._decodes, block.skipped))

    def _require_same_sizes(self, was: tuple[str, ...], now: tuple[str, ...]) -> None:
        if not now[0] == was[0] != "":
            raise ConfigError(
                f"{self.work} is an interrupted write of another source, with the same names but other files than "
                f"{self.state.spec}. Name that source, remove the folder to start over, or use another --out."
            )

    def _replay_block(self, line: dict[str, Any], file: BinaryIO) -> bool:
        """Restores a block, whose rows come next in ``file``. Returns False if it is incomplete."""
        if "spec" in line:  # the source was moved
            pairs = zip(self._blocks, line["digests"], strict=True)
            self._blocks = [replace(block, digests=tuple(digests)) for block, digests in pairs]
            return True
        if "sealed" in line:
            self.sealed = tuple(BetonFile(**sealed) for sealed in line["sealed"])
            self.digests = tuple(line["digests"])
            return True
        count = line["next"] - line["start"] - len(line["skipped"])
        payload = file.read(len(self.files) * count * self._row.itemsize)
        # A failed write may omit a block; later blocks are then useless.
        if line["start"] != self.next or zlib.crc32(payload) != line["crc32"]:
            return False
        rows = np.frombuffer(payload, self._row).reshape(len(self.files), count)
        ends, checksums = tuple(line["ends"]), tuple(line["checksums"])
        digests = tuple(line["digests"])
        self._blocks.append(_Block(line["start"], line["next"], ends, checksums, rows, dict(line["skipped"]), digests))
        return True

    # --- growing ---

    def append(self, chunk: Chunk) -> None:
        """Writes the chunk's rows behind the earlier ones, and commits if it is time."""
        last = self._blocks[-1]
        assert chunk.start == last.next, (chunk.start, last)
        ends, checksums = [], []
        for file, descriptor, rows, images, begin, checksum in zip(
            self.files, self._descriptors, chunk.rows, chunk.images, last.ends, last.checksums, strict=True
        ):
            end, parts, places = begin, [], []
            for image in images:
                if end % file.page_size + len(image) > file.page_size:
                    parts.append(bytes(-end % file.page_size))  # an image that would cross a page starts the next one
                    end += len(parts[-1])
                parts.append(image)
                places.append(end)
                end += len(image)
            rows["ptr"] = places
            data = b"".join(parts)
            with self._guarded(self.work / file.file):
                _write_all(descriptor, data, begin)
            ends.append(end)
            checksums.append(zlib.crc32(data, checksum))
        self._blocks.append(_Block(chunk.start, chunk.next, tuple(ends), tuple(checksums), chunk.rows, chunk.skipped))
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self, wait: bool = False) -> None:
        """Flushes the appended rows and then journals them, in a thread. Waits for the commit before."""
        self._commit.result()
        self._committed = time.monotonic()
        if new := self._blocks[self._journaled :]:
            payload = np.concatenate([block.rows for block in new], axis=1).tobytes()
            line = {
                "start": new[0].start,
                "next": new[-1].next,
                "ends": new[-1].ends,
                "checksums": new[-1].checksums,
                "skipped": [skip for block in new for skip in block.skipped.items()],
                "digests": self.state.digests(new[0].start, new[-1].next),
                "crc32": zlib.crc32(payload),
            }
            self._commit = self._committer.submit(self._flush, _dump(line) + payload)
            self._journaled += len(new)
        if wait:
            self._commit.result()

    def _flush(self, block: bytes) -> None:
        for file, descriptor in zip(self.files, self._descriptors, strict=True):
            with self._guarded(self.work / file.file):
                os.fsync(descriptor)
        self._write_journal(block)

    def _write_journal(self, block: bytes) -> None:
        with self._guarded(self.journal):
            _write_all(self._journal, block, self._journal_end)
            os.fsync(self._journal)
        self._journal_end += len(block)

    # --- finishing ---

    def seal(self, labels: np.ndarray) -> None:
        """Completes the files: metadata and header in front, the table of allocations behind.

        ``labels`` (length,) are the labels of all rows of the source.
        """
        self.commit(wait=True)
        labels = np.delete(labels, list(self.skipped))
        rows = np.concatenate([block.rows for block in self._blocks], axis=1)
        sealed = tuple(self._seal_file(index, file_rows, labels) for index, file_rows in enumerate(rows))
        self.digests = self.state.digests()
        self._write_journal(_dump({"sealed": [asdict(file) for file in sealed], "digests": self.digests}))
        self.sealed = sealed

    def _seal_file(self, index: int, rows: np.ndarray, labels: np.ndarray) -> BetonFile:
        file, descriptor, last = self.files[index], self._descriptors[index], self._blocks[-1]
        end = last.ends[index]
        first = self._first[index]
        metadata = np.zeros(len(rows), metadata_type(self.fields, first))
        metadata["f0"], metadata["f1"] = rows[["mode", "width", "height", "ptr"] if first == PHOTO else "ptr"], labels
        spans = [(rows["ptr"], rows["size"].astype(np.uint64))]  # of images and of further values, which follow them
        for place, field in enumerate(self.fields.values()):
            values, column = np.ascontiguousarray(rows["values"][:, place]), metadata[f"f{place + 2}"]
            if field.is_number:
                column[:] = values.view(field.column)
                continue
            spans.append((spans[-1][0] + spans[-1][1], values))
            if column.dtype.names:
                column["ptr"], column["size"] = spans[-1]
            else:
                column[:] = spans[-1][0]
        table = np.zeros((len(rows), len(spans)), ALLOCATION)
        table["sample_id"] = np.arange(len(rows))[:, None]
        table["ptr"], table["size"] = np.stack([span[0] for span in spans], 1), np.stack([span[1] for span in spans], 1)
        tail = bytes(-end % 8) + table.tobytes()
        length = end + len(tail)
        head = head_bytes(metadata, self.fields, file.page_size, length - table.nbytes, first).ljust(self.start, b"\0")
        with self._guarded(self.work / file.file):
            _write_all(descriptor, tail, end)
            _write_all(descriptor, head, 0)
            os.fsync(descriptor)
        checksum = joined_crc32(zlib.crc32(head), zlib.crc32(tail, last.checksums[index]), length - self.start)
        widest, tallest = int(rows["width"].max()), int(rows["height"].max())
        return replace(file, bytes=length, checksum=f"crc32:{checksum:08x}", max_width=widest, max_height=tallest)

    def publish(self, manifest: Manifest, path: Path) -> None:
        """Gives the complete files their names, then saves the manifest at ``path``. Repeatable after a kill."""
        for file in self.sealed:
            final = self.out / file.file
            with suppress(FileNotFoundError):  # it already has its name
                os.replace(self.work / file.file, final)
            if not final.exists() or final.stat().st_size != file.bytes:
                raise DataError(f"{final} has not {file.bytes} bytes: something else changed it. Remove {self.work}.")
        flush_folder(self.out)
        with self._guarded(path):
            manifest.save(path)

    # --- errors ---

    @contextmanager
    def _guarded(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"cannot write {path}: {error.strerror or error}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                needed = f", about {byte_words(self.needed)} more needed" if self.next else ""
                problem += f"; {byte_words(shutil.disk_usage(self.out).free)} free{needed}. Free some space"
            raise DataError(
                f"{problem}. The same command continues where this one stopped; or use another --out."
            ) from error


def difference(was: dict[str, str], wanted: dict[str, str]) -> str:
    """The differences between the identities of two writes, in words; empty if there are none."""
    return "; ".join(
        f"{name}: {was.get(name)!r} there, {value!r} wanted" for name, value in wanted.items() if was.get(name) != value
    )


def byte_words(count: int) -> str:
    """``count`` bytes in words: 0.3 MB, 58 MB, 1.3 GB."""
    value, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{value:.{0 if value >= 10 else 1}f} {unit}"


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):  # a write may be partial, for example if the disk is full
        done = os.pwrite(descriptor, view, offset)
        offset += done
        view = view[done:]


def _dump(block: dict[str, Any]) -> bytes:
    return json.dumps(block).encode() + b"\n"


def _line(file: BinaryIO) -> dict[str, Any] | None:
    """The object on the next line of a journal; None at its end, or if the line is incomplete."""
    line = file.readline()
    with suppress(ValueError):
        return json.loads(line) if line.endswith(b"\n") else None
    return None
