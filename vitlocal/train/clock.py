"""The budget's clock: how much of a run is spent, in time, epochs or steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vitlocal.config import BudgetConfig
from vitlocal.plan import Position, Progress


class Clock:
    """Counts steps, images and seconds of training, and seconds in all; each goes on after a restart.

    ``train_seconds`` leaves out what happens in :meth:`paused` (evaluation, saving), ``wall_seconds`` nothing since
    ``began``, a reading of ``now`` (without it: since the clock was made); time while no process runs counts nowhere.
    ``now`` is for tests.

    A budget in time is spent when less is left than half a step takes. ``room`` is what is kept of it for the work
    after training, in seconds: the fraction comes to 1 so much earlier.
    """

    def __init__(
        self, budget: BudgetConfig, images_per_epoch: int, now: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ):  # fmt: skip
        self.budget, self.images_per_epoch, self.now = budget, images_per_epoch, now
        self.step = 0
        self.images_seen = 0
        self.position = Position()
        self._train = self._wall = 0.0  # up to the last restart or pause
        self._wall_since = now() if began is None else began
        self._train_since: float | None = None
        self.room = 0.0
        self.step_seconds = 0.0  # of the quicker one of the last two: one alone may have been held up
        self._last_step = 0.0
        self._ticked = 0.0  # training seconds at the last tick or start
        self.agreed: tuple[float, float] | None = None  # the budget's seconds and a step's, told by rank 0 to several

    @property
    def train_seconds(self) -> float:
        return self._train + (self.now() - self._train_since if self._train_since is not None else 0.0)

    @property
    def wall_seconds(self) -> float:
        return self._wall + self.now() - self._wall_since

    @property
    def counts_all(self) -> bool:
        """Whether the budget is in time, and all time counts."""
        return self.budget.counts == "wall" and self.budget.length.kind == "seconds"

    @property
    def seconds(self) -> float:
        """The budget's, on this process's watch."""
        return self.train_seconds if self.budget.counts == "train" else self.wall_seconds

    @property
    def progress(self) -> Progress:
        seconds, step_seconds = (self.seconds, self.step_seconds) if self.agreed is None else self.agreed
        at = Progress(self._epoch(self.position), self.step, self.images_seen, seconds)
        return replace(at, fraction=self._fraction(at, step_seconds))

    def ahead(self, images: int) -> Progress:
        """Where the run will stand after a step over ``images`` images, if that takes as long as the last ones.

        A step's learning rate is that of its end: the last step's is the schedule's last.
        """
        seconds, step_seconds = (self.seconds, self.step_seconds) if self.agreed is None else self.agreed
        epoch = self._epoch(self._moved(images))
        at = Progress(epoch, self.step + 1, self.images_seen + images, seconds + step_seconds)
        return replace(at, fraction=self._fraction(at, step_seconds))

    def _fraction(self, at: Progress, step_seconds: float) -> float:
        length = self.budget.length
        if length.kind != "seconds":
            return min(1.0, length.done(at))
        left = length.value - self.room - at.seconds
        return 1.0 if left <= step_seconds / 2 else at.seconds / (length.value - self.room)

    def _epoch(self, position: Position) -> float:
        return position.epoch + position.images / self.images_per_epoch

    def _moved(self, images: int) -> Position:
        epoch, done = self.position.epoch, self.position.images + images
        return Position(epoch, done) if done < self.images_per_epoch else Position(epoch + 1, 0)

    @property
    def spent(self) -> bool:
        return self.progress.fraction >= 1.0

    def start(self) -> None:
        """Training time begins to run."""
        if self._train_since is None:
            self._train_since = self.now()
            self._ticked = self._train

    def stop(self) -> None:
        """Training time stands still until :meth:`start`."""
        self._train, self._train_since = self.train_seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training time."""
        running = self._train_since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def tick(self, images: int) -> None:
        """One step over ``images`` images is done."""
        self.step += 1
        self.images_seen += images
        self.position = self._moved(images)
        before, self._ticked = self._ticked, self.train_seconds
        took = self._ticked - before
        self.step_seconds, self._last_step = min(took, self._last_step or took), took

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "epoch": self.position.epoch,
            "images": self.position.images,
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
            "step_seconds": self.step_seconds,
            "room": self.room,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.images_seen = state["step"], state["images_seen"]
        self.position = Position(state["epoch"], state["images"])
        # What this process has already spent, on start-up say, counts on top.
        self._train, self._wall = state["train_seconds"], state["wall_seconds"]
        self.step_seconds, self.room = state["step_seconds"], state["room"]

    def spent_before(self, train: float, wall: float) -> None:
        """Counts what earlier processes spent, where that is more than :meth:`load_state_dict` knew: steps that were
        taken after the last checkpoint, and will be taken again, count."""
        self._train, self._wall = max(self._train, train), max(self._wall, wall)
        self._ticked = self.train_seconds
