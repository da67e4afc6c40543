"""This machine: the resources that a process may use, and its description in results."""

import ctypes
import gc
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from vitlocal.paths import IN_CHECKOUT

LIBRARIES = ("torch", "torchvision", "timm", "ffcv", "numba", "numpy", "opencv-python", "pillow", "nvidia-dali-cuda120")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def cores() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def _bound_alone() -> bool:
    """Whether this process may use fewer cores than the process that launched it."""
    try:
        return cores() < len(os.sched_getaffinity(os.getppid()))
    except (AttributeError, OSError):  # macOS; or the parent is gone, or may not be asked
        return False


def decoder_threads(on_accelerator: bool, processes: int = 1) -> int:
    """The decoder threads of each of ``processes`` processes on this machine: one for each of its cores.

    Cores that this process was bound to alone, as by Slurm, are not shared with the others. With an accelerator, two
    cores are left to the threads that launch its work.
    """
    share = cores() if _bound_alone() else cores() // processes
    return max(1, share - 2 if on_accelerator else share)


def can_compile_kernels() -> bool:
    """Whether Triton, and so PyTorch's compiler, can compile for a GPU: it calls a C compiler with Python's headers."""
    compiler = os.environ.get("CC") or "gcc"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    found = shutil.which(compiler) or shutil.which("clang")
    return importlib.util.find_spec("triton") is not None and found is not None and headers.exists()


def memory() -> int:
    """The bytes of memory that this process may use: the machine's, or its control group's limit if that is less."""
    found = _total_memory()
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(limit).read_text()))
        except (OSError, ValueError):  # the file is missing, or says "max"
            continue
    return found


def memory_stalls(pressure: Path = Path("/proc/pressure/memory")) -> float:
    """The fraction of the last minute in which all processes waited for memory; 0 if Linux does not report it."""
    with suppress(OSError):
        if match := re.search(r"^full.* avg60=([\d.]+)", pressure.read_text(), re.MULTILINE):
            return float(match[1]) / 100
    return 0.0


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step, instead of returning each large tensor's pages.

    On a CPU every step frees and allocates the same activations; the page faults took a fifth of its time.
    """
    mallopt, trim_threshold, mmap_threshold = getattr(ctypes.CDLL(None), "mallopt", None), -1, -3
    if mallopt is None:  # not glibc
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**30)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """The kernel sends this process the signal ``number`` when its parent ends, however that ends. Linux only."""
    parent, prctl = os.getppid(), getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), number)


def freeze_objects() -> None:
    """Excludes the objects that exist now, also those of libraries, from garbage collection.

    Otherwise a collection stops the process for half a second between steps. ``gc.unfreeze()`` undoes it.
    """
    gc.collect()
    gc.freeze()


def leave(status: int) -> NoReturn:
    """Ends the process at once with ``status``. Everything that was opened must be closed.

    Python would spend two seconds on destroying modules and objects one by one.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe or stream
            stream.flush()
    os._exit(status)


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPU."""
    import torch  # takes seconds, and not every caller of this file needs it

    processors = Path("/proc/cpuinfo")  # of Linux
    name = re.search(r"^model name\s*: (.*)$", processors.read_text() if processors.exists() else "", re.MULTILINE)
    libc = " ".join(platform.libc_ver())
    return {
        "cpu": name[1] if name else platform.processor(),
        "cores": cores(),
        "memory_gib": round(_total_memory() / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": ", ".join([platform.system(), *([libc] if libc.strip() else [])]),
    }


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """The versions of Python and of the installed libraries that results may depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """The commit of this code, with ``-dirty`` if files differ from it; None outside a checkout."""
    if not IN_CHECKOUT:  # another project's checkout may hold the installed package
        return None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
