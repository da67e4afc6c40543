"""The DALI source: the same crops in the same order as the torchvision source, from images of all kinds."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitlocal.data.crops import CropPolicy
from vitlocal.data.peers.torchvision import TorchvisionSource
from vitlocal.errors import ConfigError, DataError
from vitlocal.plan import Feed
from vitlocal.progress import Position

CPU = torch.device("cpu")
TRAIN, VAL = CropPolicy(random=True, seed=3), CropPolicy(random=False)


def test_without_dali(configure, open_configured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "vitlocal.data.peers.dali", raising=False)
    with pytest.raises(ConfigError, match=r"vitlocal\[dali\]"):
        open_configured(configure("--data.loader=dali"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with images of many kinds and sizes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        ("jpg", "RGB", {"quality": 95}), ("jpg", "L", {}), ("jpg", "CMYK", {}), ("jpg", "RGB", {"progressive": True}),
        ("jpg", "RGB", {"exif": exif}), ("png", "RGB", {}), ("png", "RGBA", {}), ("png", "P", {}), ("gif", "P", {}),
        ("png", "L", {"transparency": 100}),
        ("jpg", "RGB", {"subsampling": 0}),
    ]  # fmt: skip
    for number in range(40):
        suffix, mode, options = kinds[number % len(kinds)]
        path = root / "train" / ("ant", "bee")[number % 2] / f"{number:02}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        size = tuple(rng.integers(40, 200, 2).tolist())
        noise.resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **options)
    return root


@pytest.fixture
def dali(photos: Path):
    pytest.importorskip("nvidia.dali", reason="needs the extra: pip install 'vitlocal[dali]'")
    from vitlocal.data.peers.dali import DALISource

    opened = []

    def open_it(root: Path = photos, cropping: CropPolicy = TRAIN) -> DALISource:
        opened.append(DALISource("nowhere", str(root), "train", cropping, CPU, 2))
        return opened[-1]

    yield open_it
    for source in opened:
        source.close()


def read(source, feed: Feed, at: Position = Position()) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # noqa: B008
    with source.open(feed, at) as batches:
        return [(batch.images.clone(), batch.labels, batch.ids) for batch in batches]


@pytest.mark.parametrize("cropping", [TRAIN, VAL, dataclasses.replace(TRAIN, repeats=3)])
def test_crops_equal_torchvisions(photos: Path, dali, cropping: CropPolicy) -> None:
    slow, source = TorchvisionSource("nowhere", str(photos), "train", cropping, CPU, 1), dali(cropping=cropping)
    assert source.classes == slow.classes and source.count == slow.count == 40
    for size, count, at in ((32, 16, Position()), (48, 40, Position(1)), (24, 7, Position(2, 15))):
        expected, found = read(slow, Feed(size, count), at), read(source, Feed(size, count), at)
        assert len(expected) == len(found)
        for (images, labels, ids), (crops, own_labels, own_ids) in zip(expected, found, strict=True):
            assert torch.equal(ids, own_ids) and torch.equal(labels, own_labels)
            assert crops.shape == images.shape and crops.is_contiguous(memory_format=torch.channels_last)
            apart = (crops.float() - images.float()).abs().mean(dim=(1, 2, 3))
            assert apart.max() < 1.0, (size, ids[apart.argmax()])
    slow.close()


def test_passes_repeat_and_can_be_left_early(dali) -> None:
    source = dali()
    first = read(source, Feed(32, 8))
    for size, taken in ((48, 1), (16, 2), (64, 0)):
        with source.open(Feed(size, 12), Position()) as batches:
            for _ in range(taken):
                assert next(batches).images.shape[-1] == size
    again = read(source, Feed(32, 8))
    assert all(
        torch.equal(a, b) for mine, other in zip(first, again, strict=True) for a, b in zip(mine, other, strict=True)
    )
    rest = read(source, Feed(32, 8), Position(0, 16))
    assert torch.equal(torch.cat([ids for *_, ids in rest]), torch.cat([ids for *_, ids in first[2:]]))


def test_a_damaged_image_is_named(photos: Path, dali, tmp_path: Path) -> None:
    for number in range(9):
        path = tmp_path / "train" / "ant" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = (photos / "train" / "ant" / "00.jpg").read_bytes()
        path.write_bytes(whole[: len(whole) // 3] if number == 5 else whole)
    source = dali(tmp_path)
    for _ in range(2):  # a failed pass can be repeated
        with pytest.raises(DataError, match=r"ant/5.jpg"):
            read(source, Feed(32, 4))


def test_training_with_it(configure, open_configured, dali, photos: Path) -> None:
    config = configure("--data.loader=dali")
    sources = open_configured(config)
    assert type(sources.train).__name__ == "DALISource"
    with sources.train.open(Feed(32, 16), Position()) as batches:
        assert len(next(batches)) == 16
    sources.close()
