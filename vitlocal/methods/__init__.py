"""The training methods, by the name that a recipe's ``methods`` list uses."""

from __future__ import annotations

from collections.abc import Callable

from vitlocal.config import Config
from vitlocal.errors import ConfigError
from vitlocal.methods.image_size import ImageSize
from vitlocal.plan import Method, conflicts

METHODS: dict[str, Callable[[Config], Method]] = {
    "image_size": lambda config: ImageSize(config.image_size),
}


def build_methods(config: Config) -> list[Method]:
    """The recipe's methods in its order; raises ConfigError where two of them write one field."""
    methods = [METHODS[name](config) for name in config.methods]
    if problems := conflicts(methods):
        raise ConfigError("\n".join(problems))
    return methods
