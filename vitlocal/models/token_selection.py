"""Fewer tokens and fewer connections, chosen by attention (Kong et al. 2023, arXiv 2211.10801; code Tri-Level-ViT).

Patch dropout keeps random tokens instead.

Shapes: B batch, M heads, N patch tokens, T tokens in all, P prefix tokens (the class token, if any), n kept patch
tokens, G masks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitlocal.models.positions import Grid
from vitlocal.plan import Shape


@dataclass(frozen=True)
class RemainingTokens:
    """The tokens and connections that remain after the blocks so far. None: all of them."""

    indices: Tensor | None = None  # (B, n) int64, of kept patch tokens in the grid
    mask: Tensor | None = None  # (B, G, T, T) bool: which token (row) attends to which (column)


ALL_TOKENS = RemainingTokens()


def keep_count(count: int, rate: float) -> int:
    """Returns ⌈rate · count⌉, at least 1."""
    return max(1, math.ceil(rate * count - 1e-6))  # in binary, 0.7 x 140 is a little more than 98


def count_prefix_tokens(tokens: Tensor, grid: Grid, indices: Tensor | None) -> int:
    """Returns the number of tokens (B, T, D) before the patch tokens; ``indices`` as in :class:`RemainingTokens`."""
    return tokens.shape[1] - (grid[0] * grid[1] if indices is None else indices.shape[1])


def batch_rows(indices: Tensor, count: int) -> Tensor:
    """Returns the places of each image's tokens ``indices`` (B, n) among the B·count tokens of the batch: (B·n,)."""
    first = torch.arange(0, indices.shape[0] * count, count, device=indices.device)
    return (indices + first[:, None]).flatten()


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Returns the tokens at ``indices`` (B, n): (B, T, D) → (B, n, D)."""
    # Whole rows: on a CPU, Tensor.gather() with an index for each channel takes ten times as long.
    kept = tokens.flatten(0, 1).index_select(0, batch_rows(indices, tokens.shape[1]))
    return kept.unflatten(0, indices.shape)


def token_rows(indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Returns the places of the prefix tokens and the patch tokens ``indices`` (B, n) among all tokens: (B, P + n)."""
    prefix = torch.arange(num_prefix_tokens, device=indices.device).expand(indices.shape[0], -1)
    return torch.cat([prefix, indices + num_prefix_tokens], dim=1)


def scatter_tokens(tokens: Tensor, indices: Tensor, count: int) -> Tensor:
    """Puts patch tokens (B, n, C) at their ``indices`` among ``count``, and zeros elsewhere: (B, count, C)."""
    whole = tokens.new_zeros(tokens.shape[0] * count, tokens.shape[2])
    whole.index_copy_(0, batch_rows(indices, count), tokens.flatten(0, 1))
    return whole.unflatten(0, (-1, count))


def drop_patches(tokens: Tensor, rate: float, num_prefix_tokens: int) -> tuple[Tensor, RemainingTokens]:
    """Drops the fraction ``rate`` of each image's patch tokens, at random (Li et al. 2022, arXiv 2212.00794).

    As timm's ``PatchDropout``, with the same random numbers: those of PyTorch. The tokens that remain lose their order.
    """
    count = tokens.shape[1] - num_prefix_tokens
    keep = max(1, int(count * (1 - rate)))
    indices = torch.randn(tokens.shape[0], count, device=tokens.device).argsort(dim=1)[:, :keep]  # (B, keep)
    return gather_tokens(tokens, token_rows(indices, num_prefix_tokens)), RemainingTokens(indices)


def attention_mask(attention: Tensor, rate: float, num_prefix_tokens: int) -> Tensor:
    """Returns the mask (B, G, T, T) that keeps, for each patch token, the fraction ``rate`` of its strongest patches.

    Prefix tokens attend to all tokens, and all attend to them.
    """
    patches = attention[..., num_prefix_tokens:, num_prefix_tokens:]  # (B, G, n, n)
    # By index, not by threshold: attention that was masked before is zero, and many zeros are equal.
    strongest = patches.topk(keep_count(patches.shape[3], rate), dim=3, sorted=False).indices  # (B, G, n, k)
    mask = torch.ones_like(attention, dtype=torch.bool)
    kept = torch.zeros_like(patches, dtype=torch.bool).scatter(3, strongest, 1)
    mask[..., num_prefix_tokens:, num_prefix_tokens:] = kept
    return mask


def patch_scores(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """Returns the class token's ``attention`` (B, M, R, T) to each patch, averaged over heads: (B, N).

    The class token is the first row. Without one: the attention of all tokens, summed, as in the released code for
    Swin.
    """
    rows = attention[:, :, :1] if num_prefix_tokens else attention
    return rows.mean(dim=1).sum(dim=1)[:, num_prefix_tokens:]


def prune_tokens(
    tokens: Tensor, attention: Tensor, before: RemainingTokens, shape: Shape, num_prefix_tokens: int
) -> tuple[Tensor, RemainingTokens]:
    """Drops tokens (B, T, D) and connections by ``attention`` (B, M, R, T), whose rows may be the class token's only.

    Without a class token, or to drop connections, all rows are needed. Keeps the patch tokens with the largest
    :func:`patch_scores`. Dropped tokens are not merged into others (as in the released code).
    """
    count = attention.shape[3] - num_prefix_tokens
    indices, keep, chosen = before.indices, keep_count(count, shape.token_keep_rate), None
    if keep < count:
        scores = patch_scores(attention, num_prefix_tokens)
        best = scores.topk(keep, dim=1).indices.sort(dim=1).values  # (B, keep), among those that remain
        indices = best if indices is None else indices.gather(1, best)
        chosen = token_rows(best, num_prefix_tokens)
        tokens = gather_tokens(tokens, chosen)
    if shape.attention_keep_rate == 1:
        return tokens, RemainingTokens(indices)
    attention = attention if shape.per_head_masks else attention.mean(dim=1, keepdim=True)
    if chosen is not None:
        rows = chosen[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3])
        attention = attention.gather(2, rows)
        attention = attention.gather(3, chosen[:, None, None, :].expand(*attention.shape[:3], -1))
    return tokens, RemainingTokens(indices, attention_mask(attention, shape.attention_keep_rate, num_prefix_tokens))
