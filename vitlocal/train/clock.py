"""The budget's clock: how much of a run is spent, in time, epochs or steps."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vitlocal.config import BudgetConfig
from vitlocal.progress import Position, Progress

PACES = 5  # steps by which the next one is told
STOP = 0.5  # of a step: where less is left, none is begun
SLACK = 0.25  # of a step: where so much more is left after it, a step is taken for the last one


class Clock:
    """Counts steps, images and seconds of training, and seconds in all; each goes on after a restart.

    ``train_seconds`` leaves out what happens in :meth:`paused` (evaluation, saving), ``wall_seconds`` nothing since
    ``began``, a reading of ``now`` (without it: since the clock was made); time while no process runs counts nowhere.
    ``watch`` is what tells training time: ``now``, or processor time where that counts. ``now`` is for tests.

    A budget in time is spent when less is left than half a step takes. Where all counts, ``room`` is what is kept of it
    for the work after training, and ``origin`` what has gone by before the first step, both in seconds: the fraction
    goes from 0 to 1 in between.
    """

    def __init__(
        self, budget: BudgetConfig, images_per_epoch: int, now: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ):  # fmt: skip
        self.budget, self.images_per_epoch, self.now = budget, images_per_epoch, now
        self.watch = time.process_time if budget.counts == "cpu" else now
        self.step = 0
        self.images_seen = 0
        self._batch = 0  # images of the last step
        self.flops = self._step_flops = 0.0  # of all steps, and of the last
        self.position = Position()
        self._wall = 0.0  # up to the last restart
        self._wall_since = now() if began is None else began
        # Up to the last restart or pause, and since when the watch runs. In one piece: the journal reads it from a
        # thread of its own.
        self._training: tuple[float, float | None] = 0.0, None
        self.room = 0.0
        self.origin = 0.0
        self._reached = 0.0  # the largest fraction so far: room may grow, and no schedule goes back
        self._paces: deque[float] = deque(maxlen=PACES)  # seconds an image, of the last steps
        self._ticked = 0.0  # training seconds at the last tick or start
        self.agreed: tuple[float, float] | None = None  # the budget's seconds and the pace, told by rank 0 to several

    @property
    def train_seconds(self) -> float:
        before, since = self._training
        return before if since is None else before + self.watch() - since

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
        return self.wall_seconds if self.budget.counts == "wall" else self.train_seconds

    @property
    def pace(self) -> float:
        """Seconds an image, the median of the last steps: one alone may have been held up."""
        return statistics.median(self._paces) if self._paces else 0.0

    @property
    def _now(self) -> tuple[float, float]:
        return (self.seconds, self.pace) if self.agreed is None else self.agreed

    @property
    def progress(self) -> Progress:
        seconds, pace = self._now
        at = Progress(self._epoch(self.position), self.step, self.images_seen, seconds, flops=self.flops)
        return replace(at, fraction=self._fraction(at, STOP * pace * self._batch, STOP * self._step_flops))

    def ahead(self, images: int, flops: float = 0.0) -> Progress:
        """Where the run will stand after a step over ``images`` images, if that takes as long as the last ones.

        A step's learning rate is that of its end: the last step's is the schedule's last, also if it takes a quarter
        less time than thought.
        """
        seconds, pace = self._now
        epoch = self._epoch(self._moved(images))
        at = Progress(epoch, self.step + 1, self.images_seen + images, seconds + pace * images, 0.0, self.flops + flops)
        return replace(at, fraction=self._fraction(at, (STOP + SLACK) * pace * images, STOP * flops))

    def nearly_spent(self, steps: int) -> bool:
        """Whether a budget in time ends within so many steps."""
        length, (seconds, pace) = self.budget.length, self._now
        left = length.value - self.room - seconds
        return length.kind == "seconds" and left <= steps * pace * self._batch

    def has_room_for(self, seconds: float, images: int) -> bool:
        """Whether so many seconds of something else would leave time for a step over ``images``, where all counts."""
        now, pace = self._now
        left = self.budget.length.value - self.room - now
        return not self.counts_all or left - seconds >= pace * images

    def _fraction(self, at: Progress, tolerance: float, flops: float) -> float:
        """``tolerance`` and ``flops``: what may be left of a budget in time or FLOPs when it counts as spent."""
        length = self.budget.length
        if length.kind == "flops" and length.value - at.flops <= flops:
            return 1.0
        if length.kind != "seconds":
            return min(1.0, length.fraction_done(at))
        end = length.value - self.room
        if end - at.seconds <= tolerance:
            return 1.0
        return max(self._reached, (at.seconds - self.origin) / (end - self.origin))

    def count_flops(self, flops: float) -> None:
        """Spends FLOPs on what is no step."""
        self.flops += flops

    def begin(self) -> None:
        """Training is about to begin: what has gone by is not of its schedule."""
        if self.counts_all and not self.step:
            self.origin = self._now[0]

    def pass_over(self, seconds: float) -> None:
        """Counts seconds that will go by when nothing reads this clock any more."""
        self._wall += seconds

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
        before, since = self._training
        if since is None:
            self._training = before, self.watch()
            self._ticked = before

    def stop(self) -> None:
        """Training time stands still until :meth:`start`."""
        self._training = self.train_seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training time."""
        running = self._training[1] is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def tick(self, images: int, flops: float = 0.0) -> None:
        """One step over ``images`` images is done."""
        self.step += 1
        self.flops += flops
        self._step_flops = flops
        self.images_seen += images
        self.position = self._moved(images)
        before, self._ticked = self._ticked, self.train_seconds
        self._paces.append((self._ticked - before) / images)
        self._batch = images
        self._reached = self.progress.fraction

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "epoch": self.position.epoch,
            "images": self.position.images,
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
            "paces": list(self._paces),
            "batch": self._batch,
            "flops": self.flops,
            "step_flops": self._step_flops,
            "reached": self._reached,
            "room": self.room,
            "origin": self.origin,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.images_seen = state["step"], state["images_seen"]
        self.position = Position(state["epoch"], state["images"])
        # What this process has already spent, on start-up say, counts on top.
        self._training, self._wall = (state["train_seconds"], self._training[1]), state["wall_seconds"]
        self._paces.extend(state["paces"])
        self.flops, self._step_flops = state["flops"], state["step_flops"]
        self._batch, self._reached = state["batch"], state["reached"]
        self.room, self.origin = state["room"], state["origin"]

    def spent_before(self, train: float, wall: float) -> None:
        """Counts what earlier processes spent, where that is more than :meth:`load_state_dict` knew: steps that were
        taken after the last checkpoint, and will be taken again, count."""
        before, since = self._training
        self._training, self._wall = (max(before, train), since), max(self._wall, wall)
        self._ticked = self.train_seconds
