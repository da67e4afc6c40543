"""Which files are photos, and how they are decoded to upright RGB."""

import functools
import io
import re
import threading
from pathlib import Path

import numpy as np
from PIL import EpsImagePlugin, Image, UnidentifiedImageError, features

from vitlocal.data.native import Encoder
from vitlocal.errors import UndecodableImage, shown

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"),
    *((".avif",) if "avif" in features.modules and features.check("avif") else ()),  # since Pillow 11.3
)
HEIF_SUFFIXES = (".heic", ".heif")
# Pillow knows more formats. Some of them start programs (EPS: Ghostscript), and few read them as carefully as these.
EpsImagePlugin.gs_binary = False  # also if torchvision, or a dataset of a user, opens an image
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF", "AVIF", "HEIF")
LARGEST_EDGE = 1 << 20  # px; decoders of longer rows may need much memory

SKIP = '--on-error skip, or on_error="skip" of vitlocal.write'
REMEDY = f"restore the file, or write the data folder without such images: {SKIP}"


@functools.cache
def register_heif() -> bool:
    """Lets Pillow decode HEIF, once per process. Returns whether the optional package pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


@functools.cache
def photo_suffixes() -> tuple[str, ...]:
    """The suffixes of the files that can be decoded here, in lower case."""
    return SUFFIXES + HEIF_SUFFIXES * register_heif()


def _formats() -> tuple[str, ...]:
    """Those of FORMATS that Pillow reads here."""
    register_heif()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(file: bytes | str | Path) -> Image.Image:
    """Reads the header of an image in one of FORMATS. Raises what Pillow raises, also above its limit of pixels.

    Pillow itself warns of images above its limit, and decodes those of up to twice as many pixels.
    """
    image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_formats())
    most = Image.MAX_IMAGE_PIXELS
    if (most and image.width * image.height > most) or max(image.size) > LARGEST_EDGE:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} px, expected at most {most} pixels, and {LARGEST_EDGE} in a row or column"
        )
    return image


def suffix_reason(name: str) -> str:
    """Why a file with this name is not read as a photo: its suffix, with the remedy if there is one."""
    suffix = match[0].lower() if (match := re.search(r"\.(?=\w*[^\W\d])\w{1,9}$", name)) else "no suffix"
    if suffix in HEIF_SUFFIXES:
        return f"{suffix} (`pip install pillow-heif` makes them readable)"
    return f"{suffix} (a newer Pillow reads them: `pip install -U pillow`)" if suffix == ".avif" else suffix


_local = threading.local()


def require_whole(data: bytes, name: str, remedy: str = REMEDY) -> None:
    """Raises UndecodableImage with ``name`` for a damaged JPEG whose missing pixels Pillow would invent."""
    if data[:2] == b"\xff\xd8":
        _local.encoder = getattr(_local, "encoder", None) or Encoder()
        try:
            _local.encoder.require_whole(data)
        except ValueError as error:
            raise UndecodableImage(f"{shown(name)}: {error}; {remedy}") from error


def decode_rgb(data: bytes, name: str, remedy: str = REMEDY) -> Image.Image:
    """Decodes an image of one of FORMATS to RGB, upright by its EXIF orientation.

    16-bit values are scaled, transparent parts become white, and an animation gives its first frame. Raises
    UndecodableImage with `name` if the bytes are not a complete image.
    """
    try:
        image = open_image(data)
        image.load()
        return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds of errors on damaged data
        if not data:
            problem = "it is empty"
        elif isinstance(error, Image.DecompressionBombError):
            problem = f"too large to decode safely: {error}"
        elif isinstance(error, UnidentifiedImageError):
            problem = f"of none of the formats {', '.join(_formats())}"
        else:
            problem = str(error) or type(error).__name__
        raise UndecodableImage(
            f"{shown(name)}: expected a whole image, got {len(data)} bytes that do not decode ({problem}); {remedy}"
        ) from error


def decode_whole(data: bytes, name: str, remedy: str = REMEDY) -> Image.Image:
    """:func:`decode_rgb`, which also refuses damaged JPEGs that Pillow accepts; see :func:`require_whole`."""
    require_whole(data, name, remedy)
    return decode_rgb(data, name, remedy)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns a loaded image upright and converts it to RGB. Returns an upright RGB image without a copy."""
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16 bits; Pillow's convert would clip at 255
        deep = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        deep[deep == image.info.get("transparency", -1)] = 65535  # the transparent level of a PNG becomes white
        deep += 128
        deep //= 257
        return Image.fromarray(deep.astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode == "F":  # values are in 0..1 or in 0..255
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        image = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    return image.convert("RGB")  # Pillow has already inverted a CMYK JPEG of Adobe


_TURNS = {  # EXIF orientation -> the transposition that makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_upright(image: Image.Image) -> bool:
    """Whether an opened image needs no turn. Reads no pixels."""
    return _TURNS.get(_orientation(image)) is None


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block does not affect the pixels
        return 1
