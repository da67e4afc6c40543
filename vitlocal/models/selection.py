"""Fewer tokens and fewer connections, chosen by attention (Kong et al. 2023, arXiv 2211.10801; code Tri-Level-ViT).

Shapes: B batch, M heads, N patch tokens, T tokens in all, n kept patch tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# So that ⌈r·N⌉ is 98 for 0.7 × 140, whose product is a little more in binary.
SLACK = 1e-6


@dataclass(frozen=True)
class Selection:
    """How many a block keeps: this part of the patch tokens, and for each token this part of those to attend to."""

    kept: float
    attended: float

    @property
    def is_whole(self) -> bool:
        return self.kept == 1.0 and self.attended == 1.0


@dataclass(frozen=True)
class Selected:
    """What the blocks so far have left. None: everything."""

    places: Tensor | None = None  # (B, n) int64, of kept patch tokens in the grid
    mask: Tensor | None = None  # (B, 1, T, T) bool: who attends (row) to whom (column)


EVERYTHING = Selected()


def part_of(count: int, part: float) -> int:
    """⌈part · count⌉, at least one."""
    return max(1, math.ceil(part * count - SLACK))


def patch_scores(attention: Tensor, passing: int) -> Tensor:
    """How much each patch token matters, (B, N), from head-mean attention (B, T, T).

    The class token's attention to it; where there is none (``passing`` is 0), what it gets from all tokens, as the
    released code does for Swin.
    """
    return attention[:, 0, 1:] if passing else attention.sum(dim=1)


def strongest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` places of highest score, in the order of the grid: (B, N) → (B, count) int64."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def gather_tokens(tokens: Tensor, places: Tensor, passing: int = 0) -> Tensor:
    """The patch tokens at ``places`` (B, n), behind the ``passing`` ones that stay: (B, T, D) → (B, passing + n, D)."""
    index = (places + passing)[..., None].expand(-1, -1, tokens.shape[2])
    chosen = tokens.gather(1, index)
    return torch.cat([tokens[:, :passing], chosen], dim=1) if passing else chosen


def scatter_tokens(tokens: Tensor, places: Tensor, count: int) -> Tensor:
    """Kept patch tokens (B, n, C) back at their ``places`` among ``count``, zeros elsewhere: (B, count, C)."""
    whole = tokens.new_zeros(tokens.shape[0], count, tokens.shape[2])
    return whole.scatter(1, places[..., None].expand(-1, -1, tokens.shape[2]), tokens)


def connection_mask(attention: Tensor, part: float, passing: int) -> Tensor:
    """Each patch token attends to the ``part`` of patch tokens that it attends to most: (B, T, T) → (B, 1, T, T) bool.

    One mask for all heads. Class tokens attend to all, and all to them.
    """
    among = attention[:, passing:, passing:]  # (B, n, n)
    least = among.topk(part_of(among.shape[2], part), dim=2).values[..., -1:]  # (B, n, 1)
    mask = torch.ones_like(attention, dtype=torch.bool)
    mask[:, passing:, passing:] = among >= least
    return mask[:, None]


def narrow(
    tokens: Tensor, attention: Tensor, before: Selected, how: Selection, passing: int
) -> tuple[Tensor, Selected]:
    """Drops tokens (B, T, D) and connections by head-mean ``attention`` (B, T, T), which carries no gradient.

    Dropped tokens are gone: nothing is merged or pooled (as the released code does it).
    """
    attention = attention.detach()
    count = attention.shape[1] - passing
    places, keep = before.places, part_of(count, how.kept)
    if keep < count:
        chosen = strongest(patch_scores(attention, passing), keep)  # (B, keep), among those that were left
        tokens = gather_tokens(tokens, chosen, passing)
        places = chosen if places is None else places.gather(1, chosen)
        attention = gather_tokens(attention, chosen, passing)
        attention = gather_tokens(attention.transpose(1, 2), chosen, passing).transpose(1, 2)
    mask = connection_mask(attention, how.attended, passing) if how.attended < 1 else None
    return tokens, Selected(places, mask)
