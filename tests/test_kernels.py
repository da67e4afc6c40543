"""The fused local FFN compared with the plain version in float64, on a GPU or under Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from compilers import needs_cxx
from torch import Tensor, nn

from vitlocal.bench.kernel import mend_interpreter
from vitlocal.errors import ConfigError
from vitlocal.models import local_mix as module
from vitlocal.models.block import BlockShape
from vitlocal.models.lffn import LocalFeedForward
from vitlocal.models.local_mix import _fused_backward, can_fuse, fused_local_mix, local_mix, plain_local_mix

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton 3.6's interpreter warns with numpy 1.26.
pytestmark = [pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")]
if DEVICE == "cuda":  # elsewhere, the same tests run under the interpreter
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Imports the kernels, for the interpreter if there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")  # Triton reads it when it decorates the kernels
            mend_interpreter()
        yield importlib.import_module("vitlocal.models.kernels")


def operands(grid: tuple[int, int], batch: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens after a class token, weights, and a gradient by the result."""
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    count = grid[0] * grid[1]
    shapes = (batch, count + 1, channels), (channels, 1, 3, 3), (batch, count, channels)
    tokens, weight, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    parts = (2 * tokens).to(DEVICE, dtype)[:, 1:], (weight / 2).to(DEVICE, torch.float32), grad.to(DEVICE, dtype)
    return parts if dtype != torch.float64 else (parts[0], (weight / 2).to(DEVICE), parts[2])


def compare(grid: tuple[int, int], batch: int, channels: int, dtype: torch.dtype, activation: str = "h_swish") -> None:
    tokens, weight, grad = operands(grid, batch, channels, dtype)
    exact_tokens, exact_weight = tokens.double().requires_grad_(), weight.double().requires_grad_()
    expected = plain_local_mix(exact_tokens.contiguous(), exact_weight, grid, activation)
    expected.backward(grad.double())
    tokens, weight = tokens.detach().requires_grad_(), weight.requires_grad_()
    result = fused_local_mix(tokens, weight, *grid, activation)
    result.backward(grad)
    assert result.dtype == dtype and result.is_contiguous()
    # The kernels sum in float32, so 16-bit results differ only by their last rounding. (The interpreter truncates
    # bfloat16.)
    unit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
    small = min(unit, 4e-6)  # absolute, for results close to zero
    torch.testing.assert_close(result.double(), expected, rtol=unit, atol=small)
    torch.testing.assert_close(tokens.grad.double(), exact_tokens.grad, rtol=unit, atol=small)
    scale = exact_weight.grad.abs().max()
    assert (weight.grad.double() - exact_weight.grad).abs().max() <= 2e-6 * scale


@pytest.mark.parametrize("side", range(2, 15))
def test_every_square_grid(side: int) -> None:
    compare((side, side), 1, 20, torch.float32)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (6, 1), (3, 7), (9, 4), (2, 16)])
def test_other_grids(grid: tuple[int, int]) -> None:
    compare(grid, 2, 20, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["h_swish", "gelu"])
def test_dtypes_and_activations(dtype: torch.dtype, activation: str) -> None:
    compare((4, 5), 2, 20, dtype, activation)


@pytest.mark.parametrize("channels", [130, 256])
def test_several_programs_and_images_per_program(kernels, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    assert kernels._launch(7, (2, 3), channels)[1] > 1
    compare((2, 3), 7, channels, torch.float32)


def test_gradients_at_the_kinks_of_h_swish() -> None:
    tokens = torch.tensor([-3.0, 3.0, -4.0, 4.0], device=DEVICE).view(1, 4, 1).expand(1, 4, 3).contiguous()
    weight = torch.zeros(3, 1, 3, 3, device=DEVICE)
    weight[:, :, 1, 1] = 1  # the convolution is the identity
    results = []
    for mix in (
        lambda t: fused_local_mix(t, weight, 2, 2, "h_swish"),
        lambda t: local_mix(t, weight, (2, 2), kernel="plain"),
    ):
        leaf = tokens.clone().requires_grad_()
        mix(leaf).sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_an_empty_batch() -> None:
    tokens = torch.empty(0, 6, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, 1, 3, 3, device=DEVICE, requires_grad=True)
    fused_local_mix(tokens, weight, 2, 3, "h_swish").sum().backward()
    assert tokens.grad.shape == tokens.shape and not weight.grad.any()


def test_gradients_equal_finite_differences() -> None:
    tokens, weight, _ = operands((2, 3), 1, 2, torch.float64)
    tokens, weight = tokens.contiguous().requires_grad_(), weight.requires_grad_()
    torch.autograd.gradcheck(lambda t, w: fused_local_mix(t, w, 2, 3, "gelu"), (tokens, weight), atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck raises this warning
def test_opcheck() -> None:
    tokens, weight, _ = operands((2, 2), 1, 4, torch.float32)
    arguments = (tokens.contiguous().requires_grad_(), weight.requires_grad_(), 2, 2, "h_swish")
    torch.library.opcheck(fused_local_mix, arguments)
    torch.library.opcheck(
        _fused_backward, (tokens.detach(), weight.detach(), torch.ones(1, 4, 4, device=DEVICE), 2, 2, "h_swish")
    )


@needs_cxx
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_inductor_gives_the_same_gradients() -> None:
    """Inductor relies on the strides that register_fake returns."""
    part = LocalFeedForward(BlockShape(8, 1, 16, True, "h_swish"), "layer", True).to(DEVICE)
    part.kernel = "fused"
    compiled, found = torch.compile(part), []
    for run in (part, compiled):
        patches = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
        part.zero_grad()
        run(patches, (2, 3)).square().sum().backward()
        found.append([patches.grad, *(parameter.grad for parameter in part.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_torch_compile_makes_one_graph() -> None:
    part = LocalFeedForward(BlockShape(8, 1, 16, True, "h_swish"), "layer", True).to(DEVICE)
    nn.init.normal_(part.norm.weight)
    part.kernel = "fused"
    patches = torch.randn(2, 7, 8, device=DEVICE)[:, 1:]
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda t: part(t, (2, 3)), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(patches), part(patches, (2, 3)))
    assert len(graphs) == 1 and "vitlocal.local_mix" in graphs[0].code
    part.kernel = "plain"
    torch.testing.assert_close(compiled(patches), part(patches, (2, 3)), rtol=1e-5, atol=1e-5)


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(module, "fused_local_mix", lambda tokens, *rest: used.append("fused") or tokens)
    monkeypatch.setattr(module, "plain_local_mix", lambda tokens, *rest: used.append("plain") or tokens)
    tokens, weight = torch.zeros(1, 34, 4, device=DEVICE), torch.zeros(4, 1, 3, 3, device=DEVICE)
    for grid, kernel in (((2, 17), "auto"), ((17, 2), "auto"), ((17, 2), "plain"), ((17, 2), "fused")):
        local_mix(tokens, weight, grid, kernel=kernel)
    with pytest.raises(ConfigError, match="up to 16 columns, not 17"):
        local_mix(tokens, weight, (2, 17), kernel="fused")
    assert used == ["plain", "fused" if DEVICE == "cuda" else "plain", "plain", "fused"]


COMPILE = """
import os, re, subprocess, sys, tempfile, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from vitlocal.models import kernels

for kernel in (kernels._forward, kernels._backward):
    for width, block, gelu in ((8, 256, False), (16, 128, True)):
        fixed = {"W": width, "C": 1536, "GELU": gelu, "BC": block}
        types = {"weight": "*fp32", "dw": "*fp32"} | dict.fromkeys(("x", "y", "dx", "dy"), "*bf16")
        signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
        constants = {(place,): fixed[name] for place, name in enumerate(kernel.arg_names) if name in fixed}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        binary = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.THREADS // 32})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        print(kernel.__name__, width, *re.search(r"REG:(\\d+) STACK:(\\d+) SHARED:\\d+ LOCAL:(\\d+)", usage).groups())
"""


def test_gpu_kernels_use_registers_only() -> None:
    """Compiles for sm_90 with Triton's compiler and assembler, which need no GPU."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"} | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for name, width, registers, stack, local in lines:
        assert int(registers) <= 255 and (stack, local) == ("0", "0"), (name, width)


def test_torch_compile_can_trace_can_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph break here would split every local FFN of a compiled model."""

    monkeypatch.setattr("vitlocal.models.local_mix.CAN_COMPILE", True)

    def chosen(tokens: torch.Tensor) -> torch.Tensor:
        return tokens + 1 if can_fuse(torch.device("cuda"), (4, 4)) else tokens - 1

    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 1
