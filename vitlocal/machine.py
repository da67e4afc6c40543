"""What this process may use of the machine."""

from __future__ import annotations

import ctypes
import os


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step, where it would hand each large tensor's pages back.

    On a CPU every step frees and takes the same activations; faulting their pages in again took a fifth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc; others have their own ways
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)
