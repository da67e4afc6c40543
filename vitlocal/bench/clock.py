"""Does a run end with its budget? python -m vitlocal.bench clock [--budgets 45s,3m] [THE TRAINER'S OPTIONS]

Trains a recipe (rcfg/demo.yaml, or what --config-file names) under each budget as a user would, by the command: left
alone; killed by SIGKILL and resumed twice on the way; the same, with other work on every core for a fifth of it; and,
with all that the command takes counted, left alone, with such other work, and killed. The table has the seconds that
were spent in the end, how far from the budget that is, and the last step's learning rate beside the schedule's last.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitlocal.bench.entries import RECIPES, option_names
from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.parsing import times
from vitlocal.bench.runner import fall_with_parent, start_trainer
from vitlocal.config import read_config
from vitlocal.data.batch import load_manifest
from vitlocal.errors import DataError
from vitlocal.machine import cores
from vitlocal.progress import Length
from vitlocal.report.run_folder import read_log
from vitlocal.train.folder import JOURNAL
from vitlocal.train.journal import read_spent
from vitlocal.train.optim import Schedule

# The trainer's options that the bench sets for each run, and what of its own stands for them.
OWN = {"budget.length": "use --budgets"} | dict.fromkeys(
    ("budget.counts", "run.folder", "run.progress", "run.resume", "resume"), "leave it out"
)
POLL_SECONDS = 0.05
BUSY = "while True: pass"


@dataclass(frozen=True)
class Trial:
    """What happens to a run on its way, at parts of its budget."""

    name: str
    counts: str = "train"
    kills: tuple[float, ...] = ()
    load: tuple[float, float] | None = None  # from here to there, every core has other work


TRIALS = (
    Trial("left alone"),
    Trial("killed twice", kills=(0.3, 0.55)),
    Trial("killed twice, other load", kills=(0.2, 0.4), load=(0.6, 0.8)),
    Trial("all counted", counts="wall"),
    Trial("all counted, other load", counts="wall", load=(0.4, 0.6)),
    Trial("all counted, killed twice", counts="wall", kills=(0.4, 0.7)),
)


class Attempts:
    """One run, started as often as it takes; ``alive`` is how long its processes have lived together, seconds."""

    def __init__(self, options: Sequence[str], folder: Path, counts: str):
        self.options, self.folder, self.counts = [*options, f"--run.folder={folder}"], folder, counts
        self.output = folder.with_suffix(".txt")
        self.alive = 0.0

    def spent(self) -> float:
        """Seconds of the budget, by the run's own journal."""
        return read_spent(self.folder / JOURNAL)[self.counts == "wall"]

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        began = time.monotonic()
        process = start_trainer(self.options, self.output)
        try:
            yield process
        finally:
            process.kill()  # unless it has ended
            process.wait()
            self.alive += time.monotonic() - began

    def until(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Waits until so much of the budget is spent; DataError where the run ends before."""
        while self.spent() < seconds:
            if process.poll() is not None:
                raise DataError(f"the run ended before {seconds:g} s of its budget were spent; it said:\n{self.said}")
            time.sleep(POLL_SECONDS)

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Waits for the end; DataError where it is not a good one."""
        if process.wait():
            raise DataError(f"the run failed (exit status {process.returncode}); it said:\n{self.said}")

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace").strip()


@contextmanager
def other_load() -> Iterator[None]:
    """Keeps every core busy meanwhile."""
    busy = []
    try:
        for _ in range(cores()):
            command = [sys.executable, "-c", BUSY]
            busy.append(subprocess.Popen(command, preexec_fn=lambda: fall_with_parent(signal.SIGKILL)))
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def attempt(trial: Trial, budget: Length, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Trains in ``folder`` and tells how the run ended."""
    stated = [f"--budget.length={budget}", f"--budget.counts={trial.counts}", "--run.progress=no"]
    run = Attempts([*options, *stated], folder, trial.counts)
    for part in trial.kills:
        with run.started() as process:
            run.until(process, part * budget.value)
    with run.started() as process:
        if trial.load is not None:
            begin, end = trial.load
            run.until(process, begin * budget.value)
            with other_load():
                run.until(process, end * budget.value)
        run.finish(process)
    records = read_log(folder)
    last, trained = records[-1], [record for record in records if record["images_per_second"]][-1]
    # What the command took is told from outside; what training took, only the run can tell.
    spent = run.alive if trial.counts == "wall" else last["train_seconds"]
    schedule = Schedule(read_config(run.options).train)
    return {
        "budget": str(budget),
        "trial": trial.name,
        "counts": trial.counts,
        "spent_seconds": round(spent, 3),
        "off_percent": round(100 * (spent / budget.value - 1), 3),
        "step_seconds": round(trained["batch_size"] / trained["images_per_second"], 3),
        "lr": last["lr"],
        "end_lr": min(schedule.config.end_lr, schedule.peak),
        "steps": last["step"],
        "train_seconds": last["train_seconds"],
        "alive_seconds": round(run.alive, 3),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vitlocal.bench clock", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--budgets", default="45s,3m", metavar="LIST", help="lengths of time (default: 45s,3m)")
    parser.add_argument("--json", metavar="FILE", help="write the measurement")
    options, shared = parser.parse_known_args(list(argv))
    option_names(shared, OWN)
    recipe = [] if any(word.startswith(("--config-file", "-C")) for word in shared) else [RECIPES / "demo.yaml"]
    trained = [*(f"--config-file={path}" for path in recipe), "--run.save_every=10s", "--evaluate.every=0", *shared]
    budgets = times(options.budgets)
    config = read_config(trained)
    for split in ("train", "val"):
        load_manifest(config.data.root, split)  # or an error that says how to write it
    rows = []
    print(
        f"{'budget':>7} {'what happened':26} {'spent':>9} {'off by':>8} {'a step':>8} {'last rate':>10} {'its end':>10}"
    )
    for budget in budgets:
        for trial in TRIALS:
            with tempfile.TemporaryDirectory() as folder:
                row = attempt(trial, budget, trained, Path(folder) / "run")
            rows.append(row)
            print(
                f"{row['budget']:>7} {row['trial']:26} {row['spent_seconds']:7.2f} s {row['off_percent']:+6.2f} % "
                f"{row['step_seconds']:6.3f} s {row['lr']:10.2e} {row['end_lr']:10.2e}",
                flush=True,
            )
    if options.json:
        what = "seconds that runs spent of budgets in time, killed (-9) and slowed down on the way"
        write_json(options.json, measurement(what, rows))
