"""Checkpoints: written whole or not at all, and loaded without running what they contain."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from vitlocal.errors import DataError


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces ``path`` atomically; ``state`` holds tensors and plain values only. OSError where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:
            if "inline_container" not in str(error):
                raise  # the device's, say
            # PyTorch's zip writer does not pass on why a write failed.
            raise DataError(
                f"{path}: the checkpoint could not be written ({str(error).splitlines()[0]}). Is the disk full? "
                "The checkpoint before it stands; make room and run the same command again"
            ) from error
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote, on the CPU; DataError where the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable checkpoint ({str(error).splitlines()[0]}). Remove it and run the same command "
            "again to train from the start"
        ) from error
