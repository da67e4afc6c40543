"""The fused local FFN against PyTorch's compiler: python -m vitlocal.bench kernel [--sides 2,8,14] [--json FILE]

Runs activation, depth-wise convolution and activation forward and backward, on square grids of patches: once with the
Triton kernels, once as PyTorch's operations that torch.compile fuses. A row has the milliseconds and the peak memory of
both, and their errors: the largest norm of the difference to float64, relative to its norm, of the result and of the
gradients. The command fails if the fused kernels' error is more than twice that of PyTorch's operations.

The file of --json is the table by which train.kernel=auto chooses in compiled steps. To use it on this machine, name it
in the variable VITLOCAL_LOCAL_MIX_TIMES. On a CPU, Triton's interpreter runs the kernels: the times mean nothing.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitlocal.bench.measurement import text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser, numbers
from vitlocal.errors import ConfigError, DataError
from vitlocal.models.local_mix import MAX_WIDTH, fused_local_mix, plain_local_mix
from vitlocal.train.devices import autocast, choose_device, choose_precision
from vitlocal.train.timing import Timing, peak_memory, reset_peak

DEFAULTS = {"cuda": ((2, 4, 6, 8, 10, 12, 14), 1536, 1024), "cpu": ((2, 3), 16, 2)}  # sides, channels, batch size
ROUNDS = 5  # turns of each version; the median counts
GPU_TURN_MS, CPU_CALLS = 20, 3  # length of a turn
COLUMNS = {
    "grid": ("side", "d"), "fused ms": ("fused_ms", ".3f"), "plain ms": ("plain_ms", ".3f"),
    "plain / fused": ("plain_to_fused", ".2f"), "fused MiB": ("fused_peak_mib", ",d"),
    "plain MiB": ("plain_peak_mib", ",d"), "fused error": ("fused_error", ".1e"), "plain error": ("plain_error", ".1e"),
}  # fmt: skip

Run = Callable[[], tuple[Tensor, ...]]  # the result and the gradients by tokens and weights


def make_runs(side: int, channels: int, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    """The two versions, and "exact" in float64, on the same operands."""
    generator = torch.Generator().manual_seed(side)
    shapes = (batch, side * side, channels), (channels, 1, 3, 3), (batch, side * side, channels)
    tokens, weight, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    tokens, grad, weight = (2 * tokens).to(device, dtype), grad.to(device, dtype), (weight / 2).to(device)

    def fused(tokens: Tensor, weight: Tensor) -> Tensor:
        return fused_local_mix(tokens, weight, side, side, "h_swish")

    def plain(tokens: Tensor, weight: Tensor) -> Tensor:
        return plain_local_mix(tokens, weight, (side, side), "h_swish")

    def run_of(mix: Callable[[Tensor, Tensor], Tensor], count: int = batch, double: bool = False) -> Run:
        inputs = [part.double() if double else part for part in (tokens[:count], weight, grad[:count])]
        leaves = [part.detach().requires_grad_() for part in inputs[:2]]

        def run() -> tuple[Tensor, ...]:
            with autocast(device, torch.float32 if double else dtype):  # as in a step: the weights are float32
                result = mix(*leaves)
            return (result.detach(), *torch.autograd.grad(result, leaves, inputs[2]))

        return run

    few = min(batch, 64)  # float64 needs memory
    compiled = torch.compile(plain, dynamic=False)
    return {
        "fused": run_of(fused), "plain": run_of(compiled), "fused, few": run_of(fused, few),
        "plain, few": run_of(plain, few), "exact, few": run_of(plain, few, double=True),
    }  # fmt: skip


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest |found - exact| / |exact|, in Euclidean norms."""
    pairs = zip(found, exact, strict=True)
    return max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs)


def milliseconds(run: Run, device: torch.device) -> float:
    """The milliseconds of a call in one turn. On a GPU a CUDA graph repeats it, because launches take longer."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(run, rep=GPU_TURN_MS, return_mode="median"))
    return 1e3 * Timing().measure(run, device, CPU_CALLS)


def compare(side: int, channels: int, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The row of one grid."""
    runs, peaks = make_runs(side, channels, batch, dtype, device), {}
    exact = runs["exact, few"]()
    errors = {name: relative_error(runs[f"{name}, few"](), exact) for name in ("fused", "plain")}
    del exact
    for name in errors:
        runs[name]()  # compiles
        before = reset_peak(device)
        runs[name]()
        peaks[name] = round((peak_memory(device) - before) / 2**20) if device.type == "cuda" else None
    turns = [{name: milliseconds(runs[name], device) for name in errors} for _ in range(ROUNDS)]
    times = {name: statistics.median(turn[name] for turn in turns) for name in errors}
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "dtype": str(dtype).removeprefix("torch."), "side": side, "channels": channels, "batch_size": batch,
        **{f"{name}_ms": round(value, 5) for name, value in times.items()},
        "plain_to_fused": round(times["plain"] / times["fused"], 3),
        **{f"{name}_peak_mib": peak for name, peak in peaks.items()},
        **{f"{name}_error": float(f"{error:.3g}") for name, error in errors.items()},
    }  # fmt: skip


def mend_interpreter() -> None:
    """Lets the interpreter of Triton 3.6 count in loops: numpy 2.5 converts no array of one element to a number."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("kernel", __doc__)
    add = parser.add_argument
    add("--device", default="auto", help="device (default: a GPU if there is one)")
    add("--sides", type=numbers, metavar="LIST", help="sides of the grids (default: 2,4,...,14; 2,3 on a CPU)")
    add("--channels", type=at_least(1), help="hidden width (default: 1536, that of a small model; 16 on a CPU)")
    add("--batch", type=at_least(1), help="images (default: 1024; 2 on a CPU)")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="type of the tokens")
    options = parser.parse_args(argv)
    device = choose_device(options.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it decorates the kernels, which is later
        mend_interpreter()
    sides, channels, batch = DEFAULTS[device.type]
    sides, channels, batch = options.sides or sides, options.channels or channels, options.batch or batch
    if max(sides) > MAX_WIDTH:
        raise ConfigError(f"--sides: got {max(sides)}, expected at most {MAX_WIDTH}, the most columns of the kernel")
    dtype, rows = choose_precision(options.precision, device), []
    what = "the fused local FFN and the same operations compiled by PyTorch: milliseconds, peak memory, errors"
    for side in sides:
        rows.append(compare(side, channels, batch, dtype, device))
        write_json(options.json, what, rows)  # each time: a limit may end it
        torch.compiler.reset()
    print(text_table(rows, COLUMNS))
    print(f"{batch} images, {channels} channels, {dtype}, forward and backward, on {device}")
    if wrong := [row for row in rows if not row["fused_error"] <= 2 * row["plain_error"] + 1e-6]:  # or not a number
        sides_of = ", ".join(str(row["side"]) for row in wrong)
        raise DataError(f"the fused kernel is wrong at grids of side {sides_of}: see the errors above")
