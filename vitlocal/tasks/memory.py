"""Errors for lack of memory, which name the work and the option to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitlocal.errors import DeviceMemoryError, first_line

# In messages of PyTorch's allocators for GPUs, MPS and XPU, of those for CPUs, and of cuBLAS.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def explained_memory_errors(work: str, size: int, count: int, remedy: str) -> Iterator[None]:
    """A context in which an error for lack of memory becomes a :class:`DeviceMemoryError` with the ``remedy``.

    ``work`` is done on ``count`` images of ``size`` px.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        what = f"no memory for {work} of {count} images of {size} px"
        raise DeviceMemoryError(f"{what}: {remedy} ({first_line(error)})") from error
