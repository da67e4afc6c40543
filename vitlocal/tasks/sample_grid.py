"""A picture of samples: a row for each class.

R rows, K samples in a row, H W sides.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, TEXT, LEAST_SIDE, MOST_TEXT = 4, 14, 64, 240  # px


def draw_grid(images: Tensor, names: Sequence[str]) -> Image.Image:
    """``images`` (R, K, 3, H, W) uint8 in rows that have the class ``names`` (R,) at their left.

    Images below 64 px are enlarged by a whole number. Names that are too wide end in an ellipsis.
    """
    import matplotlib

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", TEXT)
    texts = [_shortened(name, font) for name in names]
    left = max((round(font.getlength(text)) for text in texts), default=0) + 2 * GAP
    rows, columns, _, height, width = images.shape
    scale = -(-LEAST_SIDE // min(height, width)) if min(height, width) < LEAST_SIDE else 1
    height, width = height * scale, width * scale
    grid = Image.new("RGB", (left + columns * (width + GAP), GAP + rows * (height + GAP)), "white")
    draw = ImageDraw.Draw(grid)
    pixels = images.movedim(2, -1).cpu().numpy()
    for row, text in enumerate(texts):
        top = GAP + row * (height + GAP)
        draw.text((GAP, top + height // 2), text, "black", font, anchor="lm")
        for column in range(columns):
            image = Image.fromarray(pixels[row, column]).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(image, (left + column * (width + GAP), top))
    return grid


def _shortened(name: str, font: ImageFont.FreeTypeFont) -> str:
    """``name`` in one line of at most :data:`MOST_TEXT` px."""
    text = "".join(letter if letter.isprintable() else " " for letter in name)
    if font.getlength(text) <= MOST_TEXT:
        return text
    while font.getlength(f"{text}…") > MOST_TEXT:
        text = text[:-1]
    return f"{text}…"
