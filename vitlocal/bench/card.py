"""What a machine has for training: python -m vitlocal.bench card [--json FILE]

Imports every library, describes the GPU, calls the native code, and compiles a small function. Prints everything that
is missing, with its remedy, and fails if something that training needs is.
"""

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module, metadata
from typing import Any

from vitlocal.bench.measurement import write_json
from vitlocal.bench.parsing import bench_parser
from vitlocal.errors import DataError
from vitlocal.machine import can_compile_kernels, cores

NEEDED = {  # modules, and the packages that have them
    "torch": "torch", "torchvision": "torchvision", "timm": "timm", "numpy": "numpy", "PIL": "pillow",
    "yaml": "pyyaml", "safetensors": "safetensors", "tqdm": "tqdm", "tensorboard": "tensorboard",
    "matplotlib": "matplotlib", "fastargs": "fastargs", "terminaltables": "terminaltables",
}  # fmt: skip
# For the kernels, parquet shards, the lists of ILSVRC2012, and the tests.
USEFUL = {"triton": "triton", "pyarrow": "pyarrow", "scipy": "scipy", "pytest": "pytest", "xdist": "pytest-xdist"}


def smi(query: str) -> str | None:
    """What nvidia-smi answers for the first GPU; None without it."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    return None


def describe_gpu() -> dict[str, Any]:
    """The GPU and its memory; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    properties, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info(0)
    return {
        "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1), "bf16": torch.cuda.is_bf16_supported(),
    }  # fmt: skip


def call_native_code() -> None:
    from vitlocal.data.native import library

    library()


def compile_something(device: str) -> float:
    """Compiles a function forward and backward. Returns the seconds that it took."""
    import torch

    if device == "cuda" and not can_compile_kernels():
        raise DataError(
            "Triton finds no C compiler with Python's headers: install gcc, libc6-dev and python3-dev, or name a "
            "compiler (CC=COMMAND); until then no step is compiled, and there is no fused kernel"
        )
    if device == "cpu" and shutil.which("g++") is None:
        raise DataError("PyTorch compiles for a CPU with a C++ compiler, and there is no g++")
    began, values = time.perf_counter(), torch.randn(64, device=device, requires_grad=True)
    torch.compile(lambda x: x.sin().sum())(values).backward()
    torch.testing.assert_close(values.grad, values.detach().cos())
    return round(time.perf_counter() - began, 1)


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("card", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device to train on (default: cuda)")
    options: argparse.Namespace = parser.parse_args(argv)
    row: dict[str, Any] = {}
    problems: list[str] = []

    def note(**found: Any) -> None:
        row.update(found)
        print("".join(f"{name:16} {value}\n" for name, value in found.items()), end="", flush=True)

    def attempt(what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # of any library
            problems.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}")
            print("problem:", problems[-1], flush=True)
            return None

    note(cores=cores(), driver=smi("driver_version"))
    note(**(attempt("the GPU", describe_gpu) or {}))
    if options.device == "cuda" and "gpu" not in row:
        problems.append("the GPU: PyTorch finds none")
    for module, package in {**NEEDED, **USEFUL}.items():
        try:
            import_module(module)
            note(**{package: metadata.version(package)})
        except Exception as error:  # a broken library raises anything
            note(**{package: f"cannot be imported ({type(error).__name__}: {error})"})
            if module in NEEDED:
                problems.append(f"{package}: {row[package]}")
    attempt("the native code", call_native_code)
    note(compile_seconds=attempt("the compiler", lambda: compile_something(options.device)))
    write_json(options.json, "a machine: its GPU, the versions of libraries, and what is missing", [row],
               problems=problems)  # fmt: skip
    if problems:
        raise DataError("\n       ".join(problems))
