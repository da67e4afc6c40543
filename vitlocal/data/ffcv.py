"""The FFCV source: ``.beton`` files through FFCV's loader, with crops that are keyed and passes that end cleanly.

FFCV compiles its pipeline once per :class:`Decoder`, for both splits, all files and all sizes: file, seed, epoch
and crop policy travel in the memory manager's ``storage_state`` and the size in the shape of the destination.

Shape letters: B batch, S size, H × W a stored image.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Full
from typing import Any

import numba
import numpy as np
import torch

from vitlocal.data.beton import check_beton
from vitlocal.data.crops import REPEAT_SHIFT, ROW_MASK, centre_box, epoch_order, random_box
from vitlocal.data.manifest import BetonFile, Manifest
from vitlocal.data.source import Batch, Cropping
from vitlocal.errors import ConfigError, DataError
from vitlocal.machine import cores
from vitlocal.plan import Feed, Position


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Importing ffcv, and each loader of it, sets PyTorch's threads; the trainer wants its own number."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


with _torch_threads_kept(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # distutils and invalid escapes, inside ffcv
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.state import State
    from ffcv.reader import Reader

BATCHES_AHEAD = 3
SLOTS = BATCHES_AHEAD + 2  # one being filled, three waiting, one with the consumer
JPG = 0  # FFCV's mode byte
# storage_state[3], int64: what varies from pass to pass. Written by the decoder: BAD, a row it could not decode, + 1.
RANDOM, SEED, EPOCH, BAD = range(4)
# storage_state[4], float64
SCALE_LOW, SCALE_HIGH, RATIO_LOW, RATIO_HIGH, FLIP, CENTRE = range(6)


class KeyedContext(OSCacheContext):
    @property
    def state(self) -> tuple:
        manager = self.manager
        return (self.mmap, manager.ptrs, manager.sizes, manager.control, manager.policy, manager.scratch)


class KeyedManager(OSCacheManager):
    """FFCV's page-cache manager, whose state also carries the crop policy and one scratch image a thread."""

    def __init__(self, reader: Reader):
        # OSCacheManager's own __init__ builds dictionaries of all samples for caches that we do not use:
        # seconds for ImageNet, at each file.
        self.reader = reader
        order = np.argsort(reader.alloc_table["ptr"])
        self.ptrs = np.ascontiguousarray(reader.alloc_table["ptr"][order])
        self.sizes = np.ascontiguousarray(reader.alloc_table["size"][order])
        self.control = np.zeros(4, np.int64)
        self.policy = np.zeros(6, np.float64)
        images = reader.metadata["f0"]
        largest = int(images["width"].max()) * int(images["height"].max()) * 3
        # Pages are touched, and so taken, only by the threads that decode JPEGs.
        self.scratch = np.empty((numba.config.NUMBA_NUM_THREADS, largest), np.uint8)
        self.context = KeyedContext(self)

    def compile_reader(self) -> Callable:
        def read(address, state):
            size = state[2][np.searchsorted(state[1], address)]
            return state[0][address : address + size]

        # Not FFCV's declared result (a mutable array): the file is mapped read-only, and says so.
        return Compiler.compile(read)


class CropDecoder(SimpleRGBImageDecoder):
    """Stored image → (S, S, 3) uint8 crop, with FFCV's own decoding and resizing (OpenCV's INTER_AREA)."""

    size = 32

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        read = self.memory_read
        images_of = Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        threads = Compiler.num_threads
        thread_of = numba.np.ufunc.parallel.get_thread_id

        def decode(draws, destination, metadata, state):
            control, policy, scratch = state[3], state[4], state[5]
            for place in images_of(len(draws)):
                row = np.int64(draws[place]) & ROW_MASK
                field = metadata[row]
                stored = read(field["data_ptr"], state)
                height, width = np.int64(field["height"]), np.int64(field["width"])
                if field["mode"] == JPG:
                    thread = thread_of() if threads > 1 else 0
                    image = scratch[thread, : height * width * 3].reshape(height, width, 3)
                    h, w = np.uint32(height), np.uint32(width)
                    if decode_jpeg(stored, image, h, w, h, w, 0, 0, 1, 1, False, False) != 0:
                        control[BAD] = row + 1  # threads may race for it: any bad row will do
                        continue
                else:
                    image = stored.reshape(height, width, 3)
                flipped = False
                if control[RANDOM]:
                    top, left, rows, columns, flipped = random_box(
                        control[SEED], control[EPOCH], draws[place], height, width, policy[SCALE_LOW],
                        policy[SCALE_HIGH], policy[RATIO_LOW], policy[RATIO_HIGH], policy[FLIP],
                    )  # fmt: skip
                else:
                    top, left, rows, columns = centre_box(height, width, policy[CENTRE])
                crop = destination[place]
                resize(image, top, top + rows, left, left + columns, crop)
                if flipped:
                    last = crop.shape[1] - 1
                    for y in range(crop.shape[0]):
                        for x in range((last + 1) // 2):
                            for channel in range(3):
                                swap = crop[y, x, channel]
                                crop[y, x, channel] = crop[y, last - x, channel]
                                crop[y, last - x, channel] = swap
            return destination[: len(draws)]

        decode.is_parallel = True
        return decode


@dataclass
class OpenFile:
    path: Path
    reader: Reader
    manager: KeyedManager


class Decoder:
    """FFCV's compiled pipeline, moved from file to file (compiling takes about 6 s, moving about 3 ms)."""

    def __init__(self, workers: int = 0):
        workers = workers or min(cores(), numba.config.NUMBA_NUM_THREADS)
        if workers > numba.config.NUMBA_NUM_THREADS:
            raise ConfigError(
                f"data.workers: got {workers}, expected at most {numba.config.NUMBA_NUM_THREADS}, the number of cores "
                "that FFCV's threads can use here"
            )
        self.workers = workers
        self.loader: Loader | None = None
        self.operation = CropDecoder()
        self.files: dict[Path, OpenFile] = {}
        self.copy_stream: torch.cuda.Stream | None = None  # one for all passes: memory is pooled by stream

    def file(self, path: Path, classes: int) -> OpenFile:
        """Opens and checks a file once; DataError names it where it is damaged, foreign or of other classes."""
        if path not in self.files:
            check_beton(path, classes)
            reader = Reader(str(path))
            if list(reader.handlers) != ["image", "label"]:
                raise DataError(
                    f"{path}: expected the fields image, label in this order; write it with write_dataset.py"
                )
            self.files[path] = OpenFile(path, reader, KeyedManager(reader))
        return self.files[path]

    def start(self, file: OpenFile, draws: np.ndarray, feed: Feed, device: torch.device) -> Pass:
        """Begins to decode ``draws`` (int64) of the file, ``feed.batch_size`` at a time."""
        if self.loader is None:
            self.loader = self._compile(file)
        loader = self.loader
        loader.reader, loader.memory_manager, loader.graph.metadata = (
            file.reader,
            file.manager,
            file.reader.metadata,
        )
        loader.batch_size = feed.batch_size
        self.operation.size = feed.size
        if device.type == "cuda" and self.copy_stream is None:
            self.copy_stream = torch.cuda.Stream(device)
        with _torch_threads_kept():
            return Pass(loader, draws, file, device, self.copy_stream)

    def _compile(self, file: OpenFile) -> Loader:
        class KeyedLoader(Loader):
            def next_traversal_order(self) -> Sequence[int]:
                return []  # the order comes from outside, per pass

        import ffcv.loader.loader as module

        manager, module.OSCacheManager = module.OSCacheManager, lambda reader: file.manager
        try:
            with _torch_threads_kept():
                return KeyedLoader(
                    str(file.path), batch_size=1, num_workers=self.workers, os_cache=True,
                    pipelines={"image": [self.operation], "label": None}, batches_ahead=BATCHES_AHEAD,
                )  # fmt: skip
        finally:
            module.OSCacheManager = manager


class Pass(EpochIterator):
    """One pass over draws of a file, in a thread of its own: an FFCV iterator that reports and can be left.

    FFCV's own thread hangs its consumer when it fails, and outlives a pass that ends early.
    """

    def __init__(
        self,
        loader: Loader,
        draws: np.ndarray,
        file: OpenFile,
        device: torch.device,
        copy_stream: torch.cuda.Stream | None,
    ):
        self.file, self.device, self.copy_stream = file, device, copy_stream
        self.labels = file.reader.metadata["f1"]
        self.copies: list[torch.cuda.Event | None] = [None] * SLOTS
        super().__init__(loader, draws)

    def run(self) -> None:
        try:
            numba.set_num_threads(self.loader.num_workers)  # numba's count is a thread's own, and so is CUDA's device
            if self.copy_stream is not None:
                torch.cuda.set_device(self.copy_stream.device)
            for number, draws in enumerate(self.iter_ixes):
                slot = number % SLOTS
                if (copy := self.copies[slot]) is not None:
                    copy.synchronize()  # the host buffer is still being read by the copy of SLOTS batches ago
                (images,) = self.run_pipeline(number, draws, slot, None)
                if bad := int(self.storage_state[3][BAD]):
                    raise DataError(
                        f"{self.file.path}: row {bad - 1} is not a readable JPEG; the file is damaged: write it again"
                    )
                if not self._put(self._batch(images, draws, slot)):
                    return
            self._put(None)
        except BaseException as error:  # to be raised in the consumer, whatever it is
            self._put(error)

    def _batch(self, images: np.ndarray, draws: np.ndarray, slot: int) -> Any:
        ids = torch.from_numpy(draws & ROW_MASK)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # (B, 3, S, S), a view: channels-last
        labels = torch.from_numpy(self.labels[ids.numpy()].astype(np.int64))
        if self.copy_stream is None:
            return Batch(pixels, labels, ids), None
        with torch.cuda.stream(self.copy_stream):  # host-to-device copies, beside the training step
            batch = Batch(
                pixels.to(self.device, non_blocking=True),
                labels.pin_memory().to(self.device, non_blocking=True),
                ids,
            )
            event = torch.cuda.Event()
            event.record(self.copy_stream)
        self.copies[slot] = event
        return batch, event

    def _put(self, item: Any) -> bool:
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def __next__(self) -> Batch:
        item = self.output_queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            batch.images.record_stream(stream)
            batch.labels.record_stream(stream)
        return batch

    def close(self) -> None:
        """Stops and joins the thread, and lets its buffers go. May be called twice."""
        self.terminate_event.set()
        while True:
            try:
                self.output_queue.get_nowait()
            except Empty:
                break
        if self.is_alive() and threading.current_thread() is not self:
            self.join()
        self.memory_allocations = None

    def __del__(self) -> None:
        if hasattr(self, "terminate_event"):
            self.terminate_event.set()


class FFCVSource:
    """A split stored in ``.beton`` files. Serves a size from the smallest file that is good enough for it."""

    def __init__(
        self, root: str, manifest: Manifest, cropping: Cropping, side_ratio: float, device: torch.device,
        decoder: Decoder,
    ):  # fmt: skip
        self.root, self.manifest, self.cropping, self.side_ratio = Path(root), manifest, cropping, side_ratio
        self.device, self.decoder = device, decoder
        self.classes, self.count = manifest.classes, manifest.count
        assert self.count <= ROW_MASK < 1 << REPEAT_SHIFT

    def choose(self, size: int) -> BetonFile:
        """The smallest file whose side is at least ``side_ratio`` × size; where none is, the largest.

        Raw wins over JPEG of the same side. For the centre crop the side must only cover the crop.
        """
        need = size * self.side_ratio if self.cropping.random else size / self.cropping.centre
        files = sorted(self.manifest.files, key=lambda file: (file.side, file.format != "raw"))
        return next((file for file in files if file.side >= need - 1e-6), files[-1])

    @contextmanager
    def open(self, feed: Feed, at: Position) -> Iterator[Iterator[Batch]]:
        file = self.decoder.file(self.root / self.choose(feed.size).file, len(self.classes))
        if len(file.reader.metadata) != self.count:
            raise DataError(
                f"{file.path} has {len(file.reader.metadata)} rows, its manifest says {self.count}; write both again"
            )
        cropping = self.cropping
        if cropping.random:
            draws = epoch_order(self.count, cropping.seed, at.epoch, cropping.repeats)
        else:
            draws = np.arange(self.count)
        file.manager.control[:] = (cropping.random, cropping.seed, at.epoch, 0)
        file.manager.policy[:] = (*cropping.scale, *cropping.ratio, cropping.flip, cropping.centre)
        batches = self.decoder.start(file, draws[at.images :].astype(np.int64), feed, self.device)
        try:
            yield batches
        finally:
            batches.close()

    def close(self) -> None:
        self.decoder.files.clear()
