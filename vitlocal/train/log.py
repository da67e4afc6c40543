"""Logs a run: ``log.jsonl`` (a line per pass), TensorBoard, the progress bar and the console."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitlocal.jsonl import append_line, write_lines
from vitlocal.progress import Length, Progress
from vitlocal.report.run_folder import read_log

REFRESH_SECONDS = 1.0
FIRST_SILENCE, LONGEST_SILENCE = 10.0, 600.0  # seconds without a line on the console, if no bar is drawn


class Log:
    """Writes the records of passes, and shows the progress about once a second.

    On a terminal it draws a bar. Elsewhere it prints a line after 10 seconds without one, and later less often.
    ``length``: the length of the budget. ``progress=False``: no bar and no such lines.
    """

    def __init__(self, folder: Path, length: Length | str, progress: bool = True):
        self._folder, self._length = folder, length
        drawn = progress and sys.stderr.isatty()
        self._prints_progress = progress and not drawn
        self._silence, self._printed = FIRST_SILENCE, time.monotonic()
        self._next = 0.0
        self._bar = tqdm(
            total=100.0,
            disable=not drawn,
            leave=False,
            dynamic_ncols=True,
            bar_format="{percentage:5.1f} % of " + str(length) + " {bar} {elapsed}<{remaining} {postfix}",
        )
        self._tensorboard: Any = None

    def begin(self, step: int) -> None:
        """Drops the records after ``step``: these passes will run again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in tensorboard's own imports
            from torch.utils.tensorboard import SummaryWriter
        path = self._folder / "log.jsonl"
        write_lines(path, [record for record in read_log(self._folder) if record["step"] <= step])
        self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)

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
        self._bar.set_postfix_str(now, refresh=False)
        self._bar.n = percent
        self._bar.refresh()
        if self._prints_progress and time.monotonic() >= self._printed + self._silence:
            self.print(f"{percent:.1f} % of {self._length}: {now}")
            self._silence = min(2 * self._silence, LONGEST_SILENCE)
        for name, value in (("loss", loss), ("lr", lr), ("image_size", size), ("images_per_second", rate)):
            self._tensorboard.add_scalar(f"train/{name}", value, at.step)

    def record(self, values: dict[str, Any]) -> None:
        """Writes the record of a pass, and prints it."""
        append_line(self._folder / "log.jsonl", values)
        for name in ("top1", "top5"):
            if values[name] is not None:
                self._tensorboard.add_scalar(f"val/{name}", values[name], values["step"])
        accuracy = "" if values["top1"] is None else f"  top-1 {values['top1']:5.2f} %  top-5 {values['top5']:5.2f} %"
        grid = f", tokens {values['grid']}×{values['grid']}" if "grid" in values else ""
        loss = "" if values["loss"] is None else f"loss {values['loss']:.4f}"
        self.print(
            f"epoch {values['epoch']:6.2f}  {values['image_size']:3d} px{grid}  batch {values['batch_size']}  {loss}"
            f"{accuracy}  {values['images_per_second']:,.0f} images/s  "
            f"waited for data {100 * values['data_wait_fraction']:.1f} %"
        )

    def print(self, text: str) -> None:
        """Prints a line above the progress bar."""
        tqdm.write(text)
        sys.stdout.flush()
        self._printed = time.monotonic()

    def close(self) -> None:
        self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
