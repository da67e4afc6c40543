"""Rows of a source -> images encoded for each .beton file, by worker processes or in this one.

Letters: F files, K rows of a chunk that could be read.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import numpy as np
from PIL import Image

from vitlocal.data.beton import MAX_EDGE, MODES
from vitlocal.data.images import ImageSet
from vitlocal.data.manifest import PlannedFile
from vitlocal.errors import DataError, Interrupted

FEW_IMAGES = 400  # fewer are written sooner without workers, whose start takes about 4 s
CHUNK_BYTES = 4 << 20  # of encoded images in a message from a worker, about

ROW = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("size", "<u4"), ("ptr", "<u8")])
_UNREADABLE = (DataError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what decoders raise


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to encode a row."""

    files: tuple[PlannedFile, ...]
    short_edge: int  # in pixels, is not shrunk below that
    skip: bool  # images that cannot be read


@dataclass
class Chunk:
    """The encoded rows of source rows start..next."""

    start: int
    next: int
    rows: np.ndarray  # (F, K) of ROW; ptr is set when the images get their place in the files
    blobs: list[bytes]  # F strings of K encoded images each
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
    """The chunks of the source's rows from ``start`` on, in order; close it to stop the workers.

    Interrupts come between chunks, so that each is finished and kept. A row that fails ends its chunk, which
    comes with the rows before it; then the failure is raised: DataError for an unreadable image (unless
    ``job.skip``) and for a dead worker, RuntimeError for an error of the program's.
    """
    count = _rows_per_chunk(job)
    spans = [range(first, min(first + count, len(images))) for first in range(start, len(images), count)]
    workers = min(workers, len(spans))
    alone = workers < 2 or len(images) - start < FEW_IMAGES
    interrupts.deferring = True
    chunks = _here(images, job, spans, interrupts) if alone else _by_workers(images, job, spans, workers, interrupts)
    try:
        for chunk in chunks:
            yield chunk
            if chunk.failure is not None:
                raise chunk.failure
        interrupts.check()
    finally:
        chunks.close()
        interrupts.deferring = False


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


def _rows_per_chunk(job: Job) -> int:
    # About: photos are 3:4, and take a quarter of their bytes as JPEG.
    row = sum(max(file.side, job.short_edge) ** 2 * (9 if file.format == "raw" else 2) / 4 for file in job.files)
    return max(1, min(32, int(CHUNK_BYTES / row)))


def _encode_rows(images: ImageSet, span: range, job: Job) -> Chunk:
    rows: list[list[tuple[int, ...]]] = [[] for _ in job.files]
    parts: list[list[np.ndarray]] = [[] for _ in job.files]
    skipped, failure, end = {}, None, span.stop
    for index in span:
        try:
            stored = _encode_image(images.load(index), job)
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
                + "The same command goes on where this one stopped, with either option."
            )
        except Exception:
            trace = traceback.format_exc()
            failure = RuntimeError(f"encoding {images.entry(index)!r} of {images.spec} failed:\n{trace}")
        if failure is not None:
            end = index
            break
        for row, part, (shape, data) in zip(rows, parts, stored, strict=True):
            row.append((*shape, data.size, 0))
            part.append(data)
    return Chunk(span.start, end, np.array(rows, ROW), [b"".join(part) for part in parts], skipped, failure)


def _encode_image(image: Image.Image, job: Job) -> list[tuple[tuple[int, int, int], np.ndarray]]:
    """For each file ((mode, width, height), bytes as uint8)."""
    pixels = np.asarray(image)  # (height, width, 3) uint8
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise TypeError(f"expected 8-bit RGB, got {pixels.dtype} of shape {pixels.shape}")
    height, width = pixels.shape[:2]
    stored = []
    done: dict[tuple[int, ...], np.ndarray] = {}  # a small image may be the same in several files
    for file in job.files:
        size = stored_size(width, height, file.side, job.short_edge)
        shape = (MODES[file.format], *size)
        if shape not in done:
            if max(size) > MAX_EDGE:
                raise DataError(f"{size[0]}x{size[1]} pixels, expected at most {MAX_EDGE} a side")
            done[shape] = _encode_pixels(pixels, size, file)
        if done[shape].size > file.page_size:
            raise DataError(
                f"takes {done[shape].size} bytes as {file.format}, which a page of {file.page_size} cannot hold"
            )
        stored.append((shape, done[shape]))
    return stored


def _encode_pixels(pixels: np.ndarray, size: tuple[int, int], file: PlannedFile) -> np.ndarray:
    """``pixels`` (height, width, 3) at ``size`` in the file's format; from the full image, for the best quality."""
    if size != pixels.shape[1::-1]:
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    if file.format == "raw":
        return np.ascontiguousarray(pixels).reshape(-1)
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    good, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, file.quality])
    if not good:
        raise RuntimeError(f"OpenCV cannot encode {size[0]}x{size[1]} pixels as JPEG")
    return data.reshape(-1)


# --- processes --------------------------------------------------------------------------------------------------------


def _here(images: ImageSet, job: Job, spans: Sequence[range], interrupts: Interrupts) -> Iterator[Chunk]:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        for span in spans:
            interrupts.check()
            yield _encode_rows(images, span, job)
    finally:
        cv2.setNumThreads(threads)


@dataclass
class _Worker:
    process: BaseProcess
    spans: deque[range] = field(default_factory=deque)  # sent and not yet answered, at most two


def _by_workers(
    images: ImageSet, job: Job, spans: Sequence[range], count: int, interrupts: Interrupts
) -> Iterator[Chunk]:
    # Not fork: this process may have threads (of torch, FFCV, tqdm). The server imports us once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    _start_server()
    payload = pickle.dumps(images)
    workers: dict[Connection, _Worker] = {}
    waiting, given = deque(spans), spans[0].start
    ahead = 3 * count * len(spans[0])  # rows in memory at most
    ready: dict[int, Chunk] = {}  # by first row: answered out of order
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, payload, job), daemon=True)
            try:
                interrupts.deferring = False  # the server may take seconds to answer
                process.start()
                interrupts.deferring = True
            except (OSError, EOFError) as error:
                interrupts.check()
                raise DataError(f"cannot start a worker process: {error!r}; give fewer --workers") from error
            theirs.close()
            workers[ours] = _Worker(process)
        while given < spans[-1].stop:
            interrupts.check()
            for depth in (1, 2):
                for connection, worker in workers.items():
                    if len(worker.spans) < depth and waiting and waiting[0].start < given + ahead:
                        worker.spans.append(waiting.popleft())
                        with contextlib.suppress(ConnectionError):  # the worker is dead, which shows below
                            connection.send(worker.spans[-1])
            for connection in wait(workers, timeout=0.2):
                worker = workers[connection]
                try:
                    chunk = connection.recv()
                except (EOFError, OSError):
                    raise _death(worker, images, interrupts) from None
                worker.spans.popleft()
                ready[chunk.start] = chunk
            while given in ready:
                interrupts.check()
                chunk = ready.pop(given)
                yield chunk
                given = chunk.next
    finally:
        for connection, worker in workers.items():
            worker.process.terminate()
            connection.close()
        for worker in workers.values():
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()


def _work(connection: Connection, images: bytes, job: Job) -> None:
    """A worker: answers spans by their encoded rows, until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    cv2.setNumThreads(0)
    source = pickle.loads(images)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(_encode_rows(source, connection.recv(), job))


def _start_server() -> None:
    """Starts the server that forks the workers, deaf to Ctrl-C, which reaches all processes of a terminal."""
    resource_tracker.ensure_running()  # first, for it unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()  # inherits the mask, and so do the workers
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(worker: _Worker, images: ImageSet, interrupts: Interrupts) -> DataError:
    worker.process.join(5)
    interrupts.check()  # a SIGTERM for all processes of the group
    code = worker.process.exitcode
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
    at = f" at the images from {images.entry(worker.spans[0].start)!r} on" if worker.spans else ""
    return DataError(
        f"a worker process died ({how}){at}. Where memory ran out, give fewer --workers; a traceback, "
        "if it printed one, says why. The same command goes on where this one stopped."
    )
