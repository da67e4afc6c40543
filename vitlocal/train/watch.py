"""Reads a number off the device without waiting for it."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

Note = TypeVar("Note")


class Watch(Generic[Note]):
    """Takes a look at a 0-D tensor: :meth:`look` begins it, :meth:`seen` has it some steps later."""

    def __init__(self, device: torch.device):
        self.copies = device.type == "cuda"
        self._value = torch.zeros((), dtype=torch.float64, pin_memory=self.copies)
        self._copied: torch.cuda.Event | None = None
        self._note: Note | None = None

    @property
    def looking(self) -> bool:
        return self._note is not None

    def look(self, value: Tensor, note: Note) -> None:
        """Begins to read ``value``; ``note`` comes back with it. One look at a time."""
        assert not self.looking
        self._value.copy_(value, non_blocking=True)
        self._note = note
        if self.copies:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def seen(self) -> tuple[float, Note] | None:
        """The value and its note, once and as soon as the device has got there; else None."""
        if self._note is None or (self._copied is not None and not self._copied.query()):
            return None
        seen, self._note = (float(self._value), self._note), None
        return seen


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
