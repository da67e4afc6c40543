"""The room that a budget keeps where everything counts: for the last evaluation, checkpoints, and what follows."""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from vitlocal.errors import ConfigError
from vitlocal.machine import awake_seconds
from vitlocal.train.checkpoint import save_checkpoint
from vitlocal.train.watch import wait

if TYPE_CHECKING:
    from vitlocal.train.run import Run

REHEARSAL = ".rehearsal"
KNOWN = 3  # evaluations and checkpoints, the last ones, by which the length of the next is told
REHEARSED_BATCHES = 5  # of the last evaluation, to know how long it will take
LEAVING = 0.06  # of what loading took: what the process takes to end, which no clock of ours sees
LEAVING_SECONDS = 0.2  # the same, where what loading took is not known
MOMENTS = 3  # times what it takes without them, a checkpoint with the optimizer's moments takes at most


@dataclass
class Room:
    """Seconds that what follows training takes, as far as is known; saved with the run, and rank 0's on every rank."""

    finishing: float = 0.0  # export, report, and the process's own end
    saves: list[float] = field(default_factory=list)  # the last checkpoints, the first of them rehearsed
    evaluations: list[float] = field(default_factory=list)  # the last ones, likewise

    @property
    def saving(self) -> float:
        """What the next checkpoint will take: the median of the last ones, of which a disk may have held one up; of two
        the longer."""
        return statistics.median_high(self.saves) if self.saves else 0.0

    @property
    def evaluating(self) -> float:
        """What the next evaluation will take, likewise."""
        return statistics.median_high(self.evaluations) if self.evaluations else 0.0

    @property
    def between(self) -> float:
        """An evaluation on the way, and its checkpoint."""
        return self.evaluating + self.saving

    @property
    def whole(self) -> float:
        """After the last step: a checkpoint, the evaluation, another checkpoint, the end."""
        return self.evaluating + 2 * self.saving + self.finishing

    def evaluated(self, seconds: float) -> None:
        """Notes what an evaluation took."""
        self.evaluations = [*self.evaluations, seconds][-KNOWN:]

    def saved(self, seconds: float) -> None:
        """Notes what a checkpoint took."""
        self.saves = [*self.saves, seconds][-KNOWN:]


def leaving_seconds(began: float | None) -> float:
    """What the process will take to end, told by what loading took since ``began``, a reading of ``time.monotonic``.

    A busy machine makes both slow, a cold disk loading alone: waiting for a disk is left out.
    """
    return LEAVING_SECONDS if began is None else LEAVING * min(awake_seconds(), monotonic() - began)


def rehearse(run: Run) -> None:
    """Compiles the evaluation, and finds out what the budget must have left. ConfigError where that is all of it."""
    resumed = run.clock.room > 0
    evaluation = rehearse_evaluation(run)
    if run.ranks.first and not resumed:
        saving, run.room.finishing = rehearse_finish(run)
        run.room.saved(saving)
    run.room.evaluated(evaluation)
    run.keep_room()
    run.agree()
    if resumed:
        return
    length, spent, room = run.config.budget.length, run.clock.progress.seconds, run.clock.room
    if room + spent >= length.value:
        raise ConfigError(
            f"budget.length: of {length} in all, {spent:.0f} s go by before the first step, and the last evaluation"
            f" and saving need {room:.0f} s: nothing is left to train. Give more time, or let only training count: "
            "budget.counts=train"
        )


def rehearse_evaluation(run: Run) -> float:
    """Seconds that an evaluation takes, told from its first batches in one pass; the very first, which compiles, apart.

    The others are taken to be as long as the median of these, so that one that was held up is not multiplied.
    """
    whole = -(-run.sources.val.count // run.config.evaluate.batch_size)
    last, times = run.plans_ahead()[-1], []
    run.accuracy(limit=1, plan=last)

    def note() -> bool:  # asked before each batch
        wait(run.device)
        times.append(perf_counter())
        return False

    began = perf_counter()
    run.accuracy(note, limit=REHEARSED_BATCHES, plan=last)
    times.append(perf_counter())
    each = statistics.median(after - before for before, after in pairwise(times))
    return times[-1] - began + max(0, whole - REHEARSED_BATCHES) * each


def rehearse_finish(run: Run) -> tuple[float, float]:
    """Seconds that a checkpoint takes, and export, report and leaving: tried in a folder that is removed again."""
    folder = run.folder / REHEARSAL
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed here
    folder.mkdir()
    try:
        times = [perf_counter()]
        save_checkpoint(folder / "checkpoint.pt", run.state(shared=False))
        times.append(perf_counter())
        run.export(folder)
        times.append(perf_counter())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # The optimizer's moments are not there yet: two numbers to each weight.
    return MOMENTS * (times[1] - times[0]), times[2] - times[1] + run.leaving
