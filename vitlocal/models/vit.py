"""The Vision Transformer trunk that the families share: everything but the feed-forward part.

Shapes: B batch, S input size, P patch side, (h, w) token grid of the input, (H, W) full grid of the
position table, N = h·w patch tokens, T tokens in all (N, or N + 1 with a class token), D width, M heads,
d head width, L depth.
"""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlocal.errors import ConfigError
from vitlocal.models.local_mix import ACTIVATIONS
from vitlocal.models.token_selection import EVERYTHING, Selected, Selection, narrow

# Width, depth and heads of DeiT's models, which the local-FFN models share.
TINY: dict[str, Any] = dict(embed_dim=192, depth=12, num_heads=3)
SMALL: dict[str, Any] = dict(embed_dim=384, depth=12, num_heads=6)
BASE: dict[str, Any] = dict(embed_dim=768, depth=12, num_heads=12)

# What timm's own machinery passes beside the model's options.
_TIMM_OPTIONS = frozenset({"pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir"})


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"model option {name}={value!r}: expected one of {', '.join(choices)}")


def check_bool(name: str, value: object) -> None:
    """Raises :class:`ConfigError` unless ``value`` is a bool: the string "false" would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"model option {name}={value!r}: expected true or false")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises :class:`ConfigError` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"model option {name}={value!r}: expected a whole number of at least {least}")


@dataclass(frozen=True)
class BlockShape:
    """What a family's block is built from: width D, heads, hidden width of the feed-forward part."""

    dim: int
    num_heads: int
    hidden: int
    qkv_bias: bool
    activation: str


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ConfigError(f"model option {name}={value!r}: expected one whole number, or height and width")
    for side in pair:
        check_count(name, side)
    return pair


@torch.compiler.assume_constant_result  # a compiled graph holds the matrix: no step builds or copies it
def position_matrix(full: tuple[int, int], grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The (h·w, H·W) matrix that resamples a table at ``full`` = (H, W) to ``grid`` = (h, w).

    It is the linear map of ``F.interpolate(mode="bicubic", antialias=True, align_corners=False)``, found by
    resampling the unit vectors in float64. Rows sum to 1.
    """
    # A matrix made while evaluating must serve training too, which an inference tensor may not.
    with torch.inference_mode(False), torch.no_grad():
        count = full[0] * full[1]
        units = torch.eye(count, dtype=torch.float64, device="cpu").view(1, count, *full)
        resampled = F.interpolate(units, size=grid, mode="bicubic", antialias=True, align_corners=False)
        matrix = resampled.view(count, -1).t().contiguous().to(device, dtype)
        # Up to PyTorch 2.14, compiling for a second image size takes a constant's shape for a symbol, and stops.
        matrix._dynamo_static_indices = {0, 1}
        return matrix


def sincos_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of rows and columns (Chen et al. 2021, arXiv 2104.02057): (h·w, dim), between -1 and 1.

    A quarter of the ``dim`` channels each: sine and cosine of the column, then of the row, at ``dim / 4`` frequencies
    from 1 to 1/10,000 radians a patch.
    """
    frequencies = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [places.flatten()[:, None] * frequencies for places in (columns, rows)]  # (h·w, dim / 4) each
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


class PatchEmbed(nn.Module):
    """Maps each patch of P × P pixels of images (B, C, S, S) to a token: (B, N, D), contiguous.

    A convolution whose stride is its side is one matrix product over patches: 1.1 to 2.2 times as fast as PyTorch's
    convolution on a CPU, and what comes before it, from uint8 pixels on, compiles into the copy that lines patches up.
    """

    def __init__(self, in_chans: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)  # its weights alone are used

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        side = self.proj.kernel_size[0]
        rows, columns = height // side, width // side
        strips = images.permute(0, 2, 3, 1).reshape(batch, rows, side, columns, side * channels)
        patches = strips.transpose(2, 3).reshape(batch, rows * columns, side * side * channels)  # the one copy
        weight = self.proj.weight.permute(0, 2, 3, 1).reshape(len(self.proj.weight), -1)  # (D, P·P·C)
        return F.linear(patches, weight, self.proj.bias)


def attention_of(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """What queries (B, M, R, d) pay to keys (B, M, T, d), (B, M, R, T) float32, written out.

    ``mask`` (B, 1 or M, R, T) bool: who attends (row) to whom (column); None: all to all.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, D). ``active``: so many of its heads run, the first ones."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = self.active = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def project(self, tokens: Tensor, parts: slice = slice(3)) -> tuple[Tensor, ...]:
        """Queries, keys and values (``parts`` of these three) of the active heads, (B, M, T, d) each."""
        batch, count, dim = tokens.shape
        if self.active == self.num_heads and parts == slice(3):
            qkv = self.qkv(tokens)
        else:
            weight = self.qkv.weight.view(3, self.num_heads, -1, dim)[parts, : self.active].reshape(-1, dim)
            bias = self.qkv.bias
            if bias is not None:
                bias = bias.view(3, self.num_heads, -1)[parts, : self.active].reshape(-1)
            qkv = F.linear(tokens, weight, bias)
        return qkv.view(batch, count, -1, self.active, dim // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def _merge(self, mixed: Tensor) -> Tensor:
        """The active heads' outputs (B, M, T, d) → (B, T, D)."""
        merged = mixed.transpose(1, 2).flatten(2)
        if self.active == self.num_heads:
            return self.proj(merged)
        return F.linear(merged, self.proj.weight[:, : merged.shape[2]], self.proj.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` (B, 1 or M, T, T) bool: who attends (row) to whom (column); None: all to all."""
        return self._merge(F.scaled_dot_product_attention(*self.project(tokens), attn_mask=mask))

    def shown(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`forward`, and the attention that each head paid, (B, M, T, T): written out, and slower."""
        query, key, value = self.project(tokens)
        attention = attention_of(query, key, mask)
        return self._merge(attention.to(value.dtype) @ value), attention

    def paid(self, tokens: Tensor, mask: Tensor | None, num_prefix_tokens: int) -> Tensor:
        """What the class token pays to each patch, the mean over heads: (B, N). Without one: what all pay, summed."""
        rows = slice(0, 1) if num_prefix_tokens else slice(None)
        (query,), (key,) = self.project(tokens[:, rows], slice(0, 1)), self.project(tokens, slice(1, 2))
        attention = attention_of(query, key, None if mask is None else mask[:, :, rows])  # (B, M, 1 or T, T)
        return attention.mean(dim=1).sum(dim=1)[:, num_prefix_tokens:]


def add_branch(tokens: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """``tokens + branch``, the branch scaled by drop path's ``scale`` (B, 1, 1) where there is one."""
    return tokens + branch if scale is None else torch.addcmul(tokens, branch, scale)


class Block(nn.Module):
    """Attention with its norm and residual; each family adds its feed-forward part."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.attn = Attention(shape.dim, shape.num_heads, shape.qkv_bias)

    def feed_forward(
        self, tokens: Tensor, grid: tuple[int, int], scale: Tensor | None, places: Tensor | None = None
    ) -> Tensor:
        """The feed-forward part with its norm and residual: (B, T, D) -> (B, T, D).

        ``places`` (B, n): where in the grid the patch tokens lie, where not all of them are there.
        """
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], scales: tuple[Tensor, Tensor] | None = None,
        left: Selected = EVERYTHING,
    ) -> Tensor:  # fmt: skip
        """``scales``: drop path's factors (B, 1, 1) for attention and feed-forward; None keeps all."""
        attention_scale, feed_forward_scale = scales if scales is not None else (None, None)
        tokens = add_branch(tokens, self.attn(self.norm1(tokens), left.mask), attention_scale)
        return self.feed_forward(tokens, grid, feed_forward_scale, left.places)

    def narrowed(
        self, tokens: Tensor, grid: tuple[int, int], scales: tuple[Tensor, Tensor] | None, left: Selected,
        how: Selection, num_prefix_tokens: int,
    ) -> tuple[Tensor, Selected]:  # fmt: skip
        """:meth:`forward`, which between attention and feed-forward drops tokens and connections by that attention."""
        attention_scale, feed_forward_scale = scales if scales is not None else (None, None)
        branch, attention = self.attn.shown(self.norm1(tokens), left.mask)
        tokens, left = narrow(add_branch(tokens, branch, attention_scale), attention, left, how, num_prefix_tokens)
        return self.feed_forward(tokens, grid, feed_forward_scale, left.places), left


class VisionTransformer(nn.Module):
    """A Vision Transformer whose blocks come from the family's ``make_block``.

    Takes images (B, in_chans, S, S'), float, normalised, of any size that the patch divides, in either memory
    format (channels-last saves a copy), and gives logits (B, num_classes).

    Options, all accepted by ``timm.create_model``:

    - ``img_size``: the size, or height and width, whose grid the position table has. Other sizes read the
      table through :func:`position_matrix` inside the forward pass, so that all entries keep their gradient
      and optimizer state (the paper's released code makes a new parameter at each size, and loses both).
    - ``mlp_ratio``: hidden width of the feed-forward part, in widths.
    - ``activation``: "h_swish", x·relu6(x + 3)/6, or "gelu".
    - ``pool``: "token" reads the class token; "avg" does without one and reads the mean of the patch tokens.
    - ``drop_path_rate``: drop path of the last block, rising linearly from 0 at the first.
    - ``train_position``: False freezes the position table, as it is in effect in the released code.
    - ``kept``, ``attended``, ``own_masks``, ``pruned_blocks``: at these blocks, this part of the patch tokens is kept,
      and each attends to this part of them from there on; see :mod:`vitlocal.models.token_selection`.
    - ``centre``: side, in patches, of the centre crop of the token grid that runs; None: all of it.
    - ``position``: how the table starts, "random" as ``init`` says, or "sincos", see :func:`sincos_table`.
    - ``init``: "trunc_normal" as DeiT; "xavier" as the released code, which leaves biases as PyTorch does.
    """

    def __init__(
        self,
        make_block: Callable[[BlockShape], Block],
        *,
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        activation: str = "h_swish",
        pool: str = "token",
        drop_path_rate: float = 0.0,
        train_position: bool = True,
        init: str = "trunc_normal",
        position: str = "random",
        kept: float = 1.0,
        attended: float = 1.0,
        own_masks: bool = False,
        centre: int | None = None,
        pruned_blocks: Sequence[int] = (),
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes, least=0)
        options = dict(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        for name, value in options.items():
            check_count(name, value)
        check_bool("qkv_bias", qkv_bias)
        check_bool("train_position", train_position)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_choice("pool", pool, ("token", "avg"))
        check_choice("init", init, ("trunc_normal", "xavier"))
        check_choice("position", position, ("random", "sincos"))
        if position == "sincos" and embed_dim % 4:
            raise ConfigError(f"model option position=sincos: embed_dim={embed_dim} is no multiple of 4")
        if embed_dim % num_heads:
            raise ConfigError(
                f"model options embed_dim={embed_dim}, num_heads={num_heads}: the heads share the width "
                f"evenly, so choose a width that is a multiple of {num_heads}"
            )
        if not 0 <= drop_path_rate < 1:
            raise ConfigError(f"model option drop_path_rate={drop_path_rate}: expected 0 <= rate < 1")
        hidden = int(embed_dim * mlp_ratio)
        if hidden < 1:
            raise ConfigError(f"model option mlp_ratio={mlp_ratio}: expected a positive number")
        height, width = _pair("img_size", img_size)

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.pool = pool
        self.init, self.position = init, position
        self.drop_path_rate = drop_path_rate
        self.grad_checkpointing = False
        self.grid = self._grid_of(height, width, ConfigError)

        self.patch_embed = PatchEmbed(in_chans, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if pool == "token" else None
        rows = self.grid[0] * self.grid[1] + (pool == "token")
        self.pos_embed = nn.Parameter(torch.empty(1, rows, embed_dim), requires_grad=train_position)
        shape = BlockShape(embed_dim, num_heads, hidden, qkv_bias, activation)
        self.blocks = nn.ModuleList(make_block(shape) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        # What surgery.add_stage_table() adds: (S + 1, D), of which the last row stands for no stage.
        self.register_parameter("stage_table", None)
        self.stage: int | None = None
        self.stage_null, self.stage_tokens = 0.0, "all"
        # The part of the model that runs: surgery.put() alone moves these, and none is in the model's state.
        self.order: tuple[int, ...] = tuple(range(depth))  # of blocks
        if centre is not None:
            check_count("centre", centre)
        self.centre = centre
        self.crops_images = False  # before the embedding, not after it
        self.frozen: tuple[int, ...] = ()  # slots of blocks that are not trained
        how = Selection(kept, attended, own_masks)
        # By the block's place in the order.
        self.selections: dict[int, Selection] = {} if how.is_whole else dict.fromkeys(pruned_blocks, how)
        # On the device, so that writing new rates into it costs neither a sync nor a recompilation.
        self.register_buffer("drop_path_rates", torch.linspace(0, drop_path_rate, depth), persistent=False)
        # Per grid, device and dtype. Not buffers: they follow from the sizes, and belong in no checkpoint.
        self._position_matrices: dict[tuple[Any, ...], Tensor] = {}
        self.init_weights()

    def train(self, mode: bool = True) -> VisionTransformer:
        """As ever; but a frozen block's BatchNorms keep their statistics, and normalise by these."""
        super().train(mode)
        for slot in self.frozen:
            for module in self.blocks[slot].modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws the weights anew, as ``init`` says. Norms and convolutions stay as PyTorch made them."""
        xavier = self.init == "xavier"
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                nn.init.xavier_normal_(table) if xavier else nn.init.trunc_normal_(table, std=0.02)
        if self.position == "sincos":
            table = sincos_table(self.grid, self.embed_dim)
            self.pos_embed.zero_()[0, -len(table) :] = table  # the class token's row stays zero
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if not xavier:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif name.endswith("attn.qkv"):
                for part in module.weight.chunk(3):  # three layers in one: each has its own fan-out
                    nn.init.xavier_normal_(part)
            else:
                nn.init.xavier_normal_(module.weight)

    def _grid_of(self, height: int, width: int, error: type[ValueError] = ValueError) -> tuple[int, int]:
        patch = self.patch_size
        if height % patch or width % patch or not height or not width:
            nearest = tuple(max(patch, round(side / patch) * patch) for side in (height, width))
            raise error(
                f"image size {height}x{width}: the patch of {patch}x{patch} pixels must divide it; "
                f"use {nearest[0]}x{nearest[1]}, or another patch_size"
            )
        # index(): while compiling, sizes may be symbols, and the matrix of each grid is a constant.
        return operator.index(height // patch), operator.index(width // patch)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table as read at ``grid``: (1, T, D), the class token's row first and unchanged."""
        table = self.pos_embed
        if grid == self.grid:
            return table
        key = (grid, table.device, table.dtype)
        # A compiled graph holds a matrix of its own: did it look here, it would be compiled anew once one is kept.
        compiling = torch.compiler.is_compiling()
        matrix = None if compiling else self._position_matrices.get(key)
        if matrix is None:
            matrix = position_matrix(self.grid, grid, table.device, table.dtype)
            if not compiling and table.device.type != "meta":
                self._position_matrices[key] = matrix
        token, patches = table[0].split([table.shape[1] - matrix.shape[1], matrix.shape[1]])
        device = table.device.type
        # Autocast would resample in half precision. (The meta device, for counting shapes, has no autocast.)
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            return torch.cat([token, matrix @ patches])[None]

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, T, D) with their positions added, and their grid (h, w)."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (batch, {self.in_chans}, height, width)")
        grid = self._grid_of(images.shape[2], images.shape[3])
        positions = self.positions(grid)  # (1, T, D)
        num_prefix_tokens = int(self.cls_token is not None)
        inner = grid if self.centre is None else (min(grid[0], self.centre), min(grid[1], self.centre))
        if inner != grid:
            # The central rows and columns; of an odd border, the larger half lies below and to the right.
            top, left = (grid[0] - inner[0]) // 2, (grid[1] - inner[1]) // 2
            rows, columns = slice(top, top + inner[0]), slice(left, left + inner[1])
            within = positions[:, num_prefix_tokens:].unflatten(1, grid)[:, rows, columns].flatten(1, 2)
            positions = torch.cat([positions[:, :num_prefix_tokens], within], dim=1)
        if inner != grid and self.crops_images:
            side = self.patch_size
            images = images[..., top * side : rows.stop * side, left * side : columns.stop * side]
        tokens = self.patch_embed(images)  # (B, N, D)
        if inner != grid and not self.crops_images:
            tokens = tokens.unflatten(1, grid)[:, rows, columns].flatten(1, 2)
        if self.cls_token is None:
            return tokens + positions, inner
        token = (self.cls_token + positions[:, :1]).expand(tokens.shape[0], -1, -1)
        patches = tokens + positions[:, 1:]
        return torch.cat([token.to(patches.dtype), patches], dim=1), inner

    @torch.no_grad()
    def set_drop_path(self, rate: float) -> None:
        """Moves drop path to ``rate`` at the last block, for the steps to come; no wait, no recompilation."""
        torch.linspace(0, rate, len(self.order), out=self.drop_path_rates[: len(self.order)])

    def drop_path_scales(self, batch: int, noise: Tensor | None) -> Tensor:
        """Drop path's factors for a whole pass, (L, 2, B, 1, 1): 0 or 1/(1 - rate). One draw, not 2·L."""
        rates = self.drop_path_rates
        if noise is None:
            noise = torch.rand(batch, len(self.blocks), 2, device=rates.device)
        keep = 1 - rates.float()[:, None]  # (L, 1)
        noise = noise[:, : len(rates)]  # what a stage table's draw comes after
        return ((noise < keep) / keep).permute(1, 2, 0)[..., None, None]

    def forward_features(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Tokens (B, T, D) after the last norm. ``noise``: see :meth:`forward`."""
        return self._features(images, noise)[0]

    def _features(self, images: Tensor, noise: Tensor | None, shows: bool = False) -> tuple[Tensor, Tensor | None]:
        """:meth:`forward_features`, and with ``shows`` what the last block pays to each patch, (B, N)."""
        tokens, grid = self.embed(images)
        each: list[tuple[Tensor, Tensor] | None] = [None] * len(self.order)
        if self.training and self.drop_path_rate > 0:
            scales = self.drop_path_scales(tokens.shape[0], noise).to(tokens.dtype)
            each = [(scale[0], scale[1]) for scale in scales.unbind(0)][: len(self.order)]
        again = self.grad_checkpointing and torch.is_grad_enabled()
        num_prefix_tokens, left, attention = int(self.cls_token is not None), EVERYTHING, None
        if self.stage_table is not None:
            tokens = self._told_stage(tokens, noise)
        for place, (slot, scale) in enumerate(zip(self.order, each, strict=True)):
            block = self.blocks[slot]
            if shows and place == len(self.order) - 1:
                with torch.no_grad():
                    attention = block.attn.paid(block.norm1(tokens), left.mask, num_prefix_tokens)
            if place in self.selections:
                tokens, left = block.narrowed(tokens, grid, scale, left, self.selections[place], num_prefix_tokens)
            elif again:  # a block draws nothing at random: there is no generator's state to bring back
                tokens = checkpoint(block, tokens, grid, scale, left, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, grid, scale, left)
        return self.norm(tokens), attention

    def _told_stage(self, tokens: Tensor, noise: Tensor | None) -> Tensor:
        """Tokens (B, T, D) with the present stage's vector; in training, some images get that of no stage."""
        none = len(self.stage_table) - 1
        row = self.stage_table[none if self.stage is None else self.stage].to(tokens.dtype)  # (D,)
        if self.training and self.stage_null and noise is not None:
            untold = noise[:, -1:, :1] < self.stage_null  # (B, 1, 1)
            row = torch.where(untold, self.stage_table[none].to(tokens.dtype), row)  # (B, 1, D)
        if self.stage_tokens == "all":
            return tokens + row
        return torch.cat([tokens[:, :1] + row, tokens[:, 1:]], dim=1)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of :meth:`forward_features`' tokens; with ``pre_logits`` their pool."""
        pooled = tokens[:, 0] if self.pool == "token" else tokens.mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes).

        ``noise`` (B, L, 2), uniform in [0, 1): drop path's draws, a row a sample, so that a caller can key
        them to the sample's place in a global batch; (B, L + 1, 2) where there is a stage table, whose draw is last.
        By default from torch's generator; unused in evaluation.
        """
        return self.forward_head(self.forward_features(images, noise))

    def forward_with_spread(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`forward`, and how unevenly the last block's class token attends to patches, (B,): the variance of what
        it pays to each, relative to the squared mean, so that it says the same of many patches as of few.

        Without a class token: of what patches get from all. Of one patch it is 0. (The released code's is the variance
        alone, at one image size.)
        """
        tokens, attention = self._features(images, noise, shows=True)
        mean = attention.mean(dim=1)
        return self.forward_head(tokens), attention.var(dim=1, unbiased=False) / mean.square().clamp_min(1e-30)

    # From here on: what timm's tools expect of a model.

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"} | ({"stage_table"} if self.stage_table is not None else set())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks keep their inputs alone, and compute the rest again for the backward."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one for ``num_classes`` classes; 0 leaves the pooled features."""
        if global_pool not in (None, self.pool):
            raise ConfigError(
                f"global_pool={global_pool!r}: this model was built with pool={self.pool!r}, on which its "
                f"class token depends; build it anew with pool={global_pool!r}"
            )
        check_count("num_classes", num_classes, least=0)
        self.num_classes = num_classes
        if not num_classes:
            self.head = nn.Identity()
            return
        weight = self.patch_embed.proj.weight
        self.head = nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
        if self.init == "xavier":
            nn.init.xavier_normal_(self.head.weight)
        else:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)


def default_cfg(size: int) -> dict[str, Any]:
    """timm's description of a model for images of ``size`` pixels, without published weights."""
    return dict(
        input_size=(3, size, size),
        num_classes=1000,
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head",
    )


def option_names(family: type[VisionTransformer]) -> tuple[str, ...]:
    """The options that a family's models take."""
    names: dict[str, None] = {}
    for cls in (VisionTransformer, family):
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                names[name] = None
    return tuple(names)


def build(
    family: type[VisionTransformer],
    name: str,
    pretrained: bool,
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
) -> VisionTransformer:
    """Builds a registered model as timm does. An option that the family lacks is a :class:`ConfigError`."""
    known = option_names(family)
    unknown = [option for option in options if option not in known and option not in _TIMM_OPTIONS]
    if unknown:
        similar = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        hint = f" Did you mean {similar[0]}?" if similar else ""
        raise ConfigError(f"{name} has no option {', '.join(unknown)}.{hint} Its options are {', '.join(known)}.")
    return build_model_with_cfg(family, name, pretrained, **{**defaults, **options})
