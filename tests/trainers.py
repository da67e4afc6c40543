"""A trainer in its run folder, for tests that look inside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vitlocal.config import Config
from vitlocal.train.build import open_run
from vitlocal.train.trainer import Trainer


@contextmanager
def open_trainer(config: Config, began: float | None = None) -> Iterator[Trainer]:
    """The trainer of :func:`open_run`."""
    with open_run(config, began) as run:
        yield run.trainer
