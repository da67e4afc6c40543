"""The DALI source: original images, decoded by NVIDIA DALI on the GPU if there is one, else on the CPU.

Order and boxes are those of the native loader. DALI decodes the part of the image that a box needs, resizes and flips.
It is installed by ``pip install "vitlocal[dali]"``.

Shape letters: B batch, S size (px).
"""

import copy
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from vitlocal.data.batch import Batch
from vitlocal.data.crops import ROW_MASK
from vitlocal.data.images import ImageSet
from vitlocal.data.images.pixels import decode_rgb, is_upright, open_image
from vitlocal.data.native import native_box, native_policy
from vitlocal.data.peers import missing_extra
from vitlocal.data.peers.originals import OriginalsSource
from vitlocal.data.shares import BatchSlice
from vitlocal.data.transfer import send
from vitlocal.errors import DataError

try:
    from nvidia.dali import fn, pipeline_def, types
except ImportError as error:
    raise missing_extra("dali", error) from error

# Formats and modes that DALI decodes itself. The others go through Pillow.
DALI_FORMATS = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")}

Inputs = tuple[np.ndarray, ...]  # of crop_pipeline, for one image


@pipeline_def
def crop_pipeline(source: Callable[[], list[list[np.ndarray]]], gpu: bool) -> Any:
    """Decodes images to (S, S, 3) crops. Each image brings its box and size, so one pipeline serves all passes."""
    data, start, shape, top_left, bottom_right, size, flipped = fn.external_source(source=source, num_outputs=7)
    images = fn.decoders.image_slice(
        data, start=start, shape=shape, axes=[0, 1], output_type=types.RGB, device="mixed" if gpu else "cpu"
    )
    images = fn.resize(
        images, size=size, roi_start=top_left, roi_end=bottom_right, interp_type=types.INTERP_LINEAR, antialias=True
    )
    return fn.flip(images, horizontal=flipped, vertical=0)


def dali_bytes(images: ImageSet, index: int) -> tuple[bytes, int, int]:
    """An image in a format that DALI decodes, with its height and width."""
    if images.holds_files:
        data = images.read(index)
        with suppress(Exception):  # decode_rgb reports what is wrong
            head = open_image(data)  # reads no pixels
            if (head.format, head.mode) in DALI_FORMATS and is_upright(head) and "transparency" not in head.info:
                return data, head.height, head.width
        image = decode_rgb(data, images.entry(index))
    else:
        image = images.load(index)
    return b"P6 %d %d 255\n" % image.size + image.tobytes(), image.height, image.width


class DALISource(OriginalsSource):
    """A split of original images, read by ``workers`` threads. See :class:`OriginalsSource` for the arguments."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.readers = ThreadPoolExecutor(self.workers)  # they wait for the disk and read headers
        self.local = threading.local()  # each reader has a copy of the images, whose open files have positions
        self.pipeline: Any = None

    def _inputs(self, draw: int, epoch: int, size: int) -> Inputs:
        """The inputs for one image: the whole pixels around the box, and the box within them."""
        if not hasattr(self.local, "images"):
            self.local.images = copy.copy(self.images)
        data, height, width = dali_bytes(self.local.images, int(self.numbers[draw & ROW_MASK]))
        box = native_box(native_policy(self.crops, epoch), draw, height, width, size)
        top, left, bottom, right = box.pixels(height, width)
        return (
            np.frombuffer(data, np.uint8),
            np.array([top, left], np.int32),
            np.array([bottom - top, right - left], np.int32),
            np.array([box.top - top, box.left - left], np.float32),
            np.array([box.top - top + box.height, box.left - left + box.width], np.float32),
            np.array([size, size], np.float32),
            np.array(box.flipped, np.int32),
        )

    def _batches_of_inputs(self, parts: list[BatchSlice], epoch: int, size: int) -> Iterator[list[list[np.ndarray]]]:
        """The inputs of each batch, which threads read one batch ahead."""
        reading: deque[list[Future[Inputs]]] = deque()
        for number in range(len(parts) + 1):
            if number < len(parts):
                draws = parts[number].draws.tolist()
                reading.append([self.readers.submit(self._inputs, draw, epoch, size) for draw in draws])
            if number > 0:
                columns = zip(*(future.result() for future in reading.popleft()), strict=True)
                yield [list(column) for column in columns]

    def _read(
        self, slices: Iterator[BatchSlice], epoch: int, size: int, subset: np.ndarray | None
    ) -> Generator[Batch, None, None]:
        parts = list(slices)
        self.inputs = self._batches_of_inputs([part for part in parts if len(part.draws)], epoch, size)
        largest = max((len(part.draws) for part in parts), default=1)
        if self.pipeline is None or self.pipeline.max_batch_size < largest:
            gpu = self.device.type == "cuda"
            self.pipeline = crop_pipeline(
                lambda: next(self.inputs), gpu, batch_size=largest, num_threads=self.workers,
                device_id=(self.device.index or 0) if gpu else None,
            )  # fmt: skip
            self.pipeline.build()
        try:
            for part in parts:
                yield self._batch(part, size) if len(part.draws) else Batch.empty(size, self.device, part.total)
        finally:
            self.inputs = iter(())  # ends the pass
            if self.pipeline is not None:
                with suppress(StopIteration):
                    while True:  # DALI finishes the batches that it has started
                        self.pipeline.run()
                self.pipeline.reset()

    def _batch(self, part: BatchSlice, size: int) -> Batch:
        rows = part.draws & ROW_MASK
        try:
            (output,) = self.pipeline.run()
        except DataError:  # of an image that Pillow decodes for DALI
            self.pipeline = None
            raise
        except Exception as error:
            self.pipeline = None  # it cannot be used again
            raise self._find_damage(rows, error) from error
        shape = (len(rows), size, size, 3)
        if self.device.type == "cuda":
            from nvidia.dali.plugin.pytorch import feed_ndarray

            pixels = torch.empty(shape, dtype=torch.uint8, device=self.device)
            stream = torch.cuda.current_stream(self.device)
            feed_ndarray(output.as_tensor(), pixels, cuda_stream=stream)
            stream.synchronize()  # device sync: DALI reuses its memory in the next run
        else:
            pixels = torch.from_numpy(np.array(output.as_tensor()))
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
