"""Ctrl-C and SIGTERM: the first one asks the run to stop, the second one ends it at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vitlocal.errors import Interrupted


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
