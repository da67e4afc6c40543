"""The local FFN's middle, activation → 3×3 depth-wise convolution → activation on tokens: an operator and its twin.

On a CPU the twin runs, whose convolution is oneDNN's; on a CUDA device the kernels of ``kernels.py``, as one operator
that ``torch.compile`` keeps whole.

Shapes: B batch, N = h·w patch tokens of the grid (h, w), C hidden width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlocal.errors import ConfigError

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"h_swish": F.hardswish, "gelu": F.gelu}

HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot trace the question
MAX_WIDTH = 16  # columns of a grid that the fused kernel holds in registers: 256 px in patches of 16


def tokens_as_image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Contiguous tokens (B, N, C) seen as an image (B, C, h, w), channels-last: a view, no copy."""
    return tokens.view(tokens.shape[0], *grid, tokens.shape[2]).permute(0, 3, 1, 2)


def image_as_tokens(image: Tensor) -> Tensor:
    """A channels-last image (B, C, h, w) seen as tokens (B, N, C): a view, no copy."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def plain_local_mix(tokens: Tensor, weight: Tensor, grid: tuple[int, int], activation: str) -> Tensor:
    """:func:`local_mix` in PyTorch's own operations: the default on a CPU, and the fused kernel's slow twin."""
    act = ACTIVATIONS[activation]
    # For (64, 64, 768) on one CPU core, forward and backward: oneDNN's channels-last convolution takes 15 ms
    # (fc1: 50), the same through a channels-first copy 78 ms, nine shifted multiply-adds 120 ms.
    image = F.conv2d(tokens_as_image(act(tokens), grid), weight, padding=1, groups=weight.shape[0])
    return act(image_as_tokens(image))


@torch.library.custom_op("vitlocal::local_mix", mutates_args=())
def fused_local_mix(tokens: Tensor, weight: Tensor, height: int, width: int, activation: str) -> Tensor:
    """:func:`local_mix` by the Triton kernels: on a CUDA device, or anywhere under Triton's interpreter."""
    from vitlocal.models.kernels import local_mix_forward  # compiles nothing before its first use

    return local_mix_forward(tokens, weight, (height, width), activation)


@fused_local_mix.register_fake
def _(tokens: Tensor, weight: Tensor, height: int, width: int, activation: str) -> Tensor:
    return torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)


@torch.library.custom_op("vitlocal::local_mix_backward", mutates_args=())
def _fused_backward(
    tokens: Tensor, weight: Tensor, grad: Tensor, height: int, width: int, activation: str
) -> tuple[Tensor, Tensor]:
    from vitlocal.models.kernels import local_mix_backward

    return local_mix_backward(tokens, weight, grad, (height, width), activation)


@_fused_backward.register_fake
def _(tokens: Tensor, weight: Tensor, grad: Tensor, height: int, width: int, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device), torch.empty(
        weight.shape, dtype=weight.dtype, device=weight.device
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, *ctx.how = inputs
    ctx.save_for_backward(tokens, weight)  # nothing else: what the backward needs beside them, it computes anew


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_fused_backward(*ctx.saved_tensors, grad, *ctx.how), None, None, None)


fused_local_mix.register_autograd(_differentiate, setup_context=_keep)


def fuses(device: torch.device, grid: tuple[int, int]) -> bool:
    """Whether the fused kernel serves tokens on ``device``: a CUDA device, and a grid of at most MAX_WIDTH columns."""
    return device.type == "cuda" and grid[1] <= MAX_WIDTH and HAS_TRITON


def local_mix(
    tokens: Tensor, weight: Tensor, grid: tuple[int, int], activation: str = "h_swish", kernel: str = "auto"
) -> Tensor:
    """Activation, zero-padded 3×3 depth-wise convolution, activation: (B, N, C) → (B, N, C).

    ``weight`` is (C, 1, 3, 3). ``kernel`` "auto" takes the fused one where it can (:func:`fuses`), "fused" and "plain"
    leave no choice. Nothing is copied to reach a convolution's layout or to leave it.
    """
    if kernel == "fused" and grid[1] > MAX_WIDTH:
        raise ConfigError(f"train.kernel: fused serves grids of up to {MAX_WIDTH} columns, not {grid[1]}; use auto")
    if kernel == "fused" or (kernel == "auto" and fuses(tokens.device, grid)):
        return fused_local_mix(tokens, weight, *grid, activation)
    return plain_local_mix(tokens, weight, grid, activation)
