"""The native loader: ``.beton`` files to batches of crops, which a thread of each pass decodes ahead.

The thread calls the fused decoder once for each batch. Nothing is compiled, and passes may overlap.

Shape letters: B batch, S size, n rows of a file.
"""

import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from vitlocal.data.batch import Batch, Source
from vitlocal.data.beton import MappedFile
from vitlocal.data.costs import DecodingCosts
from vitlocal.data.crops import ROW_MASK, CropPolicy
from vitlocal.data.manifest import BetonFile, Manifest, load_manifest
from vitlocal.data.native import DecoderThreads, native_policy
from vitlocal.data.random_keys import integers
from vitlocal.data.shares import WHOLE, BatchSlice, Share
from vitlocal.errors import DataError
from vitlocal.plan import Feed
from vitlocal.progress import Position

SLOTS = 5  # batches in memory: the thread decodes one, three wait, the consumer has one
MAX_REPORTED = 5  # damaged images that are named at the end of a pass
MAX_REPLACEMENTS = 20  # replacements in a row that fail to decode before the pass fails


@dataclass
class Slot:
    """Host memory for a batch, which grows as needed."""

    memory: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    copied: torch.cuda.Event | None = None  # the end of the copy to a GPU

    def crops(self, count: int, size: int, pinned: bool) -> torch.Tensor:
        """(count, size, size, 3) uint8, from which nothing is copied any more."""
        if self.copied is not None:
            self.copied.synchronize()  # device sync: with a copy that began several batches ago
        if len(self.memory) < (needed := count * size * size * 3):
            self.memory = torch.empty(needed, dtype=torch.uint8, pin_memory=pinned)
        return self.memory[:needed].view(count, size, size, 3)


class LoaderResources:
    """What the native sources of a process share. ``workers`` is the number of decoder threads; 0: one a core."""

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


class BetonSource(Source):
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

    def _read(self, slices: Iterator[BatchSlice], epoch: int, size: int) -> Generator[Batch, None, None]:
        file = self.resources.file(self.root / self.choose(size).file, len(self.classes))
        self.check_count(file.path, len(file.rows))
        return EpochReader(self, file, epoch, size).batches(slices)

    def report(self, file: MappedFile, damaged: dict[int, str]) -> None:
        """Prints the rows of ``file`` that a pass has skipped, with what is wrong with them. Each row is named once."""
        new = sorted(set(damaged).difference(self.damaged))
        self.damaged = {*self.damaged, *new}
        for row in new[:MAX_REPORTED]:
            print(f"{file.path}: skipped row {row} ({self.manifest.entries[row]}): it {damaged[row]}", file=sys.stderr)
        if len(new) > MAX_REPORTED:
            print(f"{file.path}: skipped {len(new) - MAX_REPORTED} more damaged images", file=sys.stderr)


class EpochReader:
    """One pass over ``file``, in crops of ``size`` px, which a thread of its own decodes.

    A damaged image raises DataError. With ``skip_damaged`` another image replaces it in training, and evaluation leaves
    it out. The source reports such rows at the end of the pass.
    """

    def __init__(self, source: NativeSource, file: MappedFile, epoch: int, size: int):
        self._source, self._file, self._epoch, self._size = source, file, epoch, size
        self._policy = native_policy(source.crops, epoch)
        self._stream = source.resources.stream(source.device)
        self._damaged: dict[int, str] = {}
        self._free: SimpleQueue[Slot] = SimpleQueue()
        self._ready: SimpleQueue[tuple[Batch, Slot] | BaseException | None] = SimpleQueue()
        self._closed = False

    def batches(self, slices: Iterator[BatchSlice]) -> Generator[Batch, None, None]:
        """The batches of ``slices``, decoded ahead. Errors of the thread are raised here."""
        spare = self._source.resources.slots
        slots = [spare.pop() if spare else Slot() for _ in range(SLOTS)]
        for slot in slots:
            self._free.put(slot)
        thread = threading.Thread(target=self._run, args=(slices,), name="vitlocal-loader", daemon=True)
        thread.start()
        try:
            while isinstance(item := self._ready.get(), tuple):
                batch, slot = item
                if slot.copied is not None:
                    stream = torch.cuda.current_stream(self._source.device)
                    stream.wait_event(slot.copied)
                    batch.images.record_stream(stream)
                    batch.labels.record_stream(stream)
                yield batch
                self._free.put(slot)
            if item is not None:
                raise item
        finally:
            self._closed = True
            self._free.put(slots[0])  # the thread may wait for it
            thread.join()
            spare += slots
            self._source.report(self._file, self._damaged)

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
        except BaseException as error:  # the consumer raises it, whatever it is
            self._ready.put(error)

    def _read(self, part: BatchSlice, slot: Slot) -> Batch:
        """Decodes a batch, and starts its copy to the device."""
        crops, rows = self._decode(part.draws, slot.crops(len(part.draws), self._size, self._stream is not None))
        images = crops.permute(0, 3, 1, 2)  # (B, 3, S, S), a view: channels-last
        labels = torch.from_numpy(self._file.labels[rows].astype(np.int64))
        if self._stream is not None:
            with torch.cuda.stream(self._stream):  # host-to-device copies, which overlap the training step
                images = images.to(self._source.device, non_blocking=True)
                labels = labels.pin_memory().to(self._source.device, non_blocking=True)
                slot.copied = torch.cuda.Event(blocking=True)  # who waits for it leaves its core to the decoders
                slot.copied.record(self._stream)
        return Batch(images, labels, torch.from_numpy(rows), part.places, part.total)

    def _decode(self, draws: np.ndarray, crops: torch.Tensor, attempt: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        """Fills ``crops`` (B, S, S, 3) uint8. Returns crops and rows (B,) int64; B shrinks if images are left out."""
        source, file, rows = self._source, self._file, draws & ROW_MASK
        problems = source.resources.threads.decode(file.bytes, file.rows, draws, self._policy, crops.numpy())
        if not problems:
            return crops, rows
        places = np.array(sorted(problems))
        if not source.skip_damaged:
            raise DataError(
                f"{file.path}: row {rows[places[0]]} {problems[places[0]]}. Write the file again, or train without "
                "damaged images: --data.on_error=skip"
            )
        self._damaged |= {int(rows[place]): problem for place, problem in problems.items()}
        if not source.crops.random:  # evaluation must not count an image twice
            whole = np.delete(np.arange(len(draws)), places)
            return crops[torch.from_numpy(whole)], rows[whole]
        if attempt == MAX_REPLACEMENTS:
            raise DataError(f"{file.path}: {attempt} images in a row do not decode; write the file again")
        others = integers((source.crops.seed, self._epoch), draws[places], attempt, len(file.rows))
        replaced = torch.empty((len(places), *crops.shape[1:]), dtype=torch.uint8)
        crops[torch.from_numpy(places)], rows[places] = self._decode(others, replaced, attempt + 1)
        return crops, rows


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
