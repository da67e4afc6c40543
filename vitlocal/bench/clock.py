"""The accuracy of the budget's clock: python -m vitlocal.bench clock [--budgets 45s,3m] [TRAINER'S OPTIONS]

Trains a recipe (default: rcfg/demo.yaml) with the command that users have, in several trials for each budget. A trial
leaves the run alone, or kills it twice with SIGKILL and resumes it, or keeps every core busy for a while. Some trials
count training time, others all time from the start of the command to its end. The table shows the seconds that were
spent, the deviation from the budget, and the last learning rate next to the end of its schedule.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from vitlocal.bench.measurement import progress_bar, text_table, write_json
from vitlocal.bench.parsing import bench_parser, times
from vitlocal.bench.runner import option_names, start_trainer
from vitlocal.config import read_config
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import DataError
from vitlocal.machine import cores
from vitlocal.progress import Length
from vitlocal.report.run_folder import read_log
from vitlocal.train.budget import read_spent
from vitlocal.train.run_folder import JOURNAL

# The trainer's options that this bench sets itself, and the remedy if a user sets them.
SET_HERE = {"budget.length": "use --budgets"} | dict.fromkeys(
    ("budget.counts", "run.folder", "run.progress", "run.resume", "resume"), "leave it out"
)
COLUMNS = {
    "budget": ("budget", ">"), "trial": ("trial", ""), "spent, s": ("spent_seconds", ".2f"),
    "deviation, %": ("off_percent", "+.2f"), "a step, s": ("step_seconds", ".3f"), "last lr": ("lr", ".2e"),
    "its end": ("end_lr", ".2e"),
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """The disturbances of a run, at fractions of its budget."""

    name: str
    counts: str = "train"
    kills: tuple[float, ...] = ()
    load: tuple[float, float] | None = None  # the start and the end of other work on every core


TRIALS = (
    Trial("left alone"),
    Trial("killed twice", kills=(0.3, 0.55)),
    Trial("killed twice, other load", kills=(0.2, 0.4), load=(0.6, 0.8)),
    Trial("all counted", counts="wall"),
    Trial("all counted, other load", counts="wall", load=(0.4, 0.6)),
    Trial("all counted, killed twice", counts="wall", kills=(0.4, 0.7)),
)


@contextmanager
def other_load() -> Iterator[None]:
    """Keeps every core busy inside the block."""
    work = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    with ExitStack() as stack:
        for _ in range(cores()):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", work]))  # waits for it at the end
            stack.callback(process.kill)
        yield


def attempt(trial: Trial, budget: Length, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Trains in ``folder`` under a trial; returns the row of the measurement. DataError if the run fails."""
    own = [f"--budget.length={budget}", f"--budget.counts={trial.counts}", f"--run.folder={folder}"]
    options, output, alive = [*options, *own, "--run.progress=no"], folder.with_suffix(".txt"), 0.0

    def failure(why: str) -> DataError:
        return DataError(f"{why}; it printed:\n{output.read_text(errors='replace').strip()}")

    def wait_until(fraction: float) -> None:
        while read_spent(folder / JOURNAL)[trial.counts == "wall"] < fraction * budget.value:
            if process.poll() is not None:
                raise failure(f"the run ended before {fraction:.0%} of its budget was spent")
            time.sleep(0.05)

    for kill_at in (*trial.kills, None):
        start, process = time.monotonic(), start_trainer(options, output)
        try:
            if kill_at is not None:
                wait_until(kill_at)
            else:
                if trial.load is not None:
                    wait_until(trial.load[0])
                    with other_load():
                        wait_until(trial.load[1])
                process.wait()
        finally:
            process.kill()
            process.wait()
            alive += time.monotonic() - start
    if process.returncode:
        raise failure(f"the run failed (exit status {process.returncode})")
    records = read_log(folder)
    last, trained = records[-1], [record for record in records if record["images_per_second"]][-1]
    # The lifetime of the command is measured from outside. Only the run itself knows its training time.
    spent = alive if trial.counts == "wall" else last["train_seconds"]
    schedule = read_config(options).train.lr_schedule
    return {
        "budget": str(budget), "trial": trial.name, "counts": trial.counts, "spent_seconds": round(spent, 3),
        "off_percent": round(100 * (spent / budget.value - 1), 3),
        "step_seconds": round(trained["batch_size"] / trained["images_per_second"], 3), "lr": last["lr"],
        "end_lr": min(schedule.end, schedule.peak), "steps": last["step"],
        "train_seconds": last["train_seconds"], "alive_seconds": round(alive, 3),
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("clock", __doc__)
    parser.add_argument("--budgets", type=times, default="45s,3m", metavar="LIST", help="budgets in time (45s,3m)")
    options, trainer = parser.parse_known_args(argv)
    option_names(trainer, SET_HERE)
    named = any(word.startswith(("--config-file", "-C")) for word in trainer)
    recipe = [] if named else ["--config-file=rcfg/demo.yaml"]
    trainer = [*recipe, "--run.save_every=10s", "--evaluate.every=0", *trainer]
    config, rows = read_config(trainer), []
    for split in ("train", "val"):
        load_manifest(config.data.root, split)  # its error says how to write the data
    with progress_bar(len(options.budgets) * len(TRIALS)) as bar:
        for budget, trial in product(options.budgets, TRIALS):
            bar.set_description_str(f"{budget}, {trial.name}")
            with tempfile.TemporaryDirectory() as folder:
                rows.append(attempt(trial, budget, trainer, Path(folder) / "run"))
            bar.update()
    print(text_table(rows, COLUMNS))
    what = "seconds that runs spent of budgets in time; some were killed with SIGKILL or slowed down"
    write_json(options.json, what, rows)
