"""The errors that a user can fix, signals, and how the commands report both."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType


class ConfigError(ValueError):
    """A wrong option, file name or value. The commands print it and exit with status 2."""


class DataError(RuntimeError):
    """Data that cannot be read or written. The commands print it and exit with status 1."""


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


class StopSignals:
    """Stores the first SIGINT or SIGTERM in :attr:`received`. A second one raises :class:`Interrupted`."""

    def __init__(self, prints: bool = True):
        self.received: signal.Signals | None = None
        self._prints = prints

    @contextmanager
    def handled(self) -> Iterator[None]:
        """A context in which the signals are handled."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise Interrupted(number)
        self.received = signal.Signals(number)
        if self._prints:
            print("\nstopping after this step, and saving; send the signal again to stop at once", file=sys.stderr)


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs ``main(argv)``, and turns errors that a user can fix into one message and an exit status.

    Returns 0 on success, 130 after Ctrl-C and 143 after SIGTERM. A :class:`ConfigError` gives 2. A :class:`DataError`,
    a :class:`DeviceMemoryError` or an ``OSError`` (such as a full disk) gives 1. Any other error is ours and keeps its
    traceback.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: the name of a file need not be Unicode
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except (ConfigError, DataError, DeviceMemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
