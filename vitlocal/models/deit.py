"""DeiT (Touvron et al. 2021, arXiv 2012.12877) without distillation: a baseline.

Parameter names and shapes are those of timm's ``deit_*`` models, so their state dicts load unchanged.

Shapes: B batch, T tokens, D width, C hidden width.
"""

from typing import Any

from torch import Tensor, nn

from vitlocal.models.block import Block, BlockShape, add_branch, linear_slice
from vitlocal.models.local_mix import ACTIVATIONS
from vitlocal.models.positions import Grid
from vitlocal.models.timm_model import DEIT_SIZES, register_family
from vitlocal.models.vit import VisionTransformer


class FeedForward(nn.Module):
    """Linear layer, activation, linear layer: (B, T, D) -> (B, T, D). The first ``active_hidden`` hidden units run."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.hidden = self.active_hidden = shape.hidden
        self.activation = shape.activation
        self.fc1 = nn.Linear(shape.dim, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.dim)
        self.drop = nn.Dropout(shape.proj_drop)

    def hidden_units(self, tokens: Tensor) -> Tensor:
        """Returns the active hidden units after the activation: (B, T, D) -> (B, T, C)."""
        return ACTIVATIONS[self.activation](linear_slice(self.fc1, tokens, rows=self.active_hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.drop(linear_slice(self.fc2, self.drop(self.hidden_units(tokens))))


class PlainBlock(Block):
    """Attention, then the feed-forward part, both over all tokens."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__(shape)
        self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.mlp = FeedForward(shape)

    def feed_forward(self, tokens: Tensor, grid: Grid, scale: Tensor | None, kept: Tensor | None = None) -> Tensor:
        return add_branch(tokens, self.ls2(self.mlp(self.norm2(tokens))), scale)


class DeiT(VisionTransformer):
    """DeiT, with the options of :class:`VisionTransformer`; ``activation`` defaults to "gelu"."""

    def __init__(self, *, activation: str = "gelu", **options: Any) -> None:
        super().__init__(PlainBlock, activation=activation, **options)


register_family(DeiT, "vitlocal_deit_", DEIT_SIZES)
