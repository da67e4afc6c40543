"""The runs of a bench of arms: the arms of a yaml file, and a planned run for each arm and seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from vitlocal.config import Config, read_config
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import ConfigError
from vitlocal.options import as_argument
from vitlocal.recipes import check_same_run
from vitlocal.storage import methods_writing
from vitlocal.train.run_folder import data_fingerprint, read_origin

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "rcfg"

# The trainer's options that the bench sets for each run, and the remedy if a user sets them.
BENCH_OPTIONS = {"run.seed": "use --seeds", "run.folder": "use --folder", "budget.length": "use --budget"} | (
    dict.fromkeys(("run.progress", "run.resume", "resume"), "leave it out")
)

RunKey = tuple[str, int, str]  # arm, seed and budget of a run


@dataclass(frozen=True)
class Arm:
    """A contestant: recipes, of which later ones override earlier ones, and options that override both."""

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
    shared: tuple[str, ...] = ()  # the trainer's options that all runs have

    @property
    def key(self) -> RunKey:
        return self.arm.name, self.seed, self.budget

    @property
    def options(self) -> list[str]:
        """The trainer's command line."""
        own = [f"--run.seed={self.seed}", f"--budget.length={self.budget}", f"--run.folder={self.folder}"]
        return [*self.arm.command_line(), *self.shared, *own, "--run.progress=no"]

    def config(self) -> Config:
        """The run's configuration. ConfigError if it is wrong, or if the folder holds a different run."""
        config = read_config(self.options)
        if setting := methods_writing(config, "budget.length"):
            raise ConfigError(
                f"the arm '{self.arm.name}': options of {', '.join(setting)} set the length of the run, but all arms "
                "must have the same length; leave them out"
            )
        if (self.folder / "config.yaml").exists():
            check_same_run(self.folder, config, "folder")
            check_data(self.folder, config)
        return config

    @property
    def output(self) -> Path:
        """The file with what the trainer prints."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    @property
    def done(self) -> bool:
        return (self.folder / "model.safetensors").exists()  # written when the budget is spent


@lru_cache
def data_in(root: str) -> dict[str, Any]:
    """What identifies the training data of a folder. Cached, because ImageNet's manifest takes seconds to read."""
    manifest = load_manifest(root, "train")
    return data_fingerprint(manifest.count, manifest.classes)


def check_data(folder: Path, config: Config) -> None:
    """Raises ConfigError if the run in ``folder`` was trained on other images than those of ``config``."""
    if not (Path(config.data.root) / "train.json").exists():
        return  # the trainer itself checks other data
    before = [origin["data"] for origin in read_origin(folder) if "data" in origin][-1:]
    if before and before != [now := data_in(config.data.root)]:
        raise ConfigError(
            f"folder: {folder} holds a run that was trained on {before[0]['images']} images of "
            f"{before[0]['classes']} classes, but {config.data.root} holds other data ({now['images']} of "
            f"{now['classes']}); use another --folder, or the same data"
        )


def plan_runs(
    arms: Sequence[Arm], seeds: Sequence[int], budget: str, folder: Path, shared: Sequence[str]
) -> list[PlannedRun]:
    """The runs, seed by seed, so that the results of an interrupted bench can be compared.

    Raises ConfigError if two arms have the same folder, or if an option is set twice.
    """
    common = option_names(shared, BENCH_OPTIONS)
    runs: dict[Path, PlannedRun] = {}
    for arm in arms:
        for name in arm.options:
            if name in BENCH_OPTIONS:
                raise ConfigError(f"the arm '{arm.name}': the bench sets {name} for each run; {BENCH_OPTIONS[name]}")
            if name in common:
                raise ConfigError(
                    f"--{name}: the arm '{arm.name}' has {name}={as_argument(arm.options[name])}; leave out one of them"
                )
    for seed in seeds:
        for arm in arms:
            place = folder / f"{re.sub(r'[^a-zA-Z0-9_.=+-]', '_', arm.name)}-{budget}-seed{seed}"
            if place in runs:
                raise ConfigError(
                    f"the arms '{runs[place].arm.name}' and '{arm.name}' would both train in {place}; "
                    "give them different names"
                )
            runs[place] = PlannedRun(arm, seed, budget, place, tuple(shared))
    return list(runs.values())


def option_names(words: Sequence[str], bench_options: Mapping[str, str]) -> set[str]:
    """The names of options on a command line: ``train.lr`` for ``--train.lr=1e-3``.

    ``bench_options`` are those that the bench sets itself, with the remedy. ConfigError if one of them is there.
    """
    found = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    for name in found & bench_options.keys():
        raise ConfigError(f"--{name}: the bench sets it for each run; {bench_options[name]}")
    return found


def read_arms(path: str) -> list[Arm]:
    """The arms of a yaml file. ConfigError if it is not such a file.

    An arm may also have ``about`` and ``published``, which the table shows.
    """
    folder = Path(path).parent

    def recipes(part: Mapping[str, Any]) -> tuple[Path, ...]:
        named = part.get("recipes", ())
        return tuple(folder / name for name in ([named] if isinstance(named, str) else named))

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        shared, common, arms = recipes(content), content.get("options") or {}, []
        for name, options in content["arms"].items():
            if "," in str(name):
                raise ConfigError(f"{path}: the name of the arm '{name}' contains a comma, which separates names")
            own = {**common, **(options or {})}
            own_recipes, about, published = recipes(own), own.pop("about", ""), own.pop("published", None)
            own.pop("recipes", None)
            arms.append(Arm(str(name), (*shared, *own_recipes), own, about, published))
        if not arms:
            raise TypeError("there are no arms")
        return arms
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a yaml file of arms") from error
    except (yaml.YAMLError, UnicodeError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected 'recipes', a list of files, and 'arms', each a name with options ({error})"
        ) from error
