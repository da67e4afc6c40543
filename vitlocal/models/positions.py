"""The position table: its initial values, and its interpolation to other grids.

Shapes: (H, W) the table's full grid, (h, w) the grid of an input, T tokens, D width.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

Grid = tuple[int, int]


@torch.compiler.assume_constant_result  # a compiled graph holds the matrix, so no step builds or copies it
def position_matrix(full: Grid, grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the (h·w, H·W) matrix that resamples a table at ``full`` = (H, W) to ``grid`` = (h, w).

    It is the linear map of ``F.interpolate(mode="bicubic", antialias=True, align_corners=False)``: the unit vectors,
    resampled in float64. Rows sum to 1.
    """
    return _cached_matrix(full, grid, device, dtype)


@cache
@torch.inference_mode(False)  # training cannot use an inference tensor, so evaluation must not create one here
@torch.no_grad()
@_disable_current_modes()  # torch.export() traces this function, but the matrix that stays here must have values
def _cached_matrix(full: Grid, grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    count = full[0] * full[1]
    units = torch.eye(count, dtype=torch.float64, device="cpu").view(1, count, *full)
    resampled = F.interpolate(units, size=grid, mode="bicubic", antialias=True, align_corners=False)
    matrix = resampled.view(count, -1).t().contiguous().to(device, dtype)
    # Until PyTorch 2.14, the second compilation treats this constant's shape as symbolic, and fails.
    matrix._dynamo_static_indices = {0, 1}  # type: ignore[attr-defined]
    return matrix


def resample_positions(table: Tensor, full: Grid, grid: Grid) -> Tensor:
    """Resamples the table (1, T, D) from ``full`` to ``grid``, except the first rows, of prefix tokens."""
    if grid == full:
        return table
    prefix, patches = table[0].split([table.shape[1] - full[0] * full[1], full[0] * full[1]])
    if not torch.compiler.is_compiling() and isinstance(table, FakeTensor):  # counted: see vitlocal.models.counts
        return table.new_empty(1, len(prefix) + grid[0] * grid[1], table.shape[2])
    matrix = position_matrix(full, grid, table.device, table.dtype)
    with torch.autocast(table.device.type, enabled=False):  # it would resample in half precision
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


def center_window(grid: Grid, side: int | None) -> tuple[slice, slice]:
    """Returns the rows and columns of the center crop of ``grid`` with at most ``side`` patches a side (None: all).

    If the border is odd, its larger half lies below and to the right.
    """
    inner = [min(count, side or count) for count in grid]
    start = [(count - size) // 2 for count, size in zip(grid, inner, strict=True)]
    return slice(start[0], start[0] + inner[0]), slice(start[1], start[1] + inner[1])


def crop_tokens(tokens: Tensor, grid: Grid, rows: slice, columns: slice) -> Tensor:
    """Returns the patch tokens (B, h·w, D) in these rows and columns of ``grid``."""
    return tokens.unflatten(1, grid)[:, rows, columns].flatten(1, 2)


def crop_images(images: Tensor, rows: slice, columns: slice, patch: int) -> Tensor:
    """Returns the part of images (B, C, S, S') that the patches in these rows and columns cover, ``patch`` px each."""
    return images[..., rows.start * patch : rows.stop * patch, columns.start * patch : columns.stop * patch]
