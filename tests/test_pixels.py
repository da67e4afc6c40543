"""Decoding image files to upright RGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from fake_images import colour_of, encode_colour
from PIL import Image, features

from vitlocal.data.images.pixels import decode_rgb, to_rgb
from vitlocal.errors import DataError


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF"])
def test_decode_formats(format: str) -> None:
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow without WebP")
    image = decode_rgb(encode_colour(format=format), "a")
    assert image.mode == "RGB" and image.size == (12, 8)
    assert np.abs(np.subtract(colour_of(image), (200, 30, 60))).max() <= 4


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (77, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 200, 51), (204, 224, 244)),
    ],
)
def test_decode_modes(mode: str, colour: object, expected: tuple[int, ...]) -> None:
    image = decode_rgb(encode_colour(colour, mode), "a")
    assert image.mode == "RGB" and colour_of(image) == expected


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\xff\x80"])
def test_decode_palette(transparency: object) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    image.putdata([0, 1, 2])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **({} if transparency is None else {"transparency": transparency}))
    decoded = decode_rgb(buffer.getvalue(), "a")
    white = (255, 255, 255)
    expected = {
        None: [(10, 20, 30), (200, 100, 50), (0, 0, 0)],
        1: [(10, 20, 30), white, (0, 0, 0)],
        b"\x00\xff\x80": [white, (200, 100, 50), (127, 127, 127)],
    }[transparency]
    assert decoded.mode == "RGB" and [decoded.getpixel((x, 0)) for x in range(3)] == expected


def without_segment(jpeg: bytes, marker: int) -> bytes:
    """The JPEG without its segments of one kind."""
    out, at = [jpeg[:2]], 2
    while jpeg[at + 1] != 0xDA:
        length = 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] != marker:
            out.append(jpeg[at : at + length])
        at += length
    return b"".join([*out, jpeg[at:]])


@pytest.mark.parametrize("adobe", [True, False])
def test_decode_cmyk(adobe: bool) -> None:
    """CMYK JPEGs hold inverted inks by Adobe's habit, which all decoders presume, marked or not."""
    data = encode_colour((0, 200, 150, 30), "CMYK", "JPEG", quality=100)  # a red; Pillow writes it inverted
    assert b"Adobe" in data
    if not adobe:
        data = without_segment(data, 0xEE)
        assert b"Adobe" not in data
    red, green, blue = colour_of(decode_rgb(data, "a"))
    assert abs(red - 225) < 6 and abs(green - 49) < 6 and abs(blue - 93) < 6


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG of raw rows; Pillow does not write 16-bit colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    stride = len(rows) // height
    filtered = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_decode_16_bit() -> None:
    values = np.array([[0, 257, 32768, 65535]], ">u2")
    gray = decode_rgb(png(4, 1, 16, 0, values.tobytes()), "a")
    assert gray.mode == "RGB" and np.asarray(gray)[0, :, 0].tolist() == [0, 1, 128, 255]
    colours = np.array([[[0, 32768, 65535], [257 * 9, 257 * 99, 257 * 199]]], ">u2")
    colour = np.asarray(decode_rgb(png(2, 1, 16, 2, colours.tobytes()), "a"))
    assert colour[0].tolist() == [[0, 128, 255], [9, 99, 199]]


def test_a_transparent_level_of_16_bit_grey_is_white() -> None:
    values = np.array([[0, 1000, 30000, 50000]], ">u2")
    data, level = png(4, 1, 16, 0, values.tobytes()), struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + b"tRNS" + level + struct.pack(">I", zlib.crc32(b"tRNS" + level))
    place = data.index(b"IDAT") - 4
    grey = decode_rgb(data[:place] + chunk + data[place:], "a")
    assert np.asarray(grey)[0, :, 0].tolist() == [0, 255, 117, 195]


def test_decode_float() -> None:
    for values, expected in (([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 99.6, 300.0], [0, 100, 255])):
        buffer = io.BytesIO()
        Image.fromarray(np.array([values], np.float32)).save(buffer, "TIFF")
        assert np.asarray(decode_rgb(buffer.getvalue(), "a"))[0, :, 1].tolist() == expected


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_orientation(orientation: int, format: str) -> None:
    """A white mark in the upper left corner of an upright 32 × 16 image comes back there."""
    if format == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow without WebP")
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(buffer, format, exif=exif, **options)
    decoded = np.asarray(decode_rgb(buffer.getvalue(), "a")).astype(int)
    assert decoded.shape == upright.shape
    assert np.abs(decoded - upright).max() <= 8


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_decode_broken_exif_keeps_the_pixels() -> None:
    data = encode_colour(format="JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert decode_rgb(data, "a").size == (12, 8)


def test_decode_animation_takes_the_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert colour_of(decode_rgb(buffer.getvalue(), "a")) == (255, 0, 0)


def noisy(format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"", b"no image at all", noisy()[:1500], noisy()[:30], noisy("PNG")[:1500], encode_colour(format="BMP")[:100]],
    ids=["empty", "text", "half a JPEG", "JPEG header", "half a PNG", "half a BMP"],
)
def test_decode_rejects_incomplete_files(data: bytes) -> None:
    with pytest.raises(DataError, match=r"n01/a\.JPEG: expected a whole image.*--on-error skip"):
        decode_rgb(data, "n01/a.JPEG")


def test_decode_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match=r"bomb.png.*too large to decode safely"):
        decode_rgb(encode_colour(), "bomb.png")


def test_decode_does_not_copy_plain_rgb() -> None:
    image = Image.new("RGB", (4, 4))
    assert to_rgb(image) is image
