"""What benches of arms train: arms, as a yaml file lists them, and an entry for each seed of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.train.folder import check_same

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "rcfg"


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
    def key(self) -> tuple[str, int, str]:
        return self.arm.name, self.seed, self.budget

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
