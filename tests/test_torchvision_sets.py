"""The data sets of torchvision as sources."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from fake_images import check_set, make_folder

from vitlocal.data.images import open_images
from vitlocal.errors import ConfigError


def test_torchvision_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3072), dtype=np.uint8)
    for name in ("data_batch_1", "test_batch"):
        batch = {"data": pixels, "labels": [3, 1, 4, 1, 5, 9, 2]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [("data_batch_1", None)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [("test_batch", None)])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    spec = f"torchvision:CIFAR10:{tmp_path}"
    source = open_images(spec, "val")
    check_set(source, spec)
    assert source.classes == tuple("abcdefghij") and source.labels.tolist() == [3, 1, 4, 1, 5, 9, 2]
    assert np.array_equal(source.load(2), pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))
    assert source.read(0).startswith(b"\x89PNG")
    assert len(pickle.dumps(source)) < 3072 * 3  # the pixels do not travel


def test_torchvision_split_by_signature(tmp_path: Path) -> None:
    """Imagenette takes split='train' or 'val', and finds its folder by itself."""
    for split in ("train", "val"):
        make_folder(tmp_path / "imagenette2", split, per_class=2, classes=("n01440764", "n02102040"))
    train = open_images(f"torchvision:Imagenette:{tmp_path}", "train")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert len(open_images(f"torchvision:Imagenette:{tmp_path}", "validation")) == 4


def test_torchvision_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    with pytest.raises(ConfigError, match=r"torchvision.datasets has no 'Cifar10'"):
        open_images("torchvision:Cifar10", "train")
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ConfigError, match=r"could not be opened from.*no network.*torchvision:CIFAR10:FOLDER"):
        open_images(f"torchvision:CIFAR10:{tmp_path}", "train")
