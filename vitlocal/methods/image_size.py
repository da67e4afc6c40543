"""The image-size curriculum (Irandoust et al. 2022, arXiv 2211.05187, section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

from vitlocal.curriculum import Curriculum, stage_problem
from vitlocal.methods.method import Method, MethodContext, Recipe
from vitlocal.options import PIXELS, STAGE, Choice, Number, Section, Series, messages, option
from vitlocal.plan import Plan, with_size
from vitlocal.progress import Length, Progress, Stage


@dataclass(frozen=True)
class ImageSizeConfig(Section):
    init: int = option(32, PIXELS, "size of training crops at the start, px")
    step_pixels: int = option(32, PIXELS, "pixels by which the size grows at each step")
    final: int | None = option(None, PIXELS, "last size of training crops, px; none: model.size", none_is="model.size")
    growth: str = option("linear", Choice("linear", "exponential"), "grow every step_epochs, or at switch_epochs")
    stages: tuple[Stage, ...] | None = option(
        None, Series(STAGE), "the whole curriculum, stage by stage; replaces all other image_size options"
    )
    step_epochs: float = option(5.0, Number(1e-3), "epochs between two sizes, for linear growth")
    switch_epochs: tuple[float, ...] = option(
        (0, 2, 4, 8, 12, 20, 36), Series(Number(0)), "epoch at which each size starts, for exponential growth"
    )

    @property
    def sizes(self) -> list[int]:
        """The size of each stage."""
        if self.stages is not None:
            return [stage.size for stage in self.stages]
        assert self.final is not None, "read_config fills it in"
        return [*range(self.init, self.final, self.step_pixels), self.final]

    @property
    def curriculum(self) -> tuple[Stage, ...]:
        """The stages of the curriculum, for every way to state it."""
        if self.stages is not None:
            return self.stages
        linear = [number * self.step_epochs for number in range(1, len(self.sizes))]
        ends = self.switch_epochs[1 : len(self.sizes)] if self.growth == "exponential" else linear
        lengths = [Length(end, "epochs", f"{end:g}ep") for end in ends]
        return tuple(Stage(size, end) for size, end in zip(self.sizes, (*lengths, None), strict=True))


class ImageSize(Method):
    """Training crops start small and grow, up to ``final``, or as ``stages`` say.

    Stages end by epochs, steps, time or fractions of the budget (as in EfficientTrain++, arXiv 2405.08768).
    """

    name = "image_size"
    options = ImageSizeConfig
    writes = frozenset({"feed.size"})

    def __init__(self, context: MethodContext):
        self._curriculum = Curriculum(context.recipe.section(ImageSizeConfig).curriculum)

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        config = recipe.section(ImageSizeConfig)
        if config.stages is not None and (found := stage_problem(config.stages)):
            return [f"image_size.stages: {found}"]
        sizes, switches, model_size = config.sizes, list(config.switch_epochs), recipe.model_size
        exponential = config.stages is None and config.growth == "exponential"
        return messages({
            f"image_size: {max(sizes)} px is larger than model.size ({model_size}), the size of the position table; "
            f"set model.size={max(sizes)}": max(sizes) > model_size,
            f"image_size.init: {config.init} is larger than image_size.final ({sizes[-1]})":
                config.stages is None and config.init > sizes[-1],
            f"image_size.switch_epochs: got {len(switches)} epochs for the {len(sizes)} sizes "
            f"{', '.join(map(str, sizes))}; give one epoch for each size": exponential and len(switches) < len(sizes),
            f"image_size.switch_epochs: got {switches}, expected 0 first, then increasing numbers":
                exponential and (switches[:1] != [0] or switches != sorted(set(switches))),
        })  # fmt: skip

    @classmethod
    def image_sizes(cls, recipe: Recipe) -> Sequence[Stage]:
        return recipe.section(ImageSizeConfig).curriculum

    def plan(self, plan: Plan, progress: Progress) -> Plan:
        return with_size(plan, self._curriculum.size(progress))

    def changes(self) -> Sequence[Length]:
        return self._curriculum.changes
