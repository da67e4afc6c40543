"""What the blocks of all families share: attention, residual branches and checks of options.

Shapes: B batch, (h, w) token grid, N = h·w patch tokens, T tokens in all, D width, M heads, d head width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers
from torch import Tensor, nn

from vitlocal.errors import ConfigError
from vitlocal.models.positions import Grid
from vitlocal.models.rope import rotate, rotations
from vitlocal.models.token_selection import RemainingTokens, count_prefix_tokens, patch_scores, prune_tokens
from vitlocal.plan import Shape, StageEmbedding


def check_option(name: str, value: object, is_right: bool, expected: str) -> None:
    """Raises :class:`ConfigError` that states what was ``expected``, unless the value ``is_right``."""
    if not is_right:
        raise ConfigError(f"model option {name}={value!r}: expected {expected}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises :class:`ConfigError` unless ``value`` is one of ``choices``."""
    check_option(name, value, value in choices, f"one of {', '.join(choices)}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises :class:`ConfigError` unless ``value`` is a whole number of at least ``least``."""
    check_option(name, value, type(value) is int and value >= least, f"a whole number of at least {least}")


@dataclass(frozen=True)
class BlockShape:
    """The sizes and options of a block: width D, heads, hidden width of the feed-forward part.

    ``proj_drop``, ``attn_drop``: dropout rates. ``init_values``: initial factors of LayerScale; None: no LayerScale.
    ``learns_rope``: attention has frequencies of rotary positions.
    """

    dim: int
    num_heads: int
    hidden: int
    qkv_bias: bool
    activation: str
    proj_drop: float = 0.0
    attn_drop: float = 0.0
    init_values: float | None = None
    learns_rope: bool = False


def linear_slice(layer: nn.Linear, inputs: Tensor, rows: int | None = None) -> Tensor:
    """Applies the part of ``layer`` with its first ``rows`` outputs (None: all) and as many inputs as there are."""
    if inputs.shape[-1] == layer.in_features and rows in (None, layer.out_features):
        return layer(inputs)
    bias = layer.bias if layer.bias is None else layer.bias[:rows]
    return F.linear(inputs, layer.weight[:rows, : inputs.shape[-1]], bias)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the attention of queries (B, M, R, d) to keys (B, M, T, d): (B, M, R, T) float32.

    ``mask`` (B, 1 or M, R, T) bool: which token (row) attends to which (column); None: all to all.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, D). The first ``active_heads`` heads run.

    A ``rotation`` is the block's :func:`rotations`, by which rotary positions turn queries and keys; None: no turn.
    """

    freqs: nn.Parameter | None  # (M, 2, d/2), of rope="mixed"

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        dim = shape.dim
        self.num_heads = self.active_heads = shape.num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=shape.qkv_bias)
        self.attn_drop = nn.Dropout(shape.attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(shape.proj_drop)
        width = dim // shape.num_heads
        frequencies = nn.Parameter(torch.empty(shape.num_heads, 2, width // 2)) if shape.learns_rope else None
        self.register_parameter("freqs", frequencies)

    def rotation(self, shared: Tensor | None, kept: Tensor | None, grid: Grid) -> Tensor | None:
        """Returns :func:`rotations` of the active heads, or None if ``shared`` is None: no rotary positions."""
        frequencies = None if self.freqs is None else self.freqs[: self.active_heads]
        return None if shared is None else rotations(shared, frequencies, kept, grid[0] * grid[1])

    def project_qkv(
        self, tokens: Tensor, parts: slice = slice(3), rotation: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Returns queries, keys and values (or the ``parts`` of these) of the active heads, (B, M, T, d) each.

        A ``rotation`` turns queries and keys.
        """
        batch, count, dim = tokens.shape
        if self.active_heads == self.num_heads and parts == slice(3):
            qkv = self.qkv(tokens)
        else:
            weight = self.qkv.weight.view(3, self.num_heads, -1, dim)[parts, : self.active_heads].reshape(-1, dim)
            bias: Tensor | None = self.qkv.bias
            if bias is not None:
                bias = bias.view(3, self.num_heads, -1)[parts, : self.active_heads].reshape(-1)
            qkv = F.linear(tokens, weight, bias)
        shape = batch, count, -1, self.active_heads, dim // self.num_heads
        found = qkv.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        if rotation is None:
            return found
        kinds = range(3)[parts]  # queries, keys, values
        return tuple(part if kind == 2 else rotate(part, rotation) for kind, part in zip(kinds, found, strict=True))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
        """``mask`` (B, 1 or M, T, T) bool: which token (row) attends to which (column); None: all to all."""
        query, key, value = self.project_qkv(tokens, rotation=rotation)
        return self.attend(query, key, value, mask)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns :meth:`forward`'s result from what :meth:`project_qkv` returned."""
        rate = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)  # (B, M, T, d)
        return self.proj_drop(linear_slice(self.proj, mixed.transpose(1, 2).flatten(2)))

    def patch_attention(
        self, tokens: Tensor, mask: Tensor | None, num_prefix_tokens: int, rotation: Tensor | None = None
    ) -> Tensor:
        """Returns the :func:`patch_scores` of this attention before dropout: (B, N)."""
        rows = slice(0, 1) if num_prefix_tokens else slice(None)
        own = None if rotation is None else rotation[..., rows, :, :]
        (query,) = self.project_qkv(tokens[:, rows], slice(0, 1), own)
        (key,) = self.project_qkv(tokens, slice(1, 2), rotation)
        attention = attention_weights(query, key, None if mask is None else mask[:, :, rows])  # (B, M, 1 or T, T)
        return patch_scores(attention, num_prefix_tokens)


def add_branch(tokens: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """Returns ``tokens + branch``, with the branch multiplied by drop path's ``scale`` (B, 1, 1) unless it is None."""
    return tokens + branch if scale is None else torch.addcmul(tokens, branch, scale)


class LayerScale(layers.LayerScale):
    """As timm's, but its result has the type of its input: float32 factors do not make a bfloat16 branch float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype)


def layer_scale(shape: BlockShape) -> nn.Module:
    """Returns LayerScale, learned factors of a branch (Touvron et al. 2021, arXiv 2103.17239), or the identity."""
    return nn.Identity() if shape.init_values is None else LayerScale(shape.dim, shape.init_values)


class Block(nn.Module):
    """Attention with its norm and residual. Each family adds its feed-forward part."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.attn = Attention(shape)
        self.ls1, self.ls2 = layer_scale(shape), layer_scale(shape)

    def feed_forward(self, tokens: Tensor, grid: Grid, scale: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """Applies the feed-forward part with its norm, ``ls2`` and residual: (B, T, D) -> (B, T, D).

        ``kept`` (B, n): the indices in the grid of the patch tokens; None: all are there.
        """
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, grid: Grid, scales: Tensor | None, remaining: RemainingTokens, rope: Tensor | None = None
    ) -> Tensor:
        """``scales`` (2, B, 1, 1): drop path's factors for attention and feed-forward; None keeps the branches.

        ``rope``: what rotary positions of all blocks share, see :func:`rope_constant`; None: there are none.
        """
        attention_scale, feed_forward_scale = (None, None) if scales is None else scales.unbind(0)
        rotation = self.attn.rotation(rope, remaining.indices, grid)
        tokens = add_branch(tokens, self.ls1(self.attn(self.norm1(tokens), remaining.mask, rotation)), attention_scale)
        return self.feed_forward(tokens, grid, feed_forward_scale, remaining.indices)

    @torch.compiler.nested_compile_region
    def forward_once_compiled(
        self, tokens: Tensor, grid: Grid, scales: Tensor | None, remaining: RemainingTokens, rope: Tensor | None = None
    ) -> Tensor:
        """As :meth:`forward`. ``torch.compile`` compiles it once for all blocks that differ only in their weights."""
        return self.forward(tokens, grid, scales, remaining, rope)

    def forward_pruned(
        self, tokens: Tensor, grid: Grid, scales: Tensor | None, remaining: RemainingTokens, rope: Tensor | None,
        shape: Shape,
    ) -> tuple[Tensor, RemainingTokens]:  # fmt: skip
        """As :meth:`forward`, but drops tokens and connections after the attention, which chooses them."""
        attention_scale, feed_forward_scale = (None, None) if scales is None else scales.unbind(0)
        num_prefix_tokens = count_prefix_tokens(tokens, grid, remaining.indices)
        rotation = self.attn.rotation(rope, remaining.indices, grid)
        query, key, value = self.attn.project_qkv(self.norm1(tokens), rotation=rotation)
        branch = self.attn.attend(query, key, value, remaining.mask)
        tokens = add_branch(tokens, self.ls1(branch), attention_scale)
        # Written out, because fused attention does not return its weights; without gradients, the choice has none.
        rows = slice(1 if num_prefix_tokens and shape.attention_keep_rate == 1 else None)
        mask = None if remaining.mask is None else remaining.mask[:, :, rows]
        attention = attention_weights(query[:, :, rows].detach(), key.detach(), mask)  # (B, M, 1 or T, T)
        tokens, remaining = prune_tokens(tokens, attention, remaining, shape, num_prefix_tokens)
        return self.feed_forward(tokens, grid, feed_forward_scale, remaining.indices), remaining


class BlockModel(nn.Module):
    """A model of ours: its blocks, and what :mod:`vitlocal.models.shape` and the trainer rely on."""

    blocks: Any  # nn.ModuleList
    patch_embed: Any  # PatchEmbed, whose grid_size is the full grid
    embed_dim: int  # D
    stage_table: nn.Parameter | None  # (S + 1, D), its last row for no stage; shape.add_stage_table() sets it
    stage_embedding: StageEmbedding | None
    active: Any  # the Shape that runs now, with its block_order; shape.set_shape() sets it, no state dict holds it
    fixed_fields: Mapping[str, str] = {}  # fields of Shape that it cannot change, and why
    takes_noise = False  # whether forward() takes the random numbers of drop path and of the stage table
    drop_path_rate = 0.0
    # Whether training draws from PyTorch's generators. Drop path can take its numbers from the trainer instead.
    drops_out = False
    # Whether torch.compile compiles the blocks once. Only for callers that compile with devices.COMPILE_OPTIONS: with
    # PyTorch's own, gradients are wrong.
    compiles_blocks_once = False
    grad_checkpointing = False
    grid_multiple = 1  # by which the side of a crop of the grid can be divided

    @property
    def levels(self) -> list[list[Any]]:
        """The blocks of each level, whose heads and hidden units have their own numbers. Here all blocks are alike."""
        return [list(self.blocks)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes blocks keep only their inputs, and recompute the rest in the backward pass."""
        self.grad_checkpointing = enable


class DropPathModel(BlockModel):
    """A model with drop path (stochastic depth). A caller may give its random numbers, so that they repeat."""

    drop_path_rates: Tensor  # (L,)
    takes_noise = True

    def init_drop_path(self, rate: float, depth: int) -> None:
        """Makes the rates of ``depth`` blocks: they rise linearly from 0 at the first to ``rate`` at the last."""
        self.drop_path_rate = rate
        # On the device, so that writing new rates into it costs neither a sync nor a recompilation.
        self.register_buffer("drop_path_rates", torch.linspace(0, rate, depth), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DropPathModel":
        had_values = not self.drop_path_rates.is_meta
        super()._apply(fn, recurse)
        if not had_values and not self.drop_path_rates.is_meta:  # to_empty(), and no state dict has these values
            self.set_drop_path(self.drop_path_rate)
        return self

    @torch.no_grad()
    def set_drop_path(self, rate: float) -> None:
        """Sets drop path to ``rate`` at the last block. Costs no sync and no recompilation."""
        depth = len(self.active.block_order)
        torch.linspace(0, rate, depth, out=self.drop_path_rates[:depth])

    def drop_path_scales(self, batch: int, noise: Tensor | None) -> Tensor:
        """Returns drop path's factors for all blocks, (L, 2, B, 1, 1): 0 or 1/(1 - rate). Draws once, not 2·L times."""
        rates = self.drop_path_rates
        if noise is None:
            noise = torch.rand(batch, len(self.blocks), 2, device=rates.device)
        keep = 1 - rates.float()[:, None]  # (L, 1)
        kept = noise[:, : len(rates)] < keep  # (B, L, 2); a stage table's draw follows
        return (kept / keep).permute(1, 2, 0)[..., None, None]
