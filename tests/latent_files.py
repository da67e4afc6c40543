"""Files of latents, and a stand-in for the autoencoder, that tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fake_images import commit_often

from vitlocal.data.autoencoder import Autoencoder
from vitlocal.data.beton import MappedFile
from vitlocal.data.latents import copy_latents
from vitlocal.data.writer import encode
from vitlocal.data.writer import latents as writer_latents
from vitlocal.write_options import WriteOptions

Pair = tuple[np.ndarray, np.ndarray]  # the stored latents of rows, plain and mirrored: (n, 2C, h, h)


class StandIn:
    """Takes one pixel of each cell. As with a network, a result depends a little on the batch and the place in it."""

    channels, stride, scaling_factor, shift = 2, 8, 0.5, 0.0

    def __init__(self, folder: str | Path, device: torch.device | None = None):
        self.digest = f"digest of {Path(folder).name}"

    def encode(self, images: np.ndarray) -> torch.Tensor:
        picked = torch.from_numpy(images[:, 1::8, 2::8].copy()).permute(0, 3, 1, 2) / 255
        shift = (torch.arange(len(images)) + len(images)) / 2048
        return torch.cat([picked[:, :2], picked[:, 1:]], 1) + shift[:, None, None, None]


def use_stand_in(patch: Callable[..., object] = setattr) -> None:
    """The stand-in is every autoencoder. Blocks, calls and commits are of a few rows."""
    commit_often(patch)
    patch(encode, "CHUNK_BYTES", 10_000)  # a few rows, so that few are decoded ahead
    patch(writer_latents, "BLOCK_ROWS", 8)
    patch(writer_latents, "images_per_call", {16: 16, 32: 4, 64: 2}.__getitem__)
    patch(Autoencoder, "load", StandIn)


def options(out: Path, split: str = "train", **changes: object) -> WriteOptions:
    return WriteOptions(
        **{"split": split, "out": str(out), "sides": "16,32", "format": "latent", "vae": "vae", "workers": 1, **changes}
    )


def stored(path: Path, rows: np.ndarray | None = None) -> Pair:
    file = MappedFile(path, 20)
    assert file.latent is not None
    chosen = np.arange(len(file.rows)) if rows is None else rows
    found = np.empty((2, len(chosen), *file.latent.shape[1:]), np.float16)
    for mirrored in (0, 1):
        copy_latents(file, chosen, np.full(len(chosen), mirrored), found[mirrored])
    return found[0], found[1]
