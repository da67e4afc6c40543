"""timm's hierarchical Vision Transformers, made able to run in part; PVTv2 (Wang et al. 2022, arXiv 2106.13797).

:func:`vitlocal.models.factory.adopt` gives the objects that timm made new classes, whose forward passes take slices of
the weights. No parameter is new, renamed or replaced, so timm loads what was trained, and published weights fit.

Shapes: B batch, L blocks of all levels, (h, w) token grid of a level, N = h·w tokens, D width of a level, M heads, d
head width, C hidden width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from timm.models.pvt_v2 import Attention as TimmPvtAttention
from timm.models.pvt_v2 import MlpWithDepthwiseConv, PyramidVisionTransformerV2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlocal.errors import ConfigError
from vitlocal.models.block import DropPathModel, add_branch, check_option, linear_slice
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
    """The block of all families, over tokens (B, N, D) on ``grid``: attention, then the feed-forward part.

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
    part_classes: tuple[type[nn.Module], type[nn.Module], type[nn.Module]]  # of block, attention and feed-forward part

    def adopt_parts(self, size: int) -> None:
        """Completes an object that timm made. ``size``: px of the images that have the full grid.

        timm's modules of drop path stay in the blocks, which no longer use them.
        """
        self.blocks = [block for blocks in self.levels for block in blocks]  # a list, so that no name is new
        for block in self.blocks:
            block.__class__, block.attn.__class__, block.mlp.__class__ = self.part_classes
            block.attn.active_heads = block.attn.num_heads
            block.mlp.hidden = block.mlp.active_hidden = block.mlp.fc1.out_features
        # timm's rates rise linearly over the blocks of all levels, as ours do.
        self.init_drop_path(getattr(self.blocks[-1].drop_path1, "drop_prob", 0.0), len(self.blocks))
        self.drops_out = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())
        self.active = Shape(block_order=tuple(range(len(self.blocks))))

    @property
    def level_modules(self) -> Any:
        """timm's modules of the levels, each with its ``blocks``."""
        raise NotImplementedError

    @property
    def levels(self) -> list[list[Any]]:
        """The blocks of each level."""
        return [list(stage.blocks) for stage in self.level_modules]

    @property
    def grid_multiple(self) -> int:  # type: ignore[override]  # a constant of models with one level
        """The number by which the side of a crop of the grid must be divisible, so that every level halves it."""
        return 2 ** (len(self.level_modules) - 1)

    @property
    def size_multiple(self) -> int:
        """The number by which image sizes must be divisible, px."""
        raise NotImplementedError

    def _next_level(self, stage: Any, tokens: Tensor) -> Tensor:
        """Leads from the level before to ``stage``: (B, h, w, D) -> (B, h', w', D')."""
        raise NotImplementedError

    def _end_level(self, stage: Any, tokens: Tensor) -> Tensor:
        """Applies what follows the blocks of ``stage`` to tokens (B, N, D)."""
        return tokens

    def _last_norm(self, tokens: Tensor) -> Tensor:
        """Applies what follows the last level, if anything does, to its tokens (B, h, w, D)."""
        return tokens

    def _to_features(self, tokens: Tensor) -> Tensor:
        """Gives tokens (B, h, w, D) the layout that timm's ``forward_head`` takes."""
        return tokens

    def embed(self, images: Tensor) -> Tensor:
        """Returns the tokens of the first level, (B, h, w, D), or the active crop of their grid."""
        side = self.patch_embed.patch_size[0]
        if self.active.crop_before_embedding:
            window = center_window((images.shape[2] // side, images.shape[3] // side), self.active.grid)
            return self.patch_embed(crop_images(images, *window, side))
        tokens = self.patch_embed(images)
        rows, columns = center_window((tokens.shape[1], tokens.shape[2]), self.active.grid)
        return tokens[:, rows, columns]

    def forward_features(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the features of images (B, 3, S, S'). ``noise``: see :meth:`forward`."""
        return self._to_features(self._last_norm(self.run_levels(images, noise)))

    def run_levels(
        self, images: Tensor, noise: Tensor | None = None, count: int | None = None, outputs: list[Tensor] | None = None
    ) -> Tensor:
        """Returns the tokens after the first ``count`` levels, (B, h, w, D); None: all levels.

        Adds the tokens after each level to ``outputs``.
        """
        tokens = self.embed(images)
        scales: Sequence[Tensor | None] = [None] * len(self.blocks)
        if self.training and self.drop_path_rate > 0:
            scales = self.drop_path_scales(tokens.shape[0], noise).to(tokens.dtype).unbind(0)
        first = 0
        for stage in self.level_modules[:count]:
            tokens = self._next_level(stage, tokens)
            grid, numbers = (tokens.shape[1], tokens.shape[2]), range(first, first + len(stage.blocks))
            tokens = self.run_blocks(numbers, tokens.flatten(1, 2), grid, scales)
            tokens = self._end_level(stage, tokens).unflatten(1, grid)
            first = numbers.stop
            if outputs is not None:
                outputs.append(tokens)
        return tokens

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """Returns the features and a list of levels' outputs, (B, D, h, w), as timm does.

        ``indices``: of the levels, or how many of the last; None: all. ``norm``: applies the last norm, if the model
        has one, to the output of the last level. ``stop_early``: runs no level after the last of ``indices``.
        ``intermediates_only``: returns the list alone.
        """
        check_option("output_fmt", output_fmt, output_fmt == "NCHW", "NCHW")
        count = len(self.level_modules)
        taken, last = feature_take_indices(count, indices)
        outputs: list[Tensor] = []
        final = self.run_levels(x, None, last + 1 if stop_early or intermediates_only else None, outputs)
        if len(outputs) == count:
            final = self._last_norm(final)
            outputs[-1] = final if norm else outputs[-1]
        found = (tokens for level, tokens in enumerate(outputs) if level in taken)
        layers = [tokens.permute(0, 3, 1, 2).contiguous() for tokens in found]
        return layers if intermediates_only else (self._to_features(final), layers)

    def run_blocks(self, numbers: range, tokens: Tensor, grid: Grid, scales: Sequence[Tensor | None]) -> Tensor:
        """Runs the blocks with these ``numbers``, over tokens (B, N, D). ``scales``: of all blocks."""
        for number in numbers:
            tokens = self._checkpointed(self.blocks[number], tokens, grid, scales[number])
        return tokens

    def _checkpointed(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Applies ``function``; with gradient checkpointing, the backward pass does so again to save memory."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *operands, use_reentrant=False, preserve_rng_state=self.drops_out)
        return function(*operands)

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
            side = self.sr.kernel_size[0]
            if min(grid) < side:
                raise ConfigError(
                    f"PVTv2: a grid of {grid[0]}x{grid[1]} tokens is smaller than the {side}x{side} tokens that make "
                    "one key; use larger images, such as 32 px"
                )
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
    """PVTv2, of any image size from 29 px; the linear one of smaller sizes too.

    Its patches overlap, so a crop of its grid always comes after the stem.
    """

    part_classes = PyramidBlock, PvtAttention, PvtMlp
    size_multiple = 1
    fixed_fields = FIXED_FIELDS | {
        "crop_before_embedding": "its patches overlap, so a crop of the image has other tokens than the whole image",
        **dict.fromkeys(
            ("token_keep_rate", "attention_keep_rate", "per_head_masks", "pruned_blocks"),
            "it has no class token, and its keys are not tokens, so attention does not rank tokens",
        ),
    }

    def adopt_parts(self, size: int) -> None:
        super().adopt_parts(size)
        side = -(-size // self.patch_embed.proj.stride[0])
        self.patch_embed.grid_size = (side, side)  # as other stems have; the sizes of shapes follow from it

    @property
    def level_modules(self) -> Any:
        return self.stages

    def _next_level(self, stage: Any, tokens: Tensor) -> Tensor:
        return tokens if stage.downsample is None else stage.downsample(tokens.permute(0, 3, 1, 2))

    def _end_level(self, stage: Any, tokens: Tensor) -> Tensor:
        return stage.norm(tokens)

    def _to_features(self, tokens: Tensor) -> Tensor:
        return tokens.permute(0, 3, 1, 2)

    def init_weights(self) -> None:
        """Draws timm's initial weights. Norms keep their values."""
        self.apply(self._init_weights)
