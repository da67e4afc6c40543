"""Crops of real photos from stored files and from the originals."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from native_loader import native
from photos import PHOTOS, unpack_photos

from vitlocal.data.crops import CropPolicy
from vitlocal.data.manifest import load_manifest
from vitlocal.data.native import Encoder
from vitlocal.data.peers.torchvision import TorchvisionSource
from vitlocal.data.writer.write import write
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.write_options import WriteOptions

COUNT = 24

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not PHOTOS.exists(), reason=f"{PHOTOS} is not there: VITLOCAL_REALDATA names its folder"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the default files of some photos, one for each class, in both splits."""
    root = tmp_path_factory.mktemp("photos")
    source = unpack_photos(root / "source", COUNT)
    for split in ("train", "val"):
        write(WriteOptions(split, str(source), str(root / "data"), workers=1), progress=False)
    return root / "data"


def test_the_default_files(photos: Path):
    train, val = load_manifest(str(photos), "train"), load_manifest(str(photos), "val")
    assert [(file.side, file.format) for file in train.files] == [(64, "raw"), (160, "raw"), (256, "jpg"), (400, "jpg")]
    assert [(file.side, file.format) for file in val.files] == [(256, "jpg")]
    assert train.count == val.count == COUNT


def test_all_photos_are_whole():
    encoder = Encoder()
    with tarfile.open(PHOTOS) as archive:
        photos = [archive.extractfile(member).read() for member in archive if member.isfile()]
    assert len(photos) > COUNT
    for photo in photos:
        encoder.require_whole(photo)


@pytest.mark.parametrize("size", [32, 96, 160, 224])
def test_both_sources_cut_the_same_crops(photos: Path, shared, size: int):
    cpu, policy = torch.device("cpu"), CropPolicy(random=True, seed=1)
    mine = native(photos, "train", policy, shared)
    theirs = TorchvisionSource(str(photos), None, "train", policy, cpu, workers=1)
    try:
        with mine.open(Feed(size, COUNT), Position()) as a, theirs.open(Feed(size, COUNT), Position()) as b:
            one, other = next(a), next(iter(b))
            assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
            difference = (one.images.float() - other.images.float()).abs().mean((1, 2, 3))
    finally:
        theirs.close()
    # Mean levels of 255. Files store another size (by an area filter) and are resized again, which matters most if
    # a small crop is enlarged. Crops of another part or photo differ by 50 and more.
    assert np.median(difference) < 9 and difference.max() < 25, difference
