"""Checkpoints: written as a whole or not at all, and loaded without running code from the file."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vitlocal.errors import DataError
from vitlocal.models.factory import write_weights
from vitlocal.plan import Shape

KEPT = Path("checkpoints") / "kept"
FORMAT = 4  # of a checkpoint's content; increased when older checkpoints cannot be continued


def keep_weights(folder: Path, state: Mapping[str, Tensor], step: int, epoch: float, shape: Shape) -> None:
    """Writes the weights at ``step`` into the run's ``folder``, with epoch and shape."""
    (folder / KEPT).mkdir(parents=True, exist_ok=True)
    about = json.dumps({"step": step, "epoch": epoch, "shape": asdict(shape)})
    write_weights(folder / KEPT / f"{step:09d}.safetensors", state, about=about)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The content of a file of :func:`keep_weights`: the weights, and step, epoch and shape."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces ``path`` atomically. ``state`` holds tensors and plain values only. OSError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        try:
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:
            if "inline_container" not in str(error):
                raise  # an error of the device, for example
            # PyTorch's zip writer does not say why a write failed.
            raise DataError(
                f"{path}: the checkpoint could not be written ({str(error).splitlines()[0]}). Is the disk full? "
                "The previous checkpoint is intact; free some space and run the same command again"
            ) from error
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote, on the CPU.

    Raises DataError if the file is damaged or of another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable checkpoint ({str(error).splitlines()[0]}). Remove {path.parents[1]} and run the "
            "same command again to train from the start"
        ) from error
    if state.get("format") != FORMAT:
        raise DataError(
            f"{path} was written by another version of vitlocal (format {state.get('format', 1)}, expected {FORMAT}). "
            f"Continue with that version, or remove {path.parents[1]} and run the command again to train from the start"
        )
    return state
