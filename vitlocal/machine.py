"""What this process may use of the machine."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path


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


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step, where it would hand each large tensor's pages back.

    On a CPU every step frees and takes the same activations; faulting their pages in again took a fifth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc; others have their own ways
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)
