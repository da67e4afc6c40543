"""The training methods, by the name that a recipe's ``methods`` list uses."""

from __future__ import annotations

from vitlocal.errors import ConfigError
from vitlocal.methods.autoprog import AutoProg
from vitlocal.methods.batch_size import BatchSize
from vitlocal.methods.budgeted import Budgeted
from vitlocal.methods.image_size import ImageSize
from vitlocal.methods.method import Defaults, Recipe, Surroundings
from vitlocal.methods.strength import Strength
from vitlocal.methods.trilevel import Trilevel
from vitlocal.methods.unfreeze import Unfreeze
from vitlocal.plan import Method, conflicts

CLASSES = (ImageSize, Strength, BatchSize, Budgeted, Trilevel, AutoProg, Unfreeze)  # a new method: a line here
METHODS: dict[str, type[Defaults]] = {method.name: method for method in CLASSES}


def build_methods(run: Surroundings) -> list[Method]:
    """The recipe's methods in its order; raises ConfigError where two of them do not go together."""
    methods = [METHODS[name](run) for name in run.recipe.methods]
    if problems := conflicts(methods):
        raise ConfigError("\n".join(problems))
    return methods


def problems(recipe: Recipe) -> list[str]:
    """What the recipe's methods find wrong with it."""
    return [problem for name in dict.fromkeys(recipe.methods) for problem in METHODS[name].problems(recipe)]
