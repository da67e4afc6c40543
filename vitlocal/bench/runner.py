"""Trains planned runs, several at a time, each on its share of the machine. A run that is stopped saves first."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from vitlocal.bench.planned_runs import ROOT, PlannedRun
from vitlocal.bench.runs import summary
from vitlocal.errors import ConfigError, Interrupted
from vitlocal.machine import memory_stalls
from vitlocal.report.run_folder import duration
from vitlocal.train.run_folder import in_use

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STALL_LIMIT = 0.02  # of a minute without free memory: above it, the bench prints a note


class Runner:
    """Trains runs in ``jobs`` places. Each place has an equal share of the cores, and its own GPU if there are GPUs.

    In each place, ``together`` runs share the cores. They meet the same slow and fast minutes. To make this true for
    all runs that are compared, the runs of a seed start when those of the seed before have ended.

    ``gpus`` are GPUs as CUDA_VISIBLE_DEVICES names them. Raises ConfigError if there are fewer places.
    """

    def __init__(self, jobs: int, together: int, folder: Path, gpus: Sequence[str] = ()):
        self.folder, self.gpus, self.by_seeds = folder, gpus, together > 1
        self.cores = sorted(os.sched_getaffinity(0))
        if not 1 <= jobs <= len(self.cores):
            raise ConfigError(f"--jobs: got {jobs}, expected 1 to {len(self.cores)}, the number of cores")
        if 0 < len(gpus) < jobs:
            raise ConfigError(f"--jobs: got {jobs}, expected at most {len(gpus)}, the number of GPUs")
        if gpus and together > 1:
            raise ConfigError(
                "--together: runs that share a GPU cannot be timed; leave it out, or train on the CPU: --run.device=cpu"
            )
        self.share = len(self.cores) // jobs
        self.free = [*range(jobs)] * together  # places
        self.running: dict[subprocess.Popen[bytes], tuple[PlannedRun, int]] = {}  # runs and their places
        self.signal: int | None = None
        self._stall_noted = False
        self._awaited: set[Path] = set()  # folders in use by another process, which were printed

    def run(self, waiting: Sequence[PlannedRun]) -> list[PlannedRun]:
        """Returns the runs that failed. After Ctrl-C or SIGTERM it raises Interrupted when all runs have saved."""
        left, failed = list(waiting), []
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._forwarding_signals():
            while left or self.running:
                while self.free and self.signal is None and (run := self._next(left)) is not None:
                    left.remove(run)
                    self._start(run, f"{len(waiting) - len(left)} of {len(waiting)}")
                for process in list(self.running):
                    if process.poll() is not None:
                        failed += self._end(process)
                if self.signal is not None and not self.running:
                    raise Interrupted(self.signal)
                self._check_memory()
                time.sleep(0.2)
        return failed

    def _check_memory(self) -> None:
        """Prints a note once if memory is short: the search for free pages would count as training time."""
        stalls = memory_stalls()
        if stalls > STALL_LIMIT and not self._stall_noted:
            self._stall_noted = True
            say(
                f"note: memory is short (nothing ran for {stalls:.0%} of the last minute), so the present runs are "
                "slowed down and cannot be compared. Stop, remove their folders, and use fewer --jobs or --together"
            )

    def _next(self, left: Sequence[PlannedRun]) -> PlannedRun | None:
        """The first run that can start now."""
        for run in left:
            if self.by_seeds and any(other.seed != run.seed for other, _ in self.running.values()):
                return None
            if not in_use(run.folder):
                return run
            if run.folder not in self._awaited:  # a bench was killed, and its runs are still saving
                self._awaited.add(run.folder)
                say(f"waiting for another process to leave {run.folder} ...")
        return None

    def _start(self, run: PlannedRun, number: str) -> None:
        place = self.free.pop(0)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": self.gpus[place]} if self.gpus else {})
        say(f"{number}: {run.folder.name} ...")
        cores = self.cores[place * self.share :][: self.share]
        process = start_trainer(run.options, run.output, cores, env=environment, start_new_session=True)
        self.running[process] = run, place
        if self.signal is not None:  # the signal arrived while the process was started
            process.send_signal(signal.SIGTERM)

    def _end(self, process: subprocess.Popen[bytes]) -> list[PlannedRun]:
        """Frees the place of a run that has ended; returns the run if it failed."""
        run, place = self.running.pop(process)
        self.free.append(place)
        if process.returncode == 0:
            row = summary(run.folder)
            say(f"  {run.folder.name}: {row['top1']:.2f} %, {duration(row['wall_seconds'])}")
        elif self.signal is None:
            last = run.output.read_text(errors="replace").strip().splitlines()[-1:]
            why = "; ".join([*last, f"exit status {process.returncode}"])
            say(f"  {run.folder.name}: failed ({why}); see {run.output}")
            return [run]
        return []

    @contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        """Forwards signals to the runs, which save. After a second signal they end at once."""

        def forward(number: int, frame: object) -> None:
            first, self.signal = self.signal is None, number
            for process in self.running:
                process.send_signal(signal.SIGTERM)
            if first:
                say("\nstopping: the runs save; the same command continues them", sys.stderr)

        handled = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            handled.append(signal.SIGHUP)
        before = {number: signal.signal(number, forward) for number in handled}
        try:
            yield
        finally:
            for process in self.running:
                process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


def say(text: str, to: TextIO | None = None) -> None:
    """Prints, unless the terminal is gone: runs continue, and save, without it."""
    with suppress(OSError):
        print(text, file=to, flush=True)


def signal_on_parent_death(number: int) -> None:
    """Asks Linux to send this process the signal ``number`` if its parent dies. Called in a child process."""
    LIBC.prctl(PR_SET_PDEATHSIG, number)


def start_trainer(
    options: Sequence[str], output: Path, on: Collection[int] = (), **more: Any
) -> subprocess.Popen[bytes]:
    """Starts the trainer on the cores ``on``, or on all. Its output is appended to ``output``.

    If this process is killed, the trainer saves and stops.
    """

    def prepare() -> None:
        if on:
            os.sched_setaffinity(0, on)
        signal_on_parent_death(signal.SIGTERM)

    command = [sys.executable, str(ROOT / "train_imagenet.py"), *options]
    with open(output, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=prepare, **more)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
