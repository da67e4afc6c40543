"""Starts the processes of a run that trains together, without torchrun, as Slurm does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
# train_imagenet.py, but its seventh step waits for a signal. A fast run might otherwise end before a test sends it.
WAITING = """
import time
from vitlocal.launch import train
from vitlocal.train.trainer import Trainer
original = Trainer.train_step
def train_step(self, batch, plan):
    deadline = time.monotonic() + 120
    while self._now.step == 6 and not self.signals.received and time.monotonic() < deadline:
        time.sleep(0.01)
    return original(self, batch, plan)
Trainer.train_step = train_step
train()
"""


def start_training(words: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """``train_imagenet.py`` with these arguments, in a process of its own; its output is one pipe."""
    return subprocess.Popen(
        [sys.executable, "train_imagenet.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | (environment or {}),
    )  # fmt: skip


def free_port() -> int:
    """A port on which nothing listens. The system gives none of this range to other sockets before it is used."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise AssertionError("no free port")


def start_ranks(world: int, words: Sequence[str]) -> list[subprocess.Popen[str]]:
    """``world`` such processes, which are the ranks of one run on this machine."""
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port())}  # fmt: skip
    return [start_training(words, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
