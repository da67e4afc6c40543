"""The faults: how each is injected, and what must be true afterwards.

Each function below ``@fault`` injects one kind of fault ``count`` times and says of each whether something was lost.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Outcome, kill, run

from vitlocal.config import read_config
from vitlocal.launch import protect_streams
from vitlocal.report.run_folder import read_log
from vitlocal.train.__main__ import main as train
from vitlocal.train.build import open_run
from vitlocal.write_dataset import main as write

TRAINING = {
    "model.name": "vitlocal_tiny_patch8_64", "model.size": 48, "model.depth": 4, "model.width": 32, "model.heads": 4,
    "train.batch_size": 32, "train.lr_batch": 0, "train.ema_decay": 0.9, "augment.mixup": 0.8, "budget.length": "4ep",
    "evaluate.every": 2, "run.save_every": "2steps", "run.device": "cpu", "run.threads": 1, "data.workers": 1,
}  # fmt: skip
SIZES = {"image_size.init": 16, "image_size.step_pixels": 16, "image_size.step_epochs": 1}
UPDATES = {"trilevel.update_every": "1ep", "trilevel.max_updates": 2, "trilevel.decay_end": "80%"}
SEARCH = {"autoprog.search_length": "0.5ep", "autoprog.probe_batches": 2, "autoprog.size_multiple": 16}
DIT = {
    "model.name": "vitlocal_dit_tiny_patch4_32", "model.size": 16, "model.depth": 2, "model.drop_path": 0,
    "augment.mixup": 0, "augment.crop_scale": "1,1", "diffusion.grid_classes": 2, "diffusion.sample_steps": 2,
    "evaluate.crop_pct": 1,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "sizes": {"methods": "image_size", **SIZES},
    "trilevel": {"methods": "trilevel", "trilevel.token_keep_rate": 0.7, **UPDATES},
    "autoprog": {"methods": "autoprog", **SEARCH},
    "budgeted": {"methods": "budgeted"},
    "muon and batches": {"methods": "batch_size", "train.optimizer": "muon", "batch_size.limit": 64},
    "sizes and trilevel": {"methods": "image_size,trilevel", **SIZES, **UPDATES},
    "unfreeze": {"methods": "unfreeze", "unfreeze.size_multiple": 16, "unfreeze.probe_batch_size": 8},
    "diffusion": {"methods": "none", **DIT},
}


DRAWN = 0.25  # of the runs end with their page and curve


@dataclass
class Result:
    """What one kind of fault did."""

    kind: str
    injected: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)  # what was lost, a sentence for each

    def add(self, problem: str | None, count: int = 1) -> None:
        self.injected += count
        if problem is None:
            self.survived += count
        else:
            self.lost.append(problem)


class Bench:
    """A folder for runs and data, the random numbers of all injections, and finished runs to compare with."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.data = folder / "data"
        self._whole: dict[str, tuple[Path, float]] = {}  # finished runs and their seconds, by the name of their method
        for split, sides in (("train", "48:raw,96:raw"), ("val", "96:raw")):
            self.check(run(write, self.writing(self.data, split, sides), folder / "console"))

    @staticmethod
    def check(outcome: Outcome) -> None:
        """Raises RuntimeError if a command that nobody harmed failed."""
        if outcome.status:
            raise RuntimeError(f"a run without a fault failed with {outcome.status}: {outcome.console}")

    @staticmethod
    def writing(out: Path, split: str = "train", sides: str = "48:raw,96:jpg", images: int = 6) -> list[str]:
        """The arguments of ``write_dataset.py`` for the built-in sample."""
        return ["--split", split, "--source", f"sample:{images}", "--sides", sides, "--workers", "1", "--out", str(out)]

    def training(self, folder: Path, method: str = "sizes", **options: Any) -> list[str]:
        """The arguments of ``train_imagenet.py`` for a run of seconds."""
        values = {**TRAINING, "data.root": self.data, **METHODS[method], "run.folder": folder, **options}
        return [f"--{name}={value}" for name, value in values.items()]

    def whole(self, method: str = "sizes") -> tuple[Path, float]:
        """A run that nobody harmed, and how many seconds it took."""
        if method not in self._whole:
            with open_run(read_config(self.training(self.folder / "first", method), {})) as built:
                for plan in built.trainer.upcoming_plans():  # forks inherit these counts, which take as long as a run
                    built.trainer._macs(plan.feed.size, plan.shape)
            shutil.rmtree(self.folder / "first")
            folder = self.folder / f"whole {method}"
            outcome = run(train, self.training(folder, method), self.folder / "console")
            self.check(outcome)
            self._whole[method] = folder, outcome.seconds
        return self._whole[method]

    def moment(self, seconds: float) -> float:
        """A random moment within ``seconds``."""
        return self.random.uniform(0.02, 1.0) * seconds

    def fresh(self, name: str) -> Path:
        """The path of a new folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name


def contents(folder: Path) -> dict[str, Any]:
    """What a finished run leaves that must not depend on faults: exported weights, and losses of its passes."""
    log = read_log(folder)
    return {
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "losses": [record["loss"] for record in log],
        "steps": [record["step"] for record in log],
        "scores": [{name: record.get(name) for name in ("top1", "val_loss")} for record in log],
    }


def difference(folder: Path, whole: Path, weights_only: bool = False) -> str | None:
    """What two finished runs differ in; None if in nothing. ``weights_only`` if the log was damaged."""
    one, other = contents(folder), contents(whole)
    different = [name for name in one if one[name] != other[name] and (name == "weights" or not weights_only)]
    return f"other {', '.join(different)} than without the fault" if different else None


FAULTS: dict[str, Callable[[Bench, int], Iterator[Result]]] = {}


def fault(function: Callable[[Bench, int], Iterator[Result]]) -> Callable[[Bench, int], Iterator[Result]]:
    """Registers a kind of fault under the name of its function."""
    FAULTS[function.__name__] = function
    return function


def harmed_training(
    bench: Bench, method: str, harms: Sequence[tuple[int, float]], expected: Callable[[int, Outcome], str | None]
) -> str | None:
    """Trains, with a signal in each of the first processes, then to the end. Returns what was lost.

    ``harms``: signals, and when they are sent. ``expected(signal, outcome)``: what is wrong with how a process ended.
    """
    whole, _ = bench.whole(method)
    folder, console, draws = bench.fresh("run"), bench.folder / "console", bench.random.random() < DRAWN
    for number, after in harms:
        outcome = run(train, bench.training(folder, method), console, after=after, harm=kill(number), draws=draws)
        if problem := expected(number, outcome):
            return problem
    last = run(train, bench.training(folder, method), console, draws=draws)
    if last.status or last.failed_badly:
        return f"status {last.status} at the end: {last.console[-300:]}"
    return difference(folder, whole)


@fault
def kill_9_of_training(bench: Bench, count: int) -> Iterator[Result]:
    """Kills at random moments, up to three in each run, of each method. The run must end as without them."""
    for method in METHODS:
        result, kills = Result(f"kill -9 of training: {method}"), 3
        seconds = bench.whole(method)[1]
        while result.injected < max(1, count // len(METHODS)):
            harms = [(signal.SIGKILL, bench.moment(seconds)) for _ in range(kills)]
            result.add(harmed_training(bench, method, harms, lambda number, outcome: None), kills)
        yield result


@fault
def signals_to_training(bench: Bench, count: int) -> Iterator[Result]:
    """Signals of batch systems and terminals: the run saves, leaves with 128 + the signal, and continues."""

    def expected(number: int, outcome: Outcome) -> str | None:
        right = (0, 128 + number)
        if outcome.status in right and not outcome.failed_badly:
            return None
        return f"status {outcome.status} after signal {number}: {outcome.console[-300:]}"

    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGXCPU"):
        result = Result(f"{name} to training")
        for _ in range(max(1, count // 50)):
            harms = [(getattr(signal, name), bench.moment(bench.whole()[1]))]
            result.add(harmed_training(bench, "sizes", harms, expected))
        yield result


@fault
def kill_9_of_writing(bench: Bench, count: int) -> Iterator[Result]:
    """Kills at random moments, up to three in each write. The files must be the same, byte for byte."""
    console, whole = bench.folder / "console", bench.fresh("whole data")
    outcome = run(write, bench.writing(whole), console)
    bench.check(outcome)
    result = Result("kill -9 of write_dataset.py")
    while result.injected < max(1, count // 4):
        out = bench.fresh("written")
        for _ in range(3):
            run(write, bench.writing(out), console, after=bench.moment(outcome.seconds), harm=kill())
        last = run(write, bench.writing(out), console)
        problem = f"status {last.status}: {last.console[-300:]}" if last.status else files_differ(out, whole)
        result.add(problem, 3)
    yield result


def files_differ(folder: Path, whole: Path) -> str | None:
    """Which written files differ; None if none does."""
    names = {path.name for path in whole.iterdir()} | {path.name for path in folder.iterdir()}
    parts = [(folder / name, whole / name) for name in sorted(names) if not name.endswith(".costs.json")]
    wrong = [one.name for one, other in parts if not (one.exists() and other.exists())]
    wrong += [one.name for one, other in parts if one.name not in wrong and one.read_bytes() != other.read_bytes()]
    return f"{', '.join(wrong)} differ" if wrong else None


@fault
def full_disk(bench: Bench, count: int) -> Iterator[Result]:
    """No file can grow beyond some size. Both commands must say so, and continue as if nothing had been."""
    console = bench.folder / "console"
    whole, _ = bench.whole()
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    result = Result("full disk in training")
    for _ in range(max(1, count // 20)):
        folder, room = bench.fresh("run"), bench.random.randrange(2000, largest)
        outcome = run(train, bench.training(folder), console, disk_bytes=room)
        problem = None
        if outcome.status not in (0, 1) or outcome.failed_badly:
            problem = f"status {outcome.status} with files of at most {room} bytes: {outcome.console[-300:]}"
        elif outcome.status and str(bench.folder) not in outcome.console:
            problem = f"the message names no file: {outcome.console[-300:]}"
        elif half := [str(path) for path in folder.rglob("*.writing")]:
            problem = f"half-written {', '.join(half)}"
        else:
            last = run(train, bench.training(folder), console)
            problem = f"status {last.status}: {last.console[-300:]}" if last.status else difference(folder, whole)
        result.add(problem)
    yield result


@fault
def closed_console(bench: Bench, count: int) -> Iterator[Result]:
    """Nobody reads what training prints. The run must go on to its end."""
    result = Result("closed stdout")
    whole, _ = bench.whole()
    for _ in range(max(1, count // 200)):
        folder = bench.fresh("run")
        outcome = run(without_a_reader, bench.training(folder), bench.folder / "console")
        problem = f"status {outcome.status}: {outcome.console[-300:]}" if outcome.status else None
        result.add(problem or difference(folder, whole))
    yield result


def without_a_reader(argv: Sequence[str]) -> int | None:
    """Trains while stdout and stderr are a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    protect_streams(ends=False)  # as the start of the command does
    return train(argv)
