"""The budget of a run: how much is spent, in time, epochs, steps or FLOPs, and which part is reserved for its end.

A journal saves the time spent while the run goes on. So a killed run loses almost none of its count.
"""

import json
import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitlocal.errors import ConfigError
from vitlocal.jsonl import replacing
from vitlocal.progress import Length, Position, Progress

TIMED_STEPS = 5  # the next step is expected to take the median time of the last TIMED_STEPS steps
STOP = 0.5  # of a step: if less time is left, no step begins
SLACK = 0.25  # of a step: a step is the last one if at most STOP + SLACK of a step would be left after it
KNOWN = 3  # the next evaluation or checkpoint is expected to take the median time of the last KNOWN ones
# For the export, the report and the end of the process after the last evaluation: about 0.8 s on an idle core.
FINISH_SECONDS = 1.5
# Seconds between two writes of the journal: a fraction of a budget in time, within these bounds.
SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.05, 1.0
BUDGET_FRACTION = 1e-3


class RunTimer:
    """Training time and total time of a run, in seconds. Both continue after a restart.

    Training time runs between :meth:`start` and :meth:`stop`, except in :meth:`paused`. Total time runs from ``began``
    (a value of ``now``; default: from the construction). No time counts while no process runs.
    ``cpu`` measures training time as processor time of all threads.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, began: float | None = None, cpu: bool = False):
        self.now = now
        self.train_now = time.process_time if cpu else now
        self._wall_before = 0.0  # by earlier processes
        self._wall_began = now() if began is None else began
        # Seconds until the last stop, and the start since then. One tuple, because the journal's thread reads both.
        self._training: tuple[float, float | None] = 0.0, None

    @property
    def train_seconds(self) -> float:
        before, since = self._training
        return before if since is None else before + self.train_now() - since

    @property
    def wall_seconds(self) -> float:
        return self._wall_before + self.now() - self._wall_began

    def start(self) -> None:
        """Starts training time, if it is stopped."""
        before, since = self._training
        if since is None:
            self._training = before, self.train_now()

    def stop(self) -> None:
        """Stops training time until :meth:`start`."""
        self._training = self.train_seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context that does not count as training time."""
        running = self._training[1] is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def resume(self, train_seconds: float, wall_seconds: float) -> None:
        """Adds what earlier processes spent. If called again, the larger values count."""
        before, since = self._training
        self._training = max(before, train_seconds), since
        self._wall_before = max(self._wall_before, wall_seconds)


@dataclass
class FinalReserve:
    """The seconds of a wall-clock budget that are reserved for the end of the run.

    These are one evaluation, what the task measures after it (for example on samples), two checkpoints (before and
    after it), and a constant for export, report and exit.
    """

    evaluations: list[float] = field(default_factory=list)  # seconds of each
    checkpoints: list[float] = field(default_factory=list)
    judging_seconds: float = 0.0  # at the end: see Task.judging_seconds
    usual_judging_seconds: float = 0.0  # of other evaluations

    @property
    def evaluation_seconds(self) -> float:
        """The expected time of the next evaluation: the median, because a busy machine can delay one of them."""
        return statistics.median_high(self.evaluations[-KNOWN:] or [0.0])

    @property
    def checkpoint_seconds(self) -> float:
        """The expected time of the next checkpoint."""
        return statistics.median_high(self.checkpoints[-KNOWN:] or [0.0])

    @property
    def total_seconds(self) -> float:
        return self.evaluation_seconds + self.judging_seconds + 2 * self.checkpoint_seconds + FINISH_SECONDS


class Clock:
    """Measures how much of a budget is spent: ``Clock("24h")``, ``Clock("90ep", images_per_epoch=50_000)``.

    ``counts`` says which time a budget in time counts: "train" (without evaluation and saving), "wall" (all time of the
    process) or "cpu" (as "train", in processor time).

    A budget in time is spent when less than half a step is left. With "wall", ``reserve_seconds`` is the part of the
    budget that is reserved for the work after training. The fraction then goes from 0, at the first step, to 1 at
    the start of the reserve.
    """

    def __init__(
        self,
        length: Length | str,
        counts: str = "train",
        images_per_epoch: int = 1,
        now: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ):
        self.length = Length.parse(length) if isinstance(length, str) else length
        self._counts, self.images_per_epoch = counts, images_per_epoch
        self.timer = RunTimer(now, began, cpu=counts == "cpu")
        self.step, self.images_seen, self.flops = 0, 0, 0.0
        self.position = Position()
        self.reserve_seconds = 0.0
        # The budget's seconds and the pace as rank 0 measured them, if there are several processes.
        self.synced: tuple[float, float] | None = None
        self._schedule_began: float | None = None  # the budget's seconds before the first step
        self._reached = 0.0  # the largest fraction so far: the reserve may grow, but no schedule goes back
        self._batch = 0  # images of the last step
        self._step_flops = 0.0
        self._image_seconds: deque[float] = deque(maxlen=TIMED_STEPS)  # of the last steps
        self._last_step = 0.0  # training seconds at the end of the last step

    @property
    def reserves(self) -> bool:
        """Whether the end of the run counts too: a budget in time with counts="wall"."""
        return self._counts == "wall" and self.length.kind == "seconds"

    @property
    def local_time(self) -> tuple[float, float]:
        """The budget's seconds and the expected seconds per image, as this process measures them."""
        seconds = self.timer.wall_seconds if self._counts == "wall" else self.timer.train_seconds
        return seconds, statistics.median(self._image_seconds) if self._image_seconds else 0.0

    @property
    def progress(self) -> Progress:
        """The progress of the run now."""
        seconds, pace = self.synced or self.local_time
        now = Progress(self._epoch(self.position), self.step, self.images_seen, seconds, flops=self.flops)
        return replace(now, fraction=self._fraction(now, STOP * pace * self._batch, STOP * self._step_flops))

    def after_step(self, images: int, flops: float = 0.0) -> Progress:
        """The progress after a step over ``images`` images, if it takes as long as the last steps.

        A step uses the learning rate of its end. So the last step has the schedule's last rate, even if it takes a
        quarter less time than expected.
        """
        seconds, pace = self.synced or self.local_time
        epoch, seen, seconds = self._epoch(self._moved(images)), self.images_seen + images, seconds + pace * images
        end = Progress(epoch, self.step + 1, seen, seconds, flops=self.flops + flops)
        return replace(end, fraction=self._fraction(end, (STOP + SLACK) * pace * images, STOP * flops))

    def ends_within(self, steps: float) -> bool:
        """Whether the budget is a time that ends within ``steps`` steps."""
        seconds, pace = self.synced or self.local_time
        left = self.length.value - self.reserve_seconds - seconds
        return self.length.kind == "seconds" and left <= steps * pace * self._batch

    def has_time_for(self, seconds: float, images: int) -> bool:
        """Whether other work of ``seconds``, if it counts, leaves time for a step over ``images`` images."""
        now, pace = self.synced or self.local_time
        left = self.length.value - self.reserve_seconds - now
        return not self.reserves or left - seconds >= pace * images

    def start(self) -> None:
        """Lets training time run. The next step's time is measured from here.

        With "wall", the first call also begins the schedule, unless an earlier process has begun it.
        """
        self.timer.start()
        self._last_step = self.timer.train_seconds
        if self.reserves and self._schedule_began is None:
            self._schedule_began = (self.synced or self.local_time)[0]

    def record_step(self, images: int, flops: float = 0.0) -> None:
        """Counts a step over ``images`` images. :meth:`advance` follows it."""
        self.step += 1
        self.flops += flops
        self._step_flops = flops
        self.images_seen += images
        self.position = self._moved(images)
        before, self._last_step = self._last_step, self.timer.train_seconds
        self._image_seconds.append((self._last_step - before) / images)
        self._batch = images

    def advance(self) -> Progress:
        """The progress now. From here on, no fraction is less than this one."""
        now = self.progress
        self._reached = now.fraction
        return now

    def _fraction(self, at: Progress, seconds: float, flops: float) -> float:
        """The budget's fraction at ``at``. It counts as spent if at most ``seconds``, or ``flops``, are left."""
        length = self.length
        if length.kind == "flops" and length.value - at.flops <= flops:
            return 1.0
        if length.kind != "seconds":
            return min(1.0, length.fraction_done(at))
        end = length.value - self.reserve_seconds
        if end - at.seconds <= seconds:
            return 1.0
        if self.reserves and self._schedule_began is None:
            return 0.0  # start-up is not part of the schedule
        began = self._schedule_began or 0.0
        return max(self._reached, (at.seconds - began) / (end - began))

    def _epoch(self, position: Position) -> float:
        return position.epoch + position.images / self.images_per_epoch

    def _moved(self, images: int) -> Position:
        epoch, done = self.position.epoch, self.position.images + images
        return Position(epoch, done) if done < self.images_per_epoch else Position(epoch + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "epoch": self.position.epoch,
            "images": self.position.images,
            "train_seconds": self.timer.train_seconds,
            "wall_seconds": self.timer.wall_seconds,
            "image_seconds": list(self._image_seconds),
            "batch": self._batch,
            "flops": self.flops,
            "step_flops": self._step_flops,
            "reached": self._reached,
            "reserve_seconds": self.reserve_seconds,
            "schedule_began": self._schedule_began,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.images_seen = state["step"], state["images_seen"]
        self.position = Position(state["epoch"], state["images"])
        self.timer.resume(state["train_seconds"], state["wall_seconds"])
        self._image_seconds.extend(state["image_seconds"])
        self.flops, self._step_flops = state["flops"], state["step_flops"]
        self._batch, self._reached = state["batch"], state["reached"]
        self.reserve_seconds, self._schedule_began = state["reserve_seconds"], state["schedule_began"]


class Budget:
    """A budget for a training loop of your own.

        budget = Budget("24h")
        while not budget.over:
            train_step(lr=schedule(budget.fraction))
            budget.step(len(images))
            if time_to_evaluate:
                with budget.pause():
                    evaluate()

    The length is a time (``24h``, ``30m``, ``45s``), or ``90ep``, ``5000steps`` or ``3PF``. A time runs from the
    construction, or from a state that was loaded, except in :meth:`pause`. It is over when less than half a step is
    left, so that it ends at the step whose end is nearest to the deadline.

    ``counts="cpu"`` counts processor time. With several processes of torch.distributed, all have the time of rank 0:
    the construction, :meth:`step` and :meth:`load_state_dict` send it, so every process must call them. Epochs need
    ``images_per_epoch``, those of :attr:`vitlocal.Loader.images_per_epoch`. Raises ConfigError for a wrong length.
    """

    def __init__(
        self, length: Length | str, *, images_per_epoch: int | None = None, counts: str = "train",
        now: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        try:
            found = length if isinstance(length, Length) else Length.parse(str(length))
        except ValueError as error:
            raise ConfigError(f"budget: got {length!r}, expected {error}") from None
        if found.kind == "fraction" or not found.value:
            raise ConfigError(f"budget: got {found}, expected a length above 0: 24h, 90ep, 5000steps or 3PF")
        if found.kind == "epochs" and not images_per_epoch:
            raise ConfigError(f"budget: {found} needs images_per_epoch, such as loader.images_per_epoch")
        if counts not in ("train", "cpu"):
            raise ConfigError(f"counts: got {counts!r}, expected train or cpu")
        self._clock = Clock(found, counts, images_per_epoch or sys.maxsize, now)
        self._paused = False
        self._clock.start()
        self._share_time()

    @property
    def length(self) -> Length:
        return self._clock.length

    @property
    def progress(self) -> Progress:
        """The progress in every unit: for a :class:`vitlocal.Curriculum` and a :class:`vitlocal.LRSchedule`."""
        return self._clock.progress

    @property
    def spent(self) -> float:
        """How much is spent, in the unit of the length: seconds, epochs, steps or FLOPs."""
        return self.length.elapsed(self.progress)

    @property
    def fraction(self) -> float:
        """The fraction that is spent, from 0 to 1."""
        return min(1.0, self.progress.fraction)

    @property
    def over(self) -> bool:
        return self._clock.progress.is_end

    def after_step(self, images: int) -> Progress:
        """The expected progress after a step over ``images`` images: a learning rate is that of the end of its step."""
        return self._clock.after_step(images)

    def step(self, images: int, flops: float = 0.0) -> None:
        """Counts a training step over ``images`` images of all processes together. ``flops`` are those of the step."""
        if images < 1 or flops < 0:
            raise ConfigError(f"budget: got a step over {images} images and {flops} FLOPs, expected at least 1 image")
        self._clock.record_step(images, flops)
        self._share_time()
        self._clock.advance()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context that does not count, such as an evaluation. Steps are not counted in it."""
        if self._paused:  # within another pause
            yield
            return
        self._paused = True
        try:
            with self._clock.timer.paused():
                yield
        finally:
            self._paused = False
            self._clock.start()  # the next step is timed from here

    def state_dict(self) -> dict[str, Any]:
        return {"length": str(self.length), **self._clock.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a budget. It may have another length in the same unit. The fraction of a time never decreases."""
        if (was := Length.parse(state["length"])).kind != self.length.kind:
            raise ConfigError(f"budget: the state counts {was.kind} ({was}), this budget {self.length.kind}")
        self._clock.load_state_dict(state)
        self._clock.start()  # the next step is timed from here
        self._share_time()

    def _share_time(self) -> None:
        """All processes get rank 0's time, so that none of them stops alone. One small message for each step."""
        distributed = getattr(sys.modules.get("torch"), "distributed", None)  # if the program uses it
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            return
        if self.length.kind == "seconds" and distributed.get_world_size() > 1:
            box = [self._clock.local_time]
            distributed.broadcast_object_list(box, 0)  # device sync with NCCL, once per step
            self._clock.synced = box[0]


# --- the journal ------------------------------------------------------------------------------------------------------


def read_spent(path: Path) -> tuple[float, float]:
    """Training and total seconds from a journal; zeros if there is none, or if it is damaged, which is reported."""
    train, wall, _ = _read_journal(path)
    return train, wall


def read_rewinds(path: Path) -> int:
    """How often a run has gone back to a checkpoint, from its journal; 0 if there is none, or if it is damaged."""
    return int(_read_journal(path, said=True)[2])


def _read_journal(path: Path, said: bool = False) -> tuple[float, float, float]:
    try:
        spent = json.loads(path.read_text(encoding="utf-8"))
        train, wall, rewinds = (float(value) for value in (spent["train_seconds"], spent["wall_seconds"],
                                                           spent.get("rewinds", 0)))  # fmt: skip
        if not all(0 <= value < math.inf for value in (train, wall, rewinds)):
            raise ValueError("a time below 0, infinite or not a number")
        return train, wall, rewinds
    except FileNotFoundError:
        return 0.0, 0.0, 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if not said:
            print(f"{path} is damaged; the budget continues from the checkpoint", file=sys.stderr)
        return 0.0, 0.0, 0


def journal_interval(budget: Length) -> float:
    """The seconds between two writes: a kill loses at most these seconds."""
    if budget.kind != "seconds":
        return LONGEST_INTERVAL
    return max(SHORTEST_INTERVAL, min(LONGEST_INTERVAL, BUDGET_FRACTION * budget.value))


@contextmanager
def journal(path: Path, timer: RunTimer, interval: float, rewinds: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Within the context, a thread writes the timer's seconds and ``rewinds()`` to ``path`` every ``interval`` s."""
    done = threading.Event()

    def write() -> None:
        spent = {"train_seconds": timer.train_seconds, "wall_seconds": timer.wall_seconds, "rewinds": rewinds()}
        # Not synced, which would wait for the disk. A full disk is reported by the next checkpoint.
        with suppress(OSError), replacing(path, sync=False) as file:
            file.write(json.dumps(spent) + "\n")

    def write_until_done() -> None:
        while not done.wait(interval):
            write()

    write()
    thread = threading.Thread(target=write_until_done, name="journal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        write()
