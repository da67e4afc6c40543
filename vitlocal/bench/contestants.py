"""Contestants of a bench, each in its own process, limited to as many cores as it has workers.

They take turns, round by round, so that other work on the machine affects all of them equally.
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

Turn = Callable[..., Any]  # called once for each turn


class Contestant:
    """A process that calls ``make(*arguments)`` once, then the returned function for each request."""

    def __init__(self, name: str, make: Callable[..., Turn], arguments: Sequence[Any], cores: Sequence[int]):
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, theirs) = name, context.Pipe()
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # inherited; PyTorch reads it when it is loaded
        # Not a daemon, because it may have children.
        self.process = context.Process(target=_serve, args=(make, arguments, cores, theirs))
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """The result of one turn. Raises the contestant's ConfigError, else DataError with its error."""
        try:
            self.pipe.send(request)
            problem, answer = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise DataError(f"{self.name}: its process ended; see its messages above") from None
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


def _serve(make: Callable[..., Turn], arguments: Sequence[Any], cores: Sequence[int], pipe: Connection) -> None:
    os.sched_setaffinity(0, cores)
    multiprocessing.set_start_method(None, force=True)  # the default of the system, not "spawn"
    try:
        turn = make(*arguments)
        while (request := pipe.recv()) is not None:
            pipe.send((None, turn(*request)))
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
    """The cores for contestants with so many workers. Raises ConfigError if there are too few."""
    available = sorted(os.sched_getaffinity(0))
    if workers > len(available):
        raise ConfigError(f"--workers: got {workers}, expected at most the {len(available)} cores of this machine")
    return available[:workers]


def resident_mib(process: int) -> float:
    """The memory of a process and all its descendants, in MiB."""
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            pages[int(entry.name)] = int((entry / "statm").read_text().split()[1])
        except (OSError, ValueError):
            continue  # it has ended
    family, grown = {process}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        family, grown = family | more, bool(more)
    return sum(pages.get(pid, 0) for pid in family) * os.sysconf("SC_PAGE_SIZE") / 2**20


class PeakMemory:
    """The peak memory of a contestant while this is open, in MiB.

    It is measured from outside, because FFCV's writer forks, which may hang in a process with threads.
    """

    def __init__(self, contestant: Contestant):
        self.pid, self.mib, self.done = contestant.process.pid or 0, 0.0, threading.Event()
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


class TurnDisplay:
    """A line with the number of turns that are done and the time that is left."""

    def __init__(self, steps: int):
        self.bar = tqdm(
            total=steps, unit=" turns", leave=False, bar_format="{desc}: {n} of {total} turns, {remaining} left"
        )

    def step(self, description: str) -> None:
        self.bar.set_description_str(description, refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def rates_row(rates: Sequence[float], workers: int) -> dict[str, Any]:
    """Median, rate per core, spread ((largest - smallest) / median) and number of the measured rates."""
    median = statistics.median(rates)
    return {
        "workers": workers, "images_per_second": round(median, 1), "per_core": round(median / workers, 1),
        "spread": round((max(rates) - min(rates)) / median, 3), "n": len(rates),
    }  # fmt: skip
