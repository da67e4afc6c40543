"""Contestants of a bench, each in a process of its own, held to as many cores as it has workers.

They take turns, round by round, so that what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitlocal.errors import ConfigError, DataError

Made = Callable[..., Any]  # what a contestant's maker returns: called once a turn


class Contestant:
    """A process that makes something once and is then asked, one turn at a time."""

    def __init__(self, name: str, make: Callable[..., Made], arguments: Sequence[Any], cores: Sequence[int]):
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, theirs) = name, context.Pipe()
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # inherited: it is read when PyTorch is loaded
        # Not a daemon: it may have children of its own.
        self.process = context.Process(target=_serve, args=(make, arguments, cores, theirs))
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """What the contestant answers; its ConfigError, else DataError with what went wrong in it."""
        try:
            self.pipe.send(request)
            problem, answer = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise DataError(f"{self.name}: its process died; see above") from None
        if problem is not None:
            raise problem(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        try:
            self.pipe.send(None)
        except OSError:
            pass
        self.process.join(10)
        self.process.kill()


def _serve(make: Callable[..., Made], arguments: Sequence[Any], cores: Sequence[int], pipe: Connection) -> None:
    os.sched_setaffinity(0, cores)
    multiprocessing.set_start_method(None, force=True)  # the system's own, not the one that made this process
    try:
        made = make(*arguments)
        while (request := pipe.recv()) is not None:
            pipe.send((None, made(*request)))
    except KeyboardInterrupt:
        pass
    except (ConfigError, DataError) as error:
        pipe.send((type(error), str(error)))
    except BaseException as error:
        pipe.send((DataError, f"{type(error).__name__}: {error}"))


@contextmanager
def closing_all(contestants: list[Contestant]) -> Iterator[None]:
    try:
        yield
    finally:
        for contestant in contestants:
            contestant.close()


def cores_for(workers: int) -> list[int]:
    """The cores that contestants with so many workers are held to. ConfigError where there are not as many."""
    available = sorted(os.sched_getaffinity(0))
    if workers > len(available):
        raise ConfigError(f"--workers: got {workers}, expected at most the {len(available)} cores of this machine")
    return available[:workers]


def resident_mib(mine: int) -> float:
    """Memory of a process and all that descend from it, in MiB."""
    parents, pages = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            pages[int(entry.name)] = int((entry / "statm").read_text().split()[1])
        except (OSError, ValueError):
            continue  # it has ended meanwhile
    family, grown = {mine}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        family, grown = family | more, bool(more)
    return sum(pages.get(pid, 0) for pid in family) * os.sysconf("SC_PAGE_SIZE") / 2**20


class PeakMemory:
    """The most memory that a contestant takes while this is open. Watched from outside: FFCV's writer forks, which
    in a process with threads may hang."""

    def __init__(self, contestant: Contestant):
        self.pid, self.mib, self.done = contestant.process.pid, 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.5):
            self.mib = max(self.mib, resident_mib(self.pid))

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.mib = max(self.mib, resident_mib(self.pid))


class Progress:
    """A line that says how far a bench has come, and about how long the rest will take."""

    def __init__(self, steps: int):
        self.bar = tqdm(
            total=steps, unit=" turns", leave=False, bar_format="{desc}: {n} of {total} turns, {remaining} left"
        )

    def step(self, what: str) -> None:
        self.bar.set_description_str(what, refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def rates_row(rates: Sequence[float], workers: int) -> dict[str, Any]:
    """Median, rate a core, spread (largest less smallest, as a part of the median) and number of measured rates."""
    median = statistics.median(rates)
    return {
        "workers": workers, "images_per_second": round(median, 1), "per_core": round(median / workers, 1),
        "spread": round((max(rates) - min(rates)) / median, 3), "n": len(rates),
    }  # fmt: skip
