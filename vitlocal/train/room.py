"""The room that a budget keeps where everything counts: for the last evaluation, checkpoints, and what follows."""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from vitlocal.errors import ConfigError
from vitlocal.train.checkpoint import save_checkpoint
from vitlocal.train.report import rehearse_report

if TYPE_CHECKING:
    from vitlocal.train.run import Run

REHEARSAL = ".rehearsal"
EVALUATIONS = 3  # by which the length of the next one is told
REHEARSED_BATCHES = 3  # of the last evaluation, to know how long it will take
LEAVING = 0.36  # of the time that loading took: what Python takes to end, which no clock of ours sees
LEAVING_SECONDS = 1.5  # the same, where the time of loading is not known
MOMENTS = 3  # times what it takes without them, a checkpoint with the optimizer's moments takes at most


@dataclass
class Room:
    """Seconds that what follows training takes, as far as is known; saved with the run, and rank 0's on every rank."""

    saving: float = 0.0  # the slowest checkpoint
    finishing: float = 0.0  # export, report, and Python's own end
    evaluations: list[float] = field(default_factory=list)  # the last ones

    @property
    def evaluating(self) -> float:
        """What the next evaluation will take: the median of the last ones, which may have been held up; of two the
        longer."""
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
        self.evaluations = [*self.evaluations, seconds][-EVALUATIONS:]


def leaving_seconds(began: float | None) -> float:
    """What Python will take to end, told by what loading took since ``began``, a reading of ``time.monotonic``."""
    return LEAVING_SECONDS if began is None else LEAVING * (monotonic() - began)


def rehearse(run: Run) -> None:
    """Compiles the evaluation, and finds out what the budget must have left. ConfigError where that is all of it."""
    resumed = run.clock.room > 0
    evaluation = rehearse_evaluation(run)
    if run.ranks.first and not resumed:
        run.room.saving, run.room.finishing = rehearse_finish(run)
    run.keep_room(evaluation)
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
    """Seconds that an evaluation takes, told from a few of its batches; the first one, which compiles, apart."""
    whole = -(-run.sources.val.count // run.config.evaluate.batch_size)
    rehearsed = min(whole, REHEARSED_BATCHES)
    spent, last = [], run.plans_ahead()[-1]
    run.accuracy(limit=1, plan=last)
    for batches in (1, rehearsed):
        began = perf_counter()
        run.accuracy(limit=batches, plan=last)
        spent.append(perf_counter() - began)
    if rehearsed == whole:
        return spent[1]
    # Opening the source and waiting for its first batch happen once.
    return spent[1] + (whole - rehearsed) * max(0.0, spent[1] - spent[0]) / (rehearsed - 1)


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
        rehearse_report(folder, run.config)
        times.append(perf_counter())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # The optimizer's moments are not there yet: two numbers to each weight.
    return MOMENTS * (times[1] - times[0]), times[2] - times[1] + run.leaving
