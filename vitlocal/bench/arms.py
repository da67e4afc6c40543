"""Recipes against each other: python -m vitlocal.bench arms ARMS.yaml --data DIR --budget 4m [--seeds 0,1,2]

Each arm is trained once for each seed, under the same budget; an interrupted bench goes on where it was. The yaml file
names recipes beside it and the options that an arm changes:

    recipes: [paper_64px.yaml]          # what all arms share, and options over them
    options: {model.pool: avg}
    arms:
      base: {}
      larger rate: {train.lr: 2.0e-3}
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml

from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.runs import summary
from vitlocal.config import read_config
from vitlocal.data.source import load_manifest
from vitlocal.errors import ConfigError, DataError, Interrupted
from vitlocal.machine import cores
from vitlocal.plan import Length
from vitlocal.train.figures import Line, race
from vitlocal.train.folder import check_same
from vitlocal.train.log import read_log
from vitlocal.train.report import duration

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "rcfg"
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Arm:
    """What one contestant trains: recipes, later ones over earlier ones, and options over both."""

    name: str
    recipes: tuple[Path, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    published: float | None = None  # top-1 at full scale, percent

    def command_line(self) -> list[str]:
        """The trainer's options."""
        stated = [f"--{name}={_text(value)}" for name, value in self.options.items()]
        return [*(f"--config-file={recipe}" for recipe in self.recipes), *stated]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value)) or "none"
    return "none" if value is None else str(value)


@dataclass(frozen=True)
class Entry:
    """One run to be: an arm, a seed, a budget, a folder."""

    arm: Arm
    seed: int
    budget: str
    folder: Path
    shared: tuple[str, ...] = ()  # the trainer's options that all have

    @property
    def options(self) -> list[str]:
        own = [f"--run.seed={self.seed}", f"--budget.length={self.budget}", f"--run.folder={self.folder}"]
        return [*self.arm.command_line(), *self.shared, *own, "--run.progress=no"]

    @property
    def done(self) -> bool:
        """Whether the run is finished; ConfigError where the folder holds another one."""
        if not (self.folder / "model.safetensors").exists():  # written when the budget is spent
            return False
        check_same(self.folder, read_config(self.options))
        return True


def entries(arms: Sequence[Arm], seeds: Sequence[int], budget: str, folder: Path, shared: Sequence[str]) -> list[Entry]:
    """Seed by seed, so that what there is after an interruption can be compared."""
    found = [
        Entry(arm, seed, budget, folder / f"{re.sub(r'[^a-zA-Z0-9_.=+-]', '_', arm.name)}-{budget}-seed{seed}",
              tuple(shared))
        for seed in seeds
        for arm in arms
    ]  # fmt: skip
    if len({entry.folder for entry in found}) < len(found):
        raise ConfigError("arms: two of them have names that give one folder; name them apart")
    return found


# --- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """What one of several runs at a time has to itself."""

    number: int  # of its GPU
    cores: frozenset[int]


class Runner:
    """Trains entries in ``jobs`` places at a time, each a part of the cores (and a GPU of its own, where there are).

    In a place ``together`` of them run at once. They take turns there, and meet the same good and bad minutes.
    """

    def __init__(self, jobs: int, together: int, folder: Path):
        self.folder = folder
        mine = sorted(os.sched_getaffinity(0))
        if not 1 <= jobs <= len(mine):
            raise ConfigError(f"--jobs: got {jobs}, expected 1 to {len(mine)}, a core for each")
        self.gpus = _gpus()
        if 0 < len(self.gpus) < jobs:
            raise ConfigError(f"--jobs: got {jobs}, expected at most {len(self.gpus)}, a GPU for each")
        if self.gpus and together > 1:
            raise ConfigError(
                "--together: runs that share a GPU cannot be timed; leave it out, or hide it: CUDA_VISIBLE_DEVICES="
            )
        share = len(mine) // jobs
        places = [Place(number, frozenset(mine[number * share : (number + 1) * share])) for number in range(jobs)]
        self.free = [place for _ in range(together) for place in places]
        self.running: dict[subprocess.Popen[bytes], tuple[Entry, Place, float]] = {}
        self.signal: int | None = None

    def run(self, waiting: Sequence[Entry]) -> list[Entry]:
        """Returns the entries that failed; raises Interrupted, when all have saved, after Ctrl-C or SIGTERM."""
        left, failed, total = list(waiting), [], len(waiting)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._forwarding():
            while left or self.running:
                while left and self.free and self.signal is None:
                    self._start(left.pop(0), total - len(left), total)
                for process in list(self.running):
                    if process.poll() is not None:
                        failed += self._ended(process)
                if self.signal is not None and not self.running:
                    raise Interrupted(self.signal)
                time.sleep(0.2)
        return failed

    def _start(self, entry: Entry, number: int, total: int) -> None:
        there = self.free.pop(0)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": self.gpus[there.number]} if self.gpus else {})
        say(f"{number} of {total}: {entry.folder.name} ...")
        with open(self._output(entry), "ab") as output:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "train_imagenet.py"), *entry.options],
                stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,  # Ctrl-C comes by us
                preexec_fn=lambda: _settle(there),
            )  # fmt: skip
        self.running[process] = entry, there, time.monotonic()
        if self.signal is not None:  # it came while the process was started
            process.send_signal(signal.SIGTERM)

    def _output(self, entry: Entry) -> Path:
        return self.folder / f"{entry.folder.name}.txt"

    def _ended(self, process: subprocess.Popen[bytes]) -> list[Entry]:
        entry, there, began = self.running.pop(process)
        self.free.append(there)
        if process.returncode == 0:
            row = summary(entry.folder)
            say(f"  {entry.folder.name}: {row['top1']:.2f} %, {duration(time.monotonic() - began)}")
            return []
        if self.signal is None:
            last = self._output(entry).read_text(errors="replace").strip().splitlines()[-1:]
            say(f"  {entry.folder.name}: failed ({' '.join(last)}); see {self._output(entry)}")
            return [entry]
        return []

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Signals reach the runs, which save; at a second one they leave at once."""

        def forward(number: int, frame: object) -> None:
            first, self.signal = self.signal is None, number
            for process in self.running:
                process.send_signal(signal.SIGTERM)
            if first:
                say("\nstopping: the runs save what they have; the same command goes on", sys.stderr)

        heard = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            heard.append(signal.SIGHUP)
        before = {number: signal.signal(number, forward) for number in heard}
        try:
            yield
        finally:
            for process in self.running:
                process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


def say(text: str, to: TextIO | None = None) -> None:
    """Prints, unless who listened is gone: runs go on, and save, without their terminal."""
    with suppress(OSError):
        print(text, file=to, flush=True)


def fall_with_parent(number: int) -> None:
    """In a child, before it starts: it gets the signal ``number`` when its parent dies, however that comes about."""
    LIBC.prctl(PR_SET_PDEATHSIG, number)


def _settle(there: Place) -> None:
    """In a run's process, before it starts: on its cores, and told to save and stop should this one be killed."""
    os.sched_setaffinity(0, there.cores)
    fall_with_parent(signal.SIGTERM)


def _gpus() -> list[str]:
    """The GPUs that are this process's to use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


# --- results --------------------------------------------------------------------------------------------------------


def rows_of(runs: Sequence[Entry]) -> list[dict[str, Any]]:
    """One row a finished run."""
    rows = []
    for run in runs:
        if run.done:
            row = summary(run.folder)
            about = {"arm": run.arm.name, "seed": run.seed, "budget": run.budget, "published_top1": run.arm.published}
            rows.append(about | {name: value for name, value in row.items() if name != "run"})
    return rows


def curves_of(runs: Sequence[Entry]) -> dict[str, list[dict[str, Any]]]:
    """The passes of each finished run, without what is the same in all of a run or drawn nowhere."""
    names = ("epoch", "images_seen", "image_size", "loss", "top1", "lr", "train_seconds", "images_per_second")
    return {
        run.folder.name: [{name: record[name] for name in names} for record in read_log(run.folder)]
        for run in runs
        if run.done
    }


def table(rows: Sequence[dict[str, Any]], arms: Sequence[Arm]) -> str:
    """A markdown table, an arm a line: mean and standard deviation over seeds."""
    published = any(arm.published is not None for arm in arms)
    head = ["arm", *(["paper, top-1 %"] if published else []), "top-1 %", "seeds", "epochs", "images/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm.name]
        if not mine:
            continue
        top1 = [row["top1"] for row in mine]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        cells = [f"{arm.name}" + (f": {arm.about}" if arm.about else "")]
        cells += ["" if arm.published is None else f"{arm.published:g}"] if published else []
        cells += [f"{statistics.mean(top1):.2f}{spread}", ", ".join(f"{value:.2f}" for value in top1)]
        cells += [f"{statistics.mean(row['epochs'] for row in mine):.1f}"]
        cells += [f"{statistics.mean(row['images_per_second'] for row in mine):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: Sequence[Entry], path: Path, title: str) -> None:
    """Top-1 of finished runs against training time."""
    lines: dict[str, list[Line]] = {}
    for run in runs:
        if run.done:
            lines.setdefault(run.arm.name, []).append(Line(run.folder.name, read_log(run.folder)))
    race(lines, title).savefig(path, dpi=120)


# --- the command ----------------------------------------------------------------------------------------------------


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The options that benches of arms share."""
    made = argparse.ArgumentParser(
        prog=f"python -m vitlocal.bench {name}", description=about, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--data", metavar="DIR", help="the data folder (default: what the recipes say)")
    made.add_argument("--seeds", default="0", metavar="LIST", help="0,1,2 for three runs an arm (default: 0)")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores (default: 1)")
    made.add_argument(
        "--together", type=int, default=1, metavar="N",
        help="of each job: so many runs share its cores, and time is processor time (default: 1)",
    )  # fmt: skip
    made.add_argument("--folder", default=f"runs/{name}", metavar="DIR", help=f"of the runs (default: runs/{name})")
    made.add_argument("--no-run", action="store_true", help="train nothing: tabulate and draw what is there")
    made.add_argument("--json", metavar="FILE", help="write rows and curves")
    return made


def seeds_of(text: str) -> list[int]:
    """Seeds with commas between; ConfigError for anything else."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0:
        raise ConfigError(f"--seeds: got '{text}', expected whole numbers with commas between, as in 0,1,2")
    return list(dict.fromkeys(found))


def check_budget(text: str, option: str = "--budget") -> str:
    """``text`` as a budget; ConfigError where it is none."""
    try:
        length = Length.parse(text)
        if length.kind == "fraction" or not length.value:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{option}: got '{text}', expected a length such as 24h, 15m or 90ep") from None
    return str(length)


def budgets_of(text: str) -> list[Length]:
    """Budgets in time with commas between; ConfigError for anything else."""
    found = [Length.parse(check_budget(part, "--budgets")) for part in text.split(",")]
    if any(length.kind != "seconds" for length in found):
        raise ConfigError(f"--budgets: got '{text}', expected lengths of time with commas between, as in 45s,1h")
    return found


def shared_options(options: argparse.Namespace, stated: Sequence[str]) -> list[str]:
    """The trainer's options that all runs have; ConfigError for those that the bench sets itself."""
    if options.together < 1:
        raise ConfigError(f"--together: got {options.together}, expected at least 1")
    own = {"run.seed": "--seeds", "run.folder": "--folder", "budget.length": "--budget", "run.progress": None}
    if options.together > 1:
        own["budget.counts"] = None
    for word in stated:
        name = word.removeprefix("--").partition("=")[0]
        if name in own:
            better = f"; use {own[name]}" if own[name] else ""
            raise ConfigError(f"--{name}: the bench sets it for each run{better}")
    data = [f"--data.root={options.data}"] if options.data else []
    return [*data, *(["--budget.counts=cpu"] if options.together > 1 else []), *stated]


def carry_out(runs: Sequence[Entry], options: argparse.Namespace) -> None:
    """Checks every run's configuration, then trains those that are not done.

    Raises ConfigError before anything is trained, DataError where runs failed, Interrupted when all have saved.
    """
    for run in runs:
        config = read_config(run.options)
        for split in () if options.no_run else ("train", "val"):
            load_manifest(config.data.root, split)  # or an error that says how to write it
    waiting = [run for run in runs if not run.done]
    if options.no_run and len(waiting) == len(runs):
        raise ConfigError(
            f"--no-run: {options.folder} has none of these runs; leave it out to train them, or name another"
        )
    if options.no_run or not waiting:
        return
    jobs = options.jobs
    runner = Runner(jobs, options.together, Path(options.folder))
    budget = Length.parse(runs[0].budget)
    if budget.kind == "seconds":
        hours = budget.value * -(-len(waiting) // jobs) / 3600
        print(
            f"{len(waiting)} of {len(runs)} runs to train, {jobs * options.together} at a time on {cores()} cores: "
            f"{hours:.1f} h and more, if each keeps its cores busy"
        )
    if failed := runner.run(waiting):
        names = ", ".join(entry.folder.name for entry in failed)
        raise DataError(f"{len(failed)} of the runs failed ({names}); what they said lies beside their folders")


@contextmanager
def telling(write: Callable[[], None]) -> Iterator[None]:
    """Writes what there is at the end, also where runs failed or were stopped."""
    try:
        yield
    except (DataError, Interrupted):
        write()
        raise
    write()


def read_arms(path: str) -> list[Arm]:
    """The arms of a yaml file; ConfigError where it is not one."""
    folder = Path(path).parent

    def files(part: Mapping[str, Any]) -> tuple[Path, ...]:
        named = part.get("recipes", ())
        return tuple(folder / name for name in ([named] if isinstance(named, str) else named))

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        shared, common, arms = files(content), content.get("options") or {}, []
        for name, options in content["arms"].items():
            if "," in str(name):
                raise ConfigError(
                    f"{path}: the arm '{name}' has a comma in its name, which --only cannot name; leave it out"
                )
            own = {**common, **(options or {})}
            recipes = (*shared, *files(own))
            own.pop("recipes", None)
            arms.append(Arm(str(name), recipes, own))
        return arms
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a yaml file of arms") from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected 'recipes', a list of files, and 'arms', each a name with options ({error})"
        ) from error


def main(argv: Sequence[str]) -> None:
    reader = parser("arms", __doc__)
    reader.add_argument("arms", metavar="ARMS.yaml")
    reader.add_argument("--budget", required=True, metavar="LENGTH", help="of each run: 4m, 90ep, 24h")
    reader.add_argument("--only", metavar="LIST", help="names of arms, with commas between")
    reader.add_argument("--plot", metavar="FILE", help="draw top-1 against training time")
    options, shared = reader.parse_known_args(list(argv))
    arms = read_arms(options.arms)
    if options.only:
        names = [name.strip() for name in options.only.split(",")]
        if unknown := set(names) - {arm.name for arm in arms}:
            raise ConfigError(f"--only: {options.arms} has no arm {', '.join(sorted(unknown))}")
        arms = [arm for arm in arms if arm.name in names]
    folder, budget = Path(options.folder), check_budget(options.budget)
    runs = entries(arms, seeds_of(options.seeds), budget, folder, shared_options(options, shared))

    def write_results() -> None:
        rows = rows_of(runs)
        print(table(rows, arms))
        if options.json:
            what = f"training runs of {budget} each, arm by arm: the accuracy that they reached, and their passes"
            write_json(options.json, measurement(what, rows, curves=curves_of(runs)))
        if options.plot and rows:
            draw(runs, Path(options.plot), f"{budget} a run")

    with telling(write_results):
        carry_out(runs, options)
