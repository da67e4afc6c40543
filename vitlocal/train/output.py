"""Writes what a run leaves in its folder, and shows its progress. Reads kept weights."""

import json
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from vitlocal.errors import DataError
from vitlocal.jsonl import append_line, keep_lines, naming, replace_text
from vitlocal.models.factory import write_weights
from vitlocal.plan import Shape
from vitlocal.progress import Length, Progress
from vitlocal.report.run_folder import LOG, is_record, write_classes, write_picture
from vitlocal.tasks.metrics import Metric, is_evaluated
from vitlocal.tasks.task import Scores
from vitlocal.train.checkpoint import Checkpoints

KEPT = Path("checkpoints") / "kept"
REFRESH_SECONDS = 1.0
FIRST_SILENCE, LONGEST_SILENCE = 10.0, 600.0  # seconds without a line on the console, if no bar is drawn


class RunOutput:
    """Writes ``log.jsonl`` (a line per pass), TensorBoard files, evaluations and checkpoints to ``folder``.

    Shows the progress about once a second. On a terminal it draws a bar. Elsewhere it prints a line after 10 seconds
    without one, and later less often.

    ``length``: the length of the budget. ``metrics``: those of the task. ``progress=False``: no bar and no such lines.
    ``keeps_weights``: also keep the weights of each evaluation, for ``bench redundancy``.
    """

    def __init__(
        self, folder: Path, length: Length | str, metrics: Sequence[Metric], progress: bool = True,
        keeps_weights: bool = False,
    ):  # fmt: skip
        self.folder, self._metrics = folder, metrics
        self.checkpoints = Checkpoints(folder)
        self._length, self._keeps_weights = length, keeps_weights
        drawn = progress and sys.stderr.isatty()
        self._prints_progress = progress and not drawn
        self._silence, self._printed = FIRST_SILENCE, time.monotonic()
        self._next = 0.0
        form = "{percentage:5.1f} % of " + str(length) + " {bar} {elapsed}<{remaining} {postfix}"
        # Instead of tqdm's lock between processes: machine.leave frees no semaphore, and Python 3.14 would warn of it.
        tqdm.set_lock(threading.RLock())
        self._bar = tqdm(total=100.0, disable=not drawn, leave=False, dynamic_ncols=True, bar_format=form)
        self._tensorboard: Any = None

    def begin(self, step: int, here: int) -> None:
        """Opens the log. Keeps the records before ``step`` and the first ``here`` of it: later passes run again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in tensorboard's own imports
            from torch.utils.tensorboard import SummaryWriter
        recipe = self.folder / "config.yaml"
        self._recipe = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
        self._identity = self.folder.stat().st_ino
        found, log = Counter[int](), self.folder / LOG

        def keep(record: dict[str, Any]) -> bool:
            found[record["step"]] += 1
            return record["step"] < step or (record["step"] == step and found[step] <= here)

        if damaged := keep_lines(log, keep, is_record):
            self.print(
                f"note: {damaged} of the lines of {log} cannot be read; the passes in them are lost to the report"
            )
        self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        self._tensorboard.flush()  # else a thread may still write when the folder has been moved away

    def due(self) -> bool:
        """Whether :meth:`show` is due. Its loss must be read from the device, which takes some steps."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + REFRESH_SECONDS
        return True

    def show(self, at: Progress, loss: float, lr: float, size: int, rate: float) -> None:
        """Shows the progress of the run; ``rate`` in images/s."""
        now = f"epoch {at.epoch:.2f}  {size} px  loss {loss:.3f}  {rate:,.0f} images/s"
        percent = 100 * at.fraction
        self._bar.n = percent
        self._bar.set_postfix_str(now)
        if self._prints_progress and time.monotonic() >= self._printed + self._silence:
            self.print(f"{percent:.1f} % of {self._length}: {now}")
            self._silence = min(2 * self._silence, LONGEST_SILENCE)
        for name, value in (("loss", loss), ("lr", lr), ("image_size", size), ("images_per_second", rate)):
            self._add_scalar(f"train/{name}", value, at.step)

    def record(self, values: dict[str, Any]) -> None:
        """Writes the record of a pass, and prints it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        append_line(self.folder / LOG, values)
        scores = ""
        for metric in self._metrics:
            if is_evaluated(values, metric):
                self._add_scalar(f"val/{metric.name}", values[metric.name], values["step"])
                scores += "  " + metric.text(values[metric.name])
        grid = f", tokens {values['grid']}×{values['grid']}" if "grid" in values else ""
        loss = "" if values["loss"] is None else f"loss {values['loss']:.4f}"
        self.print(
            f"epoch {values['epoch']:6.2f}  {values['image_size']:3d} px{grid}  batch {values['batch_size']}  {loss}"
            f"{scores}  {values['images_per_second']:,.0f} images/s  "
            f"waited for data {100 * values['data_wait_fraction']:.1f} %"
        )

    def save_checkpoint(self, content: dict[str, Any]) -> None:
        """Replaces the run's checkpoint. DataError if the folder was removed or replaced while the run trained."""
        try:
            if self.folder.stat().st_ino != self._identity and (self.folder / "config.yaml").exists():
                raise DataError(f"{self.folder} was replaced by another run's folder; nothing was written to it")
        except FileNotFoundError:
            pass
        self.checkpoints.save(content)
        if not (self.folder / "config.yaml").exists() and self._recipe:
            replace_text(self.folder / "config.yaml", self._recipe)
        if self.folder.stat().st_ino != self._identity:
            raise DataError(
                f"{self.folder} was removed while the run trained. A checkpoint was saved to a new folder of this "
                "name, the log so far is lost. The same command continues"
            )

    def write_evaluation(
        self, scores: Scores, classes: Sequence[str], weights: Mapping[str, Tensor], at: Progress, shape: Shape
    ) -> None:
        """Writes ``classes.json`` (right and all images of each class), pictures and, if they are kept, the weights."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._keeps_weights:
            (self.folder / KEPT).mkdir(parents=True, exist_ok=True)
            about = json.dumps({"step": at.step, "epoch": at.epoch, "shape": asdict(shape)})
            write_weights(self.folder / KEPT / f"{at.step:09d}.safetensors", weights, about=about)
        if scores.by_class is not None:
            write_classes(self.folder, classes, scores.by_class)
        for name, picture in scores.pictures.items():
            write_picture(self.folder, f"{at.step:09d}_{name}", picture)

    def print(self, text: str) -> None:
        """Prints a line above the progress bar."""
        tqdm.write(text)
        sys.stdout.flush()
        self._printed = time.monotonic()

    def close(self) -> None:
        self._bar.close()
        if self._tensorboard is not None:
            with suppress(OSError):  # a full disk, which a checkpoint has reported
                self._tensorboard.close()

    def _add_scalar(self, name: str, value: float, step: int) -> None:
        with naming(self.folder / "tensorboard"):
            self._tensorboard.add_scalar(name, value, step)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The content of a file of :meth:`RunOutput.write_evaluation`: the weights, and step, epoch and shape."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])
