"""FFCV's own ``Loader`` as a source: ``data.loader=ffcv``, to compare with.

FFCV's decoders are compiled once for each file; ``output_size`` follows the size of each pass. Differences from the
native loader: the boxes are FFCV's own and come from numba's random state, so a run does not repeat exactly. A damaged
JPEG is not detected: FFCV returns the pixels of another image. Files are chosen by their side alone. FFCV is installed
by ``pip install "vitlocal[ffcv]"``.

Shape letters: B batch, S size.
"""

from collections.abc import Generator, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitlocal.data.batch import Batch
from vitlocal.data.beton import MappedFile
from vitlocal.data.beton_source import BetonSource
from vitlocal.data.costs import DecodingCosts
from vitlocal.data.crops import ROW_MASK, CropPolicy
from vitlocal.data.manifest import Manifest
from vitlocal.data.peers.crop_decoder import keep_torch_threads
from vitlocal.data.reader import ALIVE_SECONDS, VANISHED
from vitlocal.data.shares import WHOLE, BatchSlice, Share
from vitlocal.errors import DataError

with keep_torch_threads():
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FFCVLoader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor

# Compiled loaders stay alive, because numba fails with a KeyError in a finalizer if it frees FFCV's decoders.
_compiled: list[FFCVLoader] = []


class GuardedIterator(EpochIterator):
    """FFCV's iterator, which raises the errors of its thread in the consumer, and which can be closed early.

    FFCV's own thread dies of an error without a message, and its consumer then waits forever.
    """

    error: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.error = error
            self.output_queue.put(None)  # FFCV's mark of the end

    def run_pipeline(self, *arguments: Any) -> Any:
        if self.terminate_event.is_set():
            raise StopIteration  # FFCV's thread ends at this
        return super().run_pipeline(*arguments)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        waiting = self.output_queue.not_empty
        with waiting:
            while not self.output_queue.queue:
                alive = self.is_alive()
                if not waiting.wait(ALIVE_SECONDS) and not alive:
                    raise DataError(VANISHED)
        try:
            return super().__next__()
        except StopIteration as end:
            raise self.error or end from None

    def close(self) -> None:
        super().close()
        self.closed = True

    def stop(self) -> None:
        """Ends and joins the thread."""
        self.terminate_event.set()
        while self.is_alive():
            while not self.output_queue.empty():  # the thread may wait for a place in the queue
                self.output_queue.get_nowait()
            self.join(0.05)
        self.close()


class FileLoader:
    """FFCV's compiled ``Loader`` of one file."""

    def __init__(self, path: Path, crops: CropPolicy, device: torch.device, workers: int):
        if crops.random:
            self.decoder = RandomResizedCropRGBImageDecoder((1, 1), crops.scale, crops.ratio)
        else:
            self.decoder = CenterCropRGBImageDecoder((1, 1), crops.centre)  # FFCV rounds in the stored image
        image = [self.decoder, *([RandomHorizontalFlip(crops.flip)] if crops.random else []), ToTensor()]
        label = [IntDecoder(), ToTensor()]
        if device.type == "cuda":
            image, label = [*image, ToDevice(device)], [*label, ToDevice(device)]
        with keep_torch_threads():
            self.loader = FFCVLoader(
                str(path), batch_size=1, num_workers=workers, os_cache=True, drop_last=False,
                pipelines={"image": image, "label": label},
            )  # fmt: skip
        _compiled.append(self.loader)

    def start(self, rows: np.ndarray, batch_size: int, size: int) -> GuardedIterator:
        """Starts to read ``rows`` (n,) in their order."""
        self.decoder.output_size = (size, size)  # takes effect where the iterator allocates memory; nothing is compiled
        self.loader.batch_size = batch_size
        with keep_torch_threads(), torch.inference_mode(False):  # its memory is used in training too
            return GuardedIterator(self.loader, rows.astype(np.uint64))


class FFCVSource(BetonSource):
    """A split of the data folder ``root``, read by FFCV. See the module for what differs from the native loader."""

    def __init__(
        self, root: str | Path, manifest: Manifest, crops: CropPolicy, device: torch.device, workers: int, *,
        side_ratio: float = 1.5, share: Share = WHOLE,
    ):  # fmt: skip
        super().__init__(root, manifest, crops, device, DecodingCosts({}), side_ratio, share)
        self.workers, self.loaders = workers, dict[Path, FileLoader]()

    def _read(
        self, slices: Iterator[BatchSlice], epoch: int, size: int, subset: np.ndarray | None
    ) -> Generator[Batch, None, None]:
        path = self.root / self.choose(size).file
        if path not in self.loaders:
            self.check_count(path, len(MappedFile(path, len(self.classes)).rows))
            self.loaders[path] = FileLoader(path, self.crops, self.device, self.workers)
        return self._batches(self.loaders[path], slices, size)

    def _batches(self, loader: FileLoader, slices: Iterator[BatchSlice], size: int) -> Generator[Batch, None, None]:
        # FFCV cuts its order into batches of one length; the last slice of a process may have another.
        for length, group in groupby(slices, lambda part: len(part.draws)):
            parts = list(group)
            if not length:
                yield from (Batch.empty(size, self.device, part.total) for part in parts)
                continue
            batches = loader.start(np.concatenate([part.draws for part in parts]) & ROW_MASK, length, size)
            try:
                for part, (pixels, labels) in zip(parts, batches, strict=True):
                    if self.device.type == "cuda":  # FFCV writes later batches to the same memory
                        pixels = pixels.clone()
                    images = pixels.permute(0, 3, 1, 2)  # (B, 3, S, S), a view: channels-last
                    ids = torch.from_numpy(part.draws & ROW_MASK)
                    yield Batch(images, labels.flatten().clone(), ids, part.places, part.total)
            finally:
                batches.stop()
