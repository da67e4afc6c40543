"""What a run has spent, written down all the time: a run that is killed loses next to nothing of its count."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from vitlocal.progress import Length
from vitlocal.train.clock import Clock

EVERY_SECONDS = 1.0
EVERY_PART, LEAST_SECONDS = 1e-3, 0.02  # of a budget in time, where that is less: a second is much of three minutes


def read_spent(path: Path) -> tuple[float, float]:
    """Training seconds and seconds in all, as :class:`Journal` left them; zeros where there is no journal.

    So too where it cannot be read, as after the power failed: the checkpoint then tells what was spent until it.
    """
    try:
        spent = json.loads(path.read_text(encoding="utf-8"))
        return float(spent["train_seconds"]), float(spent["wall_seconds"])
    except FileNotFoundError:
        return 0.0, 0.0
    except (ValueError, KeyError, TypeError):
        print(f"{path} is damaged; the budget goes on from what the checkpoint knows", file=sys.stderr)
        return 0.0, 0.0


@dataclass(frozen=True)
class Loading:
    """In the place of a clock while there is none yet: what was spent before, and the time since ``began``."""

    train_seconds: float
    wall_seconds_before: float
    began: float

    @property
    def wall_seconds(self) -> float:
        return self.wall_seconds_before + time.monotonic() - self.began


class Journal:
    """Writes ``clock``'s seconds to ``path`` while it is open, in a thread: steps, evaluation and saving all count.

    A kill loses what was spent since the last writing: at most a second, or a thousandth of ``budget``. ``ending``
    seconds, which a process takes to end when it is killed, are written down as spent until it ends otherwise.
    """

    def __init__(self, path: Path, clock: Clock | Loading, budget: Length, ending: float):
        self.path, self.clock, self.ending = path, clock, ending
        self.every = EVERY_SECONDS
        if budget.kind == "seconds":
            self.every = max(LEAST_SECONDS, min(EVERY_SECONDS, EVERY_PART * budget.value))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="journal", daemon=True)

    def __enter__(self) -> Journal:
        self._write()  # what starting took
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._done.set()
        self._thread.join()
        self.ending = 0.0
        self._write()

    def _write_on(self) -> None:
        while not self._done.wait(self.every):
            self._write()

    def _write(self) -> None:
        spent = {"train_seconds": self.clock.train_seconds, "wall_seconds": self.clock.wall_seconds + self.ending}
        temporary = self.path.with_name(f".{self.path.name}.writing")
        try:
            # Whole or not at all if the process is killed. Not synced: that would wait for the disk every second.
            temporary.write_text(json.dumps(spent) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError:  # a full disk, say: saving the next checkpoint reports it
            temporary.unlink(missing_ok=True)
