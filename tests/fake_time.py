"""A clock for tests of budgets in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vitlocal.train.budget import FINISH_SECONDS, Clock
from vitlocal.train.evaluator import Evaluator
from vitlocal.train.output import RunOutput
from vitlocal.train.trainer import Trainer


class FakeTime:
    """The time of a run. It passes only in steps, evaluations and checkpoints, and at the export.

    ``evaluations``, ``saves`` and ``step`` are their seconds. So a test of a budget does not depend on the machine.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        evaluations: Iterator[float],
        saves: Iterator[float] | None = None,
        step: float = 0.5,
    ):
        self.now = 0.0

        def taking(owner: type, name: str, seconds: Callable[[], float]) -> None:
            original = getattr(owner, name)

            def timed(*arguments: object, **named: object) -> object:
                self.now += seconds()
                return original(*arguments, **named)

            monkeypatch.setattr(owner, name, timed)

        def fake_clock(length: object, counts: str, began: float | None = None) -> Clock:
            return Clock(length, counts, now=lambda: self.now)

        monkeypatch.setattr("vitlocal.train.build.Clock", fake_clock)
        monkeypatch.setattr(Evaluator, "estimate_seconds", lambda evaluator, plan: 3.0)
        taking(Trainer, "train_step", lambda: step)
        taking(Evaluator, "scores", lambda: next(evaluations))
        taking(RunOutput, "save_checkpoint", lambda: next(saves) if saves else 0.0)

        def export(run: object, folder: Path) -> None:
            self.now += FINISH_SECONDS

        monkeypatch.setattr("vitlocal.train.command.export", export)
