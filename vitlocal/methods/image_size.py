"""The image-size curriculum (Irandoust et al. 2022, arXiv 2211.05187, section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitlocal.curriculum import EPSILON, Curriculum, stage_problem
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
    mixed: float = option(
        0.0, Number(0, 0.5), "mixed sizes within a stage: fraction of each epoch at the next smaller or larger size"
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
        return tuple(replace(stage, mixed=self._neighbours(stage.size)) for stage in self._plain_curriculum())

    def _neighbours(self, size: int) -> tuple[tuple[int, float], ...]:
        """The next smaller and the next larger size of the curriculum, and their parts of ``mixed``."""
        sizes = sorted(set(self.sizes))
        place = sizes.index(size)
        found = [*sizes[max(0, place - 1) : place], *sizes[place + 1 : place + 2]] if self.mixed else []
        return tuple((other, self.mixed / len(found)) for other in found)

    def _plain_curriculum(self) -> tuple[Stage, ...]:
        if self.stages is not None:
            return self.stages
        linear = [number * self.step_epochs for number in range(1, len(self.sizes))]
        ends = self.switch_epochs[1 : len(self.sizes)] if self.growth == "exponential" else linear
        lengths = [Length(end, "epochs", f"{end:g}ep") for end in ends]
        return tuple(Stage(size, end) for size, end in zip(self.sizes, (*lengths, None), strict=True))


class ImageSize(Method):
    """Training crops start small and grow, up to ``final``, or as ``stages`` say.

    Stages end by epochs, steps, time or fractions of the budget (as in EfficientTrain++, arXiv 2405.08768).

    With ``mixed``, each epoch begins with steps at another size, in turns the next smaller and the next larger one. An
    epoch then has one change of size, so one pass more. It ends with the stage's size, which is evaluated. timm's
    NaFlex models draw a size for each batch instead, which would be a pass for each batch.
    """

    name = "image_size"
    options = ImageSizeConfig
    writes = frozenset({"feed.size"})

    def __init__(self, context: MethodContext):
        config = context.recipe.section(ImageSizeConfig)
        self._curriculum, self._mixed = Curriculum(config.curriculum), config.mixed

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        config = recipe.section(ImageSizeConfig)
        if config.mixed and len(set(config.sizes)) < 2:
            return [f"image_size.mixed: got {config.mixed:g}, but the only size is {config.sizes[0]} px; set it to 0"]
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
        stage, (epoch, part) = self._curriculum.stage(progress), divmod(progress.epoch + EPSILON, 1)
        size = stage.size
        if stage.mixed and part < self._mixed:
            size, _ = stage.mixed[int(epoch) % len(stage.mixed)]
        return with_size(plan, size)

    def changes(self) -> Sequence[Length]:
        if not self._mixed:
            return self._curriculum.changes
        found = list[Length]()
        for change in (Length(0.0, "epochs", "0ep"), *self._curriculum.changes):
            found.append(change)
            if change.kind == "epochs":  # the stage's own size comes after the mixed part of the epoch
                end = change.value + self._mixed
                found.append(Length(end, "epochs", f"{end:g}ep"))
        return found
