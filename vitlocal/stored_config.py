"""The options in a run's folder, and comparisons of configurations."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vitlocal.config import IMMATERIAL, Config, read_config
from vitlocal.config_reader import by_dotted_name
from vitlocal.errors import ConfigError, DataError, first_line
from vitlocal.methods import METHODS
from vitlocal.paths import TRAIN


def changed_options(before: Mapping[str, Any], config: Config) -> list[str]:
    """The differences of ``config`` from ``before``: "NAME was X and is now Y" for each option that matters."""
    before = {**read_config([], {}).flat(), **before}  # an option that is missing there counts as its default
    unused = METHODS.keys() - {*before["methods"], *config.methods}  # the options of these methods have no effect
    return [
        f"{name} was {before[name]!r} and is now {value!r}"
        for name, value in config.flat().items()
        if name not in IMMATERIAL and name.partition(".")[0] not in unused and before[name] != value
    ]


def stated_options(config: Config) -> dict[str, Any]:
    """The options of ``config`` that differ from the defaults and can change a result."""
    default = read_config([], {}).flat()
    return {name: value for name, value in config.flat().items() if name not in IMMATERIAL and default[name] != value}


def check_same_run(folder: Path, config: Config, option: str = "run.folder") -> None:
    """Raises ConfigError if ``folder``, which ``option`` names, holds a run of another configuration."""
    check_options(stored_options(folder), folder, config, option)


def stored_options(folder: Path) -> dict[str, Any]:
    """The options of the run in ``folder``, by dotted name. Raises DataError if its config.yaml cannot be read."""
    path = folder / "config.yaml"
    try:
        options = by_dotted_name(yaml.safe_load(path.read_text(encoding="utf-8")))
        if not isinstance(options["methods"], list):  # the last option
            raise ValueError("it is cut short")
        return options
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({first_line(error)})") from error


def check_options(stored: Mapping[str, Any], folder: Path, config: Config, option: str = "run.folder") -> None:
    """Raises ConfigError if the options ``stored`` in ``folder`` are those of another run than ``config``."""
    if changed := changed_options(stored, config):
        raise ConfigError(
            f"{option}: {folder} holds a run of another configuration: {'; '.join(changed)}. Use the same options to "
            f"continue it, or another --{option}"
        )


def recipe_text(config: Config) -> str:
    """The content of a run's ``config.yaml``: a recipe that repeats the run, and the command that started it."""
    command = shlex.join(sys.argv)
    command = command if command.isprintable() else ascii(command)  # a line break would end the comment
    return f"# Repeats this run: {TRAIN} --config-file THIS\n# It was: {command}\n{config.yaml()}"
