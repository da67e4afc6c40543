"""The native loader: ``.beton`` files to batches of crops, by one reader thread over a ring of host buffers.

The reader thread calls the fused decoder once for each batch. Nothing is compiled, and passes may overlap.

Shape letters: B batch, S size, n rows of a file.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from vitlocal.data.batch import Batch, SplitSource
from vitlocal.data.beton import MappedFile
from vitlocal.data.costs import DecodingCosts
from vitlocal.data.crops import REPEAT_SHIFT, ROW_MASK, CropPolicy
from vitlocal.data.manifest import BetonFile, Manifest, load_manifest
from vitlocal.data.native import DecoderThreads, native_policy
from vitlocal.data.random_keys import integers
from vitlocal.data.shares import WHOLE, BatchSlice, Share, Slices
from vitlocal.errors import DataError
from vitlocal.plan import Feed
from vitlocal.progress import Position

BATCHES_AHEAD = 3
RING_SLOTS = BATCHES_AHEAD + 2  # the reader fills one, three wait, the consumer has one
MAX_REPORTED = 5  # damaged images that are named at the end of a pass
MAX_REPLACEMENTS = 20  # replacements in a row that fail to decode before the pass fails


class BufferPool:
    """Host memory for batches, which passes take and give back. The buffers grow to the largest pass and are reused."""

    def __init__(self) -> None:
        self.free: list[torch.Tensor] = []
        self.lock = threading.Lock()

    def take(self, count: int, size: int, pinned: bool) -> list[torch.Tensor]:
        """``count`` flat uint8 buffers of at least ``size`` bytes, in pinned memory if ``pinned``."""
        # Tensors that are made in inference mode (evaluation) could not be written to outside of it.
        with self.lock, torch.inference_mode(False):
            return [self._take(size, pinned) for _ in range(count)]

    def _take(self, size: int, pinned: bool) -> torch.Tensor:
        fitting = [buffer for buffer in self.free if len(buffer) >= size and buffer.is_pinned() == pinned]
        if fitting:
            buffer = min(fitting, key=len)
            self.free = [other for other in self.free if other is not buffer]
            return buffer
        if self.free:  # it is too small for this pass, and later passes rarely need less
            self.free.pop(0)
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    def give_back(self, buffers: list[torch.Tensor]) -> None:
        with self.lock:
            self.free += buffers


class LoaderResources:
    """What the native sources of a process share. ``workers`` is the number of decoder threads; 0: one a core."""

    def __init__(self, workers: int = 0):
        self.threads = DecoderThreads(workers)
        self.buffers = BufferPool()
        self.files: dict[Path, MappedFile] = {}
        self.copy_stream: torch.cuda.Stream | None = None  # one for all passes: PyTorch pools memory by stream

    def file(self, path: Path, num_classes: int) -> MappedFile:
        """Opens and checks a file, once."""
        if path not in self.files:
            self.files[path] = MappedFile(path, num_classes)
        return self.files[path]

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream for host-to-device copies; None on a CPU."""
        if device.type == "cuda" and self.copy_stream is None:
            self.copy_stream = torch.cuda.Stream(device)
        return self.copy_stream if device.type == "cuda" else None


Ready = tuple[Batch, torch.cuda.Event | None]  # with the event that marks the end of its copy to a GPU


class EpochReader(Iterator[Batch]):
    """The batches of one pass: the ``slices`` of ``file``, cropped to ``size`` px by a thread of its own.

    A damaged image raises DataError. With ``skip_damaged`` another image replaces it in training, and evaluation leaves
    it out. ``damaged`` maps such rows to what is wrong with them. Errors of the thread are raised in the consumer.
    """

    def __init__(
        self, resources: LoaderResources, file: MappedFile, slices: Slices, crops: CropPolicy, epoch: int, size: int,
        device: torch.device, skip_damaged: bool, report: Callable[[MappedFile, dict[int, str]], None],
    ):  # fmt: skip
        self.damaged: dict[int, str] = {}
        self._resources, self._file, self._slices = resources, file, slices
        self._crops, self._epoch, self._policy = crops, epoch, native_policy(crops, epoch)
        self._device, self._skip, self._report = device, skip_damaged, report
        self._copy_stream = resources.stream(device)
        self._copies: list[torch.cuda.Event | None] = [None] * RING_SLOTS
        shape = (max(1, slices.largest), size, size, 3)
        self._buffers = resources.buffers.take(RING_SLOTS, int(np.prod(shape)), self._copy_stream is not None)
        with torch.inference_mode(False):
            self._ring = [buffer[: int(np.prod(shape))].view(shape) for buffer in self._buffers]  # (B, S, S, 3) each
        self._queue: queue.Queue[Ready | BaseException | None] = queue.Queue(BATCHES_AHEAD)
        self._closed, self._ended = threading.Event(), False
        self.thread = threading.Thread(target=self._run, name="vitlocal-loader", daemon=True)
        self.thread.start()

    # --- in the reader thread ---

    def _run(self) -> None:
        try:
            if self._copy_stream is not None:
                torch.cuda.set_device(self._copy_stream.device)
            for number, part in enumerate(self._slices):
                slot = number % RING_SLOTS
                if (copy := self._copies[slot]) is not None:
                    copy.synchronize()  # device sync: the copy of RING_SLOTS batches ago still reads the host buffer
                if self._closed.is_set():
                    return
                pixels, rows = self._decode(part.draws, self._ring[slot][: len(part.draws)])
                if not self._put(self._to_device(pixels, rows, slot, part)):
                    return
            self._put(None)
        except BaseException as error:  # the consumer raises it, whatever it is
            self._put(error)

    def _decode(self, draws: np.ndarray, crops: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """Fills ``crops`` (B, S, S, 3) uint8. Returns crops and rows (B,) int64; B shrinks if images are left out."""
        file, policy = self._file, self._policy
        problems = self._resources.threads.decode(file.bytes, file.rows, draws, policy, crops.numpy())
        if not problems:
            return crops, draws & ROW_MASK
        if not self._skip:
            place, problem = min(problems.items())
            raise DataError(
                f"{file.path}: row {draws[place] & ROW_MASK} {problem}. Write the file again, or train without "
                "damaged images: --data.on_error=skip"
            )
        self._record_damage(draws, problems)
        if not self._crops.random:  # evaluation must not count an image twice
            whole = np.setdiff1d(np.arange(len(draws)), list(problems))
            return crops[torch.from_numpy(whole)], draws[whole] & ROW_MASK
        draws = draws.copy()
        for attempt in range(MAX_REPLACEMENTS):
            places = np.array(sorted(problems))
            others = integers((self._crops.seed, self._epoch), draws[places], attempt, len(file.rows))
            replaced = np.empty((len(others), *crops.shape[1:]), np.uint8)
            failed = self._resources.threads.decode(file.bytes, file.rows, others, policy, replaced)
            self._record_damage(others, failed)
            crops[torch.from_numpy(places)] = torch.from_numpy(replaced)
            draws[places] = others
            problems = {int(places[place]): problem for place, problem in failed.items()}
            if not problems:
                return crops, draws & ROW_MASK
        raise DataError(f"{file.path}: {MAX_REPLACEMENTS} images in a row do not decode; write the file again")

    def _record_damage(self, draws: np.ndarray, problems: dict[int, str]) -> None:
        self.damaged |= {int(draws[place] & ROW_MASK): problem for place, problem in problems.items()}

    def _to_device(self, pixels: torch.Tensor, rows: np.ndarray, slot: int, part: BatchSlice) -> Ready:
        ids = torch.from_numpy(rows)
        images = pixels.permute(0, 3, 1, 2)  # (B, 3, S, S), a view: channels-last
        labels = torch.from_numpy(self._file.labels[rows].astype(np.int64))
        event = None
        if self._copy_stream is not None:
            with torch.cuda.stream(self._copy_stream):  # host-to-device copies, which overlap the training step
                images = images.to(self._device, non_blocking=True)
                labels = labels.pin_memory().to(self._device, non_blocking=True)
                event = torch.cuda.Event(blocking=True)  # a thread that waits for it leaves its core to the decoders
                event.record(self._copy_stream)
            self._copies[slot] = event
        return Batch(images, labels, ids, part.places, part.total), event

    def _put(self, item: Ready | BaseException | None) -> bool:
        """Hands ``item`` to the consumer; False if the consumer has closed the pass."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    # --- in the consumer's thread ---

    def __next__(self) -> Batch:
        item = None if self._ended else self._queue.get()
        if not isinstance(item, tuple):
            self._ended = True
            raise StopIteration if item is None else item
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            batch.images.record_stream(stream)
            batch.labels.record_stream(stream)
        return batch

    def close(self) -> None:
        """Stops and joins the thread, gives its buffers back, and reports the damage. May be called twice."""
        self._closed.set()
        self._ended = True
        while not self._queue.empty():  # a thread that waits for a place in the queue sees at once that it is closed
            self._queue.get_nowait()
        self.thread.join()
        for copy in filter(None, self._copies):
            copy.synchronize()  # device sync: it may still read the host buffer
        self._resources.buffers.give_back(self._buffers)
        self._buffers, self._ring = [], []
        self._report(self._file, self.damaged)


def choose_file(manifest: Manifest, costs: DecodingCosts, crops: CropPolicy, side_ratio: float, size: int) -> BetonFile:
    """The file for crops of ``size`` px: the cheapest to decode among the files that are large enough.

    For random crops a side of ``side_ratio`` x size is large enough; for centre crops, a side that covers the crop. If
    no file is, the largest side serves. Without measured costs the smallest side wins, and raw before JPEG.
    """
    need = size * side_ratio if crops.random else size / crops.centre
    files = sorted(manifest.files, key=lambda file: (file.side, file.format != "raw"))
    enough = [file for file in files if file.side >= need - 1e-6]
    enough = enough or [file for file in files if file.side == files[-1].side]
    measured = [cost for file in enough if (cost := costs.microseconds_for(file, size)) is not None]
    return enough[int(np.argmin(measured))] if len(measured) == len(enough) else enough[0]


class BetonSource(SplitSource):
    """A split of the data folder ``root``, read from the file that :func:`choose_file` picks for each size.

    DataError if a file has another length than the manifest says.
    """

    def __init__(
        self, root: str | Path, manifest: Manifest, crops: CropPolicy, device: torch.device, costs: DecodingCosts,
        side_ratio: float, share: Share,
    ):  # fmt: skip
        side = max(file.side for file in manifest.files)
        super().__init__(manifest.classes, manifest.count, side, crops, device, share)
        self.root, self.manifest, self.costs, self.side_ratio = Path(root), manifest, costs, side_ratio
        for file in manifest.files:  # before a run starts, because a curriculum may need a file hours later
            path = self.root / file.file
            if path.exists() and path.stat().st_size != file.bytes:
                raise DataError(
                    f"{path} has {path.stat().st_size} bytes, its manifest says {file.bytes}: it is cut off, or "
                    f"another file. Remove {manifest.split}.json and {manifest.split}_*.beton from {root}, and write "
                    f"them again with the same command: python write_dataset.py --split {manifest.split} --out {root} …"
                )

    def choose(self, size: int) -> BetonFile:
        """The file for crops of ``size`` px."""
        return choose_file(self.manifest, self.costs, self.crops, self.side_ratio, size)

    def check_count(self, path: Path, count: int) -> None:
        if count != self.count:
            raise DataError(f"{path} has {count} rows, its manifest says {self.count}; write both again")


class NativeSource(BetonSource):
    """A split of a data folder, read by the native loader. ``on_error`` "skip": see :class:`EpochReader`."""

    def __init__(
        self, root: str | Path, manifest: Manifest, crops: CropPolicy, device: torch.device, resources: LoaderResources,
        *, side_ratio: float = 1.5, on_error: str = "stop", share: Share = WHOLE,
    ):  # fmt: skip
        super().__init__(root, manifest, crops, device, DecodingCosts.load(root, manifest), side_ratio, share)
        self.resources, self.skip_damaged = resources, on_error == "skip"
        assert self.count <= ROW_MASK < 1 << REPEAT_SHIFT

    def _read(self, slices: Slices, epoch: int, size: int) -> EpochReader:
        file = self.resources.file(self.root / self.choose(size).file, len(self.classes))
        self.check_count(file.path, len(file.rows))
        return EpochReader(
            self.resources, file, slices, self.crops, epoch, size, self.device, self.skip_damaged, self._report
        )

    def _report(self, file: MappedFile, damaged: dict[int, str]) -> None:
        new = sorted(set(damaged).difference(self.damaged))
        self.damaged = {*self.damaged, *new}
        for row in new[:MAX_REPORTED]:
            print(f"{file.path}: skipped row {row} ({self.manifest.entries[row]}): it {damaged[row]}", file=sys.stderr)
        if len(new) > MAX_REPORTED:
            print(f"{file.path}: skipped {len(new) - MAX_REPORTED} more damaged images", file=sys.stderr)

    def close(self) -> None:
        """Forgets the open files."""
        self.resources.files.clear()


class Loader:
    """The native loader for a training loop of your own: ``for images, labels in loader``.

    Batches are (B, 3, S, S) uint8, channels-last, and (B,) int64, on ``device``. Each iteration is the next epoch,
    ``epoch``. ``size`` (px) and ``batch_size`` may be set between epochs. On a CPU, a batch is valid until the next.
    ``train`` (default: of the split "train") selects shuffled random resized crops with flips, else centre crops.
    """

    def __init__(
        self, root: str | Path, split: str, *, size: int, batch_size: int, train: bool | None = None, seed: int = 0,
        workers: int = 0, device: str | torch.device = "cpu",
    ):  # fmt: skip
        crops = CropPolicy(random=split == "train" if train is None else train, seed=seed)
        manifest = load_manifest(str(root), split)
        self.source = NativeSource(root, manifest, crops, torch.device(device), LoaderResources(workers))
        self.size, self.batch_size, self.epoch = size, batch_size, 0

    def __len__(self) -> int:
        return -(-self.source.count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        with self.source.open(Feed(self.size, self.batch_size), Position(epoch)) as batches:
            for batch in batches:
                yield batch.images, batch.labels
