"""Writing .beton files: their contents."""

from __future__ import annotations

import io
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from fake_images import FakeImages, area_mean, contents, encode_jpeg, make_photo, rgb, rows_of, write_config
from PIL import Image

from vitlocal.data import native
from vitlocal.data.beton import MappedFile
from vitlocal.data.images import ImageSet, decode_rgb
from vitlocal.data.manifest import Manifest, checksum, joined_crc32
from vitlocal.data.writer.encode import stored_size
from vitlocal.data.writer.write import parse_files, write
from vitlocal.errors import ConfigError

pytestmark = pytest.mark.usefixtures("frequent_commits")


def test_validation_keeps_the_short_edge() -> None:
    for width, height in np.random.default_rng(1).integers(1, 900, (500, 2)).tolist():
        stored = stored_size(width, height, 256, 256)
        assert min(stored) == min(width, height, 256)
        assert stored[0] <= width and stored[1] <= height
    assert stored_size(500, 400, 400, 256) == (400, 320)


def test_sides_and_formats() -> None:
    assert parse_files("train", "256,64,160") == ((64, "raw"), (160, "raw"), (256, "jpg"))
    assert parse_files("train", "64, 256", "raw") == ((64, "raw"), (256, "raw"))
    assert parse_files("train", "64:jpg,64:raw") == ((64, "jpg"), (64, "raw"))
    assert parse_files("train", "64,256:raw", "jpg") == ((64, "jpg"), (256, "raw"))
    assert parse_files("train", "auto") == ((64, "raw"), (160, "raw"), (256, "jpg"), (400, "jpg"))
    assert parse_files("val", "auto") == ((256, "jpg"),)
    for sides in ("64,", "0", "-3", "99999", "64:png", "64:", "64,64", "6.4", "", "64:jpg:jpg"):
        with pytest.raises(ConfigError, match=r"--sides"):
            parse_files("train", sides)
    with pytest.raises(ConfigError, match=r"--format raw needs --sides"):
        parse_files("train", "auto", "raw")
    with pytest.raises(ConfigError, match=r"--format jpg has no effect"):
        parse_files("train", "64:raw", "jpg")


def test_every_file_holds_the_same_photos(tmp_path: Path) -> None:
    images = FakeImages(150, acts={7: "unreadable", 149: "unreadable"})
    sides = "64:raw,120:raw,96:jpg"
    manifest = write(write_config(tmp_path, sides=sides, on_error="skip"), images, progress=False)
    assert manifest == Manifest.load(tmp_path / "train.json")
    assert [skip.entry for skip in manifest.skipped] == [images.entry(7), images.entry(149)]
    assert manifest.skipped[0].reason == "cut off after 12 bytes; restore it"
    kept = [index for index in range(150) if index not in images.acts]
    assert manifest.entries == tuple(images.entry(index) for index in kept)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["classes.txt", "train.json", *(f.file for f in manifest.files)]
    )
    for (side, format), file in zip(parse_files("train", sides), manifest.files, strict=True):
        path = tmp_path / file.file
        assert file.file == f"train_{side}_{format}.beton"
        mapped = MappedFile(path, classes=3)
        assert (len(mapped.rows), len(mapped.bytes), mapped.page_size) == (148, file.bytes, file.page_size)
        assert set(mapped.rows["raw"]) == {format == "raw"}
        assert (mapped.rows["width"].max(), mapped.rows["height"].max()) == (file.max_width, file.max_height)
        assert checksum(path) == file.checksum == f"crc32:{zlib.crc32(path.read_bytes()):08x}"
        assert file.quality == (90 if format == "jpg" else None)
        metadata, labels, encoded = rows_of(path)
        assert labels.tolist() == [index % 3 for index in kept]
        if side == 120:  # more than a page; no image crosses a border
            assert file.bytes > file.page_size
            first, last = metadata["data_ptr"], metadata["data_ptr"] + [len(data) - 1 for data in encoded]
            assert (first // file.page_size == last // file.page_size).all()
        for index, row, data in zip(kept, metadata, encoded, strict=True):
            pixels = np.asarray(images.load(index))
            size = stored_size(pixels.shape[1], pixels.shape[0], side)
            if size != pixels.shape[1::-1]:
                pixels = area_mean(pixels, size)
            assert (row["width"], row["height"]) == size and max(size) <= side
            if format == "jpg":  # Pillow has another version of libjpeg-turbo
                again = encode_jpeg(Image.fromarray(pixels.astype(np.uint8)), quality=90)
                pixels, data = rgb(again), rgb(data)
                assert np.abs(data.astype(int) - pixels).mean() < 0.5
            else:
                data = np.frombuffer(data, np.uint8).reshape(pixels.shape)
                assert np.abs(data.astype(int) - pixels).max() <= 1  # FFCV's filter


def test_defaults_and_the_validation_split(tmp_path: Path) -> None:
    train = write(write_config(tmp_path, sides="auto"), FakeImages(3, size=(500, 375)), progress=False)
    assert [(f.side, f.format, f.max_width, f.max_height) for f in train.files] == [
        (64, "raw", 64, 48),
        (160, "raw", 160, 120),
        (256, "jpg", 256, 192),
        (400, "jpg", 400, 300),
    ]
    val = write(write_config(tmp_path, sides="auto", split="val"), FakeImages(3, size=(500, 375)), progress=False)
    assert [(f.file, f.max_width, f.max_height) for f in val.files] == [("val_256_jpg.beton", 341, 256)]


def test_an_image_too_large_for_a_page(tmp_path: Path) -> None:
    wide = FakeImages(1, size=(9000, 300))  # a panorama keeps its short edge
    manifest = write(write_config(tmp_path, split="val", sides="64:raw,64:jpg"), wide, progress=False)
    assert [(file.max_width, file.max_height) for file in manifest.files] == [(7680, 256), (4579, 152)]


def test_the_smallest_side(tmp_path: Path) -> None:
    manifest = write(write_config(tmp_path, sides="1:jpg"), FakeImages(2), progress=False)
    assert (manifest.files[0].max_width, manifest.files[0].max_height) == (1, 1)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    write(write_config(tmp_path, on_error="skip"), FakeImages(40, acts={3: "unreadable"}))
    shown = capsys.readouterr()
    assert (
        shown.out.startswith(f"{tmp_path}/train.json: 39 images of 3 classes in 2 files, ")
        and "; skipped 1 damaged image, which" in shown.out
    )
    if terminal:
        assert "\r" in shown.err and "40/40" in shown.err
    else:
        last = shown.err.strip().splitlines()[-1].strip()
        assert re.fullmatch(r"train: 40 of 40 images, [\d.]+ images/s, 00:00 left, [\d.]+ MB", last)


def test_writing_the_built_in_sample(tmp_path: Path) -> None:
    from vitlocal.data.images import open_images

    images = open_images("sample:2", "train")
    manifest = write(write_config(tmp_path, source="sample:2", sides="32:raw"), progress=False)
    _, labels, encoded = rows_of(tmp_path / "train_32_raw.beton")
    assert manifest.classes == tuple(images.classes) and manifest.source.spec == images.spec
    assert labels.tolist() == np.asarray(images.labels).tolist()
    pixels = np.asarray(images.load(5))
    size = stored_size(pixels.shape[1], pixels.shape[0], 32)
    expected = area_mean(pixels, size).reshape(-1)
    assert np.abs(np.frombuffer(encoded[5], np.uint8) - expected).mean() < 2  # large enough for a reduction of 1/2


class FileImages(ImageSet):
    """An image set of encoded images."""

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


def exif_turn(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PHOTO = make_photo(120, 90)
XMP = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>"
KINDS_OF_FILES = {  # name -> the file, and whether it is stored unchanged if the side is large enough
    "plain": (encode_jpeg(PHOTO), True),
    "full chroma": (encode_jpeg(PHOTO, subsampling=0), True),
    "chroma halved across": (encode_jpeg(PHOTO, subsampling=1), True),
    "gray": (encode_jpeg(PHOTO.convert("L")), True),
    "optimised": (encode_jpeg(PHOTO, optimize=True, comment=b"a comment", icc_profile=b"x" * 3000), True),
    "restart markers": (encode_jpeg(PHOTO, restart_marker_blocks=3), True),
    "upright by EXIF": (encode_jpeg(PHOTO, exif=exif_turn(1)), True),
    "another turn in XMP, EXIF first": (encode_jpeg(PHOTO, exif=exif_turn(1), xmp=XMP), True),
    "followed by more": (encode_jpeg(PHOTO) + b"a second image" * 90, True),
    "turned by EXIF": (encode_jpeg(PHOTO, exif=exif_turn(6)), False),
    "turned by XMP in addition to EXIF": (encode_jpeg(PHOTO, exif=Image.Exif().tobytes(), xmp=XMP), False),
    "progressive": (encode_jpeg(PHOTO, progressive=True), False),
    "CMYK": (encode_jpeg(PHOTO.convert("CMYK")), False),
    "RGB inside": (encode_jpeg(PHOTO, keep_rgb=True), False),
    "too large": (encode_jpeg(make_photo(300, 200)), False),
}


def test_jpegs_are_stored_unchanged(tmp_path: Path) -> None:
    images = FileImages({name: data for name, (data, _) in KINDS_OF_FILES.items()})
    write(write_config(tmp_path, sides="64:raw,160:jpg"), images, progress=False)
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
            area = area_mean(original, size)
            assert np.abs(rgb(stored[row]) - area).mean() < 2, name
        size = int(small[row]["width"]), int(small[row]["height"])
        area = area_mean(original, size)
        assert np.abs(np.frombuffer(raw[row], np.uint8).reshape(area.shape) - area).max() <= 2, name


def test_jpegs_can_be_encoded_again(tmp_path: Path) -> None:
    images = FileImages({"fine": encode_jpeg(PHOTO, quality=98, subsampling=0)})
    sizes = []
    for keep in (True, False):
        out = tmp_path / str(keep)
        manifest = write(write_config(out, sides="160:jpg", keep_jpegs=keep), images, progress=False)
        assert manifest.files[0].keep == keep
        _, _, (stored,) = rows_of(out / "train_160_jpg.beton")
        sizes.append(len(stored))
        assert (stored in images.read(0)) == keep
    assert sizes[1] < 0.8 * sizes[0]
    with pytest.raises(ConfigError, match="all encoded again"):
        write(write_config(out, sides="160:jpg"), images, progress=False)


def test_crops_of_unchanged_jpegs_match_pillow(tmp_path: Path) -> None:
    from reference_boxes import random_box

    from vitlocal.data.crops import CropPolicy, cut
    from vitlocal.data.native import FULL, native_policy
    from vitlocal.data.reader import LoaderResources

    images = FileImages({name: data for name, (data, kept) in KINDS_OF_FILES.items() if kept})
    write(write_config(tmp_path, sides="160:jpg"), images, progress=False)
    resources, policy = LoaderResources(1), CropPolicy(random=True)
    file, draws = resources.file(tmp_path / "train_160_jpg.beton", 1), np.arange(len(images))
    crops = np.empty((len(images), 48, 48, 3), np.uint8)
    assert not resources.threads.decode(file.bytes, file.rows, draws, native_policy(policy, 0), crops, FULL)
    for row in range(len(images)):
        image = images.load(row)
        box = random_box(0, 0, row, image.height, image.width, policy.scale, policy.ratio, policy.flip)
        assert np.abs(np.asarray(cut(image, box, 48)).astype(int) - crops[row]).mean() < 0.6, images.entry(row)


def test_a_large_jpeg_is_decoded_at_a_reduction(tmp_path: Path) -> None:
    photo = make_photo(1200, 800)
    images = FileImages({"large": encode_jpeg(photo)})
    write(write_config(tmp_path, sides="100:raw"), images, progress=False)
    _, _, raw = rows_of(tmp_path / "train_100_raw.beton")
    area = area_mean(np.asarray(images.load(0)), (100, 66))
    assert np.abs(np.frombuffer(raw[0], np.uint8).reshape(area.shape) - area).mean() < 1


def test_pillow_decides_about_damaged_jpegs(tmp_path: Path) -> None:
    whole = encode_jpeg(PHOTO)
    odd = whole[:-2] + b"\0" * 40 + whole[-2:]  # libjpeg warns, but viewers show it
    images = FileImages({"odd": odd, "cut": whole[:-300], "none": b"", "text": b"no image", "whole": whole})
    manifest = write(write_config(tmp_path, sides="160:jpg", on_error="skip"), images, progress=False)
    assert manifest.entries == ("odd", "whole")
    assert [skip.entry for skip in manifest.skipped] == ["cut", "none", "text"]
    assert native.Encoder().inspect(b"no image") is None


def test_chroma_sampling(tmp_path: Path) -> None:
    images = FakeImages(4, size=(200, 150))
    sizes = []
    for sampling, layers in ((420, (2, 2)), (444, (1, 1))):
        out = tmp_path / str(sampling)
        manifest = write(write_config(out, sides="96:jpg", sampling=sampling), images, progress=False)
        assert manifest.files[0].sampling == sampling
        _, _, encoded = rows_of(out / "train_96_jpg.beton")
        assert Image.open(io.BytesIO(encoded[0])).layer[0][1:3] == layers
        sizes.append(sum(map(len, encoded)))
    assert sizes[0] < sizes[1]


def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path, reference: dict[str, bytes]) -> None:
    for workers in (2, 3):
        out = tmp_path / str(workers)
        write(write_config(out, workers=workers), FakeImages(60), progress=False)
        assert contents(out) == reference


def test_crc32_of_joined_strings() -> None:
    data = np.random.default_rng(0).bytes(3000)
    for cut in (0, 1, 1234, 3000):
        head, tail = zlib.crc32(data[:cut]), zlib.crc32(data[cut:])
        assert joined_crc32(head, tail, 3000 - cut) == zlib.crc32(data)
