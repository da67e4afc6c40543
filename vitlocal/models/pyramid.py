"""timm's hierarchical Vision Transformers, PVTv2 and Swin, as models of which a part can run.

:func:`adopt` gives the objects that timm made new classes, whose forward passes take slices of the weights. No
parameter is new, renamed or replaced, so timm loads what was trained, and timm's published weights fit.

PVTv2: Wang et al. 2022, arXiv 2106.13797. Swin: Liu et al. 2021, arXiv 2103.14030.

Shapes: B batch, (h, w) token grid of a level, N = h·w tokens, D width of a level, M heads, d head width, C hidden
width, W windows of an image, (k, l) tokens of a window.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.pvt_v2 import Attention as TimmPvtAttention
from timm.models.pvt_v2 import MlpWithDepthwiseConv, PyramidVisionTransformerV2
from timm.models.swin_transformer import (
    Mlp,
    SwinTransformer,
    WindowAttention,
    get_relative_position_index,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from vitlocal.errors import ConfigError
from vitlocal.models.block import DropPathModel, add_branch, linear_slice
from vitlocal.models.positions import Grid, center_window, crop_images
from vitlocal.plan import Shape

BLOCKS_FIXED = "its levels have blocks of different sizes, so a block cannot be repeated or left out"
FIXED_FIELDS = {
    "block_order": BLOCKS_FIXED,
    "skipped_blocks": BLOCKS_FIXED,
    "stage": "it has no table for a stage embedding, and timm's model would not load one",
}


def project_heads(layer: nn.Linear, tokens: Tensor, kinds: int, heads: int, active: int) -> tuple[Tensor, ...]:
    """Applies the rows of ``layer`` for the first ``active`` of ``heads``: (B, N, D) -> ``kinds`` times (B, M, N, d).

    ``kinds``: how many of queries, keys and values the layer gives, one after the other.
    """
    if active == heads:
        found = layer(tokens)
    else:
        weight = layer.weight.unflatten(0, (kinds, heads, -1))[:, :active].flatten(0, 2)
        bias = None if layer.bias is None else layer.bias.unflatten(0, (kinds, heads, -1))[:, :active].flatten()
        found = F.linear(tokens, weight, bias)
    return found.unflatten(-1, (kinds, active, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class PyramidBlock(nn.Module):
    """The block of both families, over tokens (B, N, D) on ``grid``: attention, then the feed-forward part.

    Its parts are those of timm's block.
    """

    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module

    def forward(self, tokens: Tensor, grid: Grid, scales: Tensor | None) -> Tensor:
        """``scales`` (2, B, 1, 1): drop path's factors of both branches, instead of timm's own; None keeps them."""
        attention_scale, feed_forward_scale = (None, None) if scales is None else scales.unbind(0)
        tokens = add_branch(tokens, self.attn(self.norm1(tokens), grid), attention_scale)
        return add_branch(tokens, self.mlp(self.norm2(tokens), grid), feed_forward_scale)


class PyramidModel(DropPathModel):
    """A model in levels. Between two levels, the grid is halved and the width grows.

    Subclasses add what leads from one level to the next. Stem, norms and the layers between levels always run whole.
    """

    stage_table = None
    fixed_fields: Mapping[str, str] = FIXED_FIELDS
    crops_exactly = False  # whether cropping the image crops the stem's grid, because its patches do not overlap
    part_classes: tuple[type[nn.Module], type[nn.Module]]  # of attention and of feed-forward parts

    def adopt_parts(self, size: int) -> None:
        """Completes an object that timm made. ``size``: px of the images that have the full grid."""
        self.blocks = [block for blocks in self.levels for block in blocks]  # a list, so that no name is new
        for block in self.blocks:
            block.__class__ = PyramidBlock
            block.attn.__class__, block.mlp.__class__ = self.part_classes
            block.attn.active_heads = block.attn.num_heads
            block.mlp.hidden = block.mlp.active_hidden = block.mlp.fc1.out_features
        # timm's rates rise linearly over the blocks of all levels, as ours do.
        self.init_drop_path(getattr(self.blocks[-1].drop_path1, "drop_prob", 0.0), len(self.blocks))
        self.drops_out = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())
        self.active = Shape(block_order=tuple(range(len(self.blocks))))

    @property
    def stages_in_order(self) -> Any:
        """timm's modules of the levels, each with its ``blocks``."""
        raise NotImplementedError

    @property
    def levels(self) -> list[list[Any]]:
        """The blocks of each level."""
        return [list(stage.blocks) for stage in self.stages_in_order]

    @property
    def grid_multiple(self) -> int:  # type: ignore[override]  # a constant of models with one level
        """The number by which the side of a crop of the grid must be divisible, so that every level halves it."""
        return 2 ** (len(self.stages_in_order) - 1)

    @property
    def size_multiple(self) -> int:
        """The number by which image sizes must be divisible, px."""
        raise NotImplementedError

    def next_level(self, stage: Any, tokens: Tensor) -> Tensor:
        """Leads from the level before to ``stage``: (B, h, w, D) -> (B, h', w', D')."""
        raise NotImplementedError

    def end_level(self, stage: Any, tokens: Tensor) -> Tensor:
        """Applies what follows the blocks of ``stage`` to tokens (B, N, D)."""
        return tokens

    def end(self, tokens: Tensor) -> Tensor:
        """Leads from the last level's tokens (B, h, w, D) to what timm's ``forward_head`` takes."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Returns the tokens of the first level, (B, h, w, D), or the active crop of their grid."""
        side = self.patch_embed.patch_size[0]
        if self.active.crop_before_embedding and self.crops_exactly:
            window = center_window((images.shape[2] // side, images.shape[3] // side), self.active.grid)
            return self.patch_embed(crop_images(images, *window, side))
        tokens = self.patch_embed(images)
        rows, columns = center_window((tokens.shape[1], tokens.shape[2]), self.active.grid)
        return tokens[:, rows, columns]

    def forward_features(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the features of images (B, 3, S, S'). ``noise``: see :meth:`forward`."""
        tokens = self.embed(images)
        scales: Sequence[Tensor | None] = [None] * len(self.blocks)
        if self.training and self.drop_path_rate > 0:
            scales = self.drop_path_scales(tokens.shape[0], noise).to(tokens.dtype).unbind(0)
        number = 0
        for stage in self.stages_in_order:
            tokens = self.next_level(stage, tokens)
            grid = tuple(tokens.shape[1:3])
            tokens = tokens.flatten(1, 2)
            for block in stage.blocks:
                if self.grad_checkpointing and torch.is_grad_enabled():
                    tokens = checkpoint(block, tokens, grid, scales[number], use_reentrant=False)
                else:
                    tokens = block(tokens, grid, scales[number])
                number += 1
            tokens = self.end_level(stage, tokens).unflatten(1, grid)
        return self.end(tokens)

    def forward(self: Any, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns logits (B, num_classes).

        ``noise`` (B, L, 2), uniform in [0, 1), decides which branches drop path drops. By default it comes from
        torch's generator. Evaluation does not use it.
        """
        return self.forward_head(self.forward_features(images, noise))


# --- PVTv2 ------------------------------------------------------------------------------------------------------------


class PvtAttention(TimmPvtAttention):
    """Attention to a smaller grid of keys, over tokens (B, N, D). The first ``active_heads`` heads run."""

    active_heads: int

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        heads, active = self.num_heads, self.active_heads
        (query,) = project_heads(self.q, tokens, 1, heads, active)
        context = tokens
        if self.sr is not None:
            image = tokens.mT.unflatten(2, grid)
            image = self.sr(image if self.pool is None else self.pool(image))  # (B, D, h', w')
            context = self.norm(image.flatten(2).mT)
            context = context if self.act is None else self.act(context)
        key, value = project_heads(self.kv, context, 2, heads, active)
        rate = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate)  # (B, M, N, d)
        return self.proj_drop(linear_slice(self.proj, mixed.transpose(1, 2).flatten(2)))


class PvtMlp(MlpWithDepthwiseConv):
    """Feed-forward part with a 3×3 depth-wise convolution. The first ``active_hidden`` hidden units run."""

    hidden: int
    active_hidden: int

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        count = self.active_hidden
        hidden = self.relu(linear_slice(self.fc1, tokens, rows=count).mT.unflatten(2, grid))  # (B, C, h, w)
        if count == self.hidden:
            hidden = self.dwconv(hidden)
        else:
            weight, bias = self.dwconv.weight[:count], self.dwconv.bias
            hidden = F.conv2d(hidden, weight, None if bias is None else bias[:count], padding=1, groups=count)
        hidden = self.drop(self.act(hidden.flatten(2).mT))  # (B, N, C)
        return self.drop(linear_slice(self.fc2, hidden))


class Pvt(PyramidModel, PyramidVisionTransformerV2):
    """PVTv2, of any image size. Its patches overlap, so a crop of its grid always comes after the stem."""

    part_classes = PvtAttention, PvtMlp
    size_multiple = 1
    fixed_fields = FIXED_FIELDS | dict.fromkeys(
        ("token_keep_rate", "attention_keep_rate", "per_head_masks", "pruned_blocks"),
        "it has no class token, and its keys are not tokens, so attention does not rank tokens",
    )

    def adopt_parts(self, size: int) -> None:
        super().adopt_parts(size)
        side = -(-size // self.patch_embed.proj.stride[0])
        self.patch_embed.grid_size = (side, side)  # as timm's other stems have

    @property
    def stages_in_order(self) -> Any:
        return self.stages

    def next_level(self, stage: Any, tokens: Tensor) -> Tensor:
        return tokens if stage.downsample is None else stage.downsample(tokens.permute(0, 3, 1, 2))

    def end_level(self, stage: Any, tokens: Tensor) -> Tensor:
        return stage.norm(tokens)

    def end(self, tokens: Tensor) -> Tensor:
        return tokens.permute(0, 3, 1, 2)

    def init_weights(self) -> None:
        """Draws timm's initial weights. Norms keep their values."""
        self.apply(self._init_weights)


# --- Swin -------------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # a compiled graph holds the result
def window_index(window: Grid, full: Grid, device: torch.device) -> Tensor:
    """Returns the row of the bias table of ``full`` windows for each pair of tokens of a ``window``: (k·l, k·l) int64.

    A smaller window reads the middle of the table: the biases of the same offsets.
    """
    return _cached_index(window, full, device)


@cache
@torch.inference_mode(False)  # as in vitlocal.models.positions
@torch.no_grad()
@_disable_current_modes()
def _cached_index(window: Grid, full: Grid, device: torch.device) -> Tensor:
    rows, columns = (2 * side - 1 for side in full)
    whole = torch.arange(rows * columns, device="cpu").view(rows, columns)
    middle = crop_offsets(whole[..., None], window).flatten()
    index = middle[get_relative_position_index(*window, device=torch.device("cpu"))].to(device)
    # Until PyTorch 2.14, the second compilation treats this constant's shape as symbolic, and fails.
    index._dynamo_static_indices = {0, 1}  # type: ignore[attr-defined]
    return index


def crop_offsets(table: Tensor, window: Grid) -> Tensor:
    """Returns the middle of a table (2K-1, 2L-1, M) of offsets, for windows of ``window`` = (k, l): (2k-1, 2l-1, M)."""
    starts = [(count - (2 * side - 1)) // 2 for count, side in zip(table.shape[:2], window, strict=True)]
    rows, columns = (slice(start, start + 2 * side - 1) for start, side in zip(starts, window, strict=True))
    return table[rows, columns]


@torch.compiler.assume_constant_result
def shift_mask(grid: Grid, window: Grid, shift: Grid, device: torch.device) -> Tensor:
    """Returns 0 for pairs of tokens of a window that are neighbours in the image, and timm's -100 for others.

    Rolling by ``shift`` brings opposite borders of the image into one window. (W, k·l, k·l) float32.
    """
    return _cached_mask(grid, window, shift, device)


@cache
@torch.inference_mode(False)
@torch.no_grad()
@_disable_current_modes()
def _cached_mask(grid: Grid, window: Grid, shift: Grid, device: torch.device) -> Tensor:
    parts = []  # of rows and of columns: all windows but the last, and the two parts of the last one
    for count, side, moved in zip(grid, window, shift, strict=True):
        places = torch.arange(count, device="cpu")
        parts.append((places >= count - side).long() + (places >= count - moved).long() * (moved > 0))
    regions = (3 * parts[0][:, None] + parts[1])[None, :, :, None]  # (1, h, w, 1)
    windows = window_partition(regions, window).flatten(1)  # (W, k·l)
    mask = torch.where(windows[:, :, None] == windows[:, None], 0.0, -100.0).to(device)
    mask._dynamo_static_indices = {0, 1, 2}  # type: ignore[attr-defined]
    return mask


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
        """Returns the window and the shift on ``grid``. Raises :class:`ConfigError` if windows would need padding."""
        whole, full = self.window_size, self.full_grid
        rows, columns = (-(-whole[axis] * grid[axis] // full[axis]) for axis in (0, 1))  # rounded up
        if grid[0] % rows or grid[1] % columns or rows > whole[0] or columns > whole[1]:
            raise ConfigError(
                f"Swin: on a grid of {grid[0]}x{grid[1]} tokens, windows of {rows}x{columns} would need padding, or a "
                "larger table of biases; use image sizes of 8 patches, 16, 24 and so on, up to model.size"
            )
        shift = (rows // 2 if rows < grid[0] else 0, columns // 2 if columns < grid[1] else 0)
        return (rows, columns), shift if self.is_shifted else (0, 0)

    def bias(self, grid: Grid, window: Grid, shift: Grid, tokens: Tensor) -> Tensor:
        """Returns what is added to the scores of pairs of tokens: (1 or W, M, k·l, k·l), of the type of ``tokens``."""
        area, table = window[0] * window[1], self.relative_position_bias_table[:, : self.active_heads]
        counted = not torch.compiler.is_compiling() and isinstance(tokens, FakeTensor)  # see vitlocal.models.counts
        if counted:
            return tokens.new_empty(tokens.shape[1] // area if any(shift) else 1, table.shape[1], area, area)
        bias = table[window_index(window, self.window_size, table.device)].permute(2, 0, 1)[None]
        if any(shift):
            bias = bias + shift_mask(grid, window, shift, table.device)[:, None]
        return bias.to(tokens.dtype)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        window, shift = self.window_of(grid)
        image = tokens.unflatten(1, grid)  # (B, h, w, D)
        if any(shift):
            image = image.roll([-moved for moved in shift], (1, 2))
        windows = window_partition(image, window).flatten(1, 2)  # (B·W, k·l, D)
        parts = project_heads(self.qkv, windows, 3, self.num_heads, self.active_heads)
        bias = self.bias(grid, window, shift, tokens.to(parts[0].dtype))
        # Windows whose biases differ count as heads, so that images share the biases instead of copies of them.
        kinds = len(bias)
        query, key, value = (part.unflatten(0, (-1, kinds)).flatten(1, 2) for part in parts)  # (.., W·M or M, k·l, d)
        rate = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, bias.flatten(0, 1)[None], rate)
        mixed = mixed.unflatten(1, (kinds, -1)).flatten(0, 1).transpose(1, 2).flatten(2)  # (B·W, k·l, M·d)
        image = window_reverse(linear_slice(self.proj, mixed).unflatten(1, window), window, *grid)  # (B, h, w, D)
        if any(shift):
            image = image.roll(shift, (1, 2))
        return self.proj_drop(image.flatten(1, 2))


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

    part_classes = SwinAttention, SwinMlp
    crops_exactly = True

    def adopt_parts(self, size: int) -> None:
        super().adopt_parts(size)
        self.patch_embed.strict_img_size = False
        for blocks in self.levels:
            for place, block in enumerate(blocks):
                block.attn.full_grid, block.attn.is_shifted = block.input_resolution, place % 2 == 1
                block.attn_mask = block.attn.relative_position_index = None

    @property
    def stages_in_order(self) -> Any:
        return self.layers

    @property
    def size_multiple(self) -> int:
        return self.patch_embed.patch_size[0] * self.grid_multiple

    def next_level(self, stage: Any, tokens: Tensor) -> Tensor:
        return stage.downsample(tokens)

    def end(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens)

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


def crop_table(table: Tensor, full: Grid, window: Grid) -> Tensor:
    """Returns the middle of a bias table ((2K-1)·(2L-1), M) of windows ``full`` = (K, L), for a smaller ``window``."""
    return crop_offsets(table.unflatten(0, [2 * side - 1 for side in full]), window).flatten(0, 1)


# --- both -------------------------------------------------------------------------------------------------------------

FAMILIES: dict[type[nn.Module], type[PyramidModel]] = {PyramidVisionTransformerV2: Pvt, SwinTransformer: Swin}


def adopt(model: nn.Module, size: int) -> nn.Module:
    """Turns timm's PVTv2 or Swin, in place, into a model of which a part can run. Returns other models as they are.

    ``size``: px of the images that have the full grid. A Swin must be made for them, see :func:`swin_options`.
    """
    family = FAMILIES.get(type(model))
    if family is not None:
        model.__class__ = family
        assert isinstance(model, PyramidModel)
        model.adopt_parts(size)
    return model


def swin_options(name: str, size: int, patch_size: int | None) -> dict[str, Any]:
    """Returns the options of timm's Swin ``name`` for images of ``size`` px: its windows, in proportion to the grid.

    At the size and with the patches of its name, these are its own windows. Empty if ``name`` is no Swin.
    """
    if not timm.models.is_model_in_modules(name, ["swin_transformer"]):
        return {}
    with torch.device("meta"):  # only the sizes are needed
        own: Any = timm.create_model(name)
    side, full = size // (patch_size or own.patch_embed.patch_size[0]), own.patch_embed.grid_size[0]
    return {"window_size": window_option([-(-layer.blocks[0].window_size[0] * side // full) for layer in own.layers])}


def window_option(windows: list[int]) -> int | list[int]:
    """Returns timm's option ``window_size`` for these windows of the levels."""
    return windows[0] if len(set(windows)) == 1 else windows
