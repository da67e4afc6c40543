"""The position table: its initial values, and its interpolation to other grids.

Shapes: (H, W) the table's full grid, (h, w) the grid of an input, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Grid = tuple[int, int]


@torch.compiler.assume_constant_result  # a compiled graph holds the matrix, so no step builds or copies it
def position_matrix(full: Grid, grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the (h·w, H·W) matrix that resamples a table at ``full`` = (H, W) to ``grid`` = (h, w).

    It is the linear map of ``F.interpolate(mode="bicubic", antialias=True, align_corners=False)``: the unit vectors,
    resampled in float64. Rows sum to 1.
    """
    # Training cannot use an inference tensor, so evaluation must not create one here.
    with torch.inference_mode(False), torch.no_grad():
        count = full[0] * full[1]
        units = torch.eye(count, dtype=torch.float64, device="cpu").view(1, count, *full)
        resampled = F.interpolate(units, size=grid, mode="bicubic", antialias=True, align_corners=False)
        matrix = resampled.view(count, -1).t().contiguous().to(device, dtype)
        # Until PyTorch 2.14, the second compilation treats this constant's shape as symbolic, and fails.
        matrix._dynamo_static_indices = {0, 1}  # type: ignore[attr-defined]
        return matrix


def resample_positions(table: Tensor, full: Grid, grid: Grid, cache: MutableMapping[Any, Tensor]) -> Tensor:
    """Resamples the table (1, T, D) from ``full`` to ``grid``, except the first rows, of prefix tokens."""
    if grid == full:
        return table
    key = (grid, table.device, table.dtype)
    device = table.device.type
    # A compiled graph holds its own matrix. If it looked into the cache, each new entry would recompile it.
    cached = not (torch.compiler.is_compiling() or device == "meta" or isinstance(table, FakeTensor))
    matrix = cache.get(key) if cached else None
    if matrix is None:
        matrix = position_matrix(full, grid, table.device, table.dtype)
        if cached:
            cache[key] = matrix
    prefix, patches = table[0].split([table.shape[1] - matrix.shape[1], matrix.shape[1]])
    # Autocast would resample in half precision. The meta device, which counts shapes, has no autocast.
    with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
        return torch.cat([prefix, matrix @ patches])[None]  # (1, T', D)


def sincos_table(grid: Grid, dim: int) -> Tensor:
    """Returns the sines and cosines of rows and columns, (h·w, dim) (Chen et al. 2021, arXiv 2104.02057).

    A quarter of the ``dim`` channels each: sine and cosine of the column, then of the row, at ``dim / 4`` frequencies
    from 1 to 1/10,000 radians per patch.
    """
    frequencies = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [indices.flatten()[:, None] * frequencies for indices in (columns, rows)]  # (h·w, dim / 4) each
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def center_window(grid: Grid, side: int | None) -> tuple[slice, slice] | None:
    """Returns the rows and columns of the center crop of ``grid`` with at most ``side`` patches a side.

    None if the crop is the whole grid. If the border is odd, its larger half lies below and to the right.
    """
    inner = grid if side is None else (min(grid[0], side), min(grid[1], side))
    if inner == grid:
        return None
    top, left = (grid[0] - inner[0]) // 2, (grid[1] - inner[1]) // 2
    return slice(top, top + inner[0]), slice(left, left + inner[1])


def crop_tokens(tokens: Tensor, grid: Grid, window: tuple[slice, slice]) -> Tensor:
    """Returns the patch tokens (B, h·w, D) in the rows and columns of ``window``."""
    return tokens.unflatten(1, grid)[:, window[0], window[1]].flatten(1, 2)
