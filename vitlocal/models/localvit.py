"""LocalViT (Li et al. 2021, arXiv 2104.05707) on DeiT: a baseline, which the local-FFN ViT simplifies.

Shapes: B batch, N = h·w patch tokens on the grid (h, w), D width, C hidden width, R squeezed width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlocal.models.block import Block, BlockShape, check_count, check_option
from vitlocal.models.local_mix import ACTIVATIONS, image_as_tokens, tokens_as_image
from vitlocal.models.positions import Grid
from vitlocal.models.timm_model import family_sizes, register_family
from vitlocal.models.vit import VisionTransformer


class SqueezeExcitation(nn.Module):
    """Scales each channel of an image (B, C, h, w) by a gate in [0, 1], computed from the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, squeezed)
        self.expand = nn.Linear(squeezed, channels)

    def forward(self, image: Tensor) -> Tensor:
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(image.mean(dim=(2, 3))))))  # (B, C)
        return image * gate[:, :, None, None]


class ConvFeedForward(nn.Module):
    """Three convolutions on the patch tokens (B, N, D), each with a BatchNorm: 1×1 to C, 3×3 depth-wise, 1×1 to D.

    Squeeze-and-excitation comes before the last convolution.
    """

    def __init__(self, shape: BlockShape, squeezed: int) -> None:
        super().__init__()
        dim, hidden = shape.dim, shape.hidden
        self.activation = shape.activation
        self.fc1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.se = SqueezeExcitation(hidden, squeezed)
        self.fc2 = nn.Conv2d(hidden, dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)
        self.drop = nn.Dropout(shape.proj_drop)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        act = ACTIVATIONS[self.activation]
        image = tokens_as_image(patches.contiguous(), grid)  # with a class token, this copies
        image = act(self.bn1(self.fc1(image)))  # (B, C, h, w)
        image = self.drop(self.se(act(self.bn2(self.conv(image)))))
        return self.drop(image_as_tokens(self.bn3(self.fc2(image))))


class ConvBlock(Block):
    """Attention over all tokens, then the convolutional feed-forward part over the patch tokens.

    There is no norm before the feed-forward part and no drop path after it, as in the released code.
    """

    def __init__(self, shape: BlockShape, squeezed: int) -> None:
        super().__init__(shape)
        self.mlp = ConvFeedForward(shape, squeezed)

    def feed_forward(self, tokens: Tensor, grid: Grid, scale: Tensor | None, kept: Tensor | None = None) -> Tensor:
        prefix, patches = tokens.tensor_split([tokens.shape[1] - grid[0] * grid[1]], dim=1)
        return torch.cat([prefix, patches + self.ls2(self.mlp(patches, grid))], dim=1)


class LocalViT(VisionTransformer):
    """LocalViT, with the options of :class:`VisionTransformer`.

    ``se_ratio``: hidden channels per squeezed channel. None takes the width D, which gives 4 squeezed channels, as in
    the published LocalViT-T and LocalViT-S.
    """

    def __init__(self, *, se_ratio: int | None = None, **options: Any) -> None:
        if se_ratio is not None:
            check_count("se_ratio", se_ratio)
        whole = "none, because LocalViT's convolutions need the whole grid; or use a DeiT or local-FFN model"
        for name in ("patch_drop_rate", "pruned_blocks"):
            check_option(name, options.get(name), not options.get(name), whole)
        super().__init__(lambda shape: ConvBlock(shape, max(1, shape.hidden // (se_ratio or shape.dim))), **options)


# As in the released code, heads are 48 wide (DeiT: 64). There is no published base model; ours does the same.
register_family(LocalViT, "vitlocal_localvit_", family_sizes(48, (4, 8, 16)))
