"""The local-FFN Vision Transformer (Irandoust et al. 2022, arXiv 2211.05187, section 3.1).

Shapes: B batch, T tokens in all, N = h·w patch tokens on the grid (h, w), D width, C hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitlocal.models.local_mix import ACTIVATIONS, local_mix
from vitlocal.models.token_selection import gather_tokens, scatter_tokens
from vitlocal.models.vit import (
    BASE,
    SMALL,
    TINY,
    Block,
    BlockShape,
    VisionTransformer,
    add_branch,
    build,
    check_bool,
    check_choice,
    default_cfg,
)


class LocalFeedForward(nn.Module):
    """Norm, widen, activation, 3×3 depth-wise convolution, activation, narrow, on patch tokens (B, N, D).

    No biases, as in the released code. The ablations: ``activation`` "gelu" replaces both h-swish; ``norm``
    "batch" puts a BatchNorm, over all patch tokens of the batch, in the place of the LayerNorm and nowhere
    else; ``convolution`` False leaves out the convolution and the activation after it.
    """

    def __init__(self, shape: BlockShape, norm: str, convolution: bool) -> None:
        super().__init__()
        dim, hidden = shape.dim, shape.hidden
        self.hidden = self.active = hidden  # so many hidden units run, the first ones
        self.activation = shape.activation
        self.norm: nn.Module = nn.LayerNorm(dim, eps=1e-6) if norm == "layer" else nn.BatchNorm1d(dim)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False) if convolution else None
        self.conv = conv  # its weight alone is used, by local_mix
        self.kernel = "auto"  # see local_mix; set from outside, and no part of the model's state
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def widened(self, patches: Tensor, grid: tuple[int, int], places: Tensor | None = None) -> Tensor:
        """The hidden units that run, mixed with their local_world_size' and activated: (B, N, D) -> (B, N, C)."""
        # The norm's output is fresh and contiguous even where its input is a slice, and so is fc1's.
        if isinstance(self.norm, nn.BatchNorm1d):
            normed = self.norm(patches.flatten(0, 1)).view(patches.shape)
        else:
            normed = self.norm(patches)
        whole = self.active == self.hidden
        hidden = self.fc1(normed) if whole else F.linear(normed, self.fc1.weight[: self.active])  # (B, N, C)
        if self.conv is None:
            return ACTIVATIONS[self.activation](hidden)
        if places is None:
            return local_mix(hidden, self._kernel_weight, grid, self.activation, self.kernel)
        # The convolution needs the grid; fc1 and fc2, where the work is, do without.
        grown = scatter_tokens(hidden, places, grid[0] * grid[1])
        return gather_tokens(local_mix(grown, self._kernel_weight, grid, self.activation, self.kernel), places)

    def forward(self, patches: Tensor, grid: tuple[int, int], places: Tensor | None = None) -> Tensor:
        """``places`` (B, n): where in the grid the patches lie, where not all are there; zeros stand for the others."""
        hidden = self.widened(patches, grid, places)
        if self.active == self.hidden:
            return self.fc2(hidden)
        return F.linear(hidden, self.fc2.weight[:, : self.active])

    @property
    def _kernel_weight(self) -> Tensor:
        return self.conv.weight if self.active == self.hidden else self.conv.weight[: self.active]


@contextmanager
def kernel_set(model: nn.Module, kernel: str) -> Iterator[None]:
    """All local FFNs of ``model`` use ``kernel`` in here; see :func:`local_mix`."""
    parts = [module for module in model.modules() if isinstance(module, LocalFeedForward)]
    before = [part.kernel for part in parts]
    try:
        for part in parts:
            part.kernel = kernel
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.kernel = was


class LocalBlock(Block):
    """Attention over all tokens, then the local FFN over the patch tokens: the class token passes by it.

    The released code splits and concatenates; here a row of zeros is added to the class token, which is the
    same to the bit. Where the class token is what the head reads, the last block's FFN has no effect, in the
    released code as here: its gradients are zeros.
    """

    def __init__(self, shape: BlockShape, norm: str, convolution: bool) -> None:
        super().__init__(shape)
        self.mlp = LocalFeedForward(shape, norm, convolution)

    def feed_forward(
        self, tokens: Tensor, grid: tuple[int, int], scale: Tensor | None, places: Tensor | None = None
    ) -> Tensor:
        num_prefix_tokens = tokens.shape[1] - (grid[0] * grid[1] if places is None else places.shape[1])
        if not num_prefix_tokens:
            return add_branch(tokens, self.mlp(tokens, grid, places), scale)
        branch = self.mlp(tokens[:, num_prefix_tokens:], grid, places)  # (B, N, D)
        # The padding's gradient is a view. A step of a 6-block, 192-wide model takes 1240 ms on one CPU core,
        # 1360 with split and concatenation, 1330 with a hand-written in-place addition.
        return add_branch(tokens, F.pad(branch, (0, 0, num_prefix_tokens, 0)), scale)


class LocalFFNViT(VisionTransformer):
    """The paper's Vision Transformer with a local feed-forward part, and the switches of its ablations.

    See :class:`LocalFeedForward` for ``activation``, ``norm`` and ``convolution``, and for the other options
    :class:`VisionTransformer`. ``qkv_bias`` is False, as in the released code.
    """

    def __init__(self, *, qkv_bias: bool = False, norm: str = "layer", convolution: bool = True, **trunk: Any) -> None:
        check_choice("norm", norm, ("layer", "batch"))
        check_bool("convolution", convolution)
        super().__init__(lambda shape: LocalBlock(shape, norm, convolution), qkv_bias=qkv_bias, **trunk)


default_cfgs = generate_default_cfgs(
    {
        "vitlocal_tiny_patch16_224": default_cfg(224),
        "vitlocal_small_patch16_224": default_cfg(224),
        "vitlocal_base_patch16_224": default_cfg(224),
        "vitlocal_tiny_patch8_64": default_cfg(64),
        "vitlocal_tiny_patch4_32": default_cfg(32),
    }
)


@register_model
def vitlocal_tiny_patch16_224(pretrained: bool = False, **options: Any) -> LocalFFNViT:
    """Local-FFN ViT, 192 wide, 3 heads, for 224 px."""
    return build(LocalFFNViT, "vitlocal_tiny_patch16_224", pretrained, TINY, options)


@register_model
def vitlocal_small_patch16_224(pretrained: bool = False, **options: Any) -> LocalFFNViT:
    """Local-FFN ViT, 384 wide, 6 heads, for 224 px: the paper's model."""
    return build(LocalFFNViT, "vitlocal_small_patch16_224", pretrained, SMALL, options)


@register_model
def vitlocal_base_patch16_224(pretrained: bool = False, **options: Any) -> LocalFFNViT:
    """Local-FFN ViT, 768 wide, 12 heads, for 224 px."""
    return build(LocalFFNViT, "vitlocal_base_patch16_224", pretrained, BASE, options)


@register_model
def vitlocal_tiny_patch8_64(pretrained: bool = False, **options: Any) -> LocalFFNViT:
    """Local-FFN ViT, 192 wide, 3 heads, for 64 px in patches of 8."""
    defaults = TINY | dict(patch_size=8, img_size=64)
    return build(LocalFFNViT, "vitlocal_tiny_patch8_64", pretrained, defaults, options)


@register_model
def vitlocal_tiny_patch4_32(pretrained: bool = False, **options: Any) -> LocalFFNViT:
    """Local-FFN ViT, 192 wide, 3 heads, for 32 px in patches of 4."""
    defaults = TINY | dict(patch_size=4, img_size=32)
    return build(LocalFFNViT, "vitlocal_tiny_patch4_32", pretrained, defaults, options)
