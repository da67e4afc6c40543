"""The built-in sample: the same bytes everywhere, balanced, varied, and not separable by colour."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitlocal
from vitlocal.data.images import ImageSet, decode_rgb, open_images
from vitlocal.data.images.sample import CLASSES, IMAGES_PER_CLASS, SampleImages
from vitlocal.errors import ConfigError


def test_image_set() -> None:
    train, val = open_images("sample", "train"), open_images("sample", "validation")
    assert isinstance(train, ImageSet)
    assert train.spec == val.spec == "sample" and train.classes == val.classes == CLASSES
    assert len(CLASSES) == 20 and sorted(CLASSES) == list(CLASSES)
    assert len(train) == 20 * IMAGES_PER_CLASS and len(val) == 20 * IMAGES_PER_CLASS // 5
    for source in (train, val):
        assert source.labels.dtype == np.int64
        assert np.unique(np.bincount(source.labels)).size == 1  # balanced
        assert np.bincount(source.labels[:100]).tolist() == [5] * 20  # from the beginning on
    assert train.entry(7) == f"train/{CLASSES[7]}/7"
    assert np.array_equal(train.load(7), decode_rgb(train.read(7), "a"))
    assert train.read(-1) == train.read(len(train) - 1)
    with pytest.raises(IndexError):
        train.read(len(train))


@pytest.mark.parametrize(("spec", "train", "val"), [("sample:2", 40, 80), ("sample:50", 1000, 200)])
def test_size(spec: str, train: int, val: int) -> None:
    assert len(open_images(spec, "train")) == train and len(open_images(spec, "val")) == val


def test_a_smaller_sample_is_the_beginning_of_a_larger_sample() -> None:
    assert open_images("sample:1", "train").read(13) == open_images("sample", "train").read(13)


def test_spec_opens_the_same_images_again() -> None:
    source = open_images("sample:3:5", "val")
    assert source.spec == "sample:3:5"
    assert open_images(source.spec, "val").read(11) == source.read(11)
    assert pickle.loads(pickle.dumps(source)).read(11) == source.read(11)


def test_splits_and_seeds_differ() -> None:
    sources = [SampleImages(split, 2, seed) for split in ("train", "val") for seed in (0, 1)]
    seen = {hashlib.sha256(source.read(i)).digest() for source in sources for i in range(3)}
    assert len(seen) == 12


def test_the_same_bytes_in_any_order_and_in_another_process() -> None:
    rows = (0, 5, 39)
    first = [hashlib.sha256(SampleImages("train", 2, 3).read(i)).hexdigest() for i in rows]
    source = SampleImages("train", 2, 3)
    assert [hashlib.sha256(source.read(i)).hexdigest() for i in reversed(rows)] == first[::-1]
    program = (  # an empty vitlocal: its own __init__ imports torch, which takes seconds
        "import hashlib, sys, types; package = sys.modules['vitlocal'] = types.ModuleType('vitlocal');"
        f"package.__path__ = [{str(Path(vitlocal.__file__).parent)!r}];"
        "from vitlocal.data.images.sample import SampleImages; s = SampleImages('train', 2, 3);"
        f"print(*[hashlib.sha256(s.read(i)).hexdigest() for i in {rows}])"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert child.stdout.split() == first


def test_sizes_and_qualities_vary() -> None:
    source = SampleImages("val", 20)
    sizes = np.array([source.load(i).size for i in range(60)])
    assert sizes.min() >= 100 and sizes.max() <= 500
    assert sizes.min(axis=1).min() < 150 and sizes.max(axis=1).max() > 350
    assert len({tuple(size) for size in sizes.tolist()}) > 50
    assert (sizes[:, 0] > sizes[:, 1]).any() and (sizes[:, 0] < sizes[:, 1]).any()
    files = [source.read(i) for i in range(10)]
    assert all(file.startswith(b"\xff\xd8") for file in files)
    assert len({file[:200] for file in files}) > 5  # their quantization tables


@pytest.mark.parametrize("spec", ["sample:0", "sample:x", "sample:", "sample:-3", "sample:5:1:2"])
def test_wrong_specs(spec: str) -> None:
    with pytest.raises(ConfigError, match="sample"):
        open_images(spec, "train")


def test_wrong_split() -> None:
    with pytest.raises(ConfigError, match="no split 'test'; expected 'train' or 'val'"):
        open_images("sample", "test")


def _features(source: SampleImages) -> torch.Tensor:
    """16 × 16 thumbnails and 16-bin histograms of each colour, (n, 816)."""
    rows = []
    for i in range(len(source)):
        image = source.load(i)
        thumbnail = np.asarray(image.resize((16, 16), Image.Resampling.BOX)).ravel() / 255.0
        bins = np.asarray(image) // 16
        histograms = [np.bincount(bins[..., c].ravel(), minlength=16) / bins[..., c].size for c in range(3)]
        rows.append(np.concatenate([thumbnail, *histograms]))
    return torch.tensor(np.array(rows), dtype=torch.float32)


@pytest.mark.slow
def test_colours_and_thumbnails_do_not_separate_the_classes() -> None:
    """Softmax regression stays under 40 %, at its best weight decay; a small network passes 90 %."""
    train, val = SampleImages("train", 150), SampleImages("val", 150)
    x, x_val = _features(train), _features(val)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_val = (x - mean) / std, (x_val - mean) / std
    y, y_val = torch.tensor(train.labels), torch.tensor(val.labels)
    best = 0.0
    for decay in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        weight = torch.zeros(x.shape[1], 20, requires_grad=True)
        bias = torch.zeros(20, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss(decay=decay, weight=weight, bias=bias, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(x @ weight + bias, y) + decay * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        best = max(best, ((x_val @ weight + bias).argmax(1) == y_val).float().mean().item())
    assert best < 0.40
