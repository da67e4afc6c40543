"""The local-FFN Vision Transformer (Irandoust et al. 2022, arXiv 2211.05187, section 3.1).

Shapes: B batch, T tokens in all, N = h·w patch tokens on the grid (h, w), D width, C hidden width.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitlocal.models.block import Block, BlockShape, add_branch, check_choice, check_option, linear_slice
from vitlocal.models.local_mix import ACTIVATIONS, local_mix
from vitlocal.models.positions import Grid
from vitlocal.models.timm_model import DEIT_SIZES, register_family
from vitlocal.models.token_selection import count_prefix_tokens
from vitlocal.models.vit import VisionTransformer


class LocalFeedForward(nn.Module):
    """Norm, linear layer, activation, 3×3 depth-wise convolution, activation, linear layer, on patch tokens (B, N, D).

    No biases, as in the released code. The ablations: ``activation`` "gelu" replaces both h-swish. ``norm`` "batch"
    replaces this LayerNorm by a BatchNorm over all patch tokens of the batch. ``convolution`` False leaves out the
    convolution and the activation after it.

    The first ``active_hidden`` hidden units run. ``kernel`` is :func:`local_mix`'s; no state dict holds it.
    """

    def __init__(self, shape: BlockShape, norm: str, convolution: bool) -> None:
        super().__init__()
        dim, hidden = shape.dim, shape.hidden
        self.hidden = self.active_hidden = hidden
        self.activation = shape.activation
        self.norm: nn.Module = nn.LayerNorm(dim, eps=1e-6) if norm == "layer" else nn.BatchNorm1d(dim)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        # local_mix uses only its weights.
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False) if convolution else None
        self.kernel = "auto"
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.drop = nn.Dropout(shape.proj_drop)

    def hidden_units(self, patches: Tensor, grid: Grid, kept: Tensor | None = None) -> Tensor:
        """Returns the active hidden units after convolution and activations: (B, N, D) -> (B, N, C)."""
        flat = patches.flatten(0, 1) if isinstance(self.norm, nn.BatchNorm1d) else patches
        normed = self.norm(flat).view(patches.shape)  # contiguous, like fc1's output, even if its input is a slice
        hidden = linear_slice(self.fc1, normed, rows=self.active_hidden)  # (B, N, C)
        if self.conv is None:
            return ACTIVATIONS[self.activation](hidden)
        weight = self.conv.weight[: self.active_hidden]
        # Only the convolution needs the whole grid; fc1 and fc2, which cost most, do not.
        return local_mix(hidden, weight, grid, self.activation, self.kernel, kept)

    def forward(self, patches: Tensor, grid: Grid, kept: Tensor | None = None) -> Tensor:
        """``kept`` (B, n): the patches' indices in the grid, if some are missing. The convolution reads those as 0."""
        return self.drop(linear_slice(self.fc2, self.drop(self.hidden_units(patches, grid, kept))))


class LocalBlock(Block):
    """Attention over all tokens, then the local FFN over the patch tokens.

    The released code splits and concatenates. Here a row of zeros is added to the class token: the same bits. If the
    head reads the class token, the last block's FFN has no effect, as in the released code.
    """

    def __init__(self, shape: BlockShape, norm: str, convolution: bool) -> None:
        super().__init__(shape)
        self.mlp = LocalFeedForward(shape, norm, convolution)

    def feed_forward(self, tokens: Tensor, grid: Grid, scale: Tensor | None, kept: Tensor | None = None) -> Tensor:
        num_prefix_tokens = count_prefix_tokens(tokens, grid, kept)
        if not num_prefix_tokens:
            return add_branch(tokens, self.ls2(self.mlp(tokens, grid, kept)), scale)
        branch = self.ls2(self.mlp(tokens[:, num_prefix_tokens:], grid, kept))  # (B, N, D)
        # The padding's gradient is a view: a step takes 9 % less time on a CPU than with split and concatenation.
        return add_branch(tokens, F.pad(branch, (0, 0, num_prefix_tokens, 0)), scale)


class LocalFFNViT(VisionTransformer):
    """The paper's Vision Transformer with a local feed-forward part, and the options of its ablations.

    ``activation``, ``norm`` and ``convolution``: see :class:`LocalFeedForward`. ``qkv_bias`` is False, as in the
    released code. The other options are those of :class:`VisionTransformer`.
    """

    def __init__(
        self, *, qkv_bias: bool = False, norm: str = "layer", convolution: bool = True, **options: Any
    ) -> None:
        check_choice("norm", norm, ("layer", "batch"))
        check_option("convolution", convolution, isinstance(convolution, bool), "true or false")
        super().__init__(lambda shape: LocalBlock(shape, norm, convolution), qkv_bias=qkv_bias, **options)


# vitlocal_small_patch16_224 is the paper's model.
PATCH4 = {"tiny_patch4_32": DEIT_SIZES["tiny_patch16_224"] | dict(patch_size=4, img_size=32)}
register_family(LocalFFNViT, "vitlocal_", DEIT_SIZES | PATCH4)
