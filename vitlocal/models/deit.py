"""DeiT (Touvron et al. 2021, arXiv 2012.12877) without distillation: a baseline.

Parameter names and shapes are those of timm's ``deit_*`` models, so that their state dicts load as they are.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vitlocal.models.local_mix import ACTIVATIONS
from vitlocal.models.vit import (
    BASE,
    SMALL,
    TINY,
    Block,
    BlockShape,
    VisionTransformer,
    add_branch,
    build,
    default_cfg,
)


class FeedForward(nn.Module):
    """Widen, activation, narrow, with biases: (B, T, D) -> (B, T, D)."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.hidden = self.active = shape.hidden  # so many hidden units run, the first ones
        self.activation = shape.activation
        self.fc1 = nn.Linear(shape.dim, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.dim)

    def widened(self, tokens: Tensor) -> Tensor:
        """The hidden units that run, activated: (B, T, D) -> (B, T, C)."""
        if self.active == self.hidden:
            return ACTIVATIONS[self.activation](self.fc1(tokens))
        return ACTIVATIONS[self.activation](
            F.linear(tokens, self.fc1.weight[: self.active], self.fc1.bias[: self.active])
        )

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.widened(tokens)
        if self.active == self.hidden:
            return self.fc2(hidden)
        return F.linear(hidden, self.fc2.weight[:, : self.active], self.fc2.bias)


class PlainBlock(Block):
    """Attention, then the feed-forward part, both over all tokens."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__(shape)
        self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.mlp = FeedForward(shape)

    def feed_forward(
        self, tokens: Tensor, grid: tuple[int, int], scale: Tensor | None, places: Tensor | None = None
    ) -> Tensor:
        return add_branch(tokens, self.mlp(self.norm2(tokens)), scale)


class DeiT(VisionTransformer):
    """DeiT, with the options of :class:`VisionTransformer`; ``activation`` is "gelu" if not given."""

    def __init__(self, *, activation: str = "gelu", **trunk: Any) -> None:
        super().__init__(PlainBlock, activation=activation, **trunk)


default_cfgs = generate_default_cfgs(
    {
        "vitlocal_deit_tiny_patch16_224": default_cfg(224),
        "vitlocal_deit_small_patch16_224": default_cfg(224),
        "vitlocal_deit_base_patch16_224": default_cfg(224),
        "vitlocal_deit_tiny_patch8_64": default_cfg(64),
    }
)


@register_model
def vitlocal_deit_tiny_patch16_224(pretrained: bool = False, **options: Any) -> DeiT:
    """DeiT-Ti for 224 px."""
    return build(DeiT, "vitlocal_deit_tiny_patch16_224", pretrained, TINY, options)


@register_model
def vitlocal_deit_small_patch16_224(pretrained: bool = False, **options: Any) -> DeiT:
    """DeiT-S for 224 px."""
    return build(DeiT, "vitlocal_deit_small_patch16_224", pretrained, SMALL, options)


@register_model
def vitlocal_deit_base_patch16_224(pretrained: bool = False, **options: Any) -> DeiT:
    """DeiT-B for 224 px."""
    return build(DeiT, "vitlocal_deit_base_patch16_224", pretrained, BASE, options)


@register_model
def vitlocal_deit_tiny_patch8_64(pretrained: bool = False, **options: Any) -> DeiT:
    """DeiT-Ti for 64 px in patches of 8."""
    defaults = TINY | dict(patch_size=8, img_size=64)
    return build(DeiT, "vitlocal_deit_tiny_patch8_64", pretrained, defaults, options)
