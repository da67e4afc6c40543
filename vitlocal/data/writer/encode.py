"""Encodes the rows of a source for each .beton file, in threads. The native encoder holds no lock.

For files of latents, it makes the crops that ``writer/latents.py`` encodes.

Letters: F files, K readable rows of a chunk.
"""

import copy
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from queue import Queue
from typing import Any

import numpy as np
from PIL import Image

from vitlocal.data.beton import MAX_EDGE, MODES, RAW
from vitlocal.data.crops import centre_squares
from vitlocal.data.images import ImageSet
from vitlocal.data.images.pixels import SKIP, decode_whole
from vitlocal.data.manifest import BetonFile
from vitlocal.data.native import AS_JPEG, AS_ORIGINAL, AS_RAW, FORM, Encoder
from vitlocal.errors import ConfigError, DataError, UndecodableImage

CHUNK_BYTES = 4 << 20  # approximate bytes of a chunk
CHUNKS_AHEAD = 3  # chunks per thread that may wait for earlier chunks
ALIVE_SECONDS = 2.0  # between looks at whether the threads are alive
EXIT_SECONDS = 5.0  # time for the threads to finish their images

STORED_ROW = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("size", "<u4"), ("ptr", "<u8")])


def stored_row(fields: int) -> np.dtype:
    """STORED_ROW with the ``values`` of further fields: the 8 bytes of a number, or the size of another value."""
    return np.dtype([*STORED_ROW.descr, ("values", "<u8", (fields,))]) if fields else STORED_ROW


Form = tuple[int, int, int, int, int]  # width, height, kind, JPEG's quality and sampling
StoredImage = tuple[tuple[int, int, int], bytes]  # (mode, width, height) and the encoded bytes


@dataclass(frozen=True)
class EncodeJob:
    """How to encode each row."""

    files: tuple[BetonFile, ...]
    short_edge: int  # px; the short edge is not shrunk below this
    skip: bool  # skip images that do not decode


@dataclass
class Chunk:
    """The encoded source rows from start up to, not including, next."""

    start: int
    next: int
    rows: np.ndarray  # (F, K) of stored_row(); ptr is set when the images are placed in the files
    images: list[list[bytes]]  # F lists of K encoded images, each with the values of further fields behind it
    skipped: dict[int, str]  # source rows that do not decode, and why
    failure: Exception | None  # the error at source row `next`


class RowsRead(ImageSet):
    """Rows of another set that the main thread has read. If reading a row failed, `read` raises that error."""

    def __init__(self, images: ImageSet, span: range) -> None:
        self._images, self.size = images, 0  # bytes
        self.spec, self.classes, self.labels, self.fields = images.spec, images.classes, images.labels, images.fields
        self._files: dict[int, bytes | Exception] = {}
        self._values: dict[int, list[bytes]] = {}
        for index in span:
            try:
                self._files[index] = data = images.read(index)
                self._values[index] = values = images.values(index)
                self.size += len(data) + sum(map(len, values))
            except Exception as error:
                self._files[index] = error
                if not isinstance(error, UndecodableImage):
                    break  # no row after it is written
            if self.size > CHUNK_BYTES:
                break
        self.span = range(span.start, span.start + len(self._files))
        images.release(self.span.stop)

    def entry(self, index: int) -> str:
        return self._images.entry(index)

    def read(self, index: int) -> bytes:
        data = self._files.pop(index)
        if isinstance(data, Exception):
            raise data
        return data

    def values(self, index: int) -> list[bytes]:
        return self._values[index]


def encode_chunks(images: ImageSet, job: EncodeJob, start: int, workers: int) -> Generator[Chunk, None, None]:
    """The chunks of the source's rows from ``start``, in order. Closing the iterator stops the threads.

    A row that fails ends its chunk. The chunk with the rows before it comes first, then the error is raised: DataError
    for a file that cannot be read, or an image that does not decode (unless ``job.skip``); ConfigError for a row that
    is not as expected; else RuntimeError.
    """
    images.release(start)
    # An estimate of the bytes of a row: photos are 3:4, and a JPEG takes a quarter of their bytes.
    quarters = {"latent": 12, "raw": 9, "jpg": 2}
    row = sum(max(file.side, job.short_edge) ** 2 * quarters[file.format] / 4 for file in job.files)
    count = max(1, min(32, int(CHUNK_BYTES / row)))
    requests: Queue[tuple[range, RowsRead | None, Future[Chunk]] | None] = Queue()
    stopping = threading.Event()
    threads = [  # daemons, because one may wait for a disk that does not answer
        threading.Thread(target=_work, args=(copy.copy(images), job, requests, stopping), daemon=True)
        for _ in range(min(workers, -(-(len(images) - start) // count)))
    ]
    chunks: deque[tuple[Future[Chunk], RowsRead | None]] = deque()  # in the order of their rows
    try:
        try:
            for thread in threads:
                thread.start()
        except RuntimeError as error:
            raise DataError(f"cannot start {len(threads)} threads: {error}; use fewer --workers") from error
        while start < len(images) or chunks:
            while start < len(images) and len(chunks) < CHUNKS_AHEAD * len(threads):
                size = sum(rows.size for _, rows in chunks if rows is not None)
                if size > CHUNKS_AHEAD * len(threads) * CHUNK_BYTES and len(chunks) >= len(threads):
                    break  # the photos are large
                span = range(start, min(start + count, len(images)))
                rows = RowsRead(images, span) if images.in_order else None
                span = span if rows is None else rows.span
                start = span.stop
                chunks.append((Future(), rows))
                requests.put((span, rows, chunks[-1][0]))
            made = chunks.popleft()[0]
            while not wait([made], ALIVE_SECONDS).done:
                if not all(thread.is_alive() for thread in threads):
                    raise DataError("a thread that encodes images has ended without an error; run the command again")
            chunk = made.result()
            yield chunk
            if chunk.failure is not None:
                raise chunk.failure
    finally:
        stopping.set()
        deadline = time.monotonic() + EXIT_SECONDS
        started = [thread for thread in threads if thread.ident is not None]
        for _ in started:
            requests.put(None)
        for thread in started:
            thread.join(max(0.0, deadline - time.monotonic()))


def _work(images: ImageSet, job: EncodeJob, requests: Queue, stopping: threading.Event) -> None:
    """A thread: encodes spans of rows to chunks. ``images`` is a copy for this thread, whose files have positions."""
    encoder = None
    while (request := requests.get()) is not None and not stopping.is_set():
        span, rows, chunk = request
        try:
            encoder = encoder or Encoder()
            chunk.set_result(_encode_rows(images if rows is None else rows, span, job, encoder, stopping))
        except BaseException as error:  # the main thread raises it, whatever it is
            chunk.set_exception(error)


# --- one row ---


def stored_size(width: int, height: int, side: int, short_edge: int = 0) -> tuple[int, int]:
    """The stored (width, height) of an image: its long edge is at most ``side``, and it is never enlarged.

    Rounds down in float64 as FFCV's writer, so the long edge may become side - 1; it never becomes 0.
    The short edge is not shrunk below ``short_edge``, whatever the side.
    """
    scale = max(side / max(width, height), short_edge / min(width, height))
    if scale >= 1:
        return width, height
    floor = max(1, min(short_edge, width, height))
    return max(int(scale * width), floor), max(int(scale * height), floor)


def _encode_rows(images: ImageSet, span: range, job: EncodeJob, encoder: Encoder, stopping: threading.Event) -> Chunk:
    rows: list[list[tuple[Any, ...]]] = [[] for _ in job.files]
    parts: list[list[bytes]] = [[] for _ in job.files]
    skipped: dict[int, str] = {}
    failure: Exception | None = None
    end = span.stop
    for index in span:
        if stopping.is_set():
            end = index
            break
        try:
            stored = encode_image(images, index, job, encoder)
        except (DataError, OSError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            reason = reason.removeprefix(f"{images.entry(index)}: ")
            undecodable = isinstance(error, UndecodableImage)
            if undecodable and job.skip:
                skipped[index] = reason
                continue
            if not undecodable:
                remedy = "Make the source readable. "  # a fault of a disk is not a fault of the photo
            else:  # the message may name the remedy already
                remedy = "" if "--on-error skip" in reason else f"Repair it, or skip such images: {SKIP}. "
            failure = DataError(
                f"cannot read the image {images.entry(index)!r} of {images.spec}: {reason}. {remedy}The same command "
                "continues where this one stopped" + (", with or without that option." if undecodable else ".")
            )
        except ConfigError as error:
            failure = error
        except MemoryError:
            failure = DataError(
                f"memory ran out at {images.entry(index)!r} of {images.spec}; use fewer --workers. The same command "
                "continues where this one stopped."
            )
        except Exception:
            trace = traceback.format_exc()
            failure = RuntimeError(f"encoding {images.entry(index)!r} of {images.spec} failed:\n{trace}")
        if failure is not None:
            end = index
            break
        behind, numbers = b"".join(_behind(images, index)), list[list[int]]()
        if images.fields:
            values = zip(images.fields.values(), images.values(index), strict=True)
            numbers = [[int.from_bytes(value, "little") if field.is_number else len(value) for field, value in values]]
        for row, part, (shape, data) in zip(rows, parts, stored, strict=True):
            row.append((*shape, len(data), 0, *numbers))
            part.append(data + behind if behind else data)
    return Chunk(span.start, end, np.array(rows, stored_row(len(images.fields))), parts, skipped, failure)


def encode_image(images: ImageSet, index: int, job: EncodeJob, encoder: Encoder) -> list[StoredImage]:
    """The image as each file stores it. UndecodableImage if it does not decode, else the error of reading it."""
    try:
        return _encode(images, index, job, encoder)
    except ConfigError:
        raise  # a wrong row, not a damaged image
    except (ValueError, SyntaxError, Image.DecompressionBombError, OSError) as error:  # what decoders raise
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system failed, not a decoder
        raise UndecodableImage(str(error) or type(error).__name__) from error


def _behind(images: ImageSet, index: int) -> list[bytes]:
    """The values of further fields that are stored behind the image: all but numbers."""
    values = zip(images.fields.values(), images.values(index), strict=True)
    return [value for field, value in values if not field.is_number]


def _encode(images: ImageSet, index: int, job: EncodeJob, encoder: Encoder) -> list[StoredImage]:
    if job.files[0].format == "latent":
        whole = images.holds_files
        image = decode_whole(images.read(index), images.entry(index)) if whole else images.load(index)
        squares = centre_squares(image, [file.side for file in job.files])
        return [((RAW, *square.shape[:2]), square.tobytes()) for square in squares]
    if images.holds_files:
        data = images.read(index)
        behind = sum(map(len, _behind(images, index)))
        photo = encoder.inspect(data)
        if photo is not None and photo["plain"] and photo["upright"]:
            width, height = int(photo["width"]), int(photo["height"])
            if width * height <= (Image.MAX_IMAGE_PIXELS or np.inf):  # else it is refused
                stored = _stored(data, width, height, bool(photo["keepable"]), job, encoder, behind)
                if stored is not None:
                    return stored
        image = decode_whole(data, images.entry(index))
    else:
        image = images.load(index)
        behind = sum(map(len, _behind(images, index)))
    pixels = np.ascontiguousarray(image)
    stored = _stored(pixels, pixels.shape[1], pixels.shape[0], False, job, encoder, behind)
    if stored is None:
        raise RuntimeError(f"libjpeg cannot encode pixels of shape {pixels.shape}")
    return stored


def _stored(
    photo: bytes | np.ndarray, width: int, height: int, keepable: bool, job: EncodeJob, encoder: Encoder, behind: int
) -> list[StoredImage] | None:
    """The forms of a photo. A page has room for the image and ``behind`` bytes."""
    forms = [_form(file, width, height, keepable, job) for file in job.files]
    while True:
        different = list(dict.fromkeys(forms))  # a small image may be equal in several files
        made = encoder.encode(photo, height, width, np.array([(*form, 0, 0, 0) for form in different], FORM))
        if made is None:
            return None
        data_of = dict(zip(different, made, strict=True))
        sizes = [len(data_of[form]) for form in forms]
        fits = [size + behind <= file.page_size for size, file in zip(sizes, job.files, strict=True)]
        if all(fits):
            modes = [MODES[file.format] for file in job.files]
            return [((mode, *form[:2]), data_of[form]) for mode, form in zip(modes, forms, strict=True)]
        if behind and all(size <= file.page_size for size, file in zip(sizes, job.files, strict=True)):
            raise no_room(behind, max(sizes))
        # A JPEG that a page cannot hold is encoded again, and smaller from the second time on.
        forms = [form if fit else _smaller(form) for form, fit in zip(forms, fits, strict=True)]


def _smaller(form: Form) -> Form:
    width, height, kind, quality, sampling = form
    if kind == AS_ORIGINAL:
        return width, height, AS_JPEG, quality, sampling
    return max(1, int(0.7 * width)), max(1, int(0.7 * height)), kind, quality, sampling


def no_room(behind: int, image: int) -> ConfigError:
    """The error for an image of ``image`` bytes, with ``behind`` bytes of further fields, that a page cannot hold."""
    return ConfigError(
        f"the values of a row's further fields have {behind} bytes, which a page has no room for beside an image of "
        f"{image} bytes; use smaller values or sides"
    )


def _form(file: BetonFile, width: int, height: int, keepable: bool, job: EncodeJob) -> Form:
    """The form of an image of that size in the file."""
    size = stored_size(width, height, file.side, job.short_edge)
    # A panorama that keeps its short edge may be too long for the format, or too large for a page of pixels.
    page_edge = math.sqrt(file.page_size / (3 * size[0] * size[1])) if file.format == "raw" else 1.0
    if (scale := min(MAX_EDGE / max(size), page_edge)) < 1:
        size = max(1, int(scale * size[0])), max(1, int(scale * size[1]))
    if file.format == "raw":
        return *size, AS_RAW, 0, 0
    # A JPEG that need not shrink is stored unchanged, because encoding it again would lose quality.
    unchanged = keepable and file.keep and size == (width, height)
    return *size, AS_ORIGINAL if unchanged else AS_JPEG, file.quality or 0, file.sampling or 0
