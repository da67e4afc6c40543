"""Writing .beton files: what is in them, and what is left by whatever can stop a write."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from vitlocal.data import beton, native
from vitlocal.data.beton import check_beton
from vitlocal.data.images import decode_rgb
from vitlocal.data.manifest import Manifest, checksum, joined_crc32
from vitlocal.data.writer import encode, journal
from vitlocal.data.writer import write as write_module
from vitlocal.data.writer.encode import stored_size
from vitlocal.data.writer.write import DEFAULT_FILES, StoredFile, WriteConfig, parse_files, write
from vitlocal.errors import ConfigError, DataError

FILES = (StoredFile(64, "raw"), StoredFile(96, "jpg"))


@dataclasses.dataclass
class FakeImages:
    """Smooth noise of varying sizes; ``acts`` says what loading some rows does instead."""

    count: int
    size: tuple[int, int] | None = None  # width, height; None: vary
    acts: dict[int, str] = dataclasses.field(default_factory=dict)
    spec: str = "fake"
    holds_files: bool = False
    classes: tuple[str, ...] = ("ant", "bee", "cow")

    def __post_init__(self) -> None:
        self.labels = np.arange(self.count) % 3

    def __len__(self) -> int:
        return self.count

    def entry(self, index: int) -> str:
        return f"{self.classes[index % 3]}/{index}.png"

    def load(self, index: int) -> Image.Image:
        act = self.acts.get(index)
        if act == "unreadable":
            raise DataError(f"{self.entry(index)}: cut off after 12 bytes; restore it")
        if act == "bug":
            raise TypeError("an error of ours")
        if act in ("SIGKILL", "SIGINT", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, act))
        if act == "slow":
            time.sleep(60)
        rng = np.random.default_rng(index)
        width, height = self.size or rng.integers(40, 140, 2).tolist()
        noise = rng.integers(0, 256, (8, 8, 3), np.uint8)
        return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def config(out: Path, **changes: object) -> WriteConfig:
    options = {"split": "train", "source": None, "out": str(out), "files": FILES, "quality": 90, "workers": 1}
    return WriteConfig(**{**options, "on_error": "stop", **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def finished_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".beton", ".json"))


@pytest.fixture(autouse=True, scope="module")
def often() -> Iterator[None]:
    """Commits after every chunk, of a few rows, on pages of 2 MiB; meanwhile the server of children starts."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vitlocal.data.writer.write"])
    multiprocessing.forkserver.ensure_running()
    with pytest.MonkeyPatch.context() as patch:
        make_frequent(patch.setattr)
        yield


def make_frequent(setattr=setattr) -> None:
    setattr(journal, "COMMIT_SECONDS", 0.0)
    setattr(encode, "CHUNK_BYTES", 60_000)
    setattr(write_module, "page_size_for", lambda largest: beton.page_size_for(largest, 1 << 21))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The folder that an uninterrupted write of FakeImages(60) leaves."""
    out = tmp_path_factory.mktemp("reference")
    write(config(out), FakeImages(60), progress=False)
    return contents(out)


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rows_of(path: Path) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Metadata of the images, labels, encoded images: by FFCV's own reader."""
    from ffcv.reader import Reader

    reader = Reader(str(path))
    assert reader.field_names == ["image", "label"]
    data = path.read_bytes()
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    images = reader.metadata["f0"]
    return images, reader.metadata["f1"], [data[p : p + sizes[p]] for p in images["data_ptr"].tolist()]


# --- what is written --------------------------------------------------------------------------------------


def test_the_layout_is_that_of_ffcv() -> None:
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert beton.HEADER == types.HeaderType
    assert beton.FIELD == types.FieldDescType
    assert beton.ALLOCATION == types.ALLOC_TABLE_TYPE
    assert beton.METADATA == types.get_metadata_type([RGBImageField(), IntField()])
    assert beton.VERSION == types.CURRENT_VERSION
    assert (beton.JPG, beton.RAW) == (IMAGE_MODES["jpg"], IMAGE_MODES["raw"])
    assert types.TYPE_ID_HANDLER[beton.IMAGE_FIELD] is RGBImageField
    assert types.TYPE_ID_HANDLER[beton.INT_FIELD] is IntField


def test_sizes_are_those_of_ffcv() -> None:
    from ffcv.fields.rgb_image import resizer

    for width, height in np.random.default_rng(0).integers(2, 700, (150, 2)).tolist():
        for side in (64, 160, 256):
            if min(width, height) * side < max(width, height):
                continue  # FFCV fails on an edge of no pixels
            expected = resizer(np.zeros((height, width, 3), np.uint8), side).shape[:2]
            assert stored_size(width, height, side) == expected[::-1]
    assert stored_size(5000, 3, 64) == (64, 1)


def test_validation_keeps_the_short_edge() -> None:
    for width, height in np.random.default_rng(1).integers(1, 900, (500, 2)).tolist():
        stored = stored_size(width, height, 256, 256)
        assert min(stored) == min(width, height, 256)
        assert stored[0] <= width and stored[1] <= height
    assert stored_size(500, 400, 400, 256) == (400, 320)


def test_sides_and_formats() -> None:
    assert parse_files("") == ()
    assert parse_files("256,64,160") == (StoredFile(64, "raw"), StoredFile(160, "raw"), StoredFile(256, "jpg"))
    assert parse_files("64, 256", "raw") == (StoredFile(64, "raw"), StoredFile(256, "raw"))
    assert parse_files("64:jpg,64:raw") == (StoredFile(64, "jpg"), StoredFile(64, "raw"))
    assert parse_files("64,256:raw", "jpg") == (StoredFile(64, "jpg"), StoredFile(256, "raw"))
    assert [(f.side, f.format) for f in DEFAULT_FILES["train"]] == [
        (64, "raw"),
        (160, "raw"),
        (256, "jpg"),
        (400, "jpg"),
    ]
    for sides, format in (
        ("64,", "auto"),
        ("0", "auto"),
        ("-3", "auto"),
        ("99999", "auto"),
        ("64:png", "auto"),
        ("64:", "auto"),
        ("64,64", "auto"),
        ("64:raw", "jpg"),
        ("", "raw"),
        ("64", "png"),
        ("6.4", "auto"),
    ):
        with pytest.raises(ConfigError, match=r"--sides|--format"):
            parse_files(sides, format)


def test_every_file_holds_the_same_photos(tmp_path: Path) -> None:
    images = FakeImages(150, acts={7: "unreadable", 149: "unreadable"})
    files = (StoredFile(64, "raw"), StoredFile(120, "raw"), StoredFile(96, "jpg"))
    manifest = write(config(tmp_path, files=files, on_error="skip"), images, progress=False)
    assert manifest == Manifest.load(tmp_path / "train.json")
    assert [skip.entry for skip in manifest.skipped] == [images.entry(7), images.entry(149)]
    assert manifest.skipped[0].reason == "cut off after 12 bytes; restore it"
    kept = [index for index in range(150) if index not in images.acts]
    assert manifest.entries == tuple(images.entry(index) for index in kept)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["train.json", *(f.file for f in manifest.files)])
    for stored, file in zip(sorted(files), manifest.files, strict=True):
        path = tmp_path / file.file
        assert file.file == f"train_{stored.side}_{stored.format}.beton"
        info = check_beton(path, classes=3)
        assert (info.count, info.bytes, info.page_size) == (148, file.bytes, file.page_size) and info.modes == {
            stored.format
        }
        assert (info.max_width, info.max_height) == (file.max_width, file.max_height)
        assert checksum(path) == file.checksum == f"crc32:{zlib.crc32(path.read_bytes()):08x}"
        assert file.quality == (90 if stored.format == "jpg" else None)
        metadata, labels, encoded = rows_of(path)
        assert labels.tolist() == [index % 3 for index in kept]
        if stored.side == 120:  # more than a page, and no image across its border
            assert file.bytes > file.page_size
            first, last = metadata["data_ptr"], metadata["data_ptr"] + [len(data) - 1 for data in encoded]
            assert (first // file.page_size == last // file.page_size).all()
        for index, row, data in zip(kept, metadata, encoded, strict=True):
            pixels = np.asarray(images.load(index))
            size = stored_size(pixels.shape[1], pixels.shape[0], stored.side)
            if size != pixels.shape[1::-1]:
                pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            assert (row["width"], row["height"]) == size and max(size) <= stored.side
            if stored.format == "jpg":  # as OpenCV would write it, whose libjpeg-turbo is another
                again = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
                pixels, data = rgb(again), rgb(data)
                assert np.abs(data.astype(int) - pixels).mean() < 0.5
            else:
                data = np.frombuffer(data, np.uint8).reshape(pixels.shape)
                assert np.abs(data.astype(int) - pixels).max() <= 1  # FFCV's filter


def test_the_stock_loader_reads_them(tmp_path: Path) -> None:
    import torch
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor

    threads = torch.get_num_threads()
    files = (StoredFile(64, "raw"), StoredFile(64, "jpg"))
    images = FakeImages(60, size=(80, 60))
    write(config(tmp_path, files=files), images, progress=False)
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder(), ToTensor()]}
    paths = [str(tmp_path / f"train_64_{format}.beton") for format in ("raw", "jpg")]
    loader = Loader(paths[0], 32, 1, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines)
    for path in paths:
        if path != paths[0]:  # to the other file without compiling again
            loader.reader = Reader(path)
            loader.memory_manager = type(loader.memory_manager)(loader.reader)
            loader.graph.metadata = loader.reader.metadata
        seen = 0
        for batch, labels in loader:
            for pixels, label in zip(np.array(batch), labels.flatten().tolist(), strict=True):
                full = np.asarray(images.load(seen))
                expected = cv2.resize(full, (64, 48), interpolation=cv2.INTER_AREA)
                worst = np.abs(pixels.astype(int) - expected).max()
                assert worst <= 1 if path == paths[0] else worst < 40
                assert label == seen % 3
                seen += 1
        assert seen == 60
    torch.set_num_threads(threads)


def test_defaults_and_the_validation_split(tmp_path: Path) -> None:
    train = write(config(tmp_path, files=()), FakeImages(3, size=(500, 375)), progress=False)
    assert [(f.side, f.format, f.max_width, f.max_height) for f in train.files] == [
        (64, "raw", 64, 48),
        (160, "raw", 160, 120),
        (256, "jpg", 256, 192),
        (400, "jpg", 400, 300),
    ]
    val = write(config(tmp_path, files=(), split="val"), FakeImages(3, size=(500, 375)), progress=False)
    assert [(f.file, f.max_width, f.max_height) for f in val.files] == [("val_256_jpg.beton", 341, 256)]


def test_an_image_too_large_for_a_page(tmp_path: Path) -> None:
    wide = FakeImages(1, size=(9000, 300))  # a panorama, whose short edge is kept
    with pytest.raises(DataError, match=r"a page of 2097152 cannot hold"):
        write(config(tmp_path, split="val", files=(StoredFile(64, "raw"),)), wide, progress=False)


def test_the_smallest_side(tmp_path: Path) -> None:
    manifest = write(config(tmp_path, files=(StoredFile(1, "jpg"),)), FakeImages(2), progress=False)
    assert (manifest.files[0].max_width, manifest.files[0].max_height) == (1, 1)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    write(config(tmp_path, on_error="skip"), FakeImages(40, acts={3: "unreadable"}))
    shown = capsys.readouterr()
    assert (
        shown.out.startswith(f"{tmp_path}/train.json: 39 images of 3 classes in 2 files, ") and "; 1 could" in shown.out
    )
    if terminal:
        assert "\r" in shown.err and "40/40" in shown.err
    else:  # quick, so the end alone is told
        assert re.fullmatch(r"train: 40 of 40 images, [\d,]+ images/s, 0:00 left, [\d.]+ MB\n", shown.err)


def test_the_built_in_sample(tmp_path: Path) -> None:
    from vitlocal.data.images import open_images

    images = open_images("sample:2", "train")
    manifest = write(config(tmp_path, source="sample:2", files=(StoredFile(32, "raw"),)), progress=False)
    _, labels, encoded = rows_of(tmp_path / "train_32_raw.beton")
    assert manifest.classes == tuple(images.classes) and manifest.source.spec == images.spec
    assert labels.tolist() == np.asarray(images.labels).tolist()
    pixels = np.asarray(images.load(5))
    size = stored_size(pixels.shape[1], pixels.shape[0], 32)
    expected = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(int).reshape(-1)
    assert np.abs(np.frombuffer(encoded[5], np.uint8) - expected).mean() < 2  # large enough to be read at 1/2


class FileImages:
    """Encoded images, as they are given."""

    spec, classes, holds_files = "files", ("ant",), True

    def __init__(self, files: dict[str, bytes]):
        self.names, self.files = list(files), list(files.values())
        self.labels = np.zeros(len(files), np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def entry(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> bytes:
        return self.files[index]

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.read(index), self.entry(index))


def a_photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (9, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def as_jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PHOTO = a_photo(120, 90)
XMP = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>"
KINDS_OF_FILES = {  # and whether a file of a large enough side keeps the bytes that hold the image
    "plain": (as_jpeg(PHOTO), True),
    "full chroma": (as_jpeg(PHOTO, subsampling=0), True),
    "chroma halved across": (as_jpeg(PHOTO, subsampling=1), True),
    "gray": (as_jpeg(PHOTO.convert("L")), True),
    "optimised": (as_jpeg(PHOTO, optimize=True, comment=b"a comment", icc_profile=b"x" * 3000), True),
    "restart markers": (as_jpeg(PHOTO, restart_marker_blocks=3), True),
    "upright by EXIF": (as_jpeg(PHOTO, exif=turned(1)), True),
    "another turn in XMP, EXIF first": (as_jpeg(PHOTO, exif=turned(1), xmp=XMP), True),
    "followed by more": (as_jpeg(PHOTO) + b"a second image" * 90, True),
    "turned by EXIF": (as_jpeg(PHOTO, exif=turned(6)), False),
    "turned by XMP beside EXIF": (as_jpeg(PHOTO, exif=Image.Exif().tobytes(), xmp=XMP), False),
    "progressive": (as_jpeg(PHOTO, progressive=True), False),
    "CMYK": (as_jpeg(PHOTO.convert("CMYK")), False),
    "RGB inside": (as_jpeg(PHOTO, keep_rgb=True), False),
    "too large": (as_jpeg(a_photo(300, 200)), False),
}


def test_jpegs_pass_through(tmp_path: Path) -> None:
    images = FileImages({name: data for name, (data, _) in KINDS_OF_FILES.items()})
    write(config(tmp_path, files=(StoredFile(64, "raw"), StoredFile(160, "jpg"))), images, progress=False)
    metadata, _, stored = rows_of(tmp_path / "train_160_jpg.beton")
    small, _, raw = rows_of(tmp_path / "train_64_raw.beton")
    for row, (name, (data, kept)) in enumerate(KINDS_OF_FILES.items()):
        original = np.asarray(images.load(row)).astype(int)
        if kept:
            assert len(stored[row]) <= len(data) and stored[row][-600:] in data, name
            assert b"a comment" not in stored[row] and b"Exif" not in stored[row], name
            assert (rgb(stored[row]) == original).all(), name
        else:
            assert stored[row] not in data, name
            size = stored_size(original.shape[1], original.shape[0], 160)
            assert (metadata[row]["width"], metadata[row]["height"]) == size, name
            area = cv2.resize(original.astype(np.uint8), size, interpolation=cv2.INTER_AREA).astype(int)
            assert np.abs(rgb(stored[row]) - area).mean() < 2, name
        size = int(small[row]["width"]), int(small[row]["height"])
        area = cv2.resize(original.astype(np.uint8), size, interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(np.frombuffer(raw[row], np.uint8).reshape(area.shape) - area).max() <= 2, name


def test_jpegs_may_be_encoded_anew(tmp_path: Path) -> None:
    images = FileImages({"fine": as_jpeg(PHOTO, quality=98, subsampling=0)})
    sizes = []
    for keep in (True, False):
        out = tmp_path / str(keep)
        manifest = write(config(out, files=(StoredFile(160, "jpg"),), keep_jpegs=keep), images, progress=False)
        assert manifest.files[0].keep == keep
        _, _, (stored,) = rows_of(out / "train_160_jpg.beton")
        sizes.append(len(stored))
        assert (stored in images.read(0)) == keep
    assert sizes[1] < 0.8 * sizes[0]
    with pytest.raises(ConfigError, match="all encoded anew"):
        write(config(out, files=(StoredFile(160, "jpg"),)), images, progress=False)


def test_kept_jpegs_are_cut_as_pillow_would(tmp_path: Path) -> None:
    from vitlocal.data.crops import CropPolicy, cut, random_box
    from vitlocal.data.loader import LoaderResources
    from vitlocal.data.native import FULL, native_policy

    images = FileImages({name: data for name, (data, kept) in KINDS_OF_FILES.items() if kept})
    write(config(tmp_path, files=(StoredFile(160, "jpg"),)), images, progress=False)
    decoder, cropping = LoaderResources(1), CropPolicy(random=True)
    file, draws = decoder.file(tmp_path / "train_160_jpg.beton", 1), np.arange(len(images))
    crops = np.empty((len(images), 48, 48, 3), np.uint8)
    assert not decoder.threads.decode(file.bytes, file.rows, draws, native_policy(cropping, 0), crops, FULL)
    for row in range(len(images)):
        image = images.load(row)
        box = random_box(0, 0, row, image.height, image.width, cropping.scale, cropping.ratio, cropping.flip)
        assert np.abs(np.asarray(cut(image, box, 48)).astype(int) - crops[row]).mean() < 0.6, images.entry(row)


def test_a_large_jpeg_is_decoded_in_part(tmp_path: Path) -> None:
    photo = a_photo(1200, 800)
    images = FileImages({"large": as_jpeg(photo)})
    write(config(tmp_path, files=(StoredFile(100, "raw"),)), images, progress=False)
    _, _, raw = rows_of(tmp_path / "train_100_raw.beton")
    area = cv2.resize(np.asarray(images.load(0)), (100, 66), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(np.frombuffer(raw[0], np.uint8).reshape(area.shape) - area).mean() < 1


def test_damaged_jpegs_are_for_pillow_to_judge(tmp_path: Path) -> None:
    whole = as_jpeg(PHOTO)
    odd = whole[:-2] + b"\0" * 40 + whole[-2:]  # libjpeg warns of it, and every viewer shows it
    images = FileImages({"odd": odd, "cut": whole[:-300], "none": b"", "text": b"no image", "whole": whole})
    manifest = write(config(tmp_path, files=(StoredFile(160, "jpg"),), on_error="skip"), images, progress=False)
    assert manifest.entries == ("odd", "whole")
    assert [skip.entry for skip in manifest.skipped] == ["cut", "none", "text"]
    assert native.Encoder().inspect(b"no image") is None


def test_the_chroma_can_be_kept_whole(tmp_path: Path) -> None:
    images = FakeImages(4, size=(200, 150))
    sizes = []
    for sampling, layers in ((420, (2, 2)), (444, (1, 1))):
        out = tmp_path / str(sampling)
        manifest = write(config(out, files=(StoredFile(96, "jpg"),), sampling=sampling), images, progress=False)
        assert manifest.files[0].sampling == sampling
        _, _, encoded = rows_of(out / "train_96_jpg.beton")
        assert Image.open(io.BytesIO(encoded[0])).layer[0][1:3] == layers
        sizes.append(sum(map(len, encoded)))
    assert sizes[0] < sizes[1]


def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path, reference: dict[str, bytes]) -> None:
    for workers in (2, 3):
        out = tmp_path / str(workers)
        write(config(out, workers=workers), FakeImages(60), progress=False)
        assert contents(out) == reference


def test_crc32_of_joined_strings() -> None:
    data = np.random.default_rng(0).bytes(3000)
    for cut in (0, 1, 1234, 3000):
        head, tail = zlib.crc32(data[:cut]), zlib.crc32(data[cut:])
        assert joined_crc32(head, tail, 3000 - cut) == zlib.crc32(data)


# --- images that cannot be read, workers that die ---------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_image_stops_the_write_and_skip_goes_on(tmp_path: Path, workers: int) -> None:
    images = FakeImages(40, acts={21: "unreadable", 30: "unreadable"})
    with pytest.raises(DataError) as caught:
        write(config(tmp_path, workers=workers), images, progress=False)
    for word in (images.entry(21), "cut off after 12 bytes", "--on-error skip"):
        assert word in str(caught.value)
    assert finished_names(tmp_path) == []
    seen = dataclasses.replace(images, acts={**images.acts, 20: "bug"})  # row 20 is not made again
    manifest = write(config(tmp_path, workers=workers, on_error="skip"), seen, progress=False)
    assert manifest.count == 38 and len(manifest.skipped) == 2
    whole = tmp_path / "whole"
    write(config(whole, on_error="skip"), images, progress=False)
    shutil.move(whole, tmp_path.with_name(f"whole{workers}"))
    assert contents(tmp_path) == contents(tmp_path.with_name(f"whole{workers}"))


def test_nothing_readable(tmp_path: Path) -> None:
    images = FakeImages(6, acts=dict.fromkeys(range(6), "unreadable"))
    with pytest.raises(DataError, match=r"none of the 6 images.*ant/0.png"):
        write(config(tmp_path, on_error="skip"), images, progress=False)
    with pytest.raises(DataError, match=r"no images"):
        write(config(tmp_path), FakeImages(0), progress=False)
    assert finished_names(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_ours_names_the_image(tmp_path: Path, workers: int) -> None:
    images = FakeImages(40, acts={10: "bug"})
    with pytest.raises(RuntimeError, match=r"bee/10.png(?s:.*)TypeError: an error of ours"):
        write(config(tmp_path, workers=workers, on_error="skip"), images, progress=False)


def test_threads_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(DataError, match=r"cannot start 2 threads.*fewer --workers"):
        write(config(tmp_path, workers=2), FakeImages(60), progress=False)


@pytest.mark.parametrize("error", [MemoryError("no memory for an encoder"), TypeError("an error of ours")])
def test_a_thread_that_dies_is_an_error_and_no_hang(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(encoder: native.Encoder) -> None:
        raise error

    monkeypatch.setattr(native.Encoder, "__init__", fail)
    expected = DataError if isinstance(error, MemoryError) else TypeError
    with pytest.raises(expected, match="give fewer --workers" if expected is DataError else "an error of ours"):
        write(config(tmp_path, workers=2), FakeImages(60), progress=False)


def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_none(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(native.Encoder, "encode", encode_none)
    with pytest.raises(DataError, match=r"memory ran out at 'ant/0.png'.*fewer --workers"):
        write(config(tmp_path), FakeImages(6), progress=False)


# --- interruptions ----------------------------------------------------------------------------------------


def run_frequent(options: WriteConfig, images: FakeImages, die_at_replace: int | None = None) -> None:
    make_frequent()
    if die_at_replace is not None:
        replace, calls = os.replace, []

        def counted(*paths: object) -> None:
            calls.append(paths)
            if len(calls) > die_at_replace:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = counted
    write(options, images, progress=False)


def in_child(*arguments: object, **more: object) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=run_frequent, args=arguments, kwargs=more)
    child.start()
    return child


def test_killed_at_any_image_and_continued(tmp_path: Path, reference: dict[str, bytes]) -> None:
    for index in (0, 13, 59):  # killed at 13 of what 0 left, and so on
        child = in_child(config(tmp_path), FakeImages(60, acts={index: "SIGKILL"}))
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        assert finished_names(tmp_path) == []
    begun = FakeImages(60, acts={0: "bug", 8: "bug"})  # not made again
    write(config(tmp_path), begun, progress=False)
    assert contents(tmp_path) == reference


def test_killed_while_the_files_get_their_names(tmp_path: Path, reference: dict[str, bytes]) -> None:
    for replaced in range(3):
        out = tmp_path / str(replaced)
        child = in_child(config(out), FakeImages(60), die_at_replace=replaced)
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        assert "train.json" not in finished_names(out)
        for name in finished_names(out):  # whole, or not there
            assert (out / name).read_bytes() == reference[name]
        write(config(out), FakeImages(60), progress=False)
        assert contents(out) == reference


def test_killed_with_workers(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    child = in_child(config(out, workers=2), FakeImages(60, acts={50: "slow"}))
    journal, deadline = out / ".train.writing" / "journal", time.monotonic() + 40
    while not (journal.exists() and b"start" in journal.read_bytes()):
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    child.kill()
    child.join(30)
    assert finished_names(out) == []
    write(config(out), FakeImages(60), progress=False)
    assert contents(out) == reference


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_and_continued(
    tmp_path: Path, name: str, reference: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        write(config(tmp_path), FakeImages(60, acts={33: name}), progress=False)
    assert "The same command goes on from there" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert finished_names(tmp_path) == []
    rest = FakeImages(60, acts=dict.fromkeys(range(16), "bug"))  # what came before was kept
    write(config(tmp_path), rest, progress=False)
    assert contents(tmp_path) == reference


def test_interrupted_with_workers(tmp_path: Path, reference: dict[str, bytes]) -> None:
    class Interrupting(journal.SplitFiles):
        def append(self, chunk: encode.Chunk) -> None:
            super().append(chunk)
            if chunk.next >= 20:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_module, "SplitFiles", Interrupting)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            write(config(tmp_path, workers=2), FakeImages(60, acts={50: "slow"}), progress=False)
        assert time.monotonic() - started < 20
    assert finished_names(tmp_path) == []
    write(config(tmp_path), FakeImages(60, acts=dict.fromkeys(range(20), "bug")), progress=False)
    assert contents(tmp_path) == reference


def test_a_torn_journal_loses_only_its_end(tmp_path: Path, reference: dict[str, bytes]) -> None:
    with pytest.raises(DataError):
        write(config(tmp_path / "a"), FakeImages(60, acts={40: "unreadable"}), progress=False)
    journal = (tmp_path / "a" / ".train.writing" / "journal").read_bytes()
    for cut in np.linspace(0, len(journal) - 1, 12).astype(int).tolist():
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b" / ".train.writing" / "journal").write_bytes(journal[:cut])
        write(config(tmp_path / "b"), FakeImages(60), progress=False)
        assert contents(tmp_path / "b") == reference
        shutil.rmtree(tmp_path / "b")


@pytest.mark.parametrize("what", ["images", "journal", "flush"])
def test_a_full_disk(tmp_path: Path, what: str, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    call, left = {"images": "pwrite", "journal": "write", "flush": "fsync"}[what], [300_000]
    real = getattr(os, call)
    if what != "images":
        left[0] = 7

    def limited(descriptor: int, *arguments):
        if what == "images":
            data, offset = arguments
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done = real(descriptor, data[: left[0]], offset)  # the last write is partial
            left[0] -= done
            return done
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(descriptor, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, limited)
        with pytest.raises(DataError) as caught:
            write(config(tmp_path), FakeImages(60), progress=False)
    for word in ("no room", str(tmp_path / ".train.writing"), "free", "more needed", "same command"):
        assert word in str(caught.value)
    assert finished_names(tmp_path) == []
    write(config(tmp_path), FakeImages(60, acts={0: "bug"}), progress=False)
    assert contents(tmp_path) == reference


def test_too_little_room_is_foretold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write_module, "free_bytes", lambda folder: 1000)
    write(config(tmp_path, files=(StoredFile(8, "raw"),)), FakeImages(300, size=(16, 16)), progress=False)
    assert capsys.readouterr().err.count("warning: about") == 1


# --- what is there already --------------------------------------------------------------------------------


def test_a_finished_split_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(config(tmp_path), FakeImages(10), progress=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write(config(tmp_path, workers=2, on_error="skip"), FakeImages(10, acts={3: "bug"})) == first
    assert "already finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    for changed, images in (
        (config(tmp_path, quality=80), FakeImages(10)),
        (config(tmp_path, files=FILES[:1]), FakeImages(10)),
        (config(tmp_path), FakeImages(11)),
        (config(tmp_path), FakeImages(10, spec="elsewhere")),
        (config(tmp_path), FakeImages(10, classes=("ant", "bee", "dog"))),
    ):
        with pytest.raises(ConfigError, match=r"another configuration.*Remove .*another --out"):
            write(changed, images, progress=False)
    path = tmp_path / "train_64_raw.beton"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train_64_raw.beton: cut off"):
        write(config(tmp_path), FakeImages(10), progress=False)


def test_an_interrupted_write_of_another_configuration(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write(config(tmp_path), FakeImages(10, acts={9: "unreadable"}), progress=False)
    for changed, images, name in (
        (config(tmp_path, quality=80), FakeImages(10), "quality 80"),
        (config(tmp_path), FakeImages(11), "images in the source"),
        (config(tmp_path), FakeImages(10, spec="elsewhere"), "elsewhere"),
    ):
        with pytest.raises(ConfigError, match=f"{name}(?s:.*)remove the folder"):
            write(changed, images, progress=False)
    write(config(tmp_path), FakeImages(10), progress=False)


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    stranger = tmp_path / "train_64_raw.beton"
    stranger.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"train_64_raw.beton exists, but no manifest.*Remove it"):
        write(config(tmp_path), FakeImages(10), progress=False)
    assert stranger.read_bytes() == b"mine"


def test_one_write_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write(config(tmp_path), FakeImages(10, acts={9: "unreadable"}), progress=False)
    with open(tmp_path / ".train.writing" / "journal") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"being written by another process"):
            write(config(tmp_path), FakeImages(10), progress=False)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot write to the data folder.*--out"):
        write(config(tmp_path / "file" / "out"), FakeImages(4), progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"split": "test"},
        {"quality": 0},
        {"workers": -1},
        {"sampling": 422},
        {"on_error": "ignore"},
        {"files": (StoredFile(64, "png"),)},
        {"files": FILES + FILES},
    ],
)
def test_wrong_options(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"expected|twice"):
        write(config(tmp_path, **changes), FakeImages(4), progress=False)


# --- reading back -----------------------------------------------------------------------------------------


def test_a_truncated_file_is_found_out(tmp_path: Path, reference: dict[str, bytes]) -> None:
    path = tmp_path / "cut.beton"
    for name in ("train_64_raw.beton", "train_96_jpg.beton"):
        data = reference[name]
        cuts = {*range(40), *range(len(data) - 60 * 24 - 3, len(data)), *range(0, len(data), 4999)}
        path.write_bytes(data)
        for cut in sorted(cuts, reverse=True):
            os.truncate(path, cut)
            with pytest.raises(DataError, match=r"cut.beton: .*(cut off|expected|no images).*write that again"):
                check_beton(path)
        path.write_bytes(data + b"\0")
        with pytest.raises(DataError, match=r"damaged"):
            check_beton(path)


def test_damaged_and_foreign_files(tmp_path: Path, reference: dict[str, bytes]) -> None:
    data = np.frombuffer(reference["train_64_raw.beton"], np.uint8)
    path = tmp_path / "bad.beton"
    metadata_at = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize
    table_at = len(data) - 60 * 24
    for at, value in (
        (0, 3),  # version
        (2, 1),  # fields
        (4, 7),  # page size
        (8, 61),  # samples
        (beton.HEADER.itemsize, 3),  # type of a field
        (metadata_at, 2),  # mode
        (metadata_at + 2, 77),  # width
        (metadata_at + 5, data[metadata_at + 5] ^ 1),  # pointer
        (metadata_at + 17, 1),  # label
        (table_at + 15, 255),  # pointer, near 2^64
        (table_at + 16, data[table_at + 16] ^ 1),  # size
        (table_at + 23, 255),  # size, near 2^64
    ):
        changed = data.copy()
        changed[at] = value
        path.write_bytes(changed.tobytes())
        with pytest.raises(DataError, match=r"bad.beton: .*write that again"):
            check_beton(path, classes=3)
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(DataError, match=r"not a .beton file"):
        check_beton(path)
    with pytest.raises(DataError, match=r"does not exist"):
        check_beton(tmp_path / "none.beton")
    with pytest.raises(DataError, match=r"cannot be read"):
        check_beton(tmp_path)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_files_of_ffcv_itself_pass(tmp_path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    images = FakeImages(30)
    samples = [(np.asarray(images.load(index)), index % 3) for index in range(30)]
    fields = {"image": RGBImageField("raw", max_resolution=64), "label": IntField()}
    DatasetWriter(str(tmp_path / "stock.beton"), fields, num_workers=2).from_indexed_dataset(samples, chunksize=4)
    info = check_beton(tmp_path / "stock.beton", classes=3)
    assert (info.count, info.modes, info.max_label) == (30, {"raw"}, 2)
    write(config(tmp_path, files=FILES[:1]), images, progress=False)
    theirs, ours = rows_of(tmp_path / "stock.beton"), rows_of(tmp_path / "train_64_raw.beton")
    assert theirs[1].tolist() == ours[1].tolist()
    for stock, mine in zip(theirs[2], ours[2], strict=True):
        assert np.abs(np.frombuffer(stock, np.uint8).astype(int) - np.frombuffer(mine, np.uint8)).max() <= 1


def test_checking_a_million_rows_is_quick(tmp_path: Path) -> None:
    count = 1_280_000
    rng, start = np.random.default_rng(0), beton.data_start(count)
    metadata, table = np.zeros(count, beton.METADATA), np.zeros(count, beton.ALLOCATION)
    metadata["f0"]["mode"], metadata["f0"]["width"], metadata["f0"]["height"] = beton.RAW, 2, 1
    metadata["f0"]["data_ptr"] = start + 8 * np.arange(count)
    order = rng.permutation(count)
    table["sample_id"], table["ptr"], table["size"] = order, metadata["f0"]["data_ptr"][order], 6
    path = tmp_path / "many.beton"
    with open(path, "wb") as file:
        file.write(beton.head_bytes(metadata, 1 << 21, start + 8 * count))
        file.seek(start + 8 * count)
        file.write(table.tobytes())
    began = time.process_time()
    assert check_beton(path).count == count
    assert time.process_time() - began < 3  # about 0.3 on a quiet machine


def test_wrong_manifests(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.json does not exist.*write_dataset.py --split train"):
        Manifest.load(tmp_path / "train.json")
    write(config(tmp_path), FakeImages(4), progress=False)
    path = tmp_path / "train.json"
    text = path.read_text()
    content = json.loads(text)
    path.write_text(json.dumps({**content, "version": 2, "other": 1}))
    with pytest.raises(DataError, match=r"version 2, written by a newer vitlocal"):
        Manifest.load(path)
    wrong = [text[:-20], "[]", "{}", '{"version": "1"}', "\x00", ""]
    for change in (
        {"count": 5},
        {"entries": [1, 2, 3, 4]},
        {"entries": "abcd"},
        {"files": []},
        {"files": [3]},
        {"files": [{**content["files"][0], "side": None}]},
        {"files": [{**content["files"][0], "file": "../x.beton"}]},
        {"source": None},
        {"source": {**content["source"], "length": 9}},
        {"count": True},
    ):
        wrong.append(json.dumps({**content, **change}))
    for damaged in wrong:
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"train.json is damaged: .*write the split again"):
            Manifest.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"damaged"):
        Manifest.load(path)
