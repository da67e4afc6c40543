"""What a run tells: ``log.jsonl`` (a line a pass), TensorBoard, and the progress bar."""

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
FIRST_SILENCE, LONGEST_SILENCE = 10.0, 600.0  # seconds without a line, where no bar is drawn


class Log:
    """Appends records, and draws where the run stands about once a second."""

    def __init__(self, folder: Path, length: Length, progress: bool, speaks: bool = True):
        self.speaks = speaks  # of several processes, one does
        self.folder, self.path = folder, folder / "log.jsonl"
        self.length = length
        # A bar that redraws itself is for a terminal. Elsewhere a pass of half an hour has some lines between those at
        # the ends of passes: the first soon, for one may hang on it, and then ever fewer.
        drawn = speaks and progress and sys.stderr.isatty()
        self.tells = progress and not drawn
        self._silence, self._said = FIRST_SILENCE, time.monotonic()
        self.bar = tqdm(
            total=100.0, disable=not drawn, leave=False, dynamic_ncols=True,
            bar_format="{percentage:5.1f} % of " + str(length) + " {bar} {elapsed}<{remaining} {postfix}",
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own imports
            from torch.utils.tensorboard import SummaryWriter
        self._writer_type = SummaryWriter
        self.board: Any = None
        self._next = 0.0

    def begin(self, step: int) -> None:
        """Drops what was logged after ``step``: it will be done again."""
        if not self.speaks:
            return
        write_lines(self.path, [record for record in read_log(self.folder) if record["step"] <= step])
        self.board = self._writer_type(str(self.folder / "tensorboard"), purge_step=step + 1)

    def due(self) -> bool:
        """Whether a second has passed since the last :meth:`show`: what it shows must be read from the device."""
        return self.speaks and time.monotonic() >= self._next

    def wait(self) -> None:
        """Starts the second that lies between two :meth:`show`."""
        self._next = time.monotonic() + REFRESH_SECONDS

    def show(self, at: Progress, loss: float, lr: float, size: int, rate: float) -> None:
        now = f"epoch {at.epoch:.2f}  {size} px  loss {loss:.3f}  {rate:,.0f} images/s"
        self.bar.set_postfix_str(now, refresh=False)
        self.bar.n = 100 * at.fraction
        self.bar.refresh()
        if self.tells and time.monotonic() >= self._said + self._silence:
            self.say(f"{self.bar.n:.1f} % of {self.length}: {now}")
            self._silence = min(2 * self._silence, LONGEST_SILENCE)
        for name, value in (("loss", loss), ("lr", lr), ("image_size", size), ("images_per_second", rate)):
            self.board.add_scalar(f"train/{name}", value, at.step)

    def record(self, values: dict[str, Any]) -> None:
        """Closes a pass: one line in the log, one on the screen."""
        if not self.speaks:
            return
        append_line(self.path, values)
        for name in ("top1", "top5"):
            if values[name] is not None:
                self.board.add_scalar(f"val/{name}", values[name], values["step"])
        accuracy = "" if values["top1"] is None else f"  top-1 {values['top1']:5.2f} %  top-5 {values['top5']:5.2f} %"
        grid = f", tokens {values['grid']}×{values['grid']}" if "grid" in values else ""
        self.say(
            f"epoch {values['epoch']:6.2f}  {values['image_size']:3d} px{grid}  batch {values['batch_size']}  "
            + ("" if values["loss"] is None else f"loss {values['loss']:.4f}")
            + f"{accuracy}  "
            f"{values['images_per_second']:,.0f} images/s  waited for data {100 * values['data_wait_fraction']:.1f} %"
        )

    def say(self, text: str) -> None:
        if self.speaks:
            tqdm.write(text)
            sys.stdout.flush()
            self._said = time.monotonic()

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()
