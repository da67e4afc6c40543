"""The errors that a user can fix, signals, and how the commands report both."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType

# Ctrl-C, and how terminals, schedulers and clouds announce that they will end a process.
STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU
)  # fmt: skip
# Python does not count them as printable: spaces of French, macOS and Japanese; joiners of Persian, Hindi and emoji.
HARMLESS = "\u00a0\u202f\u3000\u200c\u200d"
DOUBLE_SECONDS = 1.0  # two SIGINT within this time are one Ctrl-C, which torchrun sends to its processes again


class ConfigError(ValueError):
    """A wrong option, file name or value. The commands print it and exit with status 2."""


class DataError(RuntimeError):
    """Data that cannot be read or written. The commands print it and exit with status 1."""


class Diverged(DataError):
    """Training whose loss, weights, weight averages or optimizer state are infinite or not a number."""


class DeviceMemoryError(RuntimeError):
    """Work that the device's memory does not hold. The commands print it and exit with status 1."""


class UndecodableImage(DataError):
    """Bytes that are not a complete image, or an image that no file can hold. It is not the fault of a disk."""


class Interrupted(KeyboardInterrupt):
    """A signal that asks the command to stop; ``number`` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if it has none (EOFError of an empty file)."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def shown(text: object, keep: str = "") -> str:
    """A text for a terminal or a page, in which a hostile name does nothing.

    Control characters, marks of direction and bytes that are not UTF-8 become escapes such as \\x1b, except ``keep``.
    """
    found = str(text)
    if found.isprintable():
        return found
    keep += HARMLESS
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in found)


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A context in which ``handler`` handles the stop signals. One that was ignored, as by nohup, stays ignored.

    In another thread than the main one, nothing changes: Python allows handlers there only.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def interrupts(received: list[int] | None = None) -> AbstractContextManager[None]:
    """A context in which a stop signal raises :class:`Interrupted`, and is appended to ``received``."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if received is not None:
            received.append(number)
        raise Interrupted(number)

    return handled_by(interrupt)


def ends_at_once() -> AbstractContextManager[None]:
    """A context in which a stop signal ends the process at once. Imports need it: some modules catch exceptions."""

    def end(number: int, frame: FrameType | None) -> None:
        note("interrupted\n")
        os._exit(128 + number)

    return handled_by(end)


class StopSignals:
    """Stores the first stop signal in :attr:`received`. A Ctrl-C that follows raises :class:`Interrupted`.

    Others that follow are ignored. Schedulers send several, such as SIGTERM two minutes after SIGUSR1, and until they
    kill the process it may save.
    """

    def __init__(self, prints: bool = True):
        self.received: signal.Signals | None = None
        self._prints, self._at = prints, 0.0

    def handled(self) -> AbstractContextManager[None]:
        """A context in which the signals are handled."""
        return handled_by(self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
            if self._prints:
                note("\nstopping after this step or batch, and saving; another Ctrl-C, a second later, stops at once\n")
        elif number == signal.SIGINT and time.monotonic() - self._at > DOUBLE_SECONDS:
            raise Interrupted(number)


def note(text: str) -> None:
    """Writes to standard error from a signal handler, which may have interrupted a print."""
    with suppress(OSError):
        os.write(2, text.encode())


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs ``main(argv)``, and turns errors that a user can fix into one message and an exit status.

    Returns 0 on success, and 128 and its number after a stop signal: 130 after Ctrl-C. A :class:`ConfigError` gives 2.
    A :class:`DataError`, a :class:`DeviceMemoryError`, a ``MemoryError`` or an ``OSError`` (such as a full disk)
    gives 1. Any other error is ours and keeps its traceback.
    """
    received: list[int] = []
    try:
        with interrupts(received):
            return main(sys.argv[1:] if argv is None else argv) or 0
    except KeyboardInterrupt as error:
        received.append(getattr(error, "number", signal.SIGINT))
    except Exception as error:
        if not received:  # or else it comes from C code that was interrupted
            if not isinstance(error, (ConfigError, DataError, DeviceMemoryError, OSError, MemoryError)):
                raise
            text = f"not enough memory ({first_line(error)})" if isinstance(error, MemoryError) else error
            print(f"error: {shown(text, keep=chr(10))}", file=sys.stderr)
            return 2 if isinstance(error, ConfigError) else 1
    print("interrupted", file=sys.stderr)
    return 128 + received[0]
