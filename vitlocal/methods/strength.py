"""Augmentation and drop path that grow with the images, or with time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vitlocal.methods.method import Method, MethodContext, Recipe
from vitlocal.options import SHARE, Choice, Section, option
from vitlocal.plan import Plan
from vitlocal.progress import Progress


@dataclass(frozen=True)
class StrengthConfig(Section):
    start: float = option(0.2, SHARE, "part of augmentation and drop path at the smallest size, or at the start")
    by: str = option("size", Choice("size", "budget"), "grows with the image size, or with the budget spent")


class Strength(Method):
    """From a part of the recipe's augmentation and drop path to all of it (Tan and Le 2021, arXiv 2104.00298).

    Small images are harder to fit, so what makes training harder may wait. Grows linearly with the image size from
    the smallest to the largest of ``sizes``; with ``by=budget``, with the part of the budget that is spent.
    """

    name = "strength"
    writes = frozenset({"dials.strength"})
    options = StrengthConfig

    def __init__(self, run: MethodContext):
        sizes = run.recipe.of("image_size").sizes
        self.config, self.smallest, self.largest = run.recipe.of(self.name), min(sizes), max(sizes)

    @staticmethod
    def problems(recipe: Recipe) -> list[str]:
        found, augment, methods = [], recipe.augment, recipe.methods
        if recipe.of("strength").by == "size" and "image_size" not in methods[: methods.index("strength")]:
            found.append("methods: strength follows the sizes of image_size; name that before it, or set strength.by")
        # Drop path of timm's own models stays as it is: it is no tensor that could be written to.
        paths = recipe.model.drop_path if recipe.model.name.startswith("vitlocal_") else 0
        if not any((augment.randaugment, augment.three, augment.mixup, augment.cutmix, augment.erase, paths)):
            found.append("methods: strength has nothing to vary: there is neither augmentation nor drop path of ours")
        return found

    def plan(self, plan: Plan, at: Progress) -> Plan:
        if self.config.by == "budget":
            way = at.fraction
        elif self.largest == self.smallest:
            way = 1.0
        else:
            way = (plan.feed.size - self.smallest) / (self.largest - self.smallest)
        return replace(plan, dials=replace(plan.dials, strength=self.config.start + (1 - self.config.start) * way))
