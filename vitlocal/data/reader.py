"""A pass over one .beton file: a thread fills batches ahead, into memory that is used again.

For photos, the thread calls the fused decoder once for each batch. Nothing is compiled, and passes may overlap.

Shape letters: B batch, S size, n rows of a file.
"""

import atexit
import math
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
import torch

from vitlocal.data.batch import Batch
from vitlocal.data.beton import MappedFile
from vitlocal.data.crops import ROW_MASK, CropPolicy
from vitlocal.data.native import BOX, DecoderThreads, native_policy
from vitlocal.data.random_keys import integers
from vitlocal.data.shares import BatchSlice
from vitlocal.errors import ConfigError, DataError, DeviceMemoryError, first_line

PREFETCH = 3  # batches that wait for the consumer
ALIVE_SECONDS = 2.0  # between looks at whether the thread is alive
MAX_REPLACEMENTS = 20  # replacements in a row that fail to decode before the pass fails

VANISHED = "the thread that reads batches has ended without an error; run the same command again"

_running: "weakref.WeakKeyDictionary[PassReader, threading.Thread]" = weakref.WeakKeyDictionary()

# Chooses the boxes of a batch: (ids (B,) int64, epoch) -> (B, 4) or (B, 5). See Loader.
ChooseBoxes = Callable[[np.ndarray, int], np.ndarray]


class Slot:
    """Host memory for a batch, which grows as needed."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.copied: torch.cuda.Event | None = None  # the end of the copy to a GPU
        self._lent: weakref.ref[np.ndarray] | None = None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool, owned: bool) -> torch.Tensor:
        """A tensor of that form. A copy of an earlier batch to a GPU has ended.

        With ``owned``, the caller keeps the memory as long as a tensor uses it; later batches then have other memory.
        Raises :class:`DeviceMemoryError` if there is too little.
        """
        if self.copied is not None:
            self.copied.synchronize()  # device sync: with a copy that began several batches ago
            self.copied = None
        needed = math.prod(shape) * dtype.itemsize
        in_use = self._lent is not None and self._lent() is not None
        if len(self.memory) < needed or in_use:
            # Fresh memory costs as much time as decoding small crops, so it is used again if nobody has it.
            self.memory = torch.empty(0, dtype=torch.uint8)  # the earlier memory is free now
            try:
                self.memory = torch.empty(needed, dtype=torch.uint8, pin_memory=pinned)
            except RuntimeError as error:
                count, sides, gib, why = shape[0], " × ".join(map(str, shape[1:])), needed / 2**30, first_line(error)
                raise DeviceMemoryError(
                    f"no memory for {count} images of {sides} ({gib:,.1f} GiB; {why}): use smaller images "
                    "(model.size, evaluate.size) or batches (train.batch_size, evaluate.batch_size)"
                ) from error
        memory, self._lent = self.memory[:needed], None
        if owned and not pinned:  # a copy on a GPU has memory of its own
            lent = memory.numpy()  # lives as long as the last tensor that shares it
            self._lent, memory = weakref.ref(lent), torch.from_numpy(lent)
        return memory.view(dtype).view(shape)


class LoaderResources:
    """What the native loaders of a process share. ``workers`` is the number of decoder threads; 0: one a core."""

    def __init__(self, workers: int = 0):
        self.threads = DecoderThreads(workers)
        self.files: dict[Path, MappedFile] = {}
        self.slots: list[Slot] = []  # those that no pass uses
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


def pixel_boxes(boxes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Boxes in fractions of each image, (B, 4) or (B, 5), in pixels of the images ``rows`` (B,) of native.ROW.

    The columns are top, left, height, width and, perhaps, whether it is flipped. Returns (B,) of native.BOX. Raises
    ConfigError for another shape, or a box outside of its image.
    """
    given = np.asarray(boxes, np.float64)
    if given.ndim != 2 or len(given) != len(rows) or given.shape[1] not in (4, 5):
        raise ConfigError(f"crop: got boxes of shape {given.shape}, expected ({len(rows)}, 4) or ({len(rows)}, 5)")
    top, left, height, width = given[:, :4].T
    end = 1 + 1e-6  # sums of fractions are rounded
    inside = (top >= 0) & (left >= 0) & (height > 0) & (width > 0) & (top + height <= end) & (left + width <= end)
    if not inside.all():  # NaN is not inside
        wrong = given[np.flatnonzero(~inside)[0]].tolist()
        raise ConfigError(f"crop: got the box {wrong}, expected top, left, height and width as fractions of the image")
    found = np.zeros(len(rows), BOX)
    found["top"], found["left"] = top * rows["height"], left * rows["width"]
    found["height"], found["width"] = height * rows["height"], width * rows["width"]
    if given.shape[1] == 5:
        found["flipped"] = given[:, 4] != 0
    return found


@atexit.register
def _stop_all() -> None:
    """Ends the threads of passes that are still open: joining a thread later, while Python ends, can take for ever."""
    for reader, thread in list(_running.items()):
        reader.stop()
        thread.join()


class PassReader:
    """One pass, whose batches a thread of its own fills ahead. A kind of pass adds ``_fill``.

    At most ``prefetch`` batches wait. With ``owned``, batches belong to the consumer; else a batch on a CPU is valid
    until the next.
    """

    def __init__(self, resources: LoaderResources, device: torch.device, prefetch: int = PREFETCH, owned: bool = False):
        self._resources, self._device, self._prefetch, self._owned = resources, device, prefetch, owned
        self._stream = resources.stream(device)
        self._free: SimpleQueue[Slot] = SimpleQueue()
        self._ready: SimpleQueue[tuple[Batch, Slot] | BaseException | None] = SimpleQueue()
        self._closed = False

    def batches(self, slices: Iterator[BatchSlice]) -> Generator[Batch, None, None]:
        """The batches of ``slices``, decoded ahead. Errors of the thread are raised here."""
        spare = self._resources.slots
        # The thread decodes one, ``prefetch`` wait, and the consumer has one. An owned batch may be in use until the
        # consumer has the next one, so one more is kept back.
        slots = [spare.pop() if spare else Slot() for _ in range(self._prefetch + 2 + self._owned)]
        kept_back = [slots[0]] if self._owned else []
        for slot in slots[len(kept_back) :]:
            self._free.put(slot)
        thread = threading.Thread(target=self._run, args=(slices,), name="vitlocal-loader", daemon=True)
        thread.start()
        _running[self] = thread
        try:
            while isinstance(item := self._next(thread), tuple):
                batch, slot = item
                del item
                if self._stream is not None and slot.copied is not None:
                    stream = torch.cuda.current_stream(self._device)
                    stream.wait_event(slot.copied)
                    batch.images.record_stream(stream)
                    batch.labels.record_stream(stream)
                yield batch
                del batch
                kept_back.append(slot)
                self._free.put(kept_back.pop(0))
            if item is not None:
                raise item
        finally:
            if not self._closed:
                self.stop()
            try:
                thread.join()
            except RuntimeError:  # the garbage collector closes this generator in the thread itself
                pass
            else:
                spare += slots

    def _next(self, thread: threading.Thread) -> tuple[Batch, Slot] | BaseException | None:
        """What the thread has made next. DataError if it has ended without a word."""
        while True:
            alive = thread.is_alive()
            try:
                return self._ready.get(timeout=ALIVE_SECONDS)
            except Empty:
                if not alive:
                    raise DataError(VANISHED) from None

    def stop(self) -> None:
        """Lets the thread end after the batch that it decodes."""
        self._closed = True
        self._free.put(Slot())  # the thread may wait for a slot

    # --- in the thread ---

    def _run(self, slices: Iterator[BatchSlice]) -> None:
        try:
            if self._stream is not None:
                torch.cuda.set_device(self._stream.device)
            for part in slices:
                slot = self._free.get()
                if self._closed:
                    return
                self._ready.put((self._read(part, slot), slot))
            self._ready.put(None)
        except MemoryError as error:
            text = f"memory ran out while a batch was read ({first_line(error)}): use smaller batches or images"
            self._ready.put(DeviceMemoryError(text))
        except BaseException as error:  # the consumer raises it, whatever it is
            self._ready.put(error)

    def _read(self, part: BatchSlice, slot: Slot) -> Batch:
        """Fills a batch, and starts its copy to the device."""
        images, found, rows = self._fill(part.draws, slot)
        labels = torch.from_numpy(found.astype(np.int64))
        if self._stream is not None:
            with torch.cuda.stream(self._stream):  # host-to-device copies, which overlap the training step
                images = images.to(self._device, non_blocking=True)
                labels = labels.pin_memory().to(self._device, non_blocking=True)
                slot.copied = torch.cuda.Event(blocking=True)  # who waits for it leaves its core to the decoders
                slot.copied.record(self._stream)
        elif self._device.type != "cpu":
            images, labels = images.to(self._device), labels.to(self._device)
        return Batch(images, labels, torch.from_numpy(rows), part.places, part.total)

    def _fill(self, draws: np.ndarray, slot: Slot) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """The images of ``draws`` (B,) in the memory of ``slot``, their labels (B,), and their rows (B,) int64."""
        raise NotImplementedError

    def _take(self, slot: Slot, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return slot.take(shape, dtype, self._stream is not None, self._owned)


class EpochReader(PassReader):
    """A pass over the photos of ``file``, in crops of ``size`` px.

    ``choose_boxes`` replaces the boxes of ``crops``.

    A damaged image raises DataError. With ``skip_damaged`` another image of ``subset`` (default: all rows) replaces it
    if the order is random, and else it is left out. ``damaged`` says what is wrong with such rows.
    """

    def __init__(
        self, resources: LoaderResources, file: MappedFile, crops: CropPolicy, epoch: int, size: int,
        device: torch.device, *, subset: np.ndarray | None = None, skip_damaged: bool = False,
        choose_boxes: ChooseBoxes | None = None, prefetch: int = PREFETCH, owned: bool = False,
    ):  # fmt: skip
        super().__init__(resources, device, prefetch, owned)
        self._file, self._crops, self._epoch, self._size, self._subset = file, crops, epoch, size, subset
        self._skip_damaged, self._choose_boxes = skip_damaged, choose_boxes
        self._policy = native_policy(crops, epoch)
        self.damaged: dict[int, str] = {}

    # --- in the thread ---

    def _fill(self, draws: np.ndarray, slot: Slot) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        memory = self._take(slot, (len(draws), self._size, self._size, 3), torch.uint8)
        crops, rows = self._decode(draws, memory)
        return crops.permute(0, 3, 1, 2), self._file.labels[rows], rows  # (B, 3, S, S), a view: channels-last

    def _decode(self, draws: np.ndarray, crops: torch.Tensor, attempt: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        """Fills ``crops`` (B, S, S, 3) uint8. Returns crops and rows (B,) int64; B shrinks if images are left out."""
        file, rows = self._file, draws & ROW_MASK
        file.check()
        boxes = None
        if self._choose_boxes is not None and len(rows):
            boxes = pixel_boxes(self._choose_boxes(rows.copy(), self._epoch), file.rows[rows])
        problems = self._resources.threads.decode(
            file.bytes, file.rows, draws, self._policy, crops.numpy(), boxes=boxes
        )
        if not problems:
            return crops, rows
        places = np.array(sorted(problems))
        if not self._skip_damaged:
            raise DataError(
                f"{file.path}: row {rows[places[0]]} {problems[places[0]]}. Write the file again, or leave damaged "
                'images out: on_error="skip", or --data.on_error=skip for a run'
            )
        self.damaged |= {int(rows[place]): problem for place, problem in problems.items()}
        if not self._crops.shuffles:  # evaluation must not count an image twice
            whole = np.delete(np.arange(len(draws)), places)
            return crops[torch.from_numpy(whole)], rows[whole]
        if attempt == MAX_REPLACEMENTS:
            which = "" if self._subset is None else f" of the {len(self._subset)} selected"
            raise DataError(f"{file.path}: {attempt} images in a row{which} do not decode; write the file again")
        count = len(file.rows) if self._subset is None else len(self._subset)
        others = integers((self._crops.seed, self._epoch), draws[places], attempt, count)
        others = others if self._subset is None else self._subset[others]
        replaced = torch.empty((len(places), *crops.shape[1:]), dtype=torch.uint8)
        crops[torch.from_numpy(places)], rows[places] = self._decode(others, replaced, attempt + 1)
        return crops, rows
