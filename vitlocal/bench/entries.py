"""What benches of arms train: arms, as a yaml file lists them, and an entry for each seed of each."""

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
from vitlocal.methods import claimed
from vitlocal.options import as_argument
from vitlocal.train.folder import check_same, data_of, origin_of

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "rcfg"


# The trainer's options that the bench sets for each run, and what of its own stands for them.
OWN = {
    "run.seed": "use --seeds",
    "run.folder": "use --folder",
    "budget.length": "use --budget",
    "run.progress": "leave it out",
    "run.resume": "leave it out",
    "resume": "leave it out",
}

Key = tuple[str, int, str]  # of a run: arm, seed, budget


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
        stated = [f"--{name}={as_argument(value)}" for name, value in self.options.items()]
        return [*(f"--config-file={recipe}" for recipe in self.recipes), *stated]


@dataclass(frozen=True)
class Entry:
    """One run to be: an arm, a seed, a budget, a folder."""

    arm: Arm
    seed: int
    budget: str
    folder: Path
    shared: tuple[str, ...] = ()  # the trainer's options that all have

    @property
    def key(self) -> Key:
        return self.arm.name, self.seed, self.budget

    @property
    def options(self) -> list[str]:
        own = [f"--run.seed={self.seed}", f"--budget.length={self.budget}", f"--run.folder={self.folder}"]
        return [*self.arm.command_line(), *self.shared, *own, "--run.progress=no"]

    def config(self) -> Config:
        """What will be trained. ConfigError where that is none, or where the folder holds a run of another."""
        config = read_config(self.options)
        if "budget.length" in claimed(config):
            raise ConfigError(
                f"the arm '{self.arm.name}': budgeted.epochs or budgeted.budget set the run's length, and all arms are "
                "to have the same; leave them out"
            )
        if (self.folder / "config.yaml").exists():
            check_same(self.folder, config, "folder")
            check_data(self.folder, config)
        return config

    @property
    def done(self) -> bool:
        return (self.folder / "model.safetensors").exists()  # written when the budget is spent


@lru_cache
def data_in(root: str) -> dict[str, Any]:
    """:func:`data_of` the training split: once for all runs, as ImageNet's manifest takes seconds to read."""
    manifest = load_manifest(root, "train")
    return data_of(manifest.count, manifest.classes)


def check_data(folder: Path, config: Config) -> None:
    """ConfigError where the run in ``folder`` says that it was trained on other images than ``config``'s."""
    if config.data.loader not in ("native", "ffcv") or not (Path(config.data.root) / "train.json").exists():
        return  # the trainer knows what there is
    before = [origin["data"] for origin in origin_of(folder) if "data" in origin][-1:]
    if before and before != [now := data_in(config.data.root)]:
        raise ConfigError(
            f"folder: {folder} holds a run that was trained on {before[0]['images']} images of "
            f"{before[0]['classes']} classes, and {config.data.root} has others ({now['images']} of "
            f"{now['classes']}); use another --folder, or the same data"
        )


def entries(arms: Sequence[Arm], seeds: Sequence[int], budget: str, folder: Path, shared: Sequence[str]) -> list[Entry]:
    """Seed by seed, so that what there is after an interruption can be compared.

    Raises ConfigError where arms cannot be told apart, or state what the bench sets, or what all ``shared`` state.
    """
    common = option_names(shared, OWN)
    for arm in arms:
        for name in arm.options:
            if name in OWN:
                raise ConfigError(f"the arm '{arm.name}': the bench sets {name} for each run; {OWN[name]}")
            if name in common:
                raise ConfigError(
                    f"--{name}: the arm '{arm.name}' has {name}={as_argument(arm.options[name])}; leave out one of them"
                )
    found, owners = [], {}
    for seed in seeds:
        for arm in arms:
            place = folder / f"{re.sub(r'[^a-zA-Z0-9_.=+-]', '_', arm.name)}-{budget}-seed{seed}"
            if place in owners:
                raise ConfigError(
                    f"the arms '{owners[place]}' and '{arm.name}' would both train in {place}; name them apart"
                )
            owners[place] = arm.name
            found.append(Entry(arm, seed, budget, place, tuple(shared)))
    return found


def option_names(words: Sequence[str], own: Mapping[str, str]) -> set[str]:
    """Of the trainer's command line, as ``train.lr`` of ``--train.lr=1e-3``; ConfigError for what a bench sets
    itself, ``own`` and what stands for it."""
    found = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    for name in found:
        if name in own:
            raise ConfigError(f"--{name}: the bench sets it for each run; {own[name]}")
    return found


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
        if not arms:
            raise TypeError("there are no arms")
        return arms
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a yaml file of arms") from error
    except (yaml.YAMLError, UnicodeError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected 'recipes', a list of files, and 'arms', each a name with options ({error})"
        ) from error
