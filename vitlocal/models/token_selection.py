"""Fewer tokens and fewer connections, chosen by attention (Kong et al. 2023, arXiv 2211.10801; code Tri-Level-ViT).

Shapes: B batch, M heads, N patch tokens, T tokens in all, n kept patch tokens; G masks, one or M.
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
    """How many a block keeps: this part of the patch tokens, and for each token this part of those to attend to.

    ``own_masks``: each head chooses whom to attend to, where otherwise one mask serves all.
    """

    kept: float
    attended: float
    own_masks: bool = False

    @property
    def is_whole(self) -> bool:
        return self.kept == 1.0 and self.attended == 1.0


@dataclass(frozen=True)
class Selected:
    """What the blocks so far have left. None: everything."""

    places: Tensor | None = None  # (B, n) int64, of kept patch tokens in the grid
    mask: Tensor | None = None  # (B, G, T, T) bool: who attends (row) to whom (column)


EVERYTHING = Selected()


def part_of(count: int, part: float) -> int:
    """⌈part · count⌉, at least one."""
    return max(1, math.ceil(part * count - SLACK))


def patch_scores(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """How much each patch token matters, (B, N), from head-mean attention (B, T, T).

    The class token's attention to it; where there is none (``num_prefix_tokens`` is 0), what it gets from all tokens, as the
    released code does for Swin.
    """
    return attention[:, 0, 1:] if num_prefix_tokens else attention.sum(dim=1)


def strongest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` places of highest score, in the order of the grid: (B, N) → (B, count) int64."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def gather_tokens(tokens: Tensor, places: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """The patch tokens at ``places`` (B, n), behind the ``num_prefix_tokens`` ones that stay: (B, T, D) → (B, num_prefix_tokens + n, D)."""
    index = (places + num_prefix_tokens)[..., None].expand(-1, -1, tokens.shape[2])
    chosen = tokens.gather(1, index)
    return torch.cat([tokens[:, :num_prefix_tokens], chosen], dim=1) if num_prefix_tokens else chosen


def scatter_tokens(tokens: Tensor, places: Tensor, count: int) -> Tensor:
    """Kept patch tokens (B, n, C) back at their ``places`` among ``count``, zeros elsewhere: (B, count, C)."""
    whole = tokens.new_zeros(tokens.shape[0], count, tokens.shape[2])
    return whole.scatter(1, places[..., None].expand(-1, -1, tokens.shape[2]), tokens)


def among(attention: Tensor, places: Tensor, num_prefix_tokens: int) -> Tensor:
    """What the ``num_prefix_tokens`` tokens and the patch tokens at ``places`` (B, n) pay to each other, of (B, G, T, T)."""
    first = torch.arange(num_prefix_tokens, device=places.device).expand(len(places), -1)
    index = torch.cat([first, places + num_prefix_tokens], dim=1)[:, None]  # (B, 1, num_prefix_tokens + n)
    rows = index[..., None].expand(-1, attention.shape[1], -1, attention.shape[3])
    attention = attention.gather(2, rows)
    return attention.gather(3, index[:, :, None].expand(-1, attention.shape[1], attention.shape[2], -1))


def connection_mask(attention: Tensor, part: float, num_prefix_tokens: int) -> Tensor:
    """Each patch token attends to the ``part`` of patch tokens that it attends to most: (B, G, T, T), bool.

    Class tokens attend to all, and all to them.
    """
    patches = attention[..., num_prefix_tokens:, num_prefix_tokens:]  # (B, G, n, n)
    # By places and not by the least value: what was masked before has nothing, and many of that are equal.
    most = patches.topk(part_of(patches.shape[3], part), dim=3).indices  # (B, G, n, k)
    mask = torch.ones_like(attention, dtype=torch.bool)
    mask[..., num_prefix_tokens:, num_prefix_tokens:] = torch.zeros_like(patches, dtype=torch.bool).scatter(
        3, most, True
    )
    return mask


def narrow(
    tokens: Tensor, attention: Tensor, before: Selected, how: Selection, num_prefix_tokens: int
) -> tuple[Tensor, Selected]:
    """Drops tokens (B, T, D) and connections by ``attention`` (B, M, T, T), which carries no gradient.

    Dropped tokens are gone: nothing is merged or pooled (as the released code does it).
    """
    attention = attention.detach()
    mean = attention.mean(dim=1, keepdim=True)  # over heads
    count = mean.shape[2] - num_prefix_tokens
    places, keep = before.places, part_of(count, how.kept)
    attention = attention if how.own_masks else mean
    if keep < count:
        chosen = strongest(patch_scores(mean[:, 0], num_prefix_tokens), keep)  # (B, keep), among those that were left
        tokens = gather_tokens(tokens, chosen, num_prefix_tokens)
        places = chosen if places is None else places.gather(1, chosen)
        attention = among(attention, chosen, num_prefix_tokens)
    mask = connection_mask(attention, how.attended, num_prefix_tokens) if how.attended < 1 else None
    return tokens, Selected(places, mask)
