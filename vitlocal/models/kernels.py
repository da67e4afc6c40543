"""Triton kernels for the middle of the local FFN: activation, 3×3 depth-wise convolution, activation, in one pass.

A thread owns a channel of one image. It walks down the grid's rows and keeps whole rows in registers, so each
activation is computed once. The backward pass recomputes the convolution's result. The weights' gradient is summed in
float32 over a program's images, then over programs, in a fixed order.

Imported on first use on a GPU, or under Triton's interpreter (``TRITON_INTERPRET=1``). ``local_mix.py`` holds the
operator that calls these kernels, and their reference.

Shapes: B batch, N = H·W patch tokens of the grid (H, W), C hidden width, BC channels of a program.
"""
# Triton's compiler takes neither type annotations of tensors nor tuples of one type.
# mypy: disable-error-code="no-untyped-def, assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitlocal.models.positions import Grid

THREADS = 128  # per program
# A program processes at least this many positions, to read its weights less often, unless fewer than PROGRAMS programs
# would remain, which fill a GPU several times.
POSITIONS = 512
PROGRAMS = 1024


@triton.jit
def _activate(x, GELU: tl.constexpr):
    if GELU:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return x * tl.minimum(tl.maximum(x * (1.0 / 6.0) + 0.5, 0.0), 1.0)


@triton.jit
def _slope(x, GELU: tl.constexpr):
    """Returns the activation's derivative."""
    if GELU:
        bell = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * bell
    step = tl.minimum(tl.maximum(x * (1.0 / 6.0) + 0.5, 0.0), 1.0)  # as in _activate; 0 or 1 outside
    return tl.where(tl.abs(x) < 3.0, x * (1.0 / 3.0) + 0.5, step)


@triton.jit
def _load_row(rows, mask, W: tl.constexpr, C: tl.constexpr):
    """Loads one row of the grid: W tensors (BC,) in the stored type, masked elements as zeros."""
    row = ()
    for j in tl.static_range(W):
        row = row + (tl.load(rows + j * C, mask=mask, other=0.0),)
    return row


@triton.jit
def _zeros(W: tl.constexpr, BC: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns new zeros at each call: Triton's compiler loses loop variables that begin as the same tensor."""
    row = ()
    for j in tl.static_range(W):
        row = row + (tl.full((BC,), 0.0, COMPUTE),)
    return row


@triton.jit
def _add_row(sums, row, left, middle, right, W: tl.constexpr):
    """Returns ``sums[j] + left·row[j - 1] + middle·row[j] + right·row[j + 1]``, with zeros beyond the ends."""
    result = ()
    for j in tl.static_range(W):
        total = sums[j] + middle * row[j]
        if j > 0:
            total += left * row[j - 1]
        if j < W - 1:
            total += right * row[j + 1]
        result = result + (total,)
    return result


# Not specialised: an epoch's last, short batch runs the same kernel.
@triton.jit(do_not_specialize=["batch", "images"])
def _forward(x, weight, y, batch, x_stride, y_stride, images, H, W: tl.constexpr, C: tl.constexpr,
             GELU: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = channel < C
    nought = tl.full((BC,), 0, tl.int32)  # turns comparisons of scalars into masks, also in the interpreter
    COMPUTE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    w = _load_row(weight + channel * 9, mask, 9, 1)  # the nine weights of each channel
    first = tl.program_id(1) * images
    source = x + first.to(tl.int64) * x_stride + channel
    target = y + first.to(tl.int64) * y_stride + channel
    for _ in range(tl.minimum(images, batch - first)):
        above = _zeros(W, BC, COMPUTE)  # the convolution's row i - 1, without its bottom taps
        here = _zeros(W, BC, COMPUTE)  # its row i, with only its top taps
        ahead = _load_row(source, mask, W, C)
        for i in range(H + 1):
            row = ()
            for j in tl.static_range(W):
                row = row + (_activate(ahead[j].to(COMPUTE), GELU),)
            # The next row loads while this one is computed.
            ahead = _load_row(source + (i + 1) * W * C, mask & (nought + i + 1 < H), W, C)
            done = _add_row(above, row, w[6], w[7], w[8], W)
            line = target + (i - 1) * W * C
            for j in tl.static_range(W):
                value = _activate(done[j], GELU).to(y.dtype.element_ty)
                tl.store(line + j * C, value, mask=mask & (nought + i > 0))
            above = _add_row(here, row, w[3], w[4], w[5], W)
            here = _add_row(_zeros(W, BC, COMPUTE), row, w[0], w[1], w[2], W)
        source += x_stride
        target += y_stride


@triton.jit(do_not_specialize=["batch", "images"])
def _backward(x, weight, dy, dx, dw, batch, x_stride, dy_stride, dx_stride, images, H, W: tl.constexpr,
              C: tl.constexpr, GELU: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = channel < C
    nought = tl.full((BC,), 0, tl.int32)  # turns comparisons of scalars into masks, also in the interpreter
    COMPUTE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    w = _load_row(weight + channel * 9, mask, 9, 1)  # the nine weights of each channel
    sums = _zeros(9, BC, COMPUTE)
    first = tl.program_id(1) * images
    source = x + first.to(tl.int64) * x_stride + channel
    given = dy + first.to(tl.int64) * dy_stride + channel
    target = dx + first.to(tl.int64) * dx_stride + channel
    for _ in range(tl.minimum(images, batch - first)):
        z_above = _zeros(W, BC, COMPUTE)  # partial sums of the convolution's rows i - 1 and i
        z_here = _zeros(W, BC, COMPUTE)
        d_above = _zeros(W, BC, COMPUTE)  # partial sums of the input's gradient, rows i - 2 and i - 1
        d_here = _zeros(W, BC, COMPUTE)
        x_above = _zeros(W, BC, COMPUTE)  # x's rows i - 2 and i - 1
        x_here = _zeros(W, BC, COMPUTE)
        ahead = _load_row(source, mask, W, C)
        grads_ahead = _load_row(given, mask & (nought > 0), W, C)
        for i in range(H + 2):
            x_below = ()
            below = ()
            grads = ()
            for j in tl.static_range(W):
                x_below = x_below + (ahead[j].to(COMPUTE),)
                grads = grads + (grads_ahead[j].to(COMPUTE),)
                below = below + (_activate(x_below[j], GELU),)
            ahead = _load_row(source + (i + 1) * W * C, mask & (nought + i + 1 < H), W, C)
            grads_ahead = _load_row(given + i * W * C, mask & (nought + i < H), W, C)
            z = _add_row(z_above, below, w[6], w[7], w[8], W)  # row i - 1, complete
            z_above = _add_row(z_here, below, w[3], w[4], w[5], W)
            z_here = _add_row(_zeros(W, BC, COMPUTE), below, w[0], w[1], w[2], W)
            dz = ()
            for j in tl.static_range(W):
                dz = dz + (grads[j] * _slope(z[j], GELU),)
            # The gradient by the taps, from row i - 1 of dz and the three input rows around it.
            for j in tl.static_range(W):
                inputs = (_activate(x_above[j], GELU), _activate(x_here[j], GELU), below[j])
                added = ()
                for k in tl.static_range(9):
                    total = sums[k]
                    if j + 1 - k % 3 >= 0 and j + 1 - k % 3 < W:  # the column whose tap k reads column j
                        total += dz[j + 1 - k % 3] * inputs[k // 3]
                    added = added + (total,)
                sums = added
            # The transposed convolution.
            d = _add_row(d_above, dz, w[2], w[1], w[0], W)  # row i - 2, complete
            line = target + (i - 2) * W * C
            for j in tl.static_range(W):
                value = (d[j] * _slope(x_above[j], GELU)).to(dx.dtype.element_ty)
                tl.store(line + j * C, value, mask=mask & (nought + i > 1))
            d_above = _add_row(d_here, dz, w[5], w[4], w[3], W)
            d_here = _add_row(_zeros(W, BC, COMPUTE), dz, w[8], w[7], w[6], W)
            x_above = x_here
            x_here = x_below
        source += x_stride
        given += dy_stride
        target += dx_stride
    for k in tl.static_range(9):
        tl.store(dw + (tl.program_id(1) * 9 + k) * C + channel, sums[k], mask=mask)


def _launch(batch: int, grid: Grid, channels: int) -> tuple[tuple[int, int], int, int]:
    """Returns the launch grid (channel blocks, groups of images), images per group, and channels per program."""
    wide = 1 if grid[1] > 8 else 2  # channels per thread: wider loads if registers allow
    block = THREADS * wide if channels % (THREADS * wide) == 0 else THREADS
    blocks = triton.cdiv(channels, block)
    images = min(-(-POSITIONS // (grid[0] * grid[1])), max(1, batch * blocks // PROGRAMS))
    return (blocks, triton.cdiv(batch, images)), images, block


def _by_rows(tokens: Tensor) -> Tensor:
    """Returns ``tokens`` with each image contiguous. Between images there may be a gap, for a class token."""
    return tokens if tokens.stride()[1:] == (tokens.shape[2], 1) else tokens.contiguous()


def local_mix_forward(tokens: Tensor, weight: Tensor, grid: Grid, activation: str) -> Tensor:
    """Computes (B, N, C) → (B, N, C), of the type of ``tokens``; ``weight`` (C, 1, 3, 3) too, or float32."""
    x, weight = _by_rows(tokens), weight.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch, images, block = _launch(len(x), grid, x.shape[2])
    if y.numel():
        _forward[launch](
            x, weight, y, len(x), x.stride(0), y.stride(0), images, grid[0], W=grid[1], C=x.shape[2],
            GELU=activation == "gelu", BC=block, num_warps=THREADS // 32,
        )  # fmt: skip
    return y


def local_mix_backward(
    tokens: Tensor, weight: Tensor, grad: Tensor, grid: Grid, activation: str
) -> tuple[Tensor, Tensor]:
    """Returns the gradients by ``tokens`` (B, N, C) and ``weight`` (C, 1, 3, 3), from ``grad`` (B, N, C)."""
    x, dy, taps = _by_rows(tokens), _by_rows(grad), weight.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch, images, block = _launch(len(x), grid, x.shape[2])
    sum_type = torch.promote_types(x.dtype, torch.float32)
    sums = torch.empty((launch[1], 9, x.shape[2]), dtype=sum_type, device=x.device)
    if dx.numel():
        _backward[launch](
            x, taps, dy, dx, sums, len(x), x.stride(0), dy.stride(0), dx.stride(0), images, grid[0], W=grid[1],
            C=x.shape[2], GELU=activation == "gelu", BC=block, num_warps=THREADS // 32,
        )  # fmt: skip
    return dx, sums.sum(0).t().reshape(weight.shape).to(weight.dtype).contiguous()  # as register_fake says
