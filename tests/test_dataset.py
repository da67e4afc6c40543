"""The decoder for other loaders: a map-style dataset, a DataLoader, and crops of JPEGs in memory."""

import io
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_images import encode_jpeg, make_photo
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms.v2 import functional as ops

from vitlocal import BetonDataset, Loader, as_dataloader, decode_crops
from vitlocal.errors import ConfigError, DataError

# --- BetonDataset ---


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, dict[int, torch.Tensor]]:
    """The loader's crops of two epochs, by row."""
    with Loader(folder, "train", 40, 24, seed=3, return_ids=True, num_workers=1) as loader:
        return {
            epoch: {int(row): image for images, _, ids in loader for row, image in zip(ids, images, strict=True)}
            for epoch in range(2)
        }


def test_items_are_the_crops_of_the_loader(folder: Path, expected):
    dataset = BetonDataset(folder, "train", 24, seed=3)
    assert len(dataset) == len(expected[0]) == len(dataset.targets) == 120
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for row in (0, 7, 119, -1):
            image, label = dataset[row]
            assert torch.equal(image, expected[epoch][row % 120]) and label == dataset.targets[row]
    with pytest.raises(IndexError):
        dataset[120]
    with pytest.raises(ConfigError, match="crop: a function is for"):
        BetonDataset(folder, "train", 24, crop=lambda ids, epoch: None)


def test_it_pickles_into_workers_and_they_follow_the_epoch(folder: Path, expected):
    dataset = BetonDataset(folder, "train", 24, seed=3)
    _ = dataset[0]  # the file is open, and the threads run
    assert len(pickle.dumps(dataset)) < 5000
    loader = DataLoader(
        dataset, batch_size=30, num_workers=2, persistent_workers=True, sampler=RandomSampler(dataset),
        multiprocessing_context=multiprocessing.get_context("forkserver"),
    )  # fmt: skip
    for epoch in range(2):
        dataset.set_epoch(epoch)
        images = torch.cat([images for images, _ in loader])
        crops = {tuple(image.flatten().tolist()) for image in expected[epoch].values()}
        assert len(images) == 120 and {tuple(image.flatten().tolist()) for image in images} == crops
    loader._iterator = None  # the workers end with it; the garbage collector might end them in the middle of an import


def test_a_transform_sees_each_image(folder: Path):
    dataset = BetonDataset(folder, "val", 32, transform=lambda image: image.float().mean())
    assert dataset[3][0].shape == () and dataset[3][0] == BetonDataset(folder, "val", 32)[3][0].float().mean()


# --- as_dataloader ---


def test_a_dataloader_has_the_batches_and_the_state_of_the_loader(folder: Path, shared):
    def opened() -> Loader:
        return Loader(folder, "train", 40, 24, seed=3, resources=shared)

    loader = as_dataloader(opened())
    assert isinstance(loader, DataLoader) and len(loader) == 3 and len(loader.dataset) == 120
    other = opened()
    for _ in range(2):
        for (images, labels), (same, same_labels) in zip(loader, other, strict=True):
            assert torch.equal(images, same) and torch.equal(labels, same_labels)
            assert images.is_contiguous(memory_format=torch.channels_last)
    for _ in loader:
        break
    with pytest.raises(ConfigError, match=r"expected a vitlocal.Loader"):
        as_dataloader(BetonDataset(folder, "train", 24))
    again = as_dataloader(opened())
    again.load_state_dict(loader.state_dict())
    assert len(list(again)) == 2
    again.set_epoch(0)
    assert torch.equal(next(iter(again))[0], next(iter(opened()))[0])


# --- decode_crops ---


def test_crops_are_those_of_torchvision():
    photos = [make_photo(width, height) for width, height in ((400, 300), (97, 203), (64, 64))]
    jpegs = [encode_jpeg(photo) for photo in photos]
    boxes = [(10, 40, 200, 300), (0, 0, 203, 97), (5, 3, 20, 50)]
    crops = decode_crops(jpegs, boxes, 48, flips=[False, True, False], num_threads=2)
    assert crops.shape == (3, 3, 48, 48) and crops.dtype == torch.uint8
    for crop, jpeg, box, flipped in zip(crops, jpegs, boxes, (False, True, False), strict=True):
        image = ops.pil_to_tensor(Image.open(io.BytesIO(jpeg)))
        other = ops.resized_crop(image, *box, [48, 48])
        other = other.flip(2) if flipped else other
        difference = (crop.float() - other.float()).abs()
        assert difference.mean() < 1.5, box  # reductions of the decoder and of the filter differ slightly
    whole = decode_crops(jpegs, size=48)
    assert torch.equal(whole[1], crops[1].flip(2)) and decode_crops([], size=8).shape == (0, 3, 8, 8)


def test_boxes_need_not_be_whole():
    jpeg = encode_jpeg(make_photo(200, 200))
    a, b = decode_crops([jpeg] * 2, [(10.0, 10, 100, 100), (10.5, 10, 100, 100)], 100)
    assert 0 < (a.float() - b.float()).abs().mean() < 10


@pytest.mark.parametrize(
    "box", [(-1, 0, 10, 10), (0, 0, 0, 10), (0, 0, 101, 100), (0, 50, 10, 51), (np.nan, 0, 1, 1), (0, 0, np.inf, 1)]
)
def test_a_box_outside_of_the_image_is_an_error(box):
    good = encode_jpeg(make_photo(100, 100))
    with pytest.raises(DataError, match="image 1 has a box that is not inside"):
        decode_crops([good, good], [(0, 0, 100, 100), box], 16)


def test_wrong_images_are_named():
    good = encode_jpeg(make_photo(100, 100))
    with pytest.raises(DataError, match="image 1 is not a JPEG"):
        decode_crops([good, b"GIF89a"], size=16)
    with pytest.raises(DataError, match="image 1 is a damaged JPEG"):
        decode_crops([good, good[: len(good) // 2]], size=16)
    with pytest.raises(ConfigError, match="threads of the decoder: got -1"):
        decode_crops([good], size=16, num_threads=-1)
    with pytest.raises(ConfigError, match="jpegs: got str, expected the bytes"):
        decode_crops(["photo.jpg"], size=16)
    for wrong in ({"boxes": [(0, 0, 1, 1)] * 2}, {"flips": [True, False]}, {"size": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            decode_crops([good], **{"size": 16, **wrong})
