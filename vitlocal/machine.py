"""This machine: what a process may use of it, and what is told of it where something was measured."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = ("torch", "torchvision", "timm", "ffcv", "numba", "numpy", "opencv-python", "pillow", "nvidia-dali-cuda120")


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's where that is less."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            there = min(there, int(Path(limit).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return there


def memory_stalls(pressure: Path = Path("/proc/pressure/memory")) -> float:
    """The part of the last minute in which nothing ran, for want of memory; 0 where Linux does not tell."""
    try:
        full = next(line for line in pressure.read_text().splitlines() if line.startswith("full"))
        return float(re.search(r"avg60=([\d.]+)", full)[1]) / 100
    except (OSError, StopIteration, TypeError):
        return 0.0


def awake_seconds(schedule: Path = Path("/proc/self/schedstat")) -> float:
    """What this process's main thread has spent on a processor or waiting for one; not for a disk, say.

    Where Linux does not tell, the processor time of all its threads.
    """
    try:
        running, waiting = schedule.read_text().split()[:2]
        return (int(running) + int(waiting)) / 1e9 or time.process_time()
    except (OSError, ValueError):
        return time.process_time()


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step, where it would hand each large tensor's pages back.

    On a CPU every step frees and takes the same activations; faulting their pages in again took a fifth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc; others have their own ways
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def keep_objects() -> None:
    """Takes the objects that there are, libraries and all, out of the garbage collector's rounds.

    A round through them stops the process for half a second, amid steps. ``gc.unfreeze()`` undoes it.
    """
    gc.collect()
    gc.freeze()


def leave(status: int) -> NoReturn:
    """Ends the process with ``status``, at once: what was opened must be closed by now.

    Python would take every module and object apart, two seconds' work, of what the system takes back in 0.1 s.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe, a closed stream
            stream.flush()
    os._exit(status)


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPU."""
    import torch  # it takes seconds, and not all who ask for cores want it

    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": cores(),
        "memory_gib": round(memory / 2**20, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": ", ".join([platform.system(), *([" ".join(libc)] if (libc := platform.libc_ver())[0] else [])]),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def versions() -> dict[str, str]:
    """Of Python, and of the libraries that results may depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """The commit of this code, ``-dirty`` where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
