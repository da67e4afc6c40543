"""Chooses the device of a process, and reads numbers from it without waiting."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

from vitlocal.errors import ConfigError
from vitlocal.machine import keep_freed_memory

Note = TypeVar("Note")


def choose_device(name: str, local_rank: int = 0, local_world_size: int = 1, world: int = 1) -> torch.device:
    """The device of ``run.device``. Each of several processes on a machine gets a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and local_world_size > 1:
        raise ConfigError(f"run.device: {local_world_size} processes cannot share {name}; use cuda, a GPU for each")
    if name == "cuda" and world > 1:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"run.device: '{name}' cannot be used here ({str(error).splitlines()[0]})"
            + (f"; {local_world_size} processes need a GPU each" if world > 1 else "")
        ) from error
    return device


def prepare_device(
    name: str, threads: int = 0, local_rank: int = 0, local_world_size: int = 1, world: int = 1
) -> torch.device:
    """Returns the device of ``run.device`` and makes it current. Sets the CPU ``threads`` (0: PyTorch's default)."""
    device = choose_device(name, local_rank, local_world_size, world)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)  # streams and events are made on the current device
    if threads:
        torch.set_num_threads(threads)
    return device


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all its work. Costs nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class AsyncScalar(Generic[Note]):
    """Reads a number from the device without waiting: :meth:`read` starts the copy, :meth:`poll` returns it later."""

    def __init__(self, device: torch.device):
        self._copies = device.type == "cuda"
        self._value = torch.zeros((), dtype=torch.float64, pin_memory=self._copies)
        self._copied: torch.cuda.Event | None = None
        self._note: Note | None = None

    @property
    def pending(self) -> bool:
        """Whether a value is on its way."""
        return self._note is not None

    def read(self, value: Tensor, note: Note) -> None:
        """Starts to copy ``value`` (0-D). ``note`` comes back with it. One copy at a time."""
        assert not self.pending
        self._value.copy_(value, non_blocking=True)
        self._note = note
        if self._copies:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def poll(self) -> tuple[float, Note] | None:
        """The value and its note, once, as soon as the copy is done; None before that."""
        if self._note is None or (self._copied is not None and not self._copied.query()):
            return None
        found, self._note = (float(self._value), self._note), None
        return found
