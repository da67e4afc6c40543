"""Augmentation and drop path that grow with the image size, or with time."""

from dataclasses import dataclass, replace

from vitlocal.errors import ConfigError
from vitlocal.methods.image_size import ImageSizeConfig
from vitlocal.methods.method import Method, MethodContext, Recipe
from vitlocal.options import FRACTION, Choice, Section, messages, option
from vitlocal.plan import Plan
from vitlocal.progress import Progress


@dataclass(frozen=True)
class StrengthConfig(Section):
    start: float = option(
        0.2, FRACTION, "fraction of the recipe's augmentation and drop path at the smallest image size, or at the start"
    )
    by: str = option("size", Choice("size", "budget"), "strength grows with the image size, or with the spent budget")


class Strength(Method):
    """Augmentation and drop path grow linearly from a fraction of the recipe's values to all of them.

    They grow with the image size, from the smallest to the largest size of ``image_size``, or with the spent budget
    (``by=budget``). Small images are harder to fit, so regularisation can wait (Tan and Le 2021, arXiv 2104.00298).
    """

    name = "strength"
    options = StrengthConfig
    writes = frozenset({"dials.strength"})

    def __init__(self, context: MethodContext):
        self._config = context.recipe.section(StrengthConfig)
        if not context.recipe.has_augmentation and not context.varies_drop_path:
            raise ConfigError(
                f"methods: strength has nothing to vary, because the drop path of {context.recipe.model_name} cannot "
                "change; set an option of augment, or remove it"
            )
        sizes = context.recipe.section(ImageSizeConfig).sizes
        self._smallest, self._largest = min(sizes), max(sizes)

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        before = recipe.methods[: recipe.methods.index("strength")]
        return messages({
            "methods: strength follows the sizes of image_size; put image_size before it, or set strength.by=budget":
                recipe.section(StrengthConfig).by == "size" and "image_size" not in before,
            "methods: strength has nothing to vary; set an option of augment, or model.drop_path, or remove it":
                not (recipe.has_augmentation or recipe.drop_path),
        })  # fmt: skip

    def plan(self, plan: Plan, progress: Progress) -> Plan:
        if self._config.by == "budget":
            way = progress.fraction
        elif self._largest == self._smallest:
            way = 1.0
        else:
            way = (plan.feed.size - self._smallest) / (self._largest - self._smallest)
        return replace(plan, dials=replace(plan.dials, strength=self._config.start + (1 - self._config.start) * way))
