"""Runs the contestants of a bench, each in its own process with one core per worker.

They take turns, round by round, so that other work on the machine affects all of them equally.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitlocal.bench.measurement import spread
from vitlocal.errors import ConfigError, DataError

Turn = Callable[..., tuple[float, dict[str, Any]]]  # images/s of one turn, and further fields of the row


class Contestant:
    """A process that calls ``make(*arguments)`` once, then the returned function for each request."""

    def __init__(self, name: str, make: Callable[..., Turn], arguments: Sequence[Any], cores: Sequence[int]):
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, theirs) = name, context.Pipe()
        self.peak_mib = 0.0  # memory during turns
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # inherited; PyTorch reads it when it is loaded
        # Not a daemon, because it may have children.
        self.process = context.Process(target=_serve, args=(make, arguments, cores, theirs))
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """The result of one turn. Raises the contestant's ConfigError, else DataError with its error."""
        try:
            self.pipe.send(request)
            # Memory is measured from outside, because FFCV's writer forks, which may hang in a process with threads.
            answered = False
            while not answered:
                answered = self.pipe.poll(0.5)
                self.peak_mib = max(self.peak_mib, resident_mib(self.process.pid or 0))
            problem, answer = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise DataError(f"{self.name}: its process ended; see its messages above") from None
        if problem is not None:
            raise problem(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        with suppress(OSError):
            self.pipe.send(None)
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
def started(
    make: Callable[..., Turn], arguments: Mapping[str, Sequence[Any]], workers: int
) -> Iterator[list[Contestant]]:
    """Contestants with the names and ``arguments`` of a mapping. ConfigError if there are fewer cores than workers."""
    available = sorted(os.sched_getaffinity(0))
    if workers > len(available):
        raise ConfigError(f"--workers: got {workers}, expected at most the {len(available)} cores of this machine")
    with ExitStack() as stack:
        contestants = (Contestant(name, make, values, available[:workers]) for name, values in arguments.items())
        yield [stack.enter_context(closing(contestant)) for contestant in contestants]


def take_turns(
    contestants: Sequence[Contestant], workers: int, rounds: int, warm_up: tuple, request: tuple, bar: tqdm
) -> list[dict[str, Any]]:
    """The measured fields of each contestant's row. The first round sends ``warm_up`` and is not counted."""
    rates: list[list[float]] = [[] for _ in contestants]
    fields: list[dict[str, Any]] = [{} for _ in contestants]
    for contestant in contestants:
        contestant.peak_mib = 0.0
    for number in range(rounds + 1):
        for place, contestant in enumerate(contestants):
            rate, fields[place] = contestant.ask(*(request if number else warm_up))
            if number:
                rates[place].append(rate)
        bar.update()
    return [
        {
            "workers": workers, "images_per_second": round(median := statistics.median(found), 1),
            "per_core": round(median / workers, 1), "spread": spread(found), "n": len(found),
            "rss_mib": round(contestant.peak_mib), **more,
        }
        for contestant, found, more in zip(contestants, rates, fields, strict=True)
    ]  # fmt: skip


def resident_mib(process: int) -> float:
    """The memory of a process and all its descendants, in MiB."""
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # the process has ended
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            pages[int(entry.name)] = int((entry / "statm").read_text().split()[1])
    family = {process}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(pages.get(pid, 0) for pid in family) * os.sysconf("SC_PAGE_SIZE") / 2**20
