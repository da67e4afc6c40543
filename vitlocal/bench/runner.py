"""Arms, the runs that a bench plans for them, and training several runs at a time, each on its share of the machine."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from vitlocal.config import Config, read_config
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import ConfigError
from vitlocal.machine import end_with_parent, memory_stalls
from vitlocal.options import as_argument
from vitlocal.paths import find_recipe
from vitlocal.report.run_folder import read_origin
from vitlocal.storage import methods_writing
from vitlocal.stored_config import check_same_run
from vitlocal.train.build_checks import check_data
from vitlocal.train.run_folder import data_fingerprint, in_use

STALL_LIMIT = 0.02  # the bench prints a note if processes waited for memory during a larger fraction of a minute

# The trainer's options that the bench sets for each run, and the remedy if a user sets them.
BENCH_OPTIONS = {"run.seed": "use --seeds", "run.folder": "use --folder", "budget.length": "use --budget"} | (
    dict.fromkeys(("run.progress", "run.resume", "resume"), "leave it out")
)


@dataclass(frozen=True)
class Arm:
    """A contestant: recipes and options. Later recipes override earlier recipes, and options override all recipes."""

    name: str
    recipes: tuple[Path, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    published: float | None = None  # top-1 of the paper at full scale, percent

    def command_line(self) -> list[str]:
        """The arm as options of the trainer."""
        options = [f"--{name}={as_argument(value)}" for name, value in self.options.items()]
        return [*(f"--config-file={recipe}" for recipe in self.recipes), *options]


@dataclass(frozen=True)
class PlannedRun:
    """A run of one arm, with a seed, a budget and a folder."""

    arm: Arm
    seed: int
    budget: str
    folder: Path
    options: tuple[str, ...]  # the trainer's command line

    def config(self) -> Config:
        """The run's configuration. ConfigError if it is wrong, or if the folder holds a different run."""
        config = read_config(self.options)
        if setting := methods_writing(config, "budget.length"):
            what = f"the arm '{self.arm.name}': options of {', '.join(setting)} set the length of the run"
            raise ConfigError(f"{what}, but all arms must have the same length; leave them out")
        if (self.folder / "config.yaml").exists():
            check_same_run(self.folder, config, "folder")
            origins, has_manifest = read_origin(self.folder), (Path(config.data.root) / "train.json").exists()
            if origins and has_manifest:  # the trainer itself checks other data
                check_data(data_in(config.data.root), origins[-1]["data"], config)
        return config

    @property
    def output(self) -> Path:
        """The file with what the trainer prints."""
        return Path(f"{self.folder}.txt")

    @property
    def done(self) -> bool:
        return (self.folder / "model.safetensors").exists()  # written when the budget is spent


@lru_cache
def data_in(root: str) -> dict[str, Any]:
    """The fingerprint of the training data in a folder. Cached, because ImageNet's manifest takes seconds to read."""
    manifest = load_manifest(root, "train")
    return data_fingerprint(manifest.count, manifest.classes)


def plan_runs(
    arms: Sequence[Arm], seeds: Sequence[int], budget: str, folder: Path, shared: Sequence[str]
) -> list[PlannedRun]:
    """The runs, seed by seed. ConfigError if two arms would have the same folder, or if an option is set twice."""
    common = option_names(shared, BENCH_OPTIONS)
    runs: dict[Path, PlannedRun] = {}
    for arm, name in ((each, name) for each in arms for name in each.options):
        if name in BENCH_OPTIONS:
            raise ConfigError(f"the arm '{arm.name}': the bench sets {name} for each run; {BENCH_OPTIONS[name]}")
        if name in common:
            stated = as_argument(arm.options[name])
            raise ConfigError(f"--{name}: the arm '{arm.name}' has {name}={stated}; leave out one of them")
    for seed, arm in product(seeds, arms):
        place = folder / f"{re.sub(r'[^a-zA-Z0-9_.=+-]', '_', arm.name)}-{budget}-seed{seed}"
        if place in runs:
            both = f"the arms '{runs[place].arm.name}' and '{arm.name}'"
            raise ConfigError(f"{both} would both train in {place}; give them different names")
        own = f"--run.seed={seed}", f"--budget.length={budget}", f"--run.folder={place}", "--run.progress=no"
        runs[place] = PlannedRun(arm, seed, budget, place, (*arm.command_line(), *shared, *own))
    return list(runs.values())


def option_names(words: Sequence[str], bench_options: Mapping[str, str]) -> set[str]:
    """The names of options on a command line. ConfigError, with the remedy, if one is in ``bench_options``."""
    found = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    for name in found & bench_options.keys():
        raise ConfigError(f"--{name}: the bench sets it for each run; {bench_options[name]}")
    return found


def read_arms(path: str) -> list[Arm]:
    """The arms of a yaml file, with what the table shows about them. ConfigError if it is not such a file."""
    file = find_recipe(path)

    def files(named: str | Sequence[str]) -> tuple[Path, ...]:
        return tuple(find_recipe(name, file.parent) for name in ([named] if isinstance(named, str) else named))

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        shared, common, arms = files(content.get("recipes", ())), content.get("options") or {}, []
        for name, options in content["arms"].items():
            if "," in str(name):
                raise ConfigError(f"{path}: the name of the arm '{name}' contains a comma, which separates names")
            own = {**common, **(options or {})}
            recipes, about, published = own.pop("recipes", ()), own.pop("about", ""), own.pop("published", None)
            arms.append(Arm(str(name), (*shared, *files(recipes)), own, about, published))
        return arms
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a yaml file of arms") from error
    except (yaml.YAMLError, UnicodeError, AttributeError, KeyError, TypeError) as error:
        expected = "'recipes', a list of files, and 'arms', each a name with options"
        raise ConfigError(f"{path}: expected {expected} ({error})") from error


def say(text: str) -> None:
    """Prints a line. A reader that has gone must not end the runs."""
    with suppress(OSError):
        print(text, flush=True)


class Runner:
    """Trains runs in ``jobs`` places. Each place has an equal share of the cores, and one of the ``gpus``, if any.

    In each place, ``together`` runs share the cores. If there are several, the runs of a seed start when those of the
    seed before have ended. So runs that are compared meet the same slow and fast minutes.
    """

    def __init__(self, jobs: int, together: int, gpus: Sequence[str] = ()):
        self.gpus, self.by_seeds = gpus, together > 1
        self.cores = sorted(os.sched_getaffinity(0))
        most, what = (len(gpus), "GPUs") if gpus else (len(self.cores), "cores")
        if not 1 <= jobs <= most:
            raise ConfigError(f"--jobs: got {jobs}, expected 1 to {most}, the number of {what}")
        if gpus and together > 1:
            raise ConfigError("--together: runs that share a GPU cannot be timed; use --together=1, or a CPU")
        self.share = len(self.cores) // jobs
        self.free = [*range(jobs)] * together  # places
        self.running: dict[subprocess.Popen[bytes], tuple[PlannedRun, int]] = {}  # runs and their places
        self._stall_noted = False
        self._awaited: set[Path] = set()  # folders in use by another process, which were printed

    def run(self, waiting: Sequence[PlannedRun]) -> list[PlannedRun]:
        """Returns the runs that failed. After Ctrl-C, the runs save; a second Ctrl-C ends them at once."""
        left, failed = list(waiting), []
        try:
            while left or self.running:
                while self.free and (run := self._next(left)) is not None:
                    left.remove(run)
                    self._start(run, f"{len(waiting) - len(left)} of {len(waiting)}")
                for process in list(self.running):
                    if process.poll() is not None:
                        failed += self._end(process)
                self._check_memory()
                time.sleep(0.2)
        except KeyboardInterrupt:
            for process in self.running:
                process.send_signal(signal.SIGTERM)
            say("\nstopping: the runs save; the same command continues them")
            for process in self.running:
                process.wait()
            raise
        finally:
            for process in self.running:
                process.kill()
        return failed

    def _check_memory(self) -> None:
        """Prints a note once if memory is short: the search for free pages would count as training time."""
        if not self._stall_noted and (stalls := memory_stalls()) > STALL_LIMIT:
            self._stall_noted = True
            say(
                f"note: memory is short (nothing ran for {stalls:.0%} of the last minute), so the present runs are "
                "slowed down and cannot be compared. Stop, remove their folders, and use fewer --jobs or --together"
            )

    def _next(self, left: Sequence[PlannedRun]) -> PlannedRun | None:
        """The first run that can start now."""
        for run in left:
            if self.by_seeds and any(other.seed != run.seed for other, _ in self.running.values()):
                return None
            if not in_use(run.folder):
                return run
            if run.folder not in self._awaited:  # a bench was killed, and its runs are still saving
                self._awaited.add(run.folder)
                say(f"waiting for another process that uses {run.folder} ...")
        return None

    def _start(self, run: PlannedRun, number: str) -> None:
        place = self.free.pop(0)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": self.gpus[place]} if self.gpus else {})
        say(f"{number}: {run.folder.name} ...")
        cores = self.cores[place * self.share :][: self.share]
        process = start_trainer(run.options, run.output, cores, env=environment, start_new_session=True)
        self.running[process] = run, place

    def _end(self, process: subprocess.Popen[bytes]) -> list[PlannedRun]:
        """Frees the place of a run that has ended, and prints its last line; returns the run if it failed."""
        run, place = self.running.pop(process)
        self.free.append(place)
        last = run.output.read_text(errors="replace").strip().rpartition("\n")[2]
        if process.returncode == 0:
            say(f"  {run.folder.name}: {last}")
            return []
        say(f"  {run.folder.name}: failed ({last}; exit status {process.returncode}); see {run.output}")
        return [run]


def start_trainer(options: Sequence[str], output: Path, on: Sequence[int] = (), **more: Any) -> subprocess.Popen[bytes]:
    """Starts the trainer on the cores ``on``, or on all. If this process is killed, it saves and stops."""

    def prepare() -> None:
        if on:
            os.sched_setaffinity(0, on)
        end_with_parent()

    command = [sys.executable, "-m", "vitlocal.train", *options]
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=prepare, **more)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return named.split(",") if named and count else [str(number) for number in range(count)]
