"""The training methods, by the name that a recipe's ``methods`` list uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vitlocal.config import Config
from vitlocal.errors import ConfigError
from vitlocal.methods.batch_size import BatchSize
from vitlocal.methods.image_size import ImageSize
from vitlocal.methods.strength import Strength
from vitlocal.plan import Method, conflicts


@dataclass(frozen=True)
class Surroundings:
    """What a method may know of the run, beside its configuration."""

    image_bytes: Callable[[int], int] = lambda size: size * size  # activations of an image of a size, on the device
    processes: int = 1


METHODS: dict[str, Callable[[Config, Surroundings], Method]] = {
    "image_size": lambda config, run: ImageSize(config.image_size),
    "strength": lambda config, run: Strength(config.strength, config.image_size.sizes),
    "batch_size": lambda config, run: BatchSize(
        config.batch_size,
        config.train.batch_size,
        config.model.size,
        run.image_bytes,
        run.processes * config.train.accumulate,
    ),
}


def build_methods(config: Config, run: Surroundings) -> list[Method]:
    """The recipe's methods in its order; raises ConfigError where two of them write one field."""
    methods = [METHODS[name](config, run) for name in config.methods]
    if problems := conflicts(methods):
        raise ConfigError("\n".join(problems))
    return methods
