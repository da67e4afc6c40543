"""The errors that a user can fix, and how the commands report them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence


class ConfigError(ValueError):
    """A wrong option, file name or value. The commands print it and exit with status 2."""


class DataError(RuntimeError):
    """Data that cannot be read or written. The commands print it and exit with status 1."""


class Interrupted(KeyboardInterrupt):
    """A signal that asks the command to stop; ``number`` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs ``main(argv)``, and turns errors that a user can fix into one message and an exit status.

    Returns 0 on success, 130 after Ctrl-C and 143 after SIGTERM. A :class:`ConfigError` gives 2. A :class:`DataError`
    or an ``OSError`` (such as a full disk) gives 1. Any other error is ours and keeps its traceback.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
