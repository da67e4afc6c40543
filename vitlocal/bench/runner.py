"""Trains entries, some at a time, each on its part of the machine; what is stopped has saved."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from vitlocal.bench.entries import ROOT, Entry
from vitlocal.bench.runs import summary
from vitlocal.errors import ConfigError, Interrupted
from vitlocal.machine import memory_stalls
from vitlocal.report.run_folder import duration
from vitlocal.train.folder import in_use

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STALLED = 0.02  # of a minute: more of it without memory is told


@dataclass(frozen=True)
class Place:
    """What one of several runs at a time has to itself."""

    number: int  # of its GPU
    cores: frozenset[int]


@dataclass(frozen=True)
class Started:
    """A run under way; of its ``output``, ``said`` bytes are of attempts before."""

    entry: Entry
    place: Place
    began: float
    output: Path
    said: int


class Runner:
    """Trains entries in ``jobs`` places at a time, each a part of the cores (and a GPU of its own, where there are).

    In a place ``together`` of them run at once. They take turns there, and meet the same good and bad minutes; so that
    this is so for all that are compared, runs of a seed begin when those of the seed before have ended.

    Raises ConfigError where there are not so many places. ``gpus``: as CUDA_VISIBLE_DEVICES names them.
    """

    def __init__(self, jobs: int, together: int, folder: Path, gpus: Sequence[str] = ()):
        self.folder, self.gpus, self.by_seeds = folder, gpus, together > 1
        mine = sorted(os.sched_getaffinity(0))
        if not 1 <= jobs <= len(mine):
            raise ConfigError(f"--jobs: got {jobs}, expected 1 to {len(mine)}, a core for each")
        if 0 < len(self.gpus) < jobs:
            raise ConfigError(f"--jobs: got {jobs}, expected at most {len(self.gpus)}, a GPU for each")
        if self.gpus and together > 1:
            raise ConfigError(
                "--together: runs that share a GPU cannot be timed; leave it out, or train on the CPU: --run.device=cpu"
            )
        share = len(mine) // jobs
        places = [Place(number, frozenset(mine[number * share : (number + 1) * share])) for number in range(jobs)]
        self.free = [place for _ in range(together) for place in places]
        self.running: dict[subprocess.Popen[bytes], Started] = {}
        self.signal: int | None = None
        self.stalled = False  # for want of memory: told once
        self.awaited: set[Path] = set()  # folders in which others were training: told once each

    def run(self, waiting: Sequence[Entry]) -> list[Entry]:
        """Returns the entries that failed; raises Interrupted, when all have saved, after Ctrl-C or SIGTERM."""
        left, failed, total = list(waiting), [], len(waiting)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._forwarding():
            while left or self.running:
                while self.free and self.signal is None and (entry := self._next(left)) is not None:
                    left.remove(entry)
                    self._start(entry, total - len(left), total)
                for process in list(self.running):
                    if process.poll() is not None:
                        failed += self._ended(process)
                if self.signal is not None and not self.running:
                    raise Interrupted(self.signal)
                self._watch_memory()
                time.sleep(0.2)
        return failed

    def _watch_memory(self) -> None:
        """Processor time counts the machine's search for free pages as well: it would be taken for training."""
        stalls = memory_stalls()
        if stalls > STALLED and not self.stalled:
            self.stalled = True
            say(
                f"note: memory is short (nothing ran for {stalls:.0%} of the last minute): what runs now is slowed "
                "down, and not to be compared. Stop, remove those runs' folders, and use fewer --jobs or --together"
            )

    def _next(self, left: Sequence[Entry]) -> Entry | None:
        """The first that can start now, if one can."""
        for entry in left:
            if self.by_seeds and any(run.entry.seed != entry.seed for run in self.running.values()):
                return None
            if not in_use(entry.folder):
                return entry
            if entry.folder not in self.awaited:  # as after a bench that was killed: its runs were told to save
                self.awaited.add(entry.folder)
                say(f"waiting for another process to leave {entry.folder} ...")
        return None

    def _start(self, entry: Entry, number: int, total: int) -> None:
        place = self.free.pop(0)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": self.gpus[place.number]} if self.gpus else {})
        say(f"{number} of {total}: {entry.folder.name} ...")
        output = self.folder / f"{entry.folder.name}.txt"
        said = output.stat().st_size if output.exists() else 0
        process = start_trainer(entry.options, output, place.cores, env=environment, start_new_session=True)
        self.running[process] = Started(entry, place, time.monotonic(), output, said)
        if self.signal is not None:  # it came while the process was started
            process.send_signal(signal.SIGTERM)

    def _ended(self, process: subprocess.Popen[bytes]) -> list[Entry]:
        run = self.running.pop(process)
        self.free.append(run.place)
        if process.returncode == 0:
            row = summary(run.entry.folder)
            say(f"  {run.entry.folder.name}: {row['top1']:.2f} %, {duration(time.monotonic() - run.began)}")
            return []
        if self.signal is None:
            with open(run.output, "rb") as output:
                output.seek(run.said)
                last = output.read().decode(errors="replace").strip().splitlines()[-1:]
            why = "; ".join([*last, f"exit status {process.returncode}"])
            say(f"  {run.entry.folder.name}: failed ({why}); see {run.output}")
            return [run.entry]
        return []

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Signals reach the runs, which save; at a second one they leave at once."""

        def forward(number: int, frame: object) -> None:
            first, self.signal = self.signal is None, number
            for process in self.running:
                process.send_signal(signal.SIGTERM)
            if first:
                say("\nstopping: the runs save what they have; the same command goes on", sys.stderr)

        heard = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            heard.append(signal.SIGHUP)
        before = {number: signal.signal(number, forward) for number in heard}
        try:
            yield
        finally:
            for process in self.running:
                process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


def say(text: str, to: TextIO | None = None) -> None:
    """Prints, unless who listened is gone: runs go on, and save, without their terminal."""
    with suppress(OSError):
        print(text, file=to, flush=True)


def fall_with_parent(number: int) -> None:
    """In a child, before it starts: it gets the signal ``number`` when its parent dies, however that comes about."""
    LIBC.prctl(PR_SET_PDEATHSIG, number)


def start_trainer(
    options: Sequence[str], output: Path, on: Collection[int] = (), **more: Any
) -> subprocess.Popen[bytes]:
    """Starts the trainer on the cores ``on`` (or all); what it says is appended to ``output``.

    Should this process be killed, the trainer is told to save and stop.
    """

    def settle() -> None:
        if on:
            os.sched_setaffinity(0, on)
        fall_with_parent(signal.SIGTERM)

    command = [sys.executable, str(ROOT / "train_imagenet.py"), *options]
    with open(output, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=settle, **more)


def visible_gpus() -> list[str]:
    """The GPUs that are this process's to use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
