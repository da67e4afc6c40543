"""Checks latents: are they finite and, for a sample of them, what the autoencoder makes of the photos?

Letters: n rows, C channels of a latent, h its side.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vitlocal.data.autoencoder import Autoencoder
from vitlocal.data.beton import MappedFile
from vitlocal.data.crops import CropPolicy, centre_squares
from vitlocal.data.fields import FieldType
from vitlocal.data.latents import copy_latents
from vitlocal.data.manifest import Manifest
from vitlocal.data.peers.originals import OriginalsSource
from vitlocal.errors import ConfigError

BATCH = 256
SAMPLE = 16  # rows that are encoded again
TOLERANCE = 0.02  # mean difference to the stored values: devices differ by much less, other photos by much more


def both_latents(file: MappedFile, kind: FieldType, rows: np.ndarray) -> np.ndarray:
    """The latents of ``rows`` (n,) in a file of ``kind``: (n, 2, 2C, h, h) float16, [plain, mirrored]."""
    found = np.empty((2, len(rows), *kind.shape[1:]), np.float16)
    for mirrored in (0, 1):
        copy_latents(file, rows, np.full(len(rows), mirrored), found[mirrored])
    return found.swapaxes(0, 1)


def damaged_latents(path: Path, file: MappedFile, side: int, manifest: Manifest, bar: tqdm) -> list[str]:
    """What is wrong with the latents of the file of ``side`` px."""
    assert manifest.latents is not None
    kind = manifest.latents.field(side)
    if not manifest.latents.is_stored_as(file.latent, side):
        return [f"{path}: holds {file.latent or 'photos'}, the manifest says {kind}"]
    problems = []
    for start in range(0, len(file.rows), BATCH):
        rows = np.arange(start, min(start + BATCH, len(file.rows)))
        parts = both_latents(file, kind, rows).reshape(len(rows), 2, 2, -1)  # means, standard deviations
        whole = np.isfinite(parts).all((1, 2, 3)) & (parts[:, :, 1] >= 0).all((1, 2))
        for row in rows[~whole].tolist():
            entry = f" ({manifest.entries[row]})" if row < manifest.count else ""
            problems.append(f"{path}: row {row}{entry} has a value that is not finite, or a negative deviation")
        bar.update(len(rows))
    return problems


class EncodedSample:
    """Some rows of a split of latents, encoded again from the photos.

    ``vae`` is the folder of the autoencoder, ``source`` the place of the photos (None: that of the manifest). Raises
    ConfigError if the split holds photos or latents of another autoencoder, or if photos are missing.
    """

    def __init__(self, vae: str, source: str | None, manifest: Manifest, out: str):
        if manifest.latents is None:
            raise ConfigError(f"--vae {vae} has no effect, because {out}/{manifest.split}.json is of photos; remove it")
        self._autoencoder, self._manifest = Autoencoder.load(vae), manifest
        if self._autoencoder.digest != manifest.latents.autoencoder:
            raise ConfigError(
                f"--vae {vae} has the digest {self._autoencoder.digest}, and the latents in {out} are of the "
                f"autoencoder {manifest.latents.autoencoder}; name that one"
            )
        photos = OriginalsSource(out, source, manifest.split, CropPolicy(random=False), torch.device("cpu"), 0)
        self._rows = np.unique(np.linspace(0, manifest.count - 1, SAMPLE).astype(np.int64))
        sides = [file.side for file in manifest.files]
        squares = [centre_squares(photos.images.load(int(photos.numbers[row])), sides) for row in self._rows]
        self._squares = dict(zip(sides, map(np.stack, zip(*squares, strict=True)), strict=True))

    def differences(self, path: Path, file: MappedFile, side: int) -> list[str]:
        """The rows of the file of ``side`` px whose latents are others."""
        assert file.latent is not None
        stored, squares = both_latents(file, file.latent, self._rows), self._squares[side]
        plain, mirrored = (
            self._autoencoder.encode(np.ascontiguousarray(photos)).cpu().numpy()
            for photos in (squares, squares[:, :, ::-1])
        )
        errors = np.abs(stored - np.stack([plain, mirrored], 1)).mean((2, 3, 4)).max(1)
        return [
            f"{path}: row {row} ({self._manifest.entries[row]}) is not the latent of its photo, by {error:.3g}"
            for row, error in zip(self._rows.tolist(), errors.tolist(), strict=True)
            if not error <= TOLERANCE
        ]
