"""Saves the time that a run has spent, while it runs. So a killed run loses almost none of its count."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from vitlocal.progress import Length
from vitlocal.train.budget import RunTimer

LONGEST_INTERVAL = 1.0  # seconds
SHORTEST_INTERVAL = 0.05
BUDGET_FRACTION = 1e-3  # of a budget in time, if that is shorter


def read_spent(path: Path) -> tuple[float, float]:
    """Training seconds and total seconds, as :class:`Journal` wrote them; zeros without a journal.

    A damaged journal, after a power failure for example, is reported and counts as zeros. The checkpoint has the time
    that was spent before it.
    """
    try:
        spent = json.loads(path.read_text(encoding="utf-8"))
        return float(spent["train_seconds"]), float(spent["wall_seconds"])
    except FileNotFoundError:
        return 0.0, 0.0
    except (ValueError, KeyError, TypeError):
        print(f"{path} is damaged; the budget continues from the checkpoint", file=sys.stderr)
        return 0.0, 0.0


def journal_interval(budget: Length) -> float:
    """The seconds between two writes: a kill loses at most these seconds."""
    if budget.kind != "seconds":
        return LONGEST_INTERVAL
    return max(SHORTEST_INTERVAL, min(LONGEST_INTERVAL, BUDGET_FRACTION * budget.value))


class Journal:
    """While it is open, a thread writes the timer's seconds to ``path`` every ``interval`` seconds."""

    def __init__(self, path: Path, timer: RunTimer, interval: float = LONGEST_INTERVAL):
        self._path, self._timer, self._interval = path, timer, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def __enter__(self) -> Journal:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._write()

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            self._write()

    def _write(self) -> None:
        spent = {"train_seconds": self._timer.train_seconds, "wall_seconds": self._timer.wall_seconds}
        temporary = self._path.with_name(f".{self._path.name}.writing")
        try:
            # Replaced as a whole, in case the process is killed. Not synced, which would wait for the disk.
            temporary.write_text(json.dumps(spent) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError:  # a full disk, for example: the next checkpoint reports it
            temporary.unlink(missing_ok=True)
