"""The FFCV source: ``.beton`` files through FFCV's loader, with the fused decoder and passes that end cleanly.

Nothing is compiled: FFCV's compiled pipeline is replaced by one call of the fused decoder a batch. So a file opens
in milliseconds, passes may overlap, and file, size, seed and crop policy are a pass's own.

Shape letters: B batch, S size, n rows of a file.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Full
from typing import Any

import numpy as np
import torch

from vitlocal.data.batch import Batch, Rows
from vitlocal.data.beton import read_beton
from vitlocal.data.costs import Costs
from vitlocal.data.crops import REPEAT_SHIFT, ROW_MASK, Cropping, replacement
from vitlocal.data.manifest import BetonFile, Manifest
from vitlocal.data.native import RANDOM, Threads, policy_of
from vitlocal.data.peers.crop_decoder import CropDecoder, torch_threads_kept
from vitlocal.data.shares import WHOLE, Share, Slice, Slices
from vitlocal.errors import DataError
from vitlocal.plan import Feed
from vitlocal.progress import Position

from ffcv.loader import Loader  # isort: skip  (decode.py imports ffcv first, quietly)
from ffcv.loader.epoch_iterator import EpochIterator  # isort: skip
from ffcv.memory_managers.os_cache import OSCacheManager  # isort: skip
from ffcv.reader import Reader  # isort: skip

BATCHES_AHEAD = 3
SLOTS = BATCHES_AHEAD + 2  # one being filled, three waiting, one with the consumer
SHOWN = 5  # damaged images that are named one by one at the end of a pass
ATTEMPTS = 20  # at replacing an image that does not decode, before the file is given up


class MappedFile(OSCacheManager):
    """A checked .beton file: FFCV's page-cache manager, less what it prepares for caches that we do not use.

    (It would build dictionaries of all samples: seconds for ImageNet, at each file.)
    """

    def __init__(self, path: Path, classes: int):
        _, self.rows, self.labels = read_beton(path, classes)
        self.path, self.reader = path, Reader(str(path))
        self.bytes = np.memmap(path, np.uint8, mode="r")

    def schedule_epoch(self, schedule: Any) -> MappedFile:
        return self

    def compile_reader(self) -> None:
        return None  # the fused decoder reads the map itself

    state = None  # FFCV's storage state, which only compiled pipelines ask for

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *raised: Any) -> None:
        pass


class Buffers:
    """Host memory for batches, pinned for a GPU, that passes take and give back: it grows to the largest and stays.

    Stands where FFCV's loader has its graph of operations, of which its passes ask nothing but memory.
    """

    def __init__(self) -> None:
        self.free: list[torch.Tensor] = []
        self.size, self.pinned = 0, False
        self.lock = threading.Lock()

    def allocate_memory(self, batch_size: int, slots: int) -> list[torch.Tensor]:
        """One (batch_size, S, S, 3) uint8 tensor a slot."""
        shape = (batch_size, self.size, self.size, 3)
        count = batch_size * self.size * self.size * 3
        # Evaluation runs in inference mode, whose tensors do not know of what they are a view when they are given back.
        with self.lock, torch.inference_mode(False):
            return [self._take(count)[:count].view(shape) for _ in range(slots)]

    def _take(self, count: int) -> torch.Tensor:
        fits = [buffer for buffer in self.free if len(buffer) >= count and buffer.is_pinned() == self.pinned]
        if fits:
            buffer = min(fits, key=len)
            self.free = [other for other in self.free if other is not buffer]
            return buffer
        if self.free:  # too small for this pass, and so for those to come, whose sizes grow
            self.free.remove(self.free[0])
        return torch.empty(count, dtype=torch.uint8, pin_memory=self.pinned)

    def give_back(self, batches: list[torch.Tensor]) -> None:
        with self.lock:
            self.free += [batch._base if batch._base is not None else batch for batch in batches]


class FusedLoader(Loader):
    """FFCV's loader with nothing to compile; which file and size it serves is set before each pass."""

    def generate_code(self) -> None:
        self.code = ()

    def next_traversal_order(self) -> list[int]:
        return []  # the order comes from outside, per pass


class Decoder:
    """What all sources of a run share: threads, memory and the copy stream."""

    def __init__(self, workers: int = 0):
        self.threads = Threads(workers)
        self.buffers = Buffers()
        self.files: dict[Path, MappedFile] = {}
        self.loader: FusedLoader | None = None
        self.copy_stream: torch.cuda.Stream | None = None  # one for all passes: memory is pooled by stream

    def file(self, path: Path, classes: int) -> MappedFile:
        """Opens and checks a file once; DataError names it where it is damaged, foreign or of other classes."""
        if path not in self.files:
            self.files[path] = MappedFile(path, classes)
        return self.files[path]

    def start(self, file: MappedFile, slices: Slices, policy: np.ndarray, size: int, device: torch.device,
              stop: bool) -> Pass:  # fmt: skip
        """Begins to decode the file's ``slices`` to crops of ``size`` px, one after another.

        A damaged image is an error where ``stop`` is set, else another is drawn in its place.
        """
        loader = self.loader or self._load(file)
        self.loader = loader
        loader.reader, loader.memory_manager = file.reader, file
        loader.batch_size = max(1, slices.largest)
        self.buffers.size, self.buffers.pinned = size, device.type == "cuda"
        if device.type == "cuda" and self.copy_stream is None:
            self.copy_stream = torch.cuda.Stream(device)
        with torch_threads_kept():
            return Pass(self, file, slices, policy, device, stop)

    def _load(self, file: MappedFile) -> FusedLoader:
        import ffcv.loader.loader as module

        manager, module.OSCacheManager = module.OSCacheManager, lambda reader: file
        try:
            with torch_threads_kept():
                loader = FusedLoader(
                    str(file.path), batch_size=1, num_workers=1, os_cache=True, batches_ahead=BATCHES_AHEAD,
                    pipelines={"image": [CropDecoder(1)], "label": None},
                )  # fmt: skip
        finally:
            module.OSCacheManager = manager
        loader.graph = self.buffers
        return loader


class Pass(EpochIterator):
    """One pass over slices of a file, in a thread of its own: an FFCV iterator that reports and can be left.

    FFCV's own thread hangs its consumer when it fails, and outlives a pass that ends early.
    """

    def __init__(self, decoder: Decoder, file: MappedFile, slices: Slices, policy: np.ndarray,
                 device: torch.device, stop: bool):  # fmt: skip
        self.threads, self.buffers, self.copy_stream = decoder.threads, decoder.buffers, decoder.copy_stream
        self.file, self.policy, self.device, self.stop = file, policy, device, stop
        self.copies: list[torch.cuda.Event | None] = [None] * SLOTS
        self.damaged: dict[int, str] = {}  # row → what is wrong with it
        self.slices = slices
        super().__init__(decoder.loader, [])  # FFCV would cut the order up itself; the thread starts here

    def run(self) -> None:
        try:
            if self.copy_stream is not None:
                torch.cuda.set_device(self.copy_stream.device)
            for number, part in enumerate(self.slices):
                slot = number % SLOTS
                if (copy := self.copies[slot]) is not None:
                    copy.synchronize()  # the host buffer is still being read by the copy of SLOTS batches ago
                pixels, rows = self.run_pipeline(number, part.draws, slot, None)
                if not self._put(self._batch(pixels, rows, slot, part)):
                    return
            self._put(None)
        except BaseException as error:  # to be raised in the consumer, whatever it is
            self._put(error)

    def run_pipeline(self, number: int, draws: np.ndarray, slot: int, event: None) -> tuple[torch.Tensor, np.ndarray]:
        """Decodes a batch: (B, S, S, 3) uint8 and its rows (B,) int64; B is smaller where images were left out."""
        crops = self.memory_allocations[slot][: len(draws)]
        problems = self.threads.decode(self.file.bytes, self.file.rows, draws, self.policy, crops.numpy())
        if not problems:
            return crops, draws & ROW_MASK
        if self.stop:
            place, problem = min(problems.items())
            raise DataError(
                f"{self.file.path}: row {draws[place] & ROW_MASK} {problem}. Write the file again, or train without "
                "such images: --data.on_error=skip"
            )
        self._note(draws, problems)
        if self.policy["kind"][0] != RANDOM:  # an evaluation counts no image twice
            kept = np.setdiff1d(np.arange(len(draws)), list(problems))
            return crops[torch.from_numpy(kept)], draws[kept] & ROW_MASK
        draws = draws.copy()
        seed, epoch = int(self.policy["seed"][0]), int(self.policy["epoch"][0])
        for attempt in range(ATTEMPTS):
            places = np.array(sorted(problems))
            others = np.array(
                [replacement(seed, epoch, int(draws[place]), attempt, len(self.file.rows)) for place in places]
            )
            drawn = np.empty((len(others), *crops.shape[1:]), np.uint8)
            again = self.threads.decode(self.file.bytes, self.file.rows, others, self.policy, drawn)
            self._note(others, again)
            crops[torch.from_numpy(places)] = torch.from_numpy(drawn)
            draws[places] = others
            problems = {int(places[place]): problem for place, problem in again.items()}
            if not problems:
                return crops, draws & ROW_MASK
        raise DataError(f"{self.file.path}: {ATTEMPTS} images in a row do not decode; write the file again")

    def _note(self, draws: np.ndarray, problems: dict[int, str]) -> None:
        self.damaged |= {int(draws[place] & ROW_MASK): problem for place, problem in problems.items()}

    def _batch(self, pixels: torch.Tensor, rows: np.ndarray, slot: int, part: Slice) -> Any:
        ids = torch.from_numpy(rows)
        images = pixels.permute(0, 3, 1, 2)  # (B, 3, S, S), a view: channels-last
        labels = torch.from_numpy(self.file.labels[rows].astype(np.int64))
        if self.copy_stream is None:
            return Batch(images, labels, ids, part.places, part.total), None
        with torch.cuda.stream(self.copy_stream):  # host-to-device copies, beside the training step
            batch = Batch(
                images.to(self.device, non_blocking=True),
                labels.pin_memory().to(self.device, non_blocking=True),
                ids,
                part.places,
                part.total,
            )
            event = torch.cuda.Event(blocking=True)  # who waits for it leaves its core to the decoders
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
        if self.memory_allocations is not None:
            for copy in filter(None, self.copies):
                copy.synchronize()  # it may still be reading
            self.buffers.give_back(self.memory_allocations)
            self.memory_allocations = None

    def __del__(self) -> None:
        if hasattr(self, "terminate_event"):
            self.terminate_event.set()


def choose_file(manifest: Manifest, costs: Costs, cropping: Cropping, side_ratio: float, size: int) -> BetonFile:
    """The file that serves crops of ``size`` px: of those good enough, the one whose crops cost least.

    Good enough for random crops is a side of at least ``side_ratio`` x size, for the centre crop one that covers it;
    where no file is, it is the largest. Where costs were not measured for all of these, the smallest side is taken to
    cost least, and raw less than JPEG.
    """
    need = size * side_ratio if cropping.random else size / cropping.centre
    files = sorted(manifest.files, key=lambda file: (file.side, file.format != "raw"))
    good = [file for file in files if file.side >= need - 1e-6]
    good = good or [file for file in files if file.side == files[-1].side]
    measured = [costs.of(file, size) for file in good]
    if None in measured:
        return good[0]
    return good[int(np.argmin(measured))]


class FFCVSource:
    """A split stored in ``.beton`` files. Serves a size from the file that is good enough for it at the least cost.

    DataError where a file has another length than its manifest says.
    """

    def __init__(
        self, root: str, manifest: Manifest, cropping: Cropping, side_ratio: float, device: torch.device,
        decoder: Decoder, on_error: str = "stop", share: Share = WHOLE,
    ):  # fmt: skip
        self.root, self.manifest, self.cropping, self.side_ratio = Path(root), manifest, cropping, side_ratio
        self.device, self.decoder, self.stop, self.share = device, decoder, on_error == "stop", share
        self.damaged: set[int] = set()  # rows that were left out so far, where that is asked for
        self.classes, self.count, self.costs = manifest.classes, manifest.count, Costs.load(root, manifest)
        self.rows, self.side = Rows(self.count), max(file.side for file in manifest.files)
        assert self.count <= ROW_MASK < 1 << REPEAT_SHIFT
        for file in manifest.files:  # now, and not when the curriculum comes to the size that this one serves
            path = self.root / file.file
            if path.exists() and path.stat().st_size != file.bytes:
                raise DataError(
                    f"{path} has {path.stat().st_size} bytes, its manifest says {file.bytes}: cut off, or another one. "
                    f"Remove {manifest.split}.json and {manifest.split}_*.beton from {root}, and write them again with "
                    f"the command that wrote them: python write_dataset.py --split {manifest.split} --out {root} …"
                )

    def choose(self, size: int) -> BetonFile:
        """The file for crops of ``size`` px, by :func:`choose_file`."""
        return choose_file(self.manifest, self.costs, self.cropping, self.side_ratio, size)

    @contextmanager
    def open(self, feed: Feed, at: Position) -> Iterator[Iterator[Batch]]:
        file = self.decoder.file(self.root / self.choose(feed.size).file, len(self.classes))
        if len(file.reader.metadata) != self.count:
            raise DataError(
                f"{file.path} has {len(file.reader.metadata)} rows, its manifest says {self.count}; write both again"
            )
        cropping = self.cropping
        slices = self.share.slices(
            cropping.draws(self.count, at.epoch, at.images, self.rows.of(feed.subset)), feed.batch_size
        )
        batches = self.decoder.start(file, slices, policy_of(cropping, at.epoch), feed.size, self.device, self.stop)
        try:
            yield batches
        finally:
            batches.close()
            self._report(file, batches.damaged)

    def _report(self, file: MappedFile, damaged: dict[int, str]) -> None:
        new = sorted(set(damaged) - self.damaged)
        self.damaged.update(new)
        for row in new[:SHOWN]:
            print(f"{file.path}: row {row} ({self.manifest.entries[row]}) {damaged[row]}; left out", file=sys.stderr)
        if len(new) > SHOWN:
            print(f"{file.path}: {len(new) - SHOWN} more damaged images left out", file=sys.stderr)

    def close(self) -> None:
        self.decoder.files.clear()
