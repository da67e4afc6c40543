"""The budget's clock: how much of a run is spent, in time, epochs or steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vitlocal.config import BudgetConfig
from vitlocal.plan import Position, Progress


class Clock:
    """Counts steps, images and seconds of training, and seconds in all; each goes on after a restart.

    ``train_seconds`` leaves out what happens in :meth:`paused` (evaluation, saving), ``wall_seconds`` nothing since
    ``began``, a reading of ``now`` (without it: since the clock was made); time while no process runs counts nowhere.
    ``now`` is for tests.
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
        self.agreed: float | None = None  # the budget's seconds as rank 0 told them, where several processes train

    @property
    def train_seconds(self) -> float:
        return self._train + (self.now() - self._train_since if self._train_since is not None else 0.0)

    @property
    def wall_seconds(self) -> float:
        return self._wall + self.now() - self._wall_since

    @property
    def seconds(self) -> float:
        """The budget's, on this process's watch."""
        return self.train_seconds if self.budget.counts == "train" else self.wall_seconds

    @property
    def progress(self) -> Progress:
        position = self.position
        epoch = position.epoch + position.images / self.images_per_epoch
        seconds = self.seconds if self.agreed is None else self.agreed
        progress = Progress(epoch, self.step, self.images_seen, seconds)
        return Progress(epoch, self.step, self.images_seen, seconds, min(1.0, self.budget.length.done(progress)))

    @property
    def spent(self) -> bool:
        return self.progress.fraction >= 1.0

    def start(self) -> None:
        """Training time begins to run."""
        if self._train_since is None:
            self._train_since = self.now()

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
        done = self.position.images + images
        epoch = self.position.epoch
        self.position = Position(epoch, done) if done < self.images_per_epoch else Position(epoch + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "epoch": self.position.epoch,
            "images": self.position.images,
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.images_seen = state["step"], state["images_seen"]
        self.position = Position(state["epoch"], state["images"])
        # What this process has already spent, on start-up say, counts on top.
        self._train, self._wall = state["train_seconds"], state["wall_seconds"]

    def spent_before(self, train: float, wall: float) -> None:
        """Counts what earlier processes spent, where that is more than :meth:`load_state_dict` knew: steps that were
        taken after the last checkpoint, and will be taken again, count."""
        self._train, self._wall = max(self._train, train), max(self._wall, wall)
