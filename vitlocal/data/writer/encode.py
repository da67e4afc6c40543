"""Rows of a source -> images encoded for each .beton file, by threads: the native encoder holds no lock.

Letters: F files, K rows of a chunk that could be read.
"""

from __future__ import annotations

import copy
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

import numpy as np
from PIL import Image

from vitlocal.data.beton import MAX_EDGE, MODES
from vitlocal.data.images import ImageSet
from vitlocal.data.images.pixels import decode_rgb
from vitlocal.data.manifest import FileSpec
from vitlocal.data.native import AS_JPEG, AS_ORIGINAL, AS_RAW, FORM, Encoder
from vitlocal.errors import DataError, Interrupted

CHUNK_BYTES = 4 << 20  # of encoded images that a thread hands over, about
AHEAD = 3  # chunks a thread that may wait for those before them
LEAVE_SECONDS = 5.0  # that the threads have to finish their images in

ROW = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("size", "<u4"), ("ptr", "<u8")])
_UNREADABLE = (DataError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what decoders raise


@dataclass(frozen=True)
class Job:
    """What is to be made of a row."""

    files: tuple[FileSpec, ...]
    short_edge: int  # in pixels, is not shrunk below that
    skip: bool  # images that cannot be read


@dataclass
class Chunk:
    """The encoded rows of source rows start..next."""

    start: int
    next: int
    rows: np.ndarray  # (F, K) of ROW; ptr is set when the images get their place in the files
    images: list[list[bytes]]  # F lists of K encoded images each
    skipped: dict[int, str]  # source rows that could not be read, and why
    failure: RuntimeError | None  # at source row `next`


class Interrupts:
    """Ctrl-C and SIGTERM as Interrupted, at once or, while ``deferring``, where ``check`` is called."""

    def __enter__(self) -> Interrupts:
        self.deferring = False
        self.requested = 0  # the signal's number
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if not self.deferring or self.requested:  # the second Ctrl-C does not wait
            raise Interrupted(number)
        self.requested = number

    def check(self) -> None:
        if self.requested:
            raise Interrupted(self.requested)


def encoded(images: ImageSet, job: Job, start: int, workers: int, interrupts: Interrupts) -> Iterator[Chunk]:
    """The chunks of the source's rows from ``start`` on, in order; close it to stop the threads.

    Interrupts come between chunks. A row that fails ends its chunk, which comes with the rows before it; then the
    failure is raised: DataError for an unreadable image (unless ``job.skip``), RuntimeError for an error of the
    program's.
    """
    count = rows_per_chunk(job)
    spans = deque(range(first, min(first + count, len(images))) for first in range(start, len(images), count))
    asked: Queue[range | None] = Queue()
    made: Queue[Chunk | BaseException] = Queue()
    stopping = threading.Event()
    threads = [  # that end with the process: one may wait for a disk that does not answer
        threading.Thread(target=_work, args=(copy.copy(images), job, asked, made, stopping), daemon=True)
        for _ in range(min(workers, len(spans)))
    ]
    ready: dict[int, Chunk] = {}  # by first row: made out of order
    given, started = start, 0
    interrupts.deferring = True
    try:
        for thread in threads:
            try:
                thread.start()
            except RuntimeError as error:
                raise DataError(f"cannot start {len(threads)} threads: {error}; give fewer --workers") from error
            started += 1
        while given < len(images):
            while spans and spans[0].start < given + AHEAD * len(threads) * count:
                asked.put(spans.popleft())
            try:
                chunk = made.get(timeout=0.2)
            except Empty:
                interrupts.check()
                continue
            if isinstance(chunk, MemoryError):
                raise DataError(
                    "memory ran out; give fewer --workers. The same command goes on where this one stopped."
                ) from chunk
            if isinstance(chunk, BaseException):
                raise chunk
            ready[chunk.start] = chunk
            while given in ready:
                chunk = ready.pop(given)
                yield chunk
                if chunk.failure is not None:
                    raise chunk.failure
                given = chunk.next
                interrupts.check()
    finally:
        stopping.set()
        for _ in threads:
            asked.put(None)
        deadline = time.monotonic() + LEAVE_SECONDS
        for thread in threads[:started]:
            thread.join(max(0.0, deadline - time.monotonic()))
        interrupts.deferring = False


def _work(images: ImageSet, job: Job, asked: Queue, made: Queue, stopping: threading.Event) -> None:
    """A thread: turns spans of rows into chunks. Its image set is a copy, since reading may move what it holds."""
    try:
        encoder = Encoder()
        while (span := asked.get()) is not None and not stopping.is_set():
            made.put(_encode_rows(images, span, job, encoder, stopping))
    except BaseException as error:  # to be raised in the main thread, whatever it is
        made.put(error)


# --- a row ------------------------------------------------------------------------------------------------------------


def stored_size(width: int, height: int, side: int, short_edge: int = 0) -> tuple[int, int]:
    """The (width, height) that an image is stored at: long edge at most ``side``, never enlarged.

    Rounds down in float64 like FFCV's writer, which can leave the long edge at side - 1, but not to 0.
    With ``short_edge``, the short edge is not shrunk below it, whatever the side.
    """
    scale = max(side / max(width, height), short_edge / min(width, height))
    if scale >= 1:
        return width, height
    floor = max(1, min(short_edge, width, height))
    return max(int(scale * width), floor), max(int(scale * height), floor)


def rows_per_chunk(job: Job) -> int:
    # About: photos are 3:4, and take a quarter of their bytes as JPEG.
    row = sum(max(file.side, job.short_edge) ** 2 * (9 if file.format == "raw" else 2) / 4 for file in job.files)
    return max(1, min(32, int(CHUNK_BYTES / row)))


def _encode_rows(images: ImageSet, span: range, job: Job, encoder: Encoder, stopping: threading.Event) -> Chunk:
    rows: list[list[tuple[int, ...]]] = [[] for _ in job.files]
    parts: list[list[bytes]] = [[] for _ in job.files]
    skipped, failure, end = {}, None, span.stop
    for index in span:
        if stopping.is_set():
            end = index
            break
        try:
            stored = encode_image(images, index, job, encoder)
        except _UNREADABLE as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            reason = reason.removeprefix(f"{images.entry(index)}: ")
            if job.skip:
                skipped[index] = reason
                continue
            known = "--on-error skip" in reason
            failure = DataError(
                f"cannot read the image {images.entry(index)!r} of {images.spec}: {reason}. "
                + ("" if known else "Mend it, or leave such images out with --on-error skip. ")
                + "The same command goes on where this one stopped, with that option or without."
            )
        except MemoryError:
            failure = DataError(
                f"memory ran out at {images.entry(index)!r} of {images.spec}; give fewer --workers. The same command "
                "goes on where this one stopped."
            )
        except Exception:
            trace = traceback.format_exc()
            failure = RuntimeError(f"encoding {images.entry(index)!r} of {images.spec} failed:\n{trace}")
        if failure is not None:
            end = index
            break
        for row, part, (shape, data) in zip(rows, parts, stored, strict=True):
            row.append((*shape, len(data), 0))
            part.append(data)
    return Chunk(span.start, end, np.array(rows, ROW), parts, skipped, failure)


def encode_image(images: ImageSet, index: int, job: Job, encoder: Encoder) -> list[tuple[tuple[int, int, int], bytes]]:
    """For each file ((mode, width, height), bytes). Raises what reading and decoding raise."""
    if images.holds_files:
        data = images.read(index)
        photo = encoder.inspect(data)
        if photo is not None and photo["plain"] and photo["upright"]:
            width, height = int(photo["width"]), int(photo["height"])
            if width * height <= (Image.MAX_IMAGE_PIXELS or np.inf):  # more is for Pillow to judge
                stored = _stored(data, width, height, bool(photo["keepable"]), job, encoder)
                if stored is not None:
                    return stored
        image = decode_rgb(data, images.entry(index))
    else:
        image = images.load(index)
    pixels = np.ascontiguousarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise TypeError(f"expected 8-bit RGB, got {pixels.dtype} of shape {pixels.shape}")
    stored = _stored(pixels, pixels.shape[1], pixels.shape[0], False, job, encoder)
    if stored is None:
        raise RuntimeError(f"libjpeg cannot encode pixels of shape {pixels.shape}")
    return stored


def _stored(
    photo: bytes | np.ndarray, width: int, height: int, keepable: bool, job: Job, encoder: Encoder
) -> list[tuple[tuple[int, int, int], bytes]] | None:
    forms = [_form(file, width, height, keepable, job) for file in job.files]
    different = list(dict.fromkeys(forms))  # a small image may be the same in several files
    made = encoder.encode(photo, height, width, np.array([(*form, 0, 0, 0) for form in different], FORM))
    if made is None:
        return None
    of = dict(zip(different, made, strict=True))
    for file, form in zip(job.files, forms, strict=True):
        if len(of[form]) > file.page_size:
            raise DataError(
                f"takes {len(of[form])} bytes as {file.format}, which a page of {file.page_size} cannot hold"
            )
    return [((MODES[file.format], form[0], form[1]), of[form]) for file, form in zip(job.files, forms, strict=True)]


def _form(file: FileSpec, width: int, height: int, keepable: bool, job: Job) -> tuple[int, int, int, int, int]:
    """How the file stores an image of that size: (width, height, kind, quality, sampling)."""
    size = stored_size(width, height, file.side, job.short_edge)
    if max(size) > MAX_EDGE:
        raise DataError(f"{size[0]}x{size[1]} pixels, expected at most {MAX_EDGE} a side")
    if file.format == "raw":
        return *size, AS_RAW, 0, 0
    # A JPEG that need not shrink stays as it came: encoded again, it would only lose.
    kept = keepable and file.keep and size == (width, height)
    return *size, AS_ORIGINAL if kept else AS_JPEG, file.quality, file.sampling
