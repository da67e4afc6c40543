"""Runs the commands in forked processes, which have the libraries loaded already, and harms them while they run."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitlocal.report.page import read_run
from vitlocal.train import command

TIME_LIMIT = 120.0  # seconds; a command that takes longer hangs

Harm = Callable[[int], None]  # gets the number of the process


@dataclass(frozen=True)
class Outcome:
    """How a command ended: ``status`` as a shell reports it (137 after kill -9), its console, and its time."""

    status: int
    console: str
    seconds: float

    @property
    def failed_badly(self) -> bool:
        """Whether it ended in a way that no command should: a traceback, a crash, or a hang."""
        crashed = self.status in {128 + number for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)}
        return crashed or self.status == 124 or "Traceback" in self.console


def kill(number: int = signal.SIGKILL) -> Harm:
    """A harm: the signal ``number``."""
    return lambda process: os.kill(process, number)


def run(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str], console: Path, *,
    after: float | None = None, harm: Harm | None = None, disk_bytes: int | None = None, draws: bool = True,
) -> Outcome:  # fmt: skip
    """Runs ``main(argv)`` as a command. ``harm`` is done ``after`` some seconds, if the command still runs.

    ``disk_bytes``: no file can become larger, as on a full disk. ``draws``: training ends with its page and curve,
    which take as long to draw as a short run trains.
    """
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        if not draws:
            command.write_report = read_run
        _child(main, argv, console, disk_bytes)
    harmed = harm is None
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        passed = time.monotonic() - began
        if done:
            break
        if not harmed and after is not None and passed >= after:
            assert harm is not None
            harm(process)
            harmed = True
        if passed > TIME_LIMIT:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return Outcome(124, console.read_text(errors="replace"), passed)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code if code >= 0 else 128 - code, console.read_text(errors="replace"), passed)


def _child(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str], console: Path, disk_bytes: int | None
) -> None:
    """The forked process: never returns."""
    from vitlocal.errors import run_command

    status = 70
    try:
        os.setsid()  # Ctrl-C at the console of this program does not reach it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        file = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if disk_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (disk_bytes, disk_bytes))
        status = run_command(main, argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
