"""The built-in sample: 20 classes of shapes and textures, rendered when they are read.

Colours, places, sizes, backgrounds, light and clutter do not depend on the class. So a colour histogram or a thumbnail
cannot separate the classes; a model must find edges and how they meet. Image `i` of a split depends on (seed, split, i)
alone, so `sample:10` is the beginning of `sample:250`.

    H, W  height and width of the image in pixels; the short side is the unit of length
    u, v  coordinates in the object's frame, turned and scaled: a shape spans about [-1, 1]
"""

import functools
import io
import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator, Philox, SeedSequence
from PIL import Image, ImageDraw

from vitlocal.data.images.image_set import ImageSet
from vitlocal.errors import ConfigError

IMAGES_PER_CLASS = 250
SHORT_SIDE = (100, 400)  # pixels; the long side is at most LONGEST_ASPECT times that
LONGEST_ASPECT = 1.25

Field = np.ndarray  # (H, W) float32


# Shapes: signed distance to the outline in units of the shape's radius, negative inside. A bound on the distance is
# enough, because only its sign and its slope at the outline are used.


def _box(u: Field, v: Field, half_u: float, half_v: float) -> Field:
    return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)


def _arrow(u: Field, v: Field, rng: Generator) -> Field:
    head = np.maximum(0.64 * (u - 1.0) + 0.77 * np.abs(v), 0.1 - u)
    return np.minimum(head, _box(u + 0.4, v, 0.6, rng.uniform(0.2, 0.27)))


def _crescent(u: Field, v: Field, rng: Generator) -> Field:
    return np.maximum(np.hypot(u, v) - 1.0, 0.85 - np.hypot(u - rng.uniform(0.5, 0.6), v))


def _cross(u: Field, v: Field, rng: Generator) -> Field:
    arm = rng.uniform(0.24, 0.34)
    return np.minimum(_box(u, v, 0.95, arm), _box(u, v, arm, 0.95))


def _heart(u: Field, v: Field, rng: Generator) -> Field:
    """A square on its tip with a half disc on each of its two upper sides."""
    u, v = np.abs(u), v + 0.2
    half = 0.62  # of the square's diagonal; each disc is centred in the middle of a side
    square = (u + np.abs(v)) * math.sqrt(0.5) - half * math.sqrt(0.5)
    return np.minimum(square, np.hypot(u - half / 2, v + half / 2) - half * math.sqrt(0.5))


def _hourglass(u: Field, v: Field, rng: Generator) -> Field:
    """Two triangles, tip to tip."""
    slope = rng.uniform(0.75, 0.95)
    side = (np.abs(u) - slope * np.abs(v)) / math.hypot(1.0, slope)
    return np.maximum(side - 0.05, np.abs(v) - 0.85)


def _ring(u: Field, v: Field, rng: Generator) -> Field:
    width = rng.uniform(0.13, 0.22)
    return np.abs(np.hypot(u, v) - (0.95 - width)) - width


def _star(u: Field, v: Field, rng: Generator) -> Field:
    """Five points: a mirrored wedge of a fifth, bounded by the line from a tip to a notch."""
    wedge = math.pi / 5
    angle = np.abs(np.mod(np.arctan2(v, u), 2 * wedge) - wedge)  # `wedge` at a tip, 0 at a notch
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch = rng.uniform(0.4, 0.46)
    tip_x, tip_y = math.cos(wedge), math.sin(wedge)
    return ((x - notch) * tip_y - y * (tip_x - notch)) / math.hypot(tip_x - notch, tip_y)


def _triangle(u: Field, v: Field, rng: Generator) -> Field:
    """The largest distance to its sides."""
    angles = (2 * math.pi * k / 3 for k in range(3))
    return functools.reduce(np.maximum, (u * math.cos(angle) + v * math.sin(angle) for angle in angles)) - 0.52


# Textures: signed field in units of one period, negative on the figure and positive on the ground.


def _triangle_wave(x: Field) -> Field:
    """Distance to the nearest integer, in [0, 1/2]."""
    return np.abs(x - np.rint(x))


def _bricks(u: Field, v: Field, rng: Generator) -> Field:
    joint = rng.uniform(0.09, 0.13)
    along = _triangle_wave(u * 0.5 + 0.5 * np.mod(np.floor(v), 2)) * 2
    return joint - np.minimum(along, _triangle_wave(v))


def _camouflage(u: Field, v: Field, rng: Generator) -> Field:
    """Irregular patches: a few plane waves of about one period, in random directions."""
    sum_of_waves = np.zeros_like(u)
    for k, phase in enumerate(rng.uniform(0, 2 * math.pi, 5)):
        angle = math.pi * k / 5 + rng.uniform(-0.25, 0.25)
        pace = 2 * math.pi * rng.uniform(0.6, 1.1)
        sum_of_waves += np.cos(u * (pace * math.cos(angle)) + v * (pace * math.sin(angle)) + np.float32(phase))
    return sum_of_waves / 8  # the slope at the border of a patch is about 1


def _checker(u: Field, v: Field, rng: Generator) -> Field:
    a, b = 0.25 - _triangle_wave(u * 0.5), 0.25 - _triangle_wave(v * 0.5)
    return np.copysign(np.minimum(np.abs(a), np.abs(b)) * 2, a * b)


def _lattice(u: Field, v: Field, rng: Generator) -> Field:
    """Thin bars, crossed."""
    return np.minimum(_triangle_wave(u), _triangle_wave(v)) - rng.uniform(0.13, 0.18)


def _rays(u: Field, v: Field, rng: Generator) -> Field:
    """Wedges around a centre."""
    wedges = int(rng.integers(7, 12))
    angle = np.arctan2(v, u) * (wedges / (2 * math.pi))
    return (_triangle_wave(angle) - 0.25) * np.hypot(u, v) * (2 * math.pi / wedges)


def _scales(u: Field, v: Field, rng: Generator) -> Field:
    """Rows of overlapping half discs, each row covering the top of the next."""

    def arc(shift: float) -> Field:
        x, y = u - shift, np.mod(v - shift, 1.0)
        return np.where(y >= 0, np.abs(np.hypot(x - np.rint(x), y) - 0.5), 1.0)

    return np.minimum(arc(0.0), arc(0.5)) - 0.1


Draw = Callable[[Field, Field, Generator], Field]

SHAPES: dict[str, Draw] = {
    "arrow": _arrow,
    "crescent": _crescent,
    "cross": _cross,
    "disc": lambda u, v, rng: np.hypot(u, v) - 0.9,
    "heart": _heart,
    "hourglass": _hourglass,
    "ring": _ring,
    "square": lambda u, v, rng: _box(u, v, 0.78, 0.78),
    "star": _star,
    "triangle": _triangle,
}
TEXTURES: dict[str, tuple[Draw, float, float]] = {  # with the smallest and the largest period, in short sides
    "bricks": (_bricks, 0.13, 0.19),
    "camouflage": (_camouflage, 0.15, 0.25),
    "checker": (_checker, 0.11, 0.19),
    "dots": (lambda u, v, rng: np.hypot(u - np.rint(u), v - np.rint(v)) - rng.uniform(0.24, 0.32), 0.14, 0.21),
    "lattice": (_lattice, 0.13, 0.21),
    "rays": (_rays, 0.15, 0.22),
    "ripples": (lambda u, v, rng: _triangle_wave(np.hypot(u, v)) - 0.25, 0.13, 0.19),
    "scales": (_scales, 0.20, 0.28),
    "stripes": (lambda u, v, rng: _triangle_wave(u) - rng.uniform(0.2, 0.3), 0.11, 0.19),
    "zigzag": (lambda u, v, rng: _triangle_wave(v + 2.0 * _triangle_wave(u / 2.6) * 1.1) - 0.25, 0.13, 0.19),
}
CENTRED = ("rays", "ripples")  # textures with a centre, which stays near that of the object
CLASSES = tuple(sorted((*SHAPES, *TEXTURES)))


def _brightness(colour: np.ndarray) -> float:
    return float(colour @ (0.299, 0.587, 0.114))


def _two_colours(rng: Generator) -> np.ndarray:
    """Two clearly different colours, (2, 3) in 0..255."""
    while True:
        colours = rng.uniform(15, 240, (2, 3))
        if abs(_brightness(colours[0] - colours[1])) > 70:
            return colours


def _clutter(image: Image.Image, rng: Generator, count: int, smallest: float, largest: float) -> None:
    """Draws small shapes and lines with random colours and places on `image`. Sizes are in short sides."""
    draw = ImageDraw.Draw(image)
    width, height = image.size
    for kind, x, y, size, angle, *colour in rng.random((count, 8)).tolist():
        x, y, size = x * width, y * height, min(image.size) * (smallest + (largest - smallest) * size)
        angle *= math.tau
        fill = tuple(int(256 * c) for c in colour)
        if kind < 0.35:
            dx, dy = 2.0 * size * math.cos(angle), 2.0 * size * math.sin(angle)
            draw.line((x - dx, y - dy, x + dx, y + dy), fill, width=max(1, round(size * 0.2)))
        elif kind < 0.55:
            draw.ellipse((x - size, y - size * 0.8, x + size, y + size * 0.8), fill)
        else:
            corners = 3 if kind < 0.75 else 4
            turns = [angle + math.tau * k / corners for k in range(corners)]
            draw.polygon([(x + size * math.cos(t), y + size * math.sin(t)) for t in turns], fill)


def _cloth(rng: Generator, size: tuple[int, int], colour: np.ndarray, spread: float, cells: int) -> Image.Image:
    """An image of about one colour, with about `cells` soft hills across."""
    hills = rng.standard_normal((cells, cells, 1)) * rng.uniform(-spread, spread, 3)
    grid = np.clip(colour + hills, 0, 255).astype(np.uint8)
    return Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)


def _mask(distance: Field, pixel: float) -> Image.Image:
    """The part of each pixel that is inside, 0..255. `pixel` is its width in the unit of the distance."""
    covered = distance * np.float32(-255.0 / pixel)
    covered += 127.5
    return Image.fromarray(np.clip(covered, 0, 255, out=covered).astype(np.uint8))


def _in_light(image: Image.Image, rng: Generator) -> Image.Image:
    """Adds light from one side, and sensor noise."""
    width, height = image.size
    across, down = rng.uniform(-0.3, 0.3, 2).astype(np.float32)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32) * across
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32) * down
    noise = rng.standard_normal((height, width), dtype=np.float32)
    noise *= np.float32(rng.uniform(1.0, 9.0))
    # (H, 3 W), because numpy is slow if the innermost axis has only 3 entries
    pixels = np.asarray(image).reshape(height, 3 * width) * (1.0 + np.repeat(x, 3) + y[:, None])
    pixels += np.repeat(noise, 3, axis=1)
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8).reshape(height, width, 3))


def render(name: str, rng: Generator) -> Image.Image:
    """Draws one image of the class `name`. Everything else comes from `rng`."""
    short = round(SHORT_SIDE[0] * (SHORT_SIDE[1] / SHORT_SIDE[0]) ** rng.random())
    long = round(short * rng.uniform(1.0, LONGEST_ASPECT))
    size = width, height = (long, short) if rng.random() < 0.6 else (short, long)
    figure, ground = _two_colours(rng)
    image = _cloth(rng, size, ground, 16, int(rng.integers(3, 7)))
    _clutter(image, rng, int(rng.integers(5, 14)), 0.015, 0.06)

    # The object's frame. Its centre is such that a central crop contains the object.
    texture = name in TEXTURES
    radius = rng.uniform(0.4, 0.65) if texture else rng.uniform(0.29, 0.46)  # in short sides
    slack = max(0.0, 0.5 - radius)
    x0, y0 = rng.uniform(-slack, slack, 2)
    turn, squeeze = rng.uniform(-0.5, 0.5), math.exp(rng.uniform(-0.12, 0.12))
    x = (np.arange(width, dtype=np.float32) - (width - 1) / 2) / short - np.float32(x0)
    y = (np.arange(height, dtype=np.float32) - (height - 1) / 2) / short - np.float32(y0)
    cos, sin = math.cos(turn), math.sin(turn)
    u = (x * (cos * squeeze))[None, :] + (y * (sin * squeeze))[:, None]  # (H, W), in short sides
    v = (y * (cos / squeeze))[:, None] - (x * (sin / squeeze))[None, :]

    if texture:
        draw, least, greatest = TEXTURES[name]
        period = rng.uniform(least, greatest)
        phase = rng.uniform(-0.5, 0.5, 2) * (1.0 if name in CENTRED else 8.0)
        pattern = draw(u / period + np.float32(phase[0]), v / period + np.float32(phase[1]), rng)
        other = _two_colours(rng)[0]
        if abs(_brightness(other - figure)) < 60 or rng.random() < 0.5:
            other = ground
        inside = Image.new("RGB", size, tuple(other.astype(int).tolist()))
        inside.paste(tuple(figure.astype(int).tolist()), mask=_mask(pattern, 1.0 / (short * period)))
        wobble = 1.0 + 0.12 * np.cos(np.arctan2(v, u) * int(rng.integers(2, 6)))
        outline = _mask(np.hypot(u, v) - radius * wobble, 1.0 / short)
    else:
        inside = _cloth(rng, size, figure, 9, int(rng.integers(4, 24)))
        outline = _mask(SHAPES[name](u / radius, v / radius, rng), 1.0 / (short * radius))
    image.paste(inside, mask=outline)

    _clutter(image, rng, int(rng.integers(0, 4)), 0.015, 0.04)  # a few small shapes in front
    return _in_light(image, rng)


class SampleImages(ImageSet):
    """The built-in sample as an image set. Row `i` has the class `i % 20`."""

    def __init__(self, split: str, per_class: int = IMAGES_PER_CLASS, seed: int = 0) -> None:
        """`per_class` is the number of training images; the validation split has a fifth of it, at least 4."""
        if split not in ("train", "val"):
            raise ConfigError(f"the built-in sample has no split '{split}'; expected 'train' or 'val'")
        self.spec = "sample" if per_class == IMAGES_PER_CLASS else f"sample:{per_class}"
        if seed:
            self.spec = f"sample:{per_class}:{seed}"
        self.split, self.per_class, self.seed = split, per_class, seed
        self.classes = CLASSES
        count = per_class if split == "train" else max(4, per_class // 5)
        self.labels = np.arange(count * len(CLASSES), dtype=np.int64) % len(CLASSES)

    def entry(self, index: int) -> str:
        return f"{self.split}/{self.classes[self.labels[index]]}/{range(len(self))[index]}"

    def read(self, index: int) -> bytes:
        """Renders image `index` and returns it as a JPEG of random quality."""
        index = range(len(self))[index]  # raises IndexError past the end; -1 is the last
        key = SeedSequence(self.seed, spawn_key=(int(self.split == "val"), index))
        rng = Generator(Philox(key))
        image = render(self.classes[self.labels[index]], rng)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(50, 96)))
        return buffer.getvalue()
