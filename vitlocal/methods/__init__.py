"""The training methods, by the name that a recipe's ``methods`` list uses."""

from collections.abc import Sequence
from importlib import import_module
from itertools import combinations

from vitlocal.methods.method import Claims, Method, MethodContext, Recipe

# The file of each method in this folder, and its class. A new method is a new file and a new line here.
CLASSES = {
    "image_size": "ImageSize",
    "strength": "Strength",
    "batch_size": "BatchSize",
    "budgeted": "Budgeted",
    "trilevel": "Trilevel",
    "autoprog": "AutoProg",
    "unfreeze": "Unfreeze",
}
METHODS: dict[str, type[Method]] = {
    name: getattr(import_module(f"{__name__}.{name}"), class_name) for name, class_name in CLASSES.items()
}


def build_methods(context: MethodContext, writing: str = "") -> list[Method]:
    """The recipe's methods in its order. With ``writing="dials."``, only those that set a field of that prefix."""
    return [
        METHODS[claims.name](context)
        for claims in context.recipe.claims
        if not writing or any(field.startswith(writing) for field in claims.writes)
    ]


def method_problems(recipe: Recipe) -> list[str]:
    """The errors that the recipe's methods find in it or, without errors, the pairs that cannot be combined."""
    found = [problem for name in dict.fromkeys(recipe.methods) for problem in METHODS[name].problems(recipe)]
    return found or conflicts(recipe.claims)


def conflicts(claims: Sequence[Claims]) -> list[str]:
    """One message for each pair of methods that cannot be combined."""
    found = []
    for first, second in combinations(claims, 2):
        if both := first.writes & second.writes:
            fields = ", ".join(sorted(both))
            found.append(f"methods: {first.name} and {second.name} both set {fields}; remove one of the two")
            continue  # one reason is enough
        for one, other in ((first, second), (second, first)):
            reasons = [reason for field, reason in one.excludes.items() if field in other.writes - one.writes]
            found += [f"methods: {one.name} and {other.name} cannot be combined: {reason}" for reason in reasons]
    return found
