"""Faults of processes as a whole: Ctrl-C during imports, and processes of a run that are killed or stopped."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator

from kinds import Bench, Result, fault
from rank_processes import start_ranks, start_training

from vitlocal.train.checkpoint import CHECKPOINT

STARTED = 0.15  # seconds after which Python itself has started
IMPORTED = 3.0  # seconds after which everything is imported
NOTICED = 60.0  # seconds within which a lost process must be named


@fault
def interrupted_imports(bench: Bench, count: int) -> Iterator[Result]:
    """Ctrl-C while the libraries are loaded: no traceback, and status 130, or 0 if the run has ended already."""
    result, folder = Result("Ctrl-C during imports"), bench.fresh("run")
    for _ in range(max(1, count // 20)):
        process = start_training(bench.training(folder))
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
    options = bench.training(folder, "sizes", **{"budget.length": "100000steps", "methods": "none"})
    processes = start_ranks(2, options)
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
