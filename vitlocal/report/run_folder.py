"""Reads the folder of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitlocal.jsonl import read_lines


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's ``log.jsonl``, oldest first."""
    return read_lines(folder / "log.jsonl")
