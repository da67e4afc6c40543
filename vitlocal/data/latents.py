"""Latents as a source: batches of an autoencoder's means and standard deviations, copied from .beton files.

Shape letters: B batch, C channels of a latent, h w its sides (size / stride).
"""

import math
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import torch

from vitlocal.data.batch import Batch
from vitlocal.data.beton import MappedFile
from vitlocal.data.beton_source import BetonSource
from vitlocal.data.costs import DecodingCosts
from vitlocal.data.crops import ROW_MASK, CropPolicy
from vitlocal.data.fields import LatentForm
from vitlocal.data.manifest import LATENT_FLAGS, load_manifest
from vitlocal.data.random_keys import uniform
from vitlocal.data.reader import LoaderResources, PassReader, Slot
from vitlocal.data.shares import WHOLE, BatchSlice, Share
from vitlocal.errors import ConfigError, DataError
from vitlocal.paths import WRITE

_MIRROR = 0x3122  # the purpose of the random numbers that choose a mirror


def copy_latents(file: MappedFile, rows: np.ndarray, mirrored: np.ndarray, out: np.ndarray) -> None:
    """Fills ``out`` (B, 2C, h, w) float16 with the plain or ``mirrored`` (B,) bool latents of ``rows`` (B,) int64."""
    size = math.prod(out.shape[1:]) * out.itemsize
    starts = file.rows["offset"][rows] + mirrored.astype(np.uint64) * np.uint64(size)
    file.read(starts, np.full(len(rows), size, np.uint64), out.reshape(-1).view(np.uint8))


class LatentReader(PassReader):
    """A pass over the latents of ``file``. Random ``crops`` mirror a draw with the probability ``crops.flip``."""

    def __init__(
        self, resources: LoaderResources, file: MappedFile, crops: CropPolicy, epoch: int, device: torch.device
    ):
        super().__init__(resources, device)
        assert file.latent is not None
        self._file, self._shape, self._key = file, file.latent.shape[1:], (crops.box_seed, epoch, _MIRROR)
        self._flip = crops.flip if crops.random else 0.0

    def _fill(self, draws: np.ndarray, slot: Slot) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        latents, rows = self._take(slot, (len(draws), *self._shape), torch.float16), draws & ROW_MASK
        mirrored = uniform(self._key, draws, 1)[:, 0] < self._flip
        copy_latents(self._file, rows, mirrored, latents.numpy())
        return latents, self._file.labels[rows], rows


class LatentSource(BetonSource):
    """A split of latents. A batch's ``images`` are (B, 2C, h, w) float16: C means, then C standard deviations.

    They are not scaled by ``latents.scaling_factor``. Each is the latent of the plain or of the mirrored photo, by the
    seed, the epoch and the draw. Validation mirrors none. A file serves its own side only, because latents of a resized
    photo are not resized latents.
    """

    reads_latents = True
    latents: LatentForm

    def __init__(
        self, root: str | Path, split: str, crops: CropPolicy, device: torch.device, resources: LoaderResources,
        share: Share = WHOLE,
    ):  # fmt: skip
        manifest = load_manifest(str(root), split)
        super().__init__(root, manifest, crops, device, DecodingCosts({}), 1.0, share)
        assert manifest.latents is not None  # BetonSource checks it
        self.latents, self._resources = manifest.latents, resources
        self._files = {file.side: file for file in manifest.files}

    def check_size(self, size: int) -> None:
        self._file(size)

    def _file(self, size: int) -> MappedFile:
        if size not in self._files:
            sides = sorted(self._files)
            wanted = ",".join(map(str, sorted({size, *sides})))
            raise ConfigError(
                f"data.root: {self.root} has no latents of {size} px for the split {self.manifest.split!r}, only of "
                f"{', '.join(map(str, sides))} px, and latents cannot be resized. Write all into another folder: "
                f"{WRITE} --split {self.manifest.split} --source PHOTOS --sides {wanted} {LATENT_FLAGS} --out FOLDER"
            )

        stored = self._files[size]
        file = self._resources.file(self.root / stored.file, len(self.classes))
        self.check_count(file.path, len(file.rows))
        if not self.latents.is_stored_as(file.latent, size):
            held, said = file.latent or "photos", self.latents.field(size)
            raise DataError(f"{file.path} holds {held}, its manifest says {said}; write both again")
        return file

    def _read(
        self, slices: Iterator[BatchSlice], epoch: int, size: int, subset: np.ndarray | None
    ) -> Generator[Batch, None, None]:
        return LatentReader(self._resources, self._file(size), self.crops, epoch, self.device).batches(slices)
