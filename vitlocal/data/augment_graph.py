"""RandAugment and three-augment on whole batches: a few operations of constant shape, which a compiler can join.

Every image goes through the same operations, with numbers of its own. The host draws these numbers, sends them in one
copy, and decides nothing else. So a step issues the same operations whatever was drawn, nothing waits for the device,
and ``torch.compile`` needs one graph. ``augment_groups.py`` has the same recipes by groups, and is the reference.

Shape letters: B batch, S size, K slots, V values of an image.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitlocal.data.augment_groups import (
    BLUR,
    CUTTING,
    GREY,
    MOVES,
    MOVING,
    OPERATIONS,
    TIMM,
    OperationSet,
    draw_three,
    draw_turns,
    fill_holes,
)

# --- slots ------------------------------------------------------------------------------------------------------------


def slot_count(count: int, chance: float) -> int:
    """The number of slots for those of ``count`` images that each need one with probability ``chance``.

    The probability that more images need one is below 1e-8 for every batch.
    """
    mean = count * chance
    return min(count, math.ceil(mean + 6 * math.sqrt(mean) + 6))


def _slots(needed: Tensor, chance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Slots for the images of ``needed`` (B,) bool, in the order of the batch.

    Returns the image of each slot, (K,), any image if the slot is free; the slot of each image, (B,); and whether it
    has one, (B,) bool. If there are too few, the last images of the batch have none.
    """
    slots = slot_count(len(needed), chance)
    number = needed.cumsum(0)  # 1 for the first image that needs a slot
    wanted = torch.arange(1, slots + 1, device=needed.device)
    images = torch.searchsorted(number, wanted).clamp(max=len(needed) - 1)
    return images, (number - 1).clamp(0, slots - 1), needed & (number <= slots)


# --- what a compiler makes of it --------------------------------------------------------------------------------------


def _stored(x: Tensor) -> Tensor:
    """``x``, contiguous, which a compiler writes to memory. Otherwise it may compute ``x`` anew for every reader."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def _for_each(channels: int) -> int:
    """The last dimension of numbers that a pixel's channels share: 1, or for a compiler ``channels`` copies.

    With copies it makes one kernel. Otherwise it stores every such number: for a move 14 in float32 for each pixel.
    """
    return channels if torch.compiler.is_compiling() else 1


# --- RandAugment ------------------------------------------------------------------------------------------------------


class Colour(NamedTuple):
    """The numbers of an image's colour operation, or tensors of them, (B,) each. The defaults change nothing."""

    # A pixel's value v goes through a table: down to a multiple of step; then + added if below 128; then 255 - v if at
    # least threshold; then · gain + mean · the image's mean grey.
    step: Any = 1
    added: Any = 0
    threshold: Any = 256
    gain: Any = 1.0
    mean: Any = 0.0
    kind: Any = 0  # AUTOCONTRAST or EQUALIZE: a table from the image's histogram instead. SHARPNESS: see below
    # The result of the table · factor + rest · the pixel's grey, or its surroundings if the kind is SHARPNESS.
    factor: Any = 1.0
    rest: Any = 0.0


AUTOCONTRAST, EQUALIZE, SHARPNESS = 1, 2, 3  # operations that look at other pixels of the image; they need slots


def slot_chance(operations: OperationSet) -> float:
    """The probability that an image needs a slot: one of these three in a turn, and applied."""
    return 3 * operations.chance / len(operations.arguments)


# Name → the operation's argument, as in augment_groups.COLOURS → the numbers of that operation.
COLOURS = {
    "autocontrast": lambda _: Colour(kind=AUTOCONTRAST),
    "equalize": lambda _: Colour(kind=EQUALIZE),
    "invert": lambda _: Colour(threshold=0),
    "posterize": lambda bits: Colour(step=2 ** (8 - bits)),
    "solarize": lambda threshold: Colour(threshold=threshold),
    "solarize_add": lambda added: Colour(added=added),
    "saturation": lambda factor: Colour(factor=factor, rest=1 - factor),
    "contrast": lambda factor: Colour(gain=factor, mean=1 - factor),
    "brightness": lambda factor: Colour(gain=factor),
    "sharpness": lambda factor: Colour(kind=SHARPNESS, factor=factor, rest=1 - factor),
}
COLOUR_VALUES, MATRIX_VALUES, BOX_VALUES = len(Colour._fields), 6, 4


def draw_randaugment(
    magnitude: float, seed: int, step: int, places: np.ndarray, size: int, strength: float = 1.0,
    operations: OperationSet = TIMM,
) -> np.ndarray:  # fmt: skip
    """What :func:`randaugment` does to images of ``size`` px at ``places`` of the global batch: (B, V) float32.

    For each image: the colour operation of each turn, the matrix from an output pixel to an input pixel (column, row),
    and the matrix from an output pixel to a pixel of the image between two moves; if there are cutouts, the box of each
    turn. See ``augment_groups.randaugment`` for the arguments.
    """
    to_pixels = np.array([[size / 2, 0, (size - 1) / 2], [0, size / 2, (size - 1) / 2], [0, 0, 1]])  # from [-1, 1]
    from_pixels = np.linalg.inv(to_pixels)
    names = list(operations.arguments)
    colours, matrices, moves, holes = [], [], [], []
    for turn in draw_turns(magnitude, seed, step, places, strength, operations):
        applied = turn.applied & (strength > 0)
        numbers = [COLOURS[names[variant // 2]](turn.arguments[variant]) for variant in range(MOVING)]
        still = applied & (turn.variants < MOVING)
        colours.append(np.array([*numbers, Colour()])[np.where(still, turn.variants, MOVING)])
        variants = range(MOVING, CUTTING)
        rows = [[*MOVES[names[variant // 2]](turn.arguments[variant]), [0, 0, 1]] for variant in variants]
        matrices.append(np.concatenate([to_pixels @ np.array(rows) @ from_pixels, np.eye(3)[None]]))
        moves.append(np.where(applied & ~still & (turn.variants < CUTTING), turn.variants - MOVING, len(variants)))
        if "cutout" in names:
            holes.append(turn.holes(size) * (strength > 0))
    (first, second), none = moves, len(matrices[0]) - 1
    # The products of all pairs of moves: an output pixel comes from where the first move puts what the second one asks
    # for. If only one of them moves the image, the frame is that of the output.
    products = (matrices[0][:, None] @ matrices[1])[first, second, :2].reshape(-1, MATRIX_VALUES)
    frames = matrices[1][np.where(first == none, none, second), :2].reshape(-1, MATRIX_VALUES)
    return np.concatenate([*colours, products, frames, *holes], axis=1).astype(np.float32)


def randaugment(images: Tensor, values: Tensor, operations: OperationSet = TIMM) -> Tensor:
    """RandAugment by the ``values`` (B, V) of :func:`draw_randaugment`: images (B, 3, S, S) uint8 to new ones.

    Differs from ``augment_groups.randaugment`` in two ways. Grey levels may be rounded otherwise, by one level. An
    image that both turns move (one in 36; with BIG_VISION, one in ten) is interpolated once instead of twice.
    """
    cuts, chance = "cutout" in operations.arguments, slot_chance(operations)
    sizes = [*[COLOUR_VALUES] * OPERATIONS, MATRIX_VALUES, MATRIX_VALUES, *[BOX_VALUES] * OPERATIONS * cuts]
    first, second, matrix, frame, *holes = values.split(sizes, dim=1)

    def cut(x: Tensor, turn: int) -> Tensor:
        return fill_holes(x.permute(0, 3, 1, 2), holes[turn], operations.padding).permute(0, 2, 3, 1) if cuts else x

    x = images.permute(0, 2, 3, 1)  # (B, S, S, 3), as in memory
    x = cut(_colour(x, Colour(*first.unbind(1)), chance), 0)
    x = _moved(x, matrix.unflatten(1, (2, 3)), frame.unflatten(1, (2, 3)), operations.padding)
    return cut(_colour(x, Colour(*second.unbind(1)), chance), 1).permute(0, 3, 1, 2)


def _floor_grey(x: Tensor) -> Tensor:
    """torchvision's grey of (..., 3) uint8 as whole float32 numbers, (..., 1)."""
    red, green, blue = x.float().split(1, dim=-1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()


def _colour(x: Tensor, colour: Colour, chance: float) -> Tensor:
    """The colour operations of one turn: (B, S, S, 3) uint8 to new images. ``chance``: see :func:`slot_chance`."""
    count, size, _, channels = x.shape
    pixels = x.reshape(count, size * size, channels)
    grey = _floor_grey(pixels)  # (B, S·S, 1)
    places = (pixels + 256 * torch.arange(channels, device=x.device)).flatten(1)  # in a table (3, 256): (B, S·S·3)
    shown, slot, has_slot = _slots(colour.kind > 0, chance)
    # A table for each image and channel, (B, 3, 256).
    value = torch.arange(256.0, device=x.device)
    step, added, threshold, gain, mean, kind, factor, rest = (each[:, None, None] for each in colour)
    table = value - value % step
    table = torch.where(table < 128, (table + added).clamp(max=255), table)
    table = torch.where(table >= threshold, 255 - table, table)
    table = (table * gain + grey.mean(dim=1, keepdim=True) * mean).clamp(0, 255).to(torch.uint8)
    has_table = (has_slot & (colour.kind != SHARPNESS))[:, None, None]
    table = torch.where(has_table, _histogram_tables(places[shown], channels, kind[shown] == EQUALIZE)[slot], table)
    looked_up = table.flatten(1).gather(1, places).view_as(pixels)
    # Blends with grey or, for sharpness, with the surroundings.
    is_sharp = kind == SHARPNESS
    surroundings = _surroundings(x[shown]).flatten(1, 2)[slot]
    blended = looked_up * factor + torch.where(is_sharp, surroundings, grey) * rest
    blended = torch.where(is_sharp, blended + 0.5, blended)  # it is rounded, the others are cut off
    blended = torch.where(is_sharp & ~has_slot[:, None, None], looked_up, blended)
    return _stored(blended.clamp(0, 255).to(torch.uint8).view_as(x))


def _histogram_tables(places: Tensor, channels: int, equalizes: Tensor) -> Tensor:
    """The tables of autocontrast, or of equalize where ``equalizes`` (K, 1, 1): (K, 3, 256) uint8.

    ``places`` (K, S·S·3) are the images: for each value, its place in a table (3, 256).
    """
    number = places.shape[1] // channels
    ones = torch.ones((), dtype=torch.int32, device=places.device).expand(places.shape)
    histogram = torch.zeros((len(places), channels * 256), dtype=torch.int32, device=places.device)
    histogram = histogram.scatter_add(1, places, ones).unflatten(1, (channels, 256))
    total = histogram.cumsum(-1, dtype=torch.int32)  # pixels that are at most as bright
    value = torch.arange(256, dtype=torch.int32, device=places.device)
    darkest = (total == 0).sum(dim=-1, keepdim=True, dtype=torch.int32)
    brightest = (total < number).sum(dim=-1, keepdim=True, dtype=torch.int32)
    unit = torch.where(total < number, total, 0).amax(dim=-1, keepdim=True) // 255
    spread = torch.where(brightest > darkest, (brightest - darkest) * (1 / 255), 1.0)
    stretched = (value - torch.where(brightest > darkest, darkest, 0)) / spread
    # Pillow's rule: the number of darker pixels, in units of a 255th of those that are darker than the brightest.
    darker = total - histogram
    equal = torch.where(unit > 0, (darker + unit // 2) // unit.clamp(min=1), value)
    return torch.where(equalizes, equal, stretched).clamp(0, 255).to(torch.uint8)


def _surroundings(x: Tensor) -> Tensor:
    """Pillow's 3×3 blur with weight 5 in the middle; borders stay. (K, S, S, 3) uint8 to float32."""
    size = x.shape[1]
    pixels = x.float()
    rows = F.pad(pixels, (0, 0, 0, 0, 1, 1))
    rows = rows[:, :-2] + pixels + rows[:, 2:]
    columns = F.pad(rows, (0, 0, 1, 1))
    around = columns[:, :, :-2] + rows + columns[:, :, 2:]  # the sum of nine
    along = torch.arange(size, device=x.device)
    inner = (along > 0) & (along < size - 1)
    return torch.where((inner[:, None] & inner)[..., None], (around + 4 * pixels) / 13, pixels)


def _moved(x: Tensor, matrix: Tensor, frame: Tensor, padding: Sequence[float] = TIMM.padding) -> Tensor:
    """Images (B, S, S, 3) uint8 moved by ``matrix`` (B, 2, 3), bilinear, padded with the colour ``padding``.

    Pixels that ``frame`` (B, 2, 3) maps out of the image are padded too, or what left the image would return. This is
    ``F.grid_sample`` in a form that a compiler makes one kernel of, from uint8 to uint8: that function takes images and
    coordinates in float32.
    """
    size, channels = x.shape[1], x.shape[3]
    along = torch.arange(float(size), device=x.device)[:, None].expand(-1, _for_each(channels))

    def mapped(matrix: Tensor) -> Tensor:
        """The columns and rows that the pixels of (S, S) are mapped to: (B, 2, S, S, 1)."""
        right, down, shift = matrix[..., None, None, None].unbind(2)  # (B, 2, 1, 1, 1) each
        return right * along + (down * along[:, None] + shift)

    position = mapped(matrix)
    corner, neighbours = position.floor(), []  # a pair for each axis: the places of the neighbours, and their weights
    for nearest in (corner, corner + 1):
        place = nearest.clamp(0, size - 1)
        weight = (1 - (position - nearest).abs()) * (place == nearest)  # 0 outside of the frame
        neighbours.append((place.unbind(1), weight.unbind(1)))
    fill = torch.stack([torch.full((), level, device=x.device) for level in padding])
    pixels, total = x.flatten(1, 2), torch.zeros((), device=x.device)
    for (_, row), (_, row_weight) in neighbours:
        for (column, _), (column_weight, _) in neighbours:
            place = (row * size + column).long().flatten(1, 2)
            found = pixels.gather(1, place.expand(-1, -1, channels)).view_as(x)
            total = torch.addcmul(total, row_weight * column_weight, found - fill)
    between = mapped(frame)
    columns_kept, rows_kept = ((between + 1).clamp(0, 1) * (size - between).clamp(0, 1)).unbind(1)
    total = total * columns_kept * rows_kept
    return _stored((total + fill).round().clamp(0, 255).to(torch.uint8))


# --- three-augment ----------------------------------------------------------------------------------------------------

GREYED, SOLARISED, BLURRED = range(3)
BLUR_CHANCE = 1 / 3


def draw_three_augment(strength: float, seed: int, step: int, places: np.ndarray, size: int) -> np.ndarray:
    """What :func:`three_augment` does to images of ``size`` px at ``places`` of the global batch: (B, V) float32.

    For each image: the first operation (-1: none), the blur's standard deviation, and the three factors of the jitter.
    """
    chosen, deviations, factors = draw_three(strength, seed, step, places, size)
    return np.column_stack([chosen, deviations, factors]).astype(np.float32)


def three_augment(images: Tensor, values: Tensor) -> Tensor:
    """Three-augment by the ``values`` (B, V) of :func:`draw_three_augment`: images (B, 3, S, S) uint8 to new ones."""
    operation, deviations, *_ = values.unbind(1)
    first, _, brightness, contrast, saturation = values[..., None, None, None].unbind(1)  # (B, 1, 1, 1) each
    x = images.permute(0, 2, 3, 1)  # (B, S, S, 3), as in memory
    shown, slot, has_slot = _slots(operation == BLURRED, BLUR_CHANCE)
    blurred = _blurred(x[shown], deviations[shown])[slot]
    pixels = x.float()
    pixels = torch.where(
        first == GREYED, _grey(pixels), torch.where(first == SOLARISED, torch.minimum(pixels, 255 - pixels), pixels)
    )
    pixels = torch.where(has_slot[:, None, None, None], blurred, pixels)
    pixels = _stored(pixels.half()).float()  # read three times; half of the bytes, and right to a sixteenth of a level
    pixels = (pixels * brightness).clamp(0, 255)
    pixels = torch.lerp(_grey(pixels).mean(dim=(1, 2, 3), keepdim=True), pixels, contrast).clamp(0, 255)
    pixels = torch.lerp(_grey(pixels), pixels, saturation)
    return _stored(pixels.round().clamp(0, 255).to(torch.uint8)).permute(0, 3, 1, 2)


def _grey(x: Tensor) -> Tensor:
    """Pillow's grey of (..., 3) float32, (..., 1)."""
    red, green, blue = (each.expand(*x.shape[:-1], _for_each(x.shape[-1])) for each in x.split(1, dim=-1))
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def _blurred(x: Tensor, deviations: Tensor) -> Tensor:
    """(K, S, S, 3) uint8, each image blurred by a Gaussian of its own deviation (K,), px: float32; edges are repeated.

    Not a convolution: a compiler could neither join it with what is around it nor keep the images channels-last.
    """
    size = x.shape[1]
    reach = min(math.ceil(3 * BLUR[1] * size / 224), size - 1)
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    taps = torch.exp(-0.5 * (offsets / deviations[:, None]) ** 2)
    taps = (taps / taps.sum(dim=1, keepdim=True))[..., None, None, None]  # (K, taps, 1, 1, 1)
    places = torch.arange(-reach, size + reach, device=x.device).clamp(0, size - 1)
    pixels = x.float()
    for dim in (1, 2):
        padded, pixels = pixels.index_select(dim, places), torch.zeros((), device=x.device)
        for number, tap in enumerate(taps.unbind(1)):
            pixels = torch.addcmul(pixels, padded.narrow(dim, number, size), tap)
    return pixels
