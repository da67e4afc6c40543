"""The training methods, by the name that a recipe's ``methods`` list uses."""

from __future__ import annotations

from importlib import import_module

from vitlocal.methods.method import Claims, Method, MethodContext, Recipe, conflicts

# Files of this folder that hold a method each. A new method: its file's name here.
MODULES = ("image_size", "strength", "batch_size", "budgeted", "trilevel", "autoprog", "unfreeze")


def _method_of(module: str) -> type[Method]:
    """The method that is defined in ``module``."""
    found = vars(import_module(f"{__name__}.{module}")).values()
    (method,) = (
        one for one in found
        if isinstance(one, type) and issubclass(one, Method) and one.__module__ == f"{__name__}.{module}"
    )  # fmt: skip
    return method


METHODS: dict[str, type[Method]] = {method.name: method for method in map(_method_of, MODULES)}


def build_methods(run: MethodContext) -> list[Method]:
    """The recipe's methods in its order."""
    return [METHODS[name](run) for name in run.recipe.methods]


def claims(recipe: Recipe) -> list[Claims]:
    """What each of the recipe's methods sets, told before anything is built."""
    return [METHODS[name].claims(recipe) for name in recipe.methods]


def claimed(recipe: Recipe) -> frozenset[str]:
    """All that the recipe's methods set."""
    return frozenset().union(*(one.writes for one in claims(recipe)))


def problems(recipe: Recipe) -> list[str]:
    """What the recipe's methods find wrong with it, and which of them do not go together."""
    found = [problem for name in dict.fromkeys(recipe.methods) for problem in METHODS[name].problems(recipe)]
    return found or conflicts(claims(recipe))
