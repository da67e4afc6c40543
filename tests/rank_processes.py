"""Starts the processes of a run that trains together, without torchrun, as Slurm does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start_training(words: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """``train_imagenet.py`` with these arguments, in a process of its own; its output is one pipe."""
    return subprocess.Popen(
        [sys.executable, "train_imagenet.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | (environment or {}),
    )  # fmt: skip


def start_ranks(world: int, words: Sequence[str]) -> list[subprocess.Popen[str]]:
    """``world`` such processes, which are the ranks of one run on this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)}  # fmt: skip
    return [start_training(words, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
