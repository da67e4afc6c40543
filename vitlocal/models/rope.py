"""Rotary positions in 2-D: attention turns queries and keys by angles that depend on their patch.

RoPE-ViT (Heo et al. 2024, arXiv 2403.13298): "axial" has fixed frequencies. "mixed" learns them in each block and head.

Shapes: B batch, M heads, T tokens in all, P prefix tokens, N = h·w patch tokens on the grid (h, w), d head width.
"""

import math
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from vitlocal.models.positions import Grid, center_window
from vitlocal.models.token_selection import token_rows

THETA = {"axial": 100.0, "mixed": 10.0}  # the paper's
IMAGE_UNITS = (14, 14)  # an image's height and width in units: the patches of the paper's models at 224 px


@torch.compiler.assume_constant_result  # a compiled graph holds the result
def rope_constant(
    grid: Grid, unit: Grid, window: int | None, num_prefix_tokens: int, axial: tuple[int, float] | None,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Returns what all blocks share: the table of "axial", (1, T, d/2, 2), or the coordinates of "mixed", (T, 2, 1).

    The table has cosines and sines. Coordinates are column and row; ``grid`` is scaled to the grid ``unit``, center to
    center. Only the center crop ``window`` counts, see :func:`center_window`. ``axial``: d and theta. Prefix tokens
    have the coordinates 0, so nothing turns them.
    """
    return _cached_constant(grid, unit, window, num_prefix_tokens, axial, device)


@cache
@torch.inference_mode(False)  # as in vitlocal.models.positions
@torch.no_grad()
@_disable_current_modes()
def _cached_constant(
    grid: Grid, unit: Grid, window: int | None, num_prefix_tokens: int, axial: tuple[int, float] | None,
    device: torch.device,
) -> Tensor:  # fmt: skip
    sides = zip(center_window(grid, window), grid, unit, strict=True)
    rows, columns = ((torch.arange(count).double()[part] + 0.5) * new / count - 0.5 for part, count, new in sides)
    patches = torch.cartesian_prod(rows, columns).flip(1)  # (N, 2): column, row
    result = torch.cat([patches.new_zeros(num_prefix_tokens, 2), patches])
    result = result[:, :, None]
    if axial is not None:
        angles = (result * _magnitudes(*axial)).flatten(1)  # (T, d/2): of the column, then of the row
        result = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    result = result.to(device, torch.float32)
    # Until PyTorch 2.14, the second compilation treats this constant's shape as symbolic, and fails.
    result._dynamo_static_indices = set(range(result.ndim))  # type: ignore[attr-defined]
    return result


def shared_rotations(
    tokens: Tensor, grid: Grid, unit: Grid, window: int | None, num_prefix_tokens: int, axial: tuple[int, float] | None
) -> Tensor:
    """Returns :func:`rope_constant` for ``tokens`` (B, T, D), also while they are only counted."""
    if not torch.compiler.is_compiling() and isinstance(tokens, FakeTensor):  # see vitlocal.models.counts
        shape = (tokens.shape[1], 2, 1) if axial is None else (1, tokens.shape[1], axial[0] // 2, 2)
        return tokens.new_empty(shape, dtype=torch.float32)
    return rope_constant(grid, unit, window, num_prefix_tokens, axial, tokens.device)


def _magnitudes(width: int, theta: float) -> Tensor:
    """Returns d/4 frequencies, from 1 to almost 1/theta radians per unit."""
    return theta ** (-torch.arange(0, width, 4, dtype=torch.float64) / width)


def mixed_frequencies(heads: int, width: int, theta: float) -> Tensor:
    """Draws initial frequencies of columns and rows, radians per unit: (M, 2, d/2).

    Each head has two orthogonal directions, turned by a random angle. Each direction has all magnitudes.
    """
    turns = torch.rand(heads, 1) * 2 * math.pi  # of the first direction
    directions = torch.cat([turns, turns + math.pi / 2], dim=1)  # (M, 2)
    waves = torch.stack([directions.cos(), directions.sin()], dim=1)  # (M, 2 axes, 2 directions)
    return (waves[..., None] * _magnitudes(width, theta).float()).flatten(2)


def rotations(shared: Tensor, frequencies: Tensor | None, kept: Tensor | None, count: int) -> Tensor:
    """Returns the cosines and sines of the angles of a block's tokens in float32: (1 or M, T, d/2, 2).

    ``shared`` is :func:`rope_constant`'s result. ``frequencies`` (M, 2, d/2) are those of "mixed". ``kept`` (B, n) are
    the indices of patch tokens among ``count``, if some are missing. The result is then (B, 1 or M, P + n, d/2, 2).
    """
    table = shared
    if frequencies is not None:
        # (T, 2, 1) times (M, 1, 2, d/2): no matrix product, which autocast would round.
        angles = (shared * frequencies.float()[:, None]).sum(dim=2)
        table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    if kept is None:
        return table
    return table[:, token_rows(kept, table.shape[1] - count)].transpose(0, 1)


def rotate(tokens: Tensor, table: Tensor) -> Tensor:
    """Turns each pair of channels of queries or keys (B, M, T, d) by its angle in ``table``, see :func:`rotations`."""
    pairs = tokens.unflatten(-1, (-1, 2))
    if tokens.dtype == torch.float32 and tokens.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        # One pass over memory. The compiler fuses the other form instead, and half precision has no complex numbers.
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)
        return torch.view_as_real(turned).flatten(-2)
    (first, second), (cos, sin) = pairs.unbind(-1), table.to(tokens.dtype).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
