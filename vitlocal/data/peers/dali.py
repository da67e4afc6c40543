"""The DALI source: original images, decoded by NVIDIA DALI on the GPU if there is one, else on the CPU.

Order and boxes are those of the native loader. DALI decodes the part of the image that a box needs, resizes and flips.
It is installed by ``pip install vitlocal[dali]``.

Shape letters: B batch, S size (px).
"""

from __future__ import annotations

import copy
import io
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitlocal.data.augment import send
from vitlocal.data.batch import Batch
from vitlocal.data.crops import ROW_MASK, Box, centre_box
from vitlocal.data.images import ImageSet
from vitlocal.data.images.pixels import decode_rgb, is_upright
from vitlocal.data.native import native_box, native_policy
from vitlocal.data.peers.originals import OriginalsSource
from vitlocal.data.shares import BatchSlice
from vitlocal.errors import ConfigError, DataError

try:
    from nvidia.dali import fn, pipeline_def, types
except ImportError as error:
    raise ConfigError(
        f"data.loader: dali needs NVIDIA DALI ({error}); pip install 'vitlocal[dali]', or use data.loader=native"
    ) from error

BATCHES_AHEAD = 2  # batches that DALI prepares; also the depth of its queue
# Formats and modes that DALI decodes itself. The others go through Pillow.
DALI_FORMATS = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")}

Sample = dict[str, np.ndarray]


@pipeline_def
def crop_pipeline(gpu: bool) -> Any:
    """Decodes images to (S, S, 3) crops. Each image brings its box and size, so one pipeline serves all passes."""

    def inputs(name: str, dtype: Any, dimensions: int = 1) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=dimensions)

    images = fn.decoders.image_slice(
        inputs("data", types.UINT8), start=inputs("start", types.INT32), shape=inputs("shape", types.INT32),
        axes=[0, 1], output_type=types.RGB, device="mixed" if gpu else "cpu",
    )  # fmt: skip
    images = fn.resize(
        images, size=inputs("size", types.FLOAT), roi_start=inputs("top_left", types.FLOAT),
        roi_end=inputs("bottom_right", types.FLOAT), interp_type=types.INTERP_LINEAR, antialias=True,
    )  # fmt: skip
    return fn.flip(images, horizontal=inputs("flipped", types.INT32, 0), vertical=0)


def dali_bytes(images: ImageSet, index: int) -> tuple[bytes, int, int]:
    """An image in a format that DALI decodes, with its height and width."""
    if images.holds_files:
        data = images.read(index)
        try:
            head = Image.open(io.BytesIO(data))  # reads no pixels
            if (head.format, head.mode) in DALI_FORMATS and is_upright(head) and "transparency" not in head.info:
                return data, head.height, head.width
        except Exception:  # decode_rgb reports what is wrong
            pass
        image = decode_rgb(data, images.entry(index))
    else:
        image = images.load(index)
    return b"P6 %d %d 255\n" % image.size + image.tobytes(), image.height, image.width


def pipeline_inputs(data: bytes, height: int, width: int, box: Box, size: int) -> Sample:
    """The inputs of :func:`crop_pipeline` for one image: the whole pixels around the box, and the box within them."""
    top, left, bottom, right = box.pixels(height, width)
    return {
        "data": np.frombuffer(data, np.uint8),
        "start": np.array([top, left], np.int32),
        "shape": np.array([bottom - top, right - left], np.int32),
        "top_left": np.array([box.top - top, box.left - left], np.float32),
        "bottom_right": np.array([box.top - top + box.height, box.left - left + box.width], np.float32),
        "size": np.array([size, size], np.float32),
        "flipped": np.array(box.flipped, np.int32),
    }


class DALISource(OriginalsSource):
    """A split of original images, read by ``workers`` threads. See :class:`OriginalsSource` for the arguments."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.readers = ThreadPoolExecutor(self.workers)  # they wait for the disk and read headers
        self.local = threading.local()  # each reader has a copy of the images, whose open files have positions
        self.pipeline: Any = None

    def _sample(self, draw: int, epoch: int, size: int) -> Sample:
        if not hasattr(self.local, "images"):
            self.local.images = copy.copy(self.images)
        data, height, width = dali_bytes(self.local.images, int(self.numbers[draw & ROW_MASK]))
        box = native_box(native_policy(self.crops, epoch), draw, height, width)
        return pipeline_inputs(data, height, width, box, size)

    def _read(self, slices: Iterator[BatchSlice], epoch: int, size: int) -> Generator[Batch, None, None]:
        parts = list(slices)
        spans = [part for part in parts if len(part.draws)]  # only the last slice can be empty
        if spans:
            self._build_pipeline(max(len(part.draws) for part in spans))
        reading: deque[Any] = deque()
        decoding: deque[BatchSlice] = deque()
        try:
            for number in range(len(spans) + BATCHES_AHEAD):
                if number < len(spans):
                    draws = spans[number].draws.tolist()
                    reading.append([self.readers.submit(self._sample, draw, epoch, size) for draw in draws])
                if number >= 1 and reading:
                    self._feed([future.result() for future in reading.popleft()])
                    self.pipeline.schedule_run()
                    decoding.append(spans[number - 1])
                if number >= BATCHES_AHEAD:
                    yield self._batch(decoding.popleft(), size)
        finally:
            for future in (future for futures in reading for future in futures):
                future.cancel()
            if self.pipeline is not None:
                self._discard(len(decoding))  # DALI finishes the batches that it has started
        for part in parts[len(spans) :]:
            yield Batch.empty(size, self.device, part.total)

    def _build_pipeline(self, batch_size: int) -> None:
        """Builds the pipeline, again if batches have grown, and fills its queue with empty work."""
        if self.pipeline is not None and self.pipeline.max_batch_size >= batch_size:
            return
        gpu = self.device.type == "cuda"
        self.pipeline = crop_pipeline(
            gpu=gpu, batch_size=batch_size, num_threads=self.workers, prefetch_queue_depth=BATCHES_AHEAD,
            device_id=(self.device.index or 0) if gpu else None,
        )  # fmt: skip
        self.pipeline.build()
        dot = b"P6 1 1 255\n" + bytes(3)
        for _ in range(BATCHES_AHEAD):
            self._feed([pipeline_inputs(dot, 1, 1, centre_box(1, 1, 1.0), 1)])
        self.pipeline.schedule_run()  # the first call runs as many batches as the queue is deep
        self._discard(BATCHES_AHEAD)

    def _discard(self, batches: int) -> None:
        for _ in range(batches):
            self.pipeline.share_outputs()
            self.pipeline.release_outputs()

    def _feed(self, samples: list[Sample]) -> None:
        for name in samples[0]:
            self.pipeline.feed_input(name, [sample[name] for sample in samples])

    def _batch(self, part: BatchSlice, size: int) -> Batch:
        rows = part.draws & ROW_MASK
        try:
            (output,) = self.pipeline.share_outputs()
        except Exception as error:
            self.pipeline = None  # it cannot be used again
            raise self._find_damage(rows, error) from error
        shape = (len(rows), size, size, 3)
        if self.device.type == "cuda":
            from nvidia.dali.plugin.pytorch import feed_ndarray

            pixels = torch.empty(shape, dtype=torch.uint8, device=self.device)
            stream = torch.cuda.current_stream(self.device)
            feed_ndarray(output.as_tensor(), pixels, cuda_stream=stream)
            stream.synchronize()  # device sync: DALI reuses its memory after the release
        else:
            pixels = torch.from_numpy(np.array(output.as_tensor()))
        self.pipeline.release_outputs()
        labels = torch.from_numpy(np.asarray(self.images.labels)[self.numbers[rows]])
        images = pixels.permute(0, 3, 1, 2)  # (B, 3, S, S), a view: channels-last
        return Batch(images, send(labels, self.device), torch.from_numpy(rows), part.places, part.total)

    def _find_damage(self, rows: np.ndarray, error: Exception) -> DataError:
        """Finds the damaged image by Pillow, because DALI does not name it."""
        for row in rows.tolist():
            try:
                self.images.load(int(self.numbers[row]))
            except DataError as found:
                return found
        return DataError(f"DALI cannot decode a batch in which Pillow finds no damage: {error}")

    def close(self) -> None:
        self.readers.shutdown(cancel_futures=True)
        self.pipeline = None
