"""Fewer tokens and fewer connections, chosen by attention (Kong et al. 2023, arXiv 2211.10801; code Tri-Level-ViT).

Shapes: B batch, M heads, N patch tokens, T tokens in all, P prefix tokens (0 or 1), n kept patch tokens, G masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# In binary, 0.7 x 140 is a little more than 98. With this slack, its ceiling is 98.
SLACK = 1e-6


@dataclass(frozen=True)
class TokenSelection:
    """The fraction of patch tokens that a block keeps, and the fraction of them that each token attends to.

    ``per_head_masks``: each head chooses its own connections. Otherwise one mask serves all heads.
    """

    token_keep_rate: float
    attention_keep_rate: float
    per_head_masks: bool = False

    @property
    def keeps_all(self) -> bool:
        """Whether the selection drops nothing."""
        return self.token_keep_rate == 1.0 and self.attention_keep_rate == 1.0


@dataclass(frozen=True)
class RemainingTokens:
    """The tokens and connections that remain after the blocks so far. None: all of them."""

    indices: Tensor | None = None  # (B, n) int64, of kept patch tokens in the grid
    mask: Tensor | None = None  # (B, G, T, T) bool: which token (row) attends to which (column)


ALL_TOKENS = RemainingTokens()


def keep_count(count: int, rate: float) -> int:
    """Returns ⌈rate · count⌉, at least 1."""
    return max(1, math.ceil(rate * count - SLACK))


def patch_scores(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """Returns the class token's attention to each patch, (B, N), from attention averaged over heads, (B, T, T).

    Without a class token: the attention of all tokens to each patch, as in the released code for Swin.
    """
    return attention[:, 0, 1:] if num_prefix_tokens else attention.sum(dim=1)


def gather_tokens(tokens: Tensor, indices: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Returns the prefix tokens, then the patch tokens at ``indices`` (B, n): (B, T, D) → (B, P + n, D)."""
    index = (indices + num_prefix_tokens)[..., None].expand(-1, -1, tokens.shape[2])
    chosen = tokens.gather(1, index)
    return torch.cat([tokens[:, :num_prefix_tokens], chosen], dim=1) if num_prefix_tokens else chosen


def scatter_tokens(tokens: Tensor, indices: Tensor, count: int) -> Tensor:
    """Puts patch tokens (B, n, C) at their ``indices`` among ``count``, and zeros elsewhere: (B, count, C)."""
    whole = tokens.new_zeros(tokens.shape[0], count, tokens.shape[2])
    return whole.scatter(1, indices[..., None].expand(-1, -1, tokens.shape[2]), tokens)


def gather_attention(attention: Tensor, indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Returns the attention (B, G, T, T) among the prefix tokens and the patch tokens at ``indices`` (B, n)."""
    prefix = torch.arange(num_prefix_tokens, device=indices.device).expand(len(indices), -1)
    index = torch.cat([prefix, indices + num_prefix_tokens], dim=1)[:, None]  # (B, 1, P + n)
    rows = index[..., None].expand(-1, attention.shape[1], -1, attention.shape[3])
    attention = attention.gather(2, rows)
    return attention.gather(3, index[:, :, None].expand(-1, attention.shape[1], attention.shape[2], -1))


def attention_mask(attention: Tensor, rate: float, num_prefix_tokens: int) -> Tensor:
    """Returns the mask (B, G, T, T) that keeps, for each patch token, the fraction ``rate`` of its strongest patches.

    A class token attends to all tokens, and all attend to it.
    """
    patches = attention[..., num_prefix_tokens:, num_prefix_tokens:]  # (B, G, n, n)
    # By index, not by threshold: attention that was masked before is zero, and many zeros are equal.
    strongest = patches.topk(keep_count(patches.shape[3], rate), dim=3).indices  # (B, G, n, k)
    mask = torch.ones_like(attention, dtype=torch.bool)
    kept = torch.zeros_like(patches, dtype=torch.bool).scatter(3, strongest, True)
    mask[..., num_prefix_tokens:, num_prefix_tokens:] = kept
    return mask


def prune_tokens(
    tokens: Tensor, attention: Tensor, before: RemainingTokens, selection: TokenSelection, num_prefix_tokens: int
) -> tuple[Tensor, RemainingTokens]:
    """Drops tokens (B, T, D) and connections by ``attention`` (B, M, T, T), which carries no gradient.

    Dropped tokens are not merged into others (as in the released code).
    """
    attention = attention.detach()
    mean = attention.mean(dim=1, keepdim=True)  # over heads
    count = mean.shape[2] - num_prefix_tokens
    indices, keep = before.indices, keep_count(count, selection.token_keep_rate)
    attention = attention if selection.per_head_masks else mean
    if keep < count:
        scores = patch_scores(mean[:, 0], num_prefix_tokens)
        chosen = scores.topk(keep, dim=1).indices.sort(dim=1).values  # (B, keep), among those that remain
        tokens = gather_tokens(tokens, chosen, num_prefix_tokens)
        indices = chosen if indices is None else indices.gather(1, chosen)
        attention = gather_attention(attention, chosen, num_prefix_tokens)
    rate = selection.attention_keep_rate
    mask = attention_mask(attention, rate, num_prefix_tokens) if rate < 1 else None
    return tokens, RemainingTokens(indices, mask)
