"""The fused decoder against Pillow, with every instruction set and number of threads, on sound and damaged images."""

from __future__ import annotations

import io
import os
import platform
import struct
from pathlib import Path

import numpy as np
import pytest
from fake_images import area_mean
from PIL import Image
from reference_boxes import random_box
from timm.data import create_transform

from vitlocal.data.beton import ALLOCATION
from vitlocal.data.crops import Box, CropPolicy, cut
from vitlocal.data.native import (
    AS_RAW,
    EIGHTH,
    FORM,
    FULL,
    ROW,
    DecoderThreads,
    Encoder,
    library,
    native_box,
    native_policy,
)
from vitlocal.errors import DataError

SHAPES = [(117, 160), (48, 64), (5, 3), (1, 1), (375, 500), (170, 256), (200, 17), (31, 33)]  # height, width
TRAIN = CropPolicy(random=True, seed=3)
REPEATS = 4


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Smooth shapes with edges and some noise, as a photo has."""
    generator = np.random.default_rng(0)
    made = []
    for height, width in SHAPES:
        y, x = np.mgrid[:height, :width] / max(height, width)
        waves = [128 + 90 * np.sin(9 * x * k + 7 * y + k) * np.cos(5 * y * k) for k in (1, 2, 3)]
        pixels = np.stack(waves, -1) + 40 * (((x * 6).astype(int) + (y * 4).astype(int)) % 2)[..., None]
        made.append(Image.fromarray(np.clip(pixels + generator.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)))
    return made


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


class Stored:
    """Images as a file stores them."""

    def __init__(self, images: list[Image.Image], blobs: list[bytes], raw: bool):
        self.images = images
        self.bytes = np.frombuffer(b"".join(blobs), np.uint8)
        self.rows = np.zeros(len(blobs), ROW)
        self.rows["bytes"] = [len(blob) for blob in blobs]
        self.rows["offset"] = np.cumsum(self.rows["bytes"]) - self.rows["bytes"]
        self.rows["width"], self.rows["height"] = zip(*(image.size for image in images), strict=True)
        self.rows["raw"] = raw

    def decode(self, size: int, threads: DecoderThreads, policy: CropPolicy = TRAIN, most: int = EIGHTH, draws=None):
        draws = self.draws() if draws is None else np.array(draws, np.int64)
        crops = np.full((len(draws), size, size, 3), 77, np.uint8)
        problems = threads.decode(self.bytes, self.rows, draws, native_policy(policy, 0), crops, most)
        return crops, problems

    def draws(self) -> np.ndarray:
        return np.array([row | k << 40 for row in range(len(self.images)) for k in range(REPEATS)])

    def references(self, size: int) -> np.ndarray:
        references = []
        for draw in self.draws().tolist():
            image = self.images[draw & 0xFF]
            box = random_box(TRAIN.seed, 0, draw, image.height, image.width, TRAIN.scale, TRAIN.ratio, TRAIN.flip)
            references.append(np.asarray(cut(image, box, size)))
        return np.stack(references)


def raw(photos: list[Image.Image]) -> Stored:
    return Stored(photos, [image.tobytes() for image in photos], raw=True)


def as_jpeg(photos: list[Image.Image], **options) -> Stored:
    blobs = [jpeg(image, **options) for image in photos]
    return Stored([Image.open(io.BytesIO(blob)).convert("RGB") for blob in blobs], blobs, raw=False)


@pytest.fixture(scope="module")
def threads():
    made = DecoderThreads(2)
    yield made
    made.close()


INSTRUCTIONS = ["plain", "NEON"] if platform.machine() in ("aarch64", "arm64") else ["plain", "SSE2", "AVX2"]


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest):
    number = INSTRUCTIONS.index(request.param)
    if library().vitlocal_instructions(number) != number:
        library().vitlocal_instructions(-1)
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library().vitlocal_instructions(-1)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other)


@pytest.mark.parametrize("size", [1, 7, 16, 32, 40, 96, 224])
def test_raw_crops_equal_pillows(photos, threads, instructions: str, size: int):
    stored = raw(photos)
    crops, problems = stored.decode(size, threads)
    assert not problems
    assert difference(crops, stored.references(size)).max() <= 1


@pytest.mark.parametrize("size", [16, 32, 96, 224])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_crops_at_full_scale_equal_pillows(photos, threads, size: int, subsampling: int):
    stored = as_jpeg(photos, subsampling=subsampling)
    crops, problems = stored.decode(size, threads, most=FULL)
    assert not problems
    assert difference(crops, stored.references(size)).max() <= 1


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 1}, {"quality": 30}])
def test_other_jpegs(photos, threads, options):
    stored = as_jpeg(photos, **options)
    crops, problems = stored.decode(64, threads, most=FULL)
    assert not problems
    assert difference(crops, stored.references(64)).max() <= 1


def test_grey_jpegs_give_grey_crops(photos, threads):
    grey = [image.convert("L") for image in photos]
    blobs = [jpeg(image) for image in grey]
    crops, problems = Stored(grey, blobs, raw=False).decode(32, threads)
    assert not problems
    assert (crops == crops[..., :1]).all() and crops.std() > 20


def test_reduced_decoding_stays_close(photos, threads):
    large = [photo.resize((640, 480)) for photo in photos]
    stored = as_jpeg(large)
    for size in (32, 64, 128):
        crops, _ = stored.decode(size, threads)
        full, _ = stored.decode(size, threads, most=FULL)
        assert 0 < difference(crops, full).mean() < 4
        assert difference(crops, full[:, :, ::-1]).mean() > 2 * difference(crops, full).mean()


def test_every_number_of_threads_gives_the_same_bytes(photos):
    stored = as_jpeg(photos)
    results = []
    for count in (1, 2, 16):
        threads = DecoderThreads(count)
        results.append(stored.decode(48, threads)[0])
        threads.close()
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()


def test_one_thread_for_each_processor_if_the_system_has_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    threads = DecoderThreads()
    threads.close()
    assert threads.count == os.cpu_count()


@pytest.mark.parametrize(("size", "crop_pct"), [(48, 0.75), (64, 0.875), (32, 1.0), (224, 0.9), (7, 0.5)])
@pytest.mark.parametrize("store", [raw, as_jpeg], ids=["raw", "jpeg"])
def test_centre_crops_have_timms_bytes(photos, threads, store, size: int, crop_pct: float):
    stored = store(photos)
    policy = CropPolicy(random=False, centre=crop_pct)
    crops, _ = stored.decode(size, threads, policy, draws=range(len(photos)), most=EIGHTH)
    transform = create_transform(size, crop_pct=crop_pct, interpolation="bilinear", normalize=False)
    for crop, image in zip(crops, stored.images, strict=True):
        different = np.abs(crop.astype(int) - transform(image).numpy().transpose(1, 2, 0)).max()
        assert different <= (image.height > 2 * image.width)  # for tall images, older Pillows have another order


def test_the_centre(photos, threads):
    stored = raw(photos)
    crops, _ = stored.decode(48, threads, CropPolicy(random=False, centre=0.75), draws=range(len(photos)))
    policy = native_policy(CropPolicy(random=False, centre=0.75), 0)
    boxes = [native_box(policy, 0, image.height, image.width, 48) for image in photos]
    references = [np.asarray(cut(image, box, 48)) for image, box in zip(photos, boxes, strict=True)]
    assert difference(crops, np.stack(references)).max() <= 1


def test_a_whole_image_at_its_own_size_is_unchanged(threads):
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stored = raw([Image.fromarray(pixels)])
    crops, _ = stored.decode(64, threads, CropPolicy(random=False, centre=1.0), draws=[0])
    assert (crops[0] == pixels).all()
    assert (np.asarray(cut(stored.images[0], Box(0, 0, 64, 64), 64)) == pixels).all()


def test_damaged_images_are_named_and_become_black(photos, threads):
    blobs = [jpeg(image) for image in photos]
    blobs[0] = blobs[0][: len(blobs[0]) // 2]
    blobs[1] = b"\0\0" + blobs[1]
    stored = Stored(photos, blobs, raw=False)
    stored.rows["width"][2] += 1
    stored.rows["offset"][3] = stored.bytes.size
    stored.rows["bytes"][4] = 1 << 62
    stored.rows["width"][5] = 0
    stored.rows["raw"][6], stored.rows["width"][6] = 1, 60000
    crops, problems = stored.decode(32, threads, CropPolicy(random=False), draws=[*range(len(photos)), 99])
    assert set(problems) == {0, 1, 2, 3, 4, 5, 6, 8}
    assert "is a damaged JPEG (Premature end of JPEG file)" == problems[0]
    assert "damaged JPEG" in problems[1] and "another size" in problems[2]
    assert all("outside" in problems[place] for place in (3, 4, 5, 6, 8))
    assert (crops[list(problems)] == 0).all()
    sound, _ = as_jpeg(photos).decode(32, threads, CropPolicy(random=False), draws=[7])
    assert (crops[7] == sound[0]).all()


def test_threads_survive_damaged_images(photos, threads):
    sound = as_jpeg(photos)
    expected, _ = sound.decode(32, threads)
    blobs = [jpeg(image)[:-300] if image.width > 100 else jpeg(image)[:40] for image in photos]
    for _ in range(20):
        assert len(Stored(photos, blobs, raw=False).decode(32, threads)[1]) >= len(blobs)
    again, problems = sound.decode(32, threads)
    assert not problems and (again == expected).all()


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "train_128_jpg.beton"
    path.write_bytes((folder / path.name).read_bytes())
    return path


def test_a_file_cut_at_any_page_is_named(copied: Path):
    from vitlocal.data.beton import MappedFile

    MappedFile(copied, 20)
    whole = copied.read_bytes()
    for length in range(0, len(whole), 4096):
        copied.write_bytes(whole[:length])
        with pytest.raises(DataError, match=copied.name):
            MappedFile(copied, 20)


def test_flipped_bytes_in_header_and_tables_are_found_or_harmless(copied: Path, threads):
    from vitlocal.data.beton import MappedFile

    whole = copied.read_bytes()
    generator = np.random.default_rng(0)
    start = int(MappedFile(copied, 20).rows["offset"].min())
    table = len(whole) - 120 * ALLOCATION.itemsize
    places = np.concatenate(
        [np.arange(24), generator.integers(24, start, 150), generator.integers(table, len(whole), 80)]
    )
    refused = 0
    for place in places.tolist():
        content = bytearray(whole)
        content[place] ^= 1 << int(generator.integers(8))
        copied.write_bytes(content)
        try:
            file = MappedFile(copied, 20)
        except DataError as error:
            assert copied.name in str(error)
            refused += 1
            continue
        crops = np.empty((len(file.rows), 16, 16, 3), np.uint8)
        threads.decode(file.bytes, file.rows, np.arange(len(file.rows)), native_policy(TRAIN, 0), crops)
    assert refused > 80


# --- files made to deceive ----------------------------------------------------------------------------------

DQT, DHT, SOS = 0xDB, 0xC4, 0xDA


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def without(data: bytes, marker: int) -> bytes:
    """The JPEG less its segments of that kind before the scan."""
    kept, at = data[:2], 2
    while True:
        length = 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        kept += b"" if data[at + 1] == marker else data[at : at + length]
        at += length
        if data[at - length + 1] == SOS:
            return kept + data[at:]


def many_scans(side: int, count: int) -> bytes:
    """A valid progressive grey JPEG that repeats an empty scan ``count`` times."""
    blocks = (side // 8) ** 2
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
    tables = segment(DQT, bytes(1) + bytes([1] * 64))
    tables += segment(DHT, bytes([0x00]) + bytes([1] + [0] * 15) + bytes([0]))  # DC: one code, of 0
    tables += segment(DHT, bytes([0x10]) + bytes([1] + [0] * 15) + bytes([0]))  # AC: one code, the block's end
    zeros = bytes(blocks // 8)
    first = segment(SOS, bytes([1, 1, 0x00, 0, 0, 0x00])) + zeros
    again = segment(SOS, bytes([1, 1, 0x00, 1, 63, 0x00])) + zeros
    return b"\xff\xd8" + frame + tables + first + again * count + b"\xff\xd9"


def raw_form(width: int, height: int) -> np.ndarray:
    return np.array([(width, height, AS_RAW, 0, 0, 0, 0, 0)], FORM)


def test_an_image_does_not_use_the_tables_of_the_previous_one(photos) -> None:
    photo = photos[4]
    sound, others = jpeg(photo), [jpeg(photo, quality=10), jpeg(photos[0], quality=20, optimize=True)]
    no_quantisation, no_codes = without(sound, DQT), without(sound, DHT)
    threads, encoder = DecoderThreads(1), Encoder()
    stored = Stored(
        [photo, photos[0], photo, photo, photo], [others[0], others[1], no_quantisation, no_codes, sound], False
    )
    crops, problems = stored.decode(48, threads, draws=[0, 2, 1, 2, 1, 3, 4])
    assert problems.keys() == {1, 3} and "table" in problems[1]
    assert not crops[1].any()
    whole = Stored([photo] * 2, [no_codes, sound], False)  # as a camera's video has them: the standard's own codes
    crops, problems = whole.decode(48, threads, CropPolicy(random=False))
    assert not problems and (crops[0] == crops[1]).all()
    width, height = photo.size
    expected = encoder.encode(sound, height, width, raw_form(width, height))
    for other in others:
        size = Image.open(io.BytesIO(other)).size
        assert encoder.encode(other, size[1], size[0], raw_form(*size))
        assert encoder.encode(no_quantisation, height, width, raw_form(width, height)) is None
        assert encoder.encode(no_codes, height, width, raw_form(width, height)) == expected


def test_a_file_with_too_many_scans_is_rejected() -> None:
    side = 1024
    few, many = many_scans(side, 90), many_scans(side, 5000)
    gray = Image.new("RGB", (side, side))
    _, problems = Stored([gray, gray], [few, many], False).decode(32, DecoderThreads(1), draws=[0, 1])
    assert problems == {1: "would take too long to decode, or too much memory (has more than 100 scans)"}
    encoder = Encoder()
    assert encoder.inspect(many)["keepable"] == 0
    assert encoder.encode(few, side, side, raw_form(8, 8)) == [bytes([128] * 192)]
    with pytest.raises(ValueError, match="more than 100 scans"):
        encoder.encode(many, side, side, raw_form(8, 8))


@pytest.mark.ffcv  # OpenCV writes such files, Pillow does not
def test_unusual_sampling_is_decoded_by_whole_rows(photos) -> None:
    import cv2

    photo = photos[4]
    options = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411]
    data = cv2.imencode(".jpg", np.asarray(photo)[..., ::-1], options)[1].tobytes()
    decoded = Image.open(io.BytesIO(data))
    assert decoded.layer[0][1:3] == (4, 1) and not Encoder().inspect(data)["keepable"]
    stored = Stored([photo], [data], False)
    draws = np.arange(8) << 40
    crops, _ = stored.decode(64, DecoderThreads(1), most=FULL, draws=draws)
    for draw, crop in zip(draws.tolist(), crops, strict=True):
        box = random_box(3, 0, draw, photo.height, photo.width, TRAIN.scale, TRAIN.ratio, TRAIN.flip)
        assert np.abs(np.asarray(cut(decoded.convert("RGB"), box, 64)).astype(int) - crop).max() <= 2


def test_shrinking_a_thousandfold_keeps_the_brightness() -> None:
    white = np.full((1, 65535, 3), 255, np.uint8)
    for width in (16, 64, 500):
        (raw,) = Encoder().encode(white, 1, 65535, raw_form(width, 1))
        assert set(raw) == {255}
    ramp = np.repeat(np.linspace(0, 255, 40000).astype(np.uint8)[None, :, None], 3, axis=2)
    (raw,) = Encoder().encode(ramp, 1, 40000, raw_form(50, 1))
    expected = area_mean(ramp, (50, 1)).reshape(-1)
    assert np.abs(np.frombuffer(raw, np.uint8) - expected).max() <= 1
