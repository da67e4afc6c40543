"""Which files are photos, and how they are decoded to upright RGB."""

import functools
import io
import re

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from vitlocal.errors import UndecodableImage

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"),
    *((".avif",) if "avif" in features.modules and features.check("avif") else ()),  # since Pillow 11.3
)
HEIF_SUFFIXES = (".heic", ".heif")

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


def suffix_reason(name: str) -> str:
    """Why a file with this name is not read as a photo: its suffix, with the remedy if there is one."""
    suffix = match[0].lower() if (match := re.search(r"\.(?=\w*[^\W\d])\w{1,9}$", name)) else "no suffix"
    if suffix in HEIF_SUFFIXES:
        return f"{suffix} (`pip install pillow-heif` makes them readable)"
    return f"{suffix} (a newer Pillow reads them: `pip install -U pillow`)" if suffix == ".avif" else suffix


def decode_rgb(data: bytes, name: str, remedy: str = REMEDY) -> Image.Image:
    """Decodes an image of any format that Pillow reads to RGB, upright by its EXIF orientation.

    16-bit values are scaled, transparent parts become white, and an animation gives its first frame. Raises
    UndecodableImage with `name` if the bytes are not a complete image.
    """
    register_heif()
    try:
        image = Image.open(io.BytesIO(data))
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
            problem = "of a format that Pillow does not know"
        else:
            problem = str(error) or type(error).__name__
        raise UndecodableImage(
            f"{name}: expected a whole image, got {len(data)} bytes that do not decode ({problem}); {remedy}"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns a loaded image upright and converts it to RGB. Returns an upright RGB image without a copy."""
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits; Pillow's convert would clip at 255
        deep = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    elif image.mode == "F":  # values are in 0..1 or in 0..255
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
