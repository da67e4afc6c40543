"""Writes what a run leaves in its folder while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vitlocal.plan import Shape
from vitlocal.progress import Progress
from vitlocal.report.run_folder import write_classes
from vitlocal.tasks.classification import Accuracy
from vitlocal.train.checkpoint import keep_weights, save_checkpoint
from vitlocal.train.log import Log
from vitlocal.train.run_folder import CHECKPOINT


class RunOutput:
    """Writes checkpoints, evaluations and the log of a run to ``folder``.

    ``keeps_weights``: also keep the weights of each evaluation, for ``bench redundancy``.
    """

    def __init__(self, folder: Path, log: Log, keeps_weights: bool = False):
        self.folder, self.log = folder, log
        self._keeps_weights = keeps_weights

    def save_checkpoint(self, content: dict[str, Any]) -> None:
        """Replaces the run's checkpoint."""
        save_checkpoint(self.folder / CHECKPOINT, content)

    def write_evaluation(
        self, accuracy: Accuracy, classes: Sequence[str], weights: Mapping[str, Tensor], at: Progress, shape: Shape
    ) -> None:
        """Writes ``classes.json`` (the correct and all images of each class) and, if ``keeps_weights``, the weights."""
        if self._keeps_weights:
            keep_weights(self.folder, weights, at.step, at.epoch, shape)
        write_classes(self.folder, classes, accuracy.by_class)
