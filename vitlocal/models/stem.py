"""What makes tokens of images: one layer per patch, or several.

Shapes: B batch, C channels, S input size, P patch side, N patch tokens, (H, W) full grid, D width.
"""

import operator

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from vitlocal.errors import ConfigError
from vitlocal.models.block import check_option


class Stem(nn.Module):
    """The sizes of patches and of the full grid."""

    proj: nn.Conv2d  # the last layer

    def __init__(self, img_size: tuple[int, int], patch_size: int) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = self.grid_of(*img_size)  # (H, W)

    def grid_of(self, height: int, width: int, patch: int | None = None) -> tuple[int, int]:
        """Returns the token grid of images of this size; :class:`ConfigError` unless the ``patch`` divides it."""
        patch = patch or self.patch_size[0]
        if height % patch or width % patch or not height or not width:
            nearest = "x".join(str(max(patch, round(side / patch) * patch)) for side in (height, width))
            text = f"the patch of {patch}x{patch} pixels must divide it; use {nearest}, or another patch_size"
            raise ConfigError(f"image size {height}x{width}: {text}")
        # While compiling, sizes may be symbols. index() makes them constants, as the matrix of each grid is.
        return operator.index(height // patch), operator.index(width // patch)


def as_matrix(convolution: nn.Module) -> Tensor:
    """Returns the weights of a convolution without overlap, for channels-last patches of K × K pixels: (D, K·K·C).

    The gradient is channels-last too, like the weight. DistributedDataParallel warns otherwise.
    """
    weight: Tensor = convolution.weight  # type: ignore[assignment]
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


class PatchEmbed(Stem):
    """Maps each patch of P × P pixels of images (B, C, S, S) to a token: (B, N, D), contiguous.

    One matrix product over patches: 1.1 to 2.2 times as fast as PyTorch's convolution on a CPU.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(img_size, patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)  # only its weights are used

    @torch.no_grad()
    def set_input_size(self, height: int, width: int, patch: int) -> None:
        """Sets the sizes of images and patches, px. The weights are resampled as in timm (arXiv 2212.08013)."""
        self.grid_size = self.grid_of(height, width, patch)  # raises before anything changes
        if patch != self.patch_size[0]:
            weight = self.proj.weight
            self.proj.weight = nn.Parameter(resample_patch_embed(weight, [patch, patch]), weight.requires_grad)
            self.patch_size = self.proj.kernel_size = self.proj.stride = (patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        side = self.patch_size[0]
        rows, columns = height // side, width // side
        strips = images.permute(0, 2, 3, 1).reshape(batch, rows, side, columns, side * channels)
        patches = strips.transpose(2, 3).reshape(batch, rows * columns, side * side * channels)  # the only copy
        return F.linear(patches, as_matrix(self.proj), self.proj.bias)


class PatchStem(Stem):
    """Layers within each patch (hMLP; Touvron et al. 2022, arXiv 2203.09795): images (B, C, S, S) to tokens (B, N, D).

    Parts of 4 × 4 pixels become ``width`` channels (None: D/4, as in the paper). Four neighbours are joined, until they
    are a patch. A norm and a GELU follow all layers but the last; the paper has a norm there too. ``norm``: "layer", or
    the paper's "batch", whose statistics mix all sizes of a curriculum. Tokens see no other patch, as those of
    :class:`PatchEmbed`.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, width: int | None = None,
        norm: str = "layer",
    ) -> None:  # fmt: skip
        super().__init__(img_size, patch_size)
        check_option("patch_size", patch_size, patch_size in (8, 16, 32), "8, 16 or 32 with stem=hmlp")
        self.levels = (patch_size // 4).bit_length() - 1
        width = max(1, embed_dim // 4) if width is None else width
        self.convs = nn.ModuleList([nn.Conv2d(in_chans, width, 4, stride=4, bias=False)])
        self.convs.extend(nn.Conv2d(width, width, 2, stride=2, bias=False) for _ in range(self.levels - 1))
        norms = (nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width, eps=1e-6) for _ in self.convs)
        self.norms = nn.ModuleList(norms)
        self.proj = nn.Conv2d(width, embed_dim, 2, stride=2)  # only the weights of convolutions are used
        nn.init.trunc_normal_(self.proj.weight, std=(4 * width) ** -0.5)  # tokens as large as those of PatchEmbed
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def set_input_size(self, height: int, width: int, patch: int) -> None:
        """Sets the size of images, px. The patch cannot change."""
        side = self.patch_size[0]
        check_option("patch_size", patch, patch == side, f"{side}, because a stem of several layers has a fixed patch")
        self.grid_size = self.grid_of(height, width)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        rows, columns = self.grid_of(height, width)
        parts = [2] * self.levels
        pixels = images.permute(0, 2, 3, 1).reshape(batch, rows, *parts, 4, columns, *parts, 4, channels)
        axes = range(1, self.levels + 3)  # of rows: the grid, the halves of each level, and pixels
        order = [axis for pair in ((row, row + len(axes)) for row in axes) for axis in pair]
        x = pixels.permute(0, *order, pixels.ndim - 1).reshape(-1, 16 * channels)  # the only copy
        for convolution, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(F.linear(x, as_matrix(convolution))))
            x = x.reshape(-1, 4 * x.shape[1])
        return F.linear(x, as_matrix(self.proj), self.proj.bias).view(batch, rows * columns, -1)


STEMS = {"patch": PatchEmbed, "hmlp": PatchStem}
