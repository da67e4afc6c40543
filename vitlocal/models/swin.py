"""timm's Swin (Liu et al. 2021, arXiv 2103.14030), made able to run in part, and at smaller sizes without padding.

Shapes: B batch, (h, w) token grid of a level, N = h·w tokens, D width of a level, M heads, d head width, C hidden
width, W windows of an image, (k, l) tokens of a window, n = k·l.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import Mlp, SwinTransformer, WindowAttention, window_partition, window_reverse
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vitlocal.errors import ConfigError
from vitlocal.models.block import add_branch, linear_slice
from vitlocal.models.positions import Grid
from vitlocal.models.pyramid import FIXED_FIELDS, PyramidBlock, PyramidModel, project_heads


def window_index(window: Grid, full: Grid, device: torch.device) -> Tensor:
    """Returns the row of the bias table of ``full`` windows for each pair of tokens of a ``window``: (n, n) int64.

    A smaller window reads the middle of the table: the biases of the same offsets.
    """
    rows, columns = torch.cartesian_prod(*(torch.arange(side, device=device) for side in window)).unbind(1)  # (n,)
    down, across = (places[:, None] - places for places in (rows, columns))
    return (down + full[0] - 1) * (2 * full[1] - 1) + across + full[1] - 1


def crop_table(table: Tensor, full: Grid, window: Grid) -> Tensor:
    """Returns the middle of a table of offsets ((2K-1)·(2L-1), M) of windows ``full`` = (K, L), for a ``window``."""
    rows, columns = (slice(whole - side, whole + side - 1) for whole, side in zip(full, window, strict=True))
    return table.unflatten(0, (2 * full[0] - 1, 2 * full[1] - 1))[rows, columns].flatten(0, 1)


def fit_table(table: Tensor, count: int) -> Tensor:
    """Returns a table of square windows for windows whose table has ``count`` offsets.

    For smaller windows: the middle. For larger ones: bicubic interpolation, as in the authors' code. A table that is
    not square is returned as it is.
    """
    side = math.isqrt(len(table))
    full, window = (side + 1) // 2, (math.isqrt(count) + 1) // 2
    if side * side != len(table):
        return table
    if window > full:
        image = table.T.unflatten(1, (side, side))[None]
        return F.interpolate(image, size=2 * window - 1, mode="bicubic")[0].flatten(1).T
    return crop_table(table, (full, full), (window, window))


def shift_mask(grid: Grid, window: Grid, shift: Grid, device: torch.device) -> Tensor:
    """Returns 0 for pairs of tokens of a window that are neighbours in the image, and timm's -100 for others.

    Rolling by ``shift`` brings opposite borders of the image into one window. (W, n, n) float32.
    """
    parts = []  # of rows and of columns: all windows but the last, and the two parts of the last one
    for count, side, moved in zip(grid, window, shift, strict=True):
        places = torch.arange(count, device=device)
        parts.append((places >= count - side).long() + (places >= count - moved).long() * (moved > 0))
    regions = (3 * parts[0][:, None] + parts[1])[None, :, :, None]  # (1, h, w, 1)
    windows = window_partition(regions, window).flatten(1)  # (W, k·l)
    return torch.where(windows[:, :, None] == windows[:, None], 0.0, -100.0)


def _kept(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes ``function`` keep its results, for eager steps. Training can use them even if an evaluation asked first."""
    return cache(torch.inference_mode(False)(torch.no_grad()(function)))


CONSTANTS = window_index, shift_mask
KEPT_CONSTANTS = _kept(window_index), _kept(shift_mask)


def to_windows(tokens: Tensor, grid: Grid, window: Grid, shift: Grid) -> Tensor:
    """Rolls the grid back by ``shift`` and divides it into windows: (B, N, C) -> (B·W, n, C)."""
    image = tokens.unflatten(1, grid)
    image = image.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else image
    return window_partition(image, window).flatten(1, 2)


def from_windows(windows: Tensor, grid: Grid, window: Grid, shift: Grid) -> Tensor:
    """The inverse of :func:`to_windows`: (B·W, n, C) -> (B, N, C)."""
    image = window_reverse(windows.unflatten(1, window), window, *grid)
    return (image.roll(shift, (1, 2)) if any(shift) else image).flatten(1, 2)


class SwinAttention(WindowAttention):
    """Attention within windows, over tokens (B, N, D) on ``grid``. The first ``active_heads`` heads run.

    The windows of a smaller grid are smaller in the same proportion, so that their number stays the same.
    """

    active_heads: int
    window_size: Grid  # of the full grid
    full_grid: Grid  # of this level
    is_shifted: bool  # whether the grid is rolled by half a window, in every second block

    def _init_buffers(self) -> None:
        """Makes no buffers: :func:`window_index` replaces timm's."""

    def window_of(self, grid: Grid) -> tuple[Grid, Grid]:
        """Returns the window and the shift on ``grid``. Raises :class:`ConfigError` if windows would not be equal."""
        whole, full = self.window_size, self.full_grid
        counts = [full[axis] // whole[axis] for axis in (0, 1)]
        rows, columns = (-(-grid[axis] // counts[axis]) for axis in (0, 1))  # rounded up
        if grid != (rows * counts[0], columns * counts[1]) or rows > whole[0] or columns > whole[1]:
            raise ConfigError(
                f"Swin: a grid of {grid[0]}x{grid[1]} tokens cannot be divided into {counts[0]}x{counts[1]} equal "
                f"windows of at most {whole[0]}x{whole[1]} tokens, for which its tables have biases; use image sizes "
                "of 8 patches, 16, 24 and so on, up to model.size, or to the size of an export"
            )
        shift = (rows // 2 if rows < grid[0] else 0, columns // 2 if columns < grid[1] else 0)
        return (rows, columns), shift if self.is_shifted else (0, 0)

    def bias(self, grid: Grid, window: Grid, shift: Grid, dtype: torch.dtype) -> Tensor:
        """Returns what is added to the scores of pairs of tokens: (1 or W, M, n, n)."""
        table = self.relative_position_bias_table[:, : self.active_heads].to(dtype)
        # A compiled step computes index and mask, in few kernels: PyTorch 2.14 cannot hold several constants of one
        # function. A step that is only counted (vitlocal.models.counts) has no values to keep.
        traced = torch.compiler.is_compiling() or isinstance(table, FakeTensor)
        index_of, mask_of = CONSTANTS if traced else KEPT_CONSTANTS
        bias = table[index_of(window, self.window_size, table.device)].permute(2, 0, 1)[None]
        return bias + mask_of(grid, window, shift, table.device).to(dtype)[:, None] if any(shift) else bias

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        window, shift = self.window_of(grid)
        windows = to_windows(tokens, grid, window, shift)  # (B·W, n, D)
        parts = project_heads(self.qkv, windows, 3, self.num_heads, self.active_heads)
        bias = self.bias(grid, window, shift, parts[0].dtype)
        # Windows whose biases differ count as heads, so that images share the biases instead of copies of them.
        kinds = len(bias)
        # (B·W, M, n, d) or, with the mask, (B, W·M, n, d)
        query, key, value = (part.unflatten(0, (-1, kinds)).flatten(1, 2) for part in parts)
        rate = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, bias.flatten(0, 1)[None], rate)
        mixed = mixed.unflatten(1, (kinds, -1)).flatten(0, 1).transpose(1, 2).flatten(2)  # (B·W, n, M·d)
        return self.proj_drop(from_windows(linear_slice(self.proj, mixed), grid, window, shift))

    def forward_with_scores(self, tokens: Tensor, grid: Grid, kept: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, but tokens attend only to themselves and to those ``kept`` (B, N) bool. Slower.

        Also returns the attention that each token receives, the mean over heads and the sum over queries: (B, N).
        """
        window, shift = self.window_of(grid)
        windows = to_windows(tokens, grid, window, shift)
        query, key, value = project_heads(self.qkv, windows, 3, self.num_heads, self.active_heads)  # (B·W, M, n, d)
        bias = self.bias(grid, window, shift, query.dtype)
        scores = ((query * query.shape[-1] ** -0.5) @ key.mT).unflatten(0, (-1, len(bias))) + bias
        itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        mask = to_windows(kept[..., None], grid, window, shift).mT[:, None] | itself  # (B·W, 1, n, n)
        attention = scores.flatten(0, 1).masked_fill(~mask, float("-inf")).float().softmax(dim=-1)
        mixed = (self.attn_drop(attention.to(value.dtype)) @ value).transpose(1, 2).flatten(2)
        received = from_windows(attention.detach().mean(dim=1).sum(dim=1)[..., None], grid, window, shift)
        return self.proj_drop(from_windows(linear_slice(self.proj, mixed), grid, window, shift)), received[..., 0]


class SwinBlock(PyramidBlock):
    """A block that can leave out tokens."""

    attn: SwinAttention

    def forward_masked(self, tokens: Tensor, grid: Grid, scales: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward` for the tokens ``kept`` (B, N) bool. The others pass unchanged, and none attends to them.

        Also returns the attention that each token receives: (B, N).
        """
        attention_scale, feed_forward_scale = (None, None) if scales is None else scales.unbind(0)
        inputs = tokens * kept[..., None]
        branch, received = self.attn.forward_with_scores(self.norm1(inputs), grid, kept)
        inputs = add_branch(inputs, branch, attention_scale)
        outputs = add_branch(inputs, self.mlp(self.norm2(inputs), grid), feed_forward_scale)
        return torch.where(kept[..., None], outputs, tokens), received


def keep_tokens(received: Tensor, kept: Tensor, count: int, strict: bool = False) -> Tensor:
    """Returns the mask (B, N) bool of the ``count`` tokens that receive most attention, among those ``kept`` (B, N).

    ``strict``: as the released code, all tokens with more than the last of these. So one fewer is kept, and a token
    that was dropped may come back.
    """
    best = received.masked_fill(~kept, 0.0 if strict else -1.0).topk(count, dim=1)
    if strict:
        return received > best.values[:, -1:]
    return torch.zeros_like(kept).scatter(1, best.indices, True)


class SwinMlp(Mlp):
    """Feed-forward part. The first ``active_hidden`` hidden units run."""

    fc1: nn.Linear
    fc2: nn.Linear
    hidden: int
    active_hidden: int

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        hidden = self.drop1(self.act(linear_slice(self.fc1, tokens, rows=self.active_hidden)))
        return self.drop2(linear_slice(self.fc2, hidden))


class Swin(PyramidModel, SwinTransformer):
    """Swin, of image sizes that 8 patches divide, up to the size it was made for. Nothing is padded."""

    part_classes = SwinBlock, SwinAttention, SwinMlp
    fixed_fields = FIXED_FIELDS | dict.fromkeys(
        ("attention_keep_rate", "per_head_masks"),
        "its windows already limit what a token attends to, and only tokens can be left out",
    )

    def adopt_parts(self, size: int) -> None:
        super().adopt_parts(size)
        self.patch_embed.strict_img_size = False
        for blocks in self.levels:
            for place, block in enumerate(blocks):
                block.attn.full_grid, block.attn.is_shifted = block.input_resolution, place % 2 == 1
                block.attn_mask = block.attn.relative_position_index = None

    @property
    def level_modules(self) -> Any:
        return self.layers

    @property
    def size_multiple(self) -> int:
        return self.patch_embed.patch_size[0] * self.grid_multiple

    def _next_level(self, stage: Any, tokens: Tensor) -> Tensor:
        return stage.downsample(tokens)

    def _last_norm(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens)

    def run_blocks(self, numbers: range, tokens: Tensor, grid: Grid, scales: Sequence[Tensor | None]) -> Tensor:
        """As for all models in levels. From the first of the shape's ``pruned_blocks`` on, a level masks tokens."""
        pruned = [number for number in numbers if number in self.active.pruned_blocks]
        if not pruned:
            return super().run_blocks(numbers, tokens, grid, scales)
        tokens = super().run_blocks(range(numbers.start, pruned[0]), tokens, grid, scales)
        count, kept = tokens.shape[1], torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        for number in range(pruned[0], numbers.stop):
            block = self.blocks[number].forward_masked
            tokens, received = self._checkpointed(block, tokens, grid, scales[number], kept)
            if number in pruned:
                count = max(1, int(self.active.token_keep_rate * count + 1e-6))  # rounded down, as the released code
                kept = keep_tokens(received, kept, count, self.active.strict_threshold)
        return tokens

    def options_at(self, size: int) -> dict[str, Any]:
        """Returns the options of timm's Swin that computes the same at ``size`` px, with :meth:`state_at`."""
        return {"img_size": size, "window_size": window_option([rows for rows, _ in self._windows_at(size)])}

    def state_at(self, state: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
        """Returns the state dict of timm's Swin for ``size`` px: the middles of the bias tables."""
        found = dict(state)
        for level, window in enumerate(self._windows_at(size)):
            for place in range(len(self.levels[level])):
                name = f"layers.{level}.blocks.{place}.attn.relative_position_bias_table"
                found[name] = crop_table(found[name], self.levels[level][place].attn.window_size, window)
        return found

    def _windows_at(self, size: int) -> list[Grid]:
        """Returns the window of each level for images of ``size`` px."""
        side = size // self.patch_embed.patch_size[0]
        grids = ((side // 2**level, side // 2**level) for level in range(len(self.levels)))
        return [blocks[0].attn.window_of(grid)[0] for blocks, grid in zip(self.levels, grids, strict=True)]


def swin_options(name: str, size: int, patch_size: int | None) -> dict[str, Any]:
    """Returns the options of timm's Swin ``name`` for images of ``size`` px: its windows, in proportion to the grid.

    At the size and with the patches of its name, these are its own windows. Empty if ``name`` is no Swin.
    """
    if not timm.models.is_model_in_modules(name, ["swin_transformer"]):
        return {}
    with torch.device("meta"):  # only the sizes are needed, of one block in each of the four levels
        own: Any = timm.create_model(name, weight_init="skip", depths=(1, 1, 1, 1))
    side, full = size // (patch_size or own.patch_embed.patch_size[0]), own.patch_embed.grid_size[0]
    return {"window_size": window_option([-(-layer.blocks[0].window_size[0] * side // full) for layer in own.layers])}


def window_option(windows: list[int]) -> int | list[int]:
    """Returns timm's option ``window_size`` for these windows of the levels."""
    return windows[0] if len(set(windows)) == 1 else windows
