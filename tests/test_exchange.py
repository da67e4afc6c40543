"""FFCV and vitlocal read each other's files, and the crops of CropDecoder are those of the native loader."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_images import FakeImages, area_mean, rows_of, write_config
from native_loader import native

from vitlocal.data import beton
from vitlocal.data.beton import MappedFile
from vitlocal.data.crops import CropPolicy
from vitlocal.data.manifest import load_manifest
from vitlocal.data.native import DecoderThreads, native_policy
from vitlocal.data.writer.encode import stored_size
from vitlocal.data.writer.write import write
from vitlocal.errors import DataError
from vitlocal.plan import Feed
from vitlocal.progress import Position

TRAIN = CropPolicy(random=True, seed=3)
pytestmark = [pytest.mark.ffcv, pytest.mark.usefixtures("frequent_commits")]


def test_the_format_equals_ffcvs() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert beton.HEADER == types.HeaderType
    assert beton.FIELD == types.FieldDescType
    assert beton.ALLOCATION == types.ALLOC_TABLE_TYPE
    assert beton.metadata_type() == types.get_metadata_type([RGBImageField(), IntField()])
    assert beton.VERSION == types.CURRENT_VERSION
    assert (beton.JPG, beton.RAW) == (IMAGE_MODES["jpg"], IMAGE_MODES["raw"])
    assert types.TYPE_ID_HANDLER[beton.IMAGE_FIELD] is RGBImageField
    assert types.TYPE_ID_HANDLER[beton.INT_FIELD] is IntField


def test_sizes_equal_ffcvs() -> None:
    from ffcv.fields.rgb_image import resizer

    for width, height in np.random.default_rng(0).integers(2, 700, (150, 2)).tolist():
        for side in (64, 160, 256):
            if min(width, height) * side < max(width, height):
                continue  # FFCV fails on an edge of no pixels
            expected = resizer(np.zeros((height, width, 3), np.uint8), side).shape[:2]
            assert stored_size(width, height, side) == expected[::-1]
    assert stored_size(5000, 3, 64) == (64, 1)


def test_the_area_mean_of_the_tests_is_that_of_ffcvs_writer() -> None:
    import cv2

    pixels = np.random.default_rng(0).integers(0, 256, (97, 130, 3), np.uint8)
    for size in ((130, 97), (129, 96), (65, 48), (31, 90), (1, 1)):
        assert np.abs(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) - area_mean(pixels, size)).max() <= 1


def test_ffcvs_loader_reads_the_files(tmp_path: Path) -> None:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor

    threads = torch.get_num_threads()
    images = FakeImages(60, size=(80, 60))
    write(write_config(tmp_path, sides="64:raw,64:jpg"), images, progress=False)
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder(), ToTensor()]}
    paths = [str(tmp_path / f"train_64_{format}.beton") for format in ("raw", "jpg")]
    for path in paths:
        reader, (image, label, _) = Reader(path), rows_of(Path(path))
        assert reader.field_names == ["image", "label"]
        assert (reader.metadata["f0"] == image).all() and (reader.metadata["f1"] == label).all()
    loader = Loader(paths[0], 32, 1, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines)
    for path in paths:
        if path != paths[0]:  # switches the file without compiling again
            loader.reader = Reader(path)
            loader.memory_manager = type(loader.memory_manager)(loader.reader)
            loader.graph.metadata = loader.reader.metadata
        seen = 0
        for batch, labels in loader:
            for pixels, label in zip(np.array(batch), labels.flatten().tolist(), strict=True):
                full = np.asarray(images.load(seen))
                expected = area_mean(full, (64, 48))
                worst = np.abs(pixels.astype(int) - expected).max()
                assert worst <= 1 if path == paths[0] else worst < 40
                assert label == seen % 3
                seen += 1
        assert seen == 60
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_files_that_ffcv_wrote_pass(tmp_path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    images = FakeImages(30)
    samples = [(np.asarray(images.load(index)), index % 3) for index in range(30)]
    fields = {"image": RGBImageField("raw", max_resolution=64), "label": IntField()}
    DatasetWriter(str(tmp_path / "stock.beton"), fields, num_workers=2).from_indexed_dataset(samples, chunksize=4)
    mapped = MappedFile(tmp_path / "stock.beton", classes=3)
    assert len(mapped.rows) == 30 and mapped.rows["raw"].all() and mapped.labels.max() == 2
    write(write_config(tmp_path, sides="64:raw"), images, progress=False)
    theirs, ours = rows_of(tmp_path / "stock.beton"), rows_of(tmp_path / "train_64_raw.beton")
    assert theirs[1].tolist() == ours[1].tolist()
    for stock, mine in zip(theirs[2], ours[2], strict=True):
        assert np.abs(np.frombuffer(stock, np.uint8).astype(int) - np.frombuffer(mine, np.uint8)).max() <= 1


def test_files_that_ffcv_wrote_need_no_manifest(tmp_path: Path, shared):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 60, 3), dtype=np.uint8)
    rows = [(image, number % 5) for number, image in enumerate(pixels)]
    for name, mode in (("train_60_raw", "raw"), ("train_60_jpg", "jpg"), ("val_60_raw", "raw")):
        fields = {"image": RGBImageField(write_mode=mode, jpeg_quality=95), "label": IntField()}
        DatasetWriter(str(tmp_path / f"{name}.beton"), fields, num_workers=1).from_indexed_dataset(rows)
    it = native(tmp_path, "train", TRAIN, shared, side_ratio=1)

    def first_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with it.open(Feed(16, 30), Position()) as batches:
            batch = next(iter(batches))
            return batch.images.clone(), batch.labels, batch.ids

    assert it.classes == ("0", "1", "2", "3", "4") and it.count == 30
    assert it.choose(60).file == "train_60_raw.beton"
    images, labels, ids = first_batch()
    assert sorted(ids.tolist()) == list(range(30)) and (labels == ids % 5).all()
    it.manifest = dataclasses.replace(it.manifest, files=it.manifest.files[:1])
    assert it.choose(60).file == "train_60_jpg.beton"
    others, _, _ = first_batch()
    assert (images.float() - others.float()).abs().mean() < 25  # noise through JPEG
    (tmp_path / "train_30_raw.beton").write_bytes((tmp_path / "val_60_raw.beton").read_bytes()[:-5])
    with pytest.raises(DataError, match="train_30_raw.beton"):
        load_manifest(str(tmp_path), "train")


def test_crop_decoder_in_an_ffcv_loader(folder: Path):
    from vitlocal.data.peers.crop_decoder import CropDecoder, keep_torch_threads

    from ffcv.loader import Loader, OrderOption  # isort: skip  (after crop_decoder, which imports ffcv without warnings)

    for name in ("train_128_jpg.beton", "train_48_raw.beton"):
        with keep_torch_threads():
            loader = Loader(
                str(folder / name), batch_size=50, num_workers=1, os_cache=True, order=OrderOption.SEQUENTIAL,
                pipelines={"image": [CropDecoder(32, TRAIN)]}, drop_last=False,
            )  # fmt: skip
            first = [images.copy() for images, _ in loader]
            second = [images.copy() for images, _ in loader]
        assert [len(images) for images in first] == [50, 50, 20]
        assert np.abs(first[0].astype(int) - second[0]).mean() > 5  # each pass is an epoch with its own boxes
        file, draws = MappedFile(folder / name, 20), np.arange(50)
        threads, crops = DecoderThreads(1), np.empty((50, 32, 32, 3), np.uint8)
        threads.decode(file.bytes, file.rows, draws, native_policy(TRAIN, 1), crops)
        threads.close()
        assert (first[0] == crops).all()
