"""Compares configurations: of a run's folder with a command's, and with the defaults."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vitlocal.config import IMMATERIAL, Config
from vitlocal.errors import ConfigError
from vitlocal.methods import METHODS
from vitlocal.options import by_dotted_name


def stored_options(folder: Path) -> dict[str, Any]:
    """The options in a run's ``config.yaml``, by dotted name."""
    return by_dotted_name(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {})


def changed_options(before: Mapping[str, Any], config: Config) -> list[str]:
    """The differences of ``config`` from ``before``: "NAME was X and is now Y" for each option that matters."""
    before = {**Config().flat(), **before}  # an option that is missing there counts as its default
    unused = METHODS.keys() - {*before["methods"], *config.methods}  # the options of these methods have no effect
    return [
        f"{name} was {before[name]!r} and is now {value!r}"
        for name, value in config.flat().items()
        if name not in IMMATERIAL and name.partition(".")[0] not in unused and before[name] != value
    ]


def stated_options(config: Config) -> dict[str, Any]:
    """The options of ``config`` that differ from the defaults and can change a result."""
    default = Config().flat()
    return {name: value for name, value in config.flat().items() if name not in IMMATERIAL and default[name] != value}


def check_same_run(folder: Path, config: Config, option: str = "run.folder") -> None:
    """Raises ConfigError if ``folder``, which ``option`` names, holds a run of another configuration."""
    if changed := changed_options(stored_options(folder), config):
        raise ConfigError(
            f"{option}: {folder} holds a run of another configuration: {'; '.join(changed)}. Use the same options to "
            f"continue it, or another --{option}"
        )


def recipe_text(config: Config) -> str:
    """The content of a run's ``config.yaml``: a recipe that repeats the run, and the command that started it."""
    command = shlex.join(sys.argv)
    return f"# Repeats this run: python train_imagenet.py --config-file THIS\n# It was: {command}\n{config.yaml()}"
