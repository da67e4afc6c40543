"""Starts the commands. Signals and closed streams are handled before anything else is imported."""

from __future__ import annotations

import io
import os
import sys

# Not from signal, which imports enum; typing and contextlib would take as long as the start of Python.
from _signal import SIG_IGN, SIGHUP, SIGINT, SIGPIPE, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, getsignal, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from typing import NoReturn


class Console(io.FileIO):
    """Standard output or error of a command that must not end when its reader, or its terminal, is gone.

    What cannot be written is dropped. ``ends``, of a command that only prints: a closed pipe ends the process, as
    SIGPIPE does, and another error ends it with exit status 1.
    """

    def __init__(self, descriptor: int, ends: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._ends = ends

    def write(self, data: object) -> int:
        try:
            return super().write(data) or len(data)  # type: ignore[arg-type]  # None: a full pipe that does not block
        except OSError as error:
            if self._ends and isinstance(error, BrokenPipeError):
                os._exit(128 + SIGPIPE)
            if self._ends:  # what it prints is its result
                os.write(2, f"error: standard output: {error.strerror}\n".encode())
                os._exit(1)
            return len(data)  # type: ignore[arg-type]


def protect_streams(ends: bool) -> None:
    """Makes standard output and error a :class:`Console`. ``ends`` is for standard output.

    Closed descriptors are opened: a file of the command that got number 1 would receive what libraries print.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the smallest free number
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        raw = io.BufferedWriter(Console(descriptor, ends and descriptor == 1))
        lines = raw.isatty() or descriptor == 2 or getattr(old, "write_through", False)
        encoding = getattr(old, "encoding", "utf-8")
        # As Python does for standard error: the name of a file need not be Unicode.
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=lines))


def launch(module: str, ends: bool = False) -> NoReturn:
    """Runs ``main`` of a module of the package as the command of this process, and ends the process.

    A stop signal during the imports ends it at once. ``ends``: see :class:`Console`.
    """

    def stop(number: int, frame: object) -> None:
        try:
            os.write(2, b"interrupted\n")
        finally:
            os._exit(128 + number)

    for number in (SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU):
        if getsignal(number) != SIG_IGN:  # nohup ignores SIGHUP
            signal(number, stop)
    protect_streams(ends)
    from importlib import import_module

    from vitlocal.errors import run_command
    from vitlocal.machine import leave

    def swallowed(error: UnraisableHookArgs) -> None:
        """An interrupt in a destructor or a callback, where nobody can catch it."""
        if isinstance(error.exc_value, KeyboardInterrupt):
            stop(getattr(error.exc_value, "number", SIGINT), None)
        sys.__unraisablehook__(error)

    sys.unraisablehook = swallowed
    leave(run_command(import_module(f"vitlocal.{module}").main))


def write() -> NoReturn:
    """``write_dataset.py``, ``vitlocal-write`` and ``python -m vitlocal.write_dataset``."""
    launch("write_dataset")


def train() -> NoReturn:
    """``train_imagenet.py``, ``vitlocal-train`` and ``python -m vitlocal.train``."""
    launch("train.__main__")


def predict() -> NoReturn:
    """``vitlocal-predict`` and ``python -m vitlocal.predict``."""
    launch("predict", ends=True)


def sample() -> NoReturn:
    """``vitlocal-sample`` and ``python -m vitlocal.sample``."""
    launch("sample")


def export() -> NoReturn:
    """``vitlocal-export`` and ``python -m vitlocal.export``."""
    launch("export")


def bench() -> NoReturn:
    """``vitlocal-bench`` and ``python -m vitlocal.bench``."""
    launch("bench.__main__")
