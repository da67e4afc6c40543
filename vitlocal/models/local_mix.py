"""The middle of the local FFN on tokens: activation → 3×3 depth-wise convolution → activation.

A CPU runs the plain version, with oneDNN's convolution. A CUDA device runs the kernels of ``kernels.py``, as one
operator that ``torch.compile`` does not split. In a compiled step, PyTorch's compiler may be faster than they are: a
table of measured times says so, grid by grid, if there is one for this GPU.

Shapes: B batch, N = h·w patch tokens of the grid (h, w), n kept patch tokens, C hidden width.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlocal.errors import ConfigError
from vitlocal.machine import can_compile_kernels
from vitlocal.models.positions import Grid
from vitlocal.models.token_selection import gather_tokens, scatter_tokens

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"h_swish": F.hardswish, "gelu": F.gelu}

CAN_COMPILE = can_compile_kernels()  # here, because torch.compile cannot trace how it finds out
MAX_WIDTH = 16  # grid columns that the fused kernel can hold in registers: 256 px in patches of 16
# The file of `bench kernel --json`, whose rows are the table. The variable names another one, of your own GPU.
TIMES, TIMES_VARIABLE = Path(__file__).with_name("local_mix_times.json"), "VITLOCAL_LOCAL_MIX_TIMES"


def tokens_as_image(tokens: Tensor, grid: Grid) -> Tensor:
    """Returns a view of contiguous tokens (B, N, C) as a channels-last image (B, C, h, w)."""
    return tokens.view(tokens.shape[0], *grid, tokens.shape[2]).permute(0, 3, 1, 2)


def image_as_tokens(image: Tensor) -> Tensor:
    """Returns a view of a channels-last image (B, C, h, w) as tokens (B, N, C)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def plain_local_mix(tokens: Tensor, weight: Tensor, grid: Grid, activation: str, kept: Tensor | None = None) -> Tensor:
    """Computes :func:`local_mix` with PyTorch's operations: the default on a CPU, and the fused kernel's reference."""
    act = ACTIVATIONS[activation]
    tokens = act(tokens)  # before the missing tokens, which are zero before and after it, are added
    if kept is not None:
        tokens = scatter_tokens(tokens, kept, grid[0] * grid[1])
    # oneDNN's channels-last convolution: a fifth of the time of a channels-first copy.
    image = F.conv2d(tokens_as_image(tokens, grid), weight, padding=1, groups=weight.shape[0])
    mixed = image_as_tokens(image)
    return act(mixed if kept is None else gather_tokens(mixed, kept))


@torch.library.custom_op("vitlocal::local_mix", mutates_args=())
def fused_local_mix(tokens: Tensor, weight: Tensor, height: int, width: int, activation: str) -> Tensor:
    """Computes :func:`local_mix` with the Triton kernels: on a CUDA device, or under Triton's interpreter."""
    from vitlocal.models.kernels import local_mix_forward  # needs Triton; it compiles on first use

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
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, *ctx.options = inputs
    ctx.save_for_backward(tokens, weight)  # the backward pass recomputes everything else


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_fused_backward(*ctx.saved_tensors, grad, *ctx.options), None, None, None)


fused_local_mix.register_autograd(_backward, setup_context=_save_inputs)


def can_fuse(device: torch.device, grid: Grid) -> bool:
    """Returns whether the fused kernel can run: on a CUDA device, with a C compiler, for at most MAX_WIDTH columns."""
    return device.type == "cuda" and grid[1] <= MAX_WIDTH and CAN_COMPILE


@functools.cache
def measured_times() -> list[dict[str, Any]]:
    """The rows of the table of measured times; none if nothing was measured yet.

    Raises ConfigError if the variable VITLOCAL_LOCAL_MIX_TIMES does not name such a table.
    """
    stated = os.environ.get(TIMES_VARIABLE)
    if not stated and not TIMES.exists():
        return []
    try:
        rows = json.loads(Path(stated or TIMES).read_text(encoding="utf-8"))["rows"]
        return [{name: row[name] for name in ("gpu", "dtype", "side", "fused_ms", "plain_ms")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{TIMES_VARIABLE}: {stated or TIMES} is not a table of kernel times ({error!r}); write one with "
            f"python -m vitlocal.bench kernel --json FILE, or unset the variable"
        ) from error


def plain_columns(rows: Sequence[Mapping[str, Any]], gpu: str, dtype: torch.dtype) -> tuple[int, ...]:
    """The numbers of grid columns for which the plain version is faster: that of the measured grid nearest to each.

    ``rows`` are those of :func:`measured_times`. Without one for this GPU and type, there are none.
    """
    same = [row for row in rows if (row["gpu"], row["dtype"]) == (gpu, str(dtype).removeprefix("torch."))]
    nearest = {n: min(same, key=lambda row: abs(row["side"] - n)) for n in range(1, MAX_WIDTH + 1) if same}
    return tuple(columns for columns, row in nearest.items() if row["plain_ms"] < row["fused_ms"])


@torch.compiler.assume_constant_result  # torch.compile cannot trace it; the grid is no argument, as it may vary
def _plain_columns_of(device: torch.device, dtype: torch.dtype) -> tuple[int, ...]:
    return plain_columns(measured_times(), torch.cuda.get_device_name(device), dtype)


def choose_kernel(device: torch.device, grid: Grid, dtype: torch.dtype, compiled: bool) -> str:
    """What ``kernel="auto"`` is: "fused" if :func:`can_fuse`, unless the plain version is faster in a compiled step."""
    if not can_fuse(device, grid) or (compiled and grid[1] in _plain_columns_of(device, dtype)):
        return "plain"
    return "fused"


def local_mix(
    tokens: Tensor, weight: Tensor, grid: Grid, activation: str = "h_swish", kernel: str = "auto",
    kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Applies activation, zero-padded 3×3 depth-wise convolution, activation: (B, N, C) → (B, N, C).

    ``weight`` is (C, 1, 3, 3). ``kernel``: "fused", "plain", or "auto", see :func:`choose_kernel`. No copy changes the
    layout before or after the convolution. ``kept`` (B, n): the indices in the grid of tokens (B, n, C), if some are
    missing. The convolution reads these as zeros.
    """
    if kernel == "fused" and grid[1] > MAX_WIDTH:
        raise ConfigError(f"train.kernel: fused is for grids of up to {MAX_WIDTH} columns, not {grid[1]}; use auto")
    if kernel == "auto":
        kernel = choose_kernel(tokens.device, grid, tokens.dtype, torch.compiler.is_compiling())
    if kernel != "fused":
        return plain_local_mix(tokens, weight, grid, activation, kept)
    if kept is None:
        return fused_local_mix(tokens, weight, *grid, activation)
    whole = scatter_tokens(tokens, kept, grid[0] * grid[1])
    return gather_tokens(fused_local_mix(whole, weight, *grid, activation), kept)
