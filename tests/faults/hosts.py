"""Faults of processes as a whole: Ctrl-C during imports, and processes of a run that are killed or stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kinds import Bench, Result, fault

from vitlocal.train.checkpoint import CHECKPOINT

ROOT = Path(__file__).parent.parent.parent
STARTED = 0.15  # seconds after which Python itself has started
IMPORTED = 3.0  # seconds after which everything is imported
NOTICED = 60.0  # seconds within which a lost process must be named


def start(words: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "train_imagenet.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | (environment or {}),
    )  # fmt: skip


@fault
def interrupted_imports(bench: Bench, count: int) -> Iterator[Result]:
    """Ctrl-C while the libraries are loaded: one line, status 130, and no folder."""
    result, folder = Result("Ctrl-C during imports"), bench.fresh("run")
    for _ in range(max(1, count // 20)):
        process = start(bench.training(folder))
        time.sleep(bench.random.uniform(STARTED, IMPORTED))
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=NOTICED)
        right = process.returncode in (0, 130) and "Traceback" not in text
        result.add(None if right else f"status {process.returncode}: {text[-300:]}")
        bench.fresh("run")
    yield result


@fault
def lost_processes(bench: Bench, count: int) -> Iterator[Result]:
    """One of two processes is killed or stopped. The other one names it within a minute, with status 1."""
    for number in (signal.SIGKILL, signal.SIGSTOP):
        result = Result(f"{number.name} to one of two processes")
        for _ in range(max(1, count // 200)):
            result.add(lose_one(bench, number, bench.random.randrange(2)))
        yield result


def lose_one(bench: Bench, number: signal.Signals, lost: int) -> str | None:
    """Trains with two processes, and sends a signal to one of them. Returns what is wrong with the other's end."""
    folder = bench.fresh("run")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = bench.training(folder, "sizes", **{"budget.length": "100000steps", "methods": "none"})
    processes = [start(options, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        while not (folder / CHECKPOINT).exists():
            if any(process.poll() is not None for process in processes):
                return "a process ended before the fault"
            time.sleep(0.05)
        time.sleep(bench.moment(2.0))
        processes[lost].send_signal(number)
        try:
            text, _ = processes[1 - lost].communicate(timeout=NOTICED)
        except subprocess.TimeoutExpired:
            return f"rank {1 - lost} waits for rank {lost} for more than {NOTICED:.0f} s"
        right = processes[1 - lost].returncode == 1 and f"has lost rank {lost}" in text and "Traceback" not in text
        return None if right else f"status {processes[1 - lost].returncode}: {text[-300:]}"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
