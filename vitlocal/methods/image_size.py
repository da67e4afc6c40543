"""The image-size curriculum (Irandoust et al. 2022, arXiv 2211.05187, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from vitlocal.methods.method import Method, MethodContext, Recipe
from vitlocal.options import COUNT, Choice, Maybe, Number, Section, Series, StageText, option
from vitlocal.plan import Plan, with_size
from vitlocal.progress import Length, Progress, Stage


@dataclass(frozen=True)
class ImageSizeConfig(Section):
    init: int = option(32, COUNT, "training crop side at the start, px")
    step_pixels: int = option(32, COUNT, "growth at a time, px")
    final: int | None = option(None, Maybe(COUNT), "last training size, px; none: model.size")
    growth: str = option("linear", Choice("linear", "exponential"), "every step_epochs, or at switch_epochs")
    stages: tuple[Stage, ...] | None = option(
        None, Maybe(Series(StageText())), "the whole curriculum, in place of the options above and below"
    )
    step_epochs: float = option(5.0, Number(low=1e-3), "epochs between growths (linear)")
    switch_epochs: tuple[float, ...] = option(
        (0, 2, 4, 8, 12, 20, 36), Series(Number(low=0)), "epoch at which each size starts (exponential)"
    )

    def completed(self, model: Any) -> ImageSizeConfig:
        """With what is left open as the model has it."""
        return replace(self, final=model.size) if self.final is None else self

    @property
    def grown(self) -> tuple[int, ...]:
        """The sizes, where ``stages`` does not state them."""
        assert self.final is not None, "completed() fills it in"
        return (*range(self.init, self.final, self.step_pixels), self.final)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(stage.size for stage in self.curriculum)

    @property
    def curriculum(self) -> tuple[Stage, ...]:
        """The stages, however they were given."""
        if self.stages is not None:
            return self.stages
        sizes = self.grown
        if self.growth == "exponential":
            ends = self.switch_epochs[1 : len(sizes)]
        else:
            ends = tuple(number * self.step_epochs for number in range(1, len(sizes)))
        return tuple(
            Stage(size, None if end is None else Length(end, "epochs", f"{end:g}ep"))
            for size, end in zip(sizes, (*ends, None), strict=True)
        )


class ImageSize(Method):
    """Training crops start small and grow by ``step_pixels`` at a time, up to ``final``.

    With ``growth=linear`` they grow every ``step_epochs`` epochs; with ``exponential`` at the listed
    ``switch_epochs`` (the released code's 0, 2, 4, 8, 12, 20, 36); with ``stages`` as listed there, by epochs, steps,
    time or parts of the budget (as EfficientTrain++, Wang et al. 2024, arXiv 2405.08768, divides its compute).
    """

    name = "image_size"
    writes = frozenset({"feed.size"})
    options = ImageSizeConfig

    def __init__(self, run: MethodContext):
        self.stages = run.recipe.of(self.name).curriculum

    @staticmethod
    def problems(recipe: Recipe) -> list[str]:
        config: ImageSizeConfig = recipe.of("image_size")
        if config.stages is not None and (found := _stage_problems(config.stages)):
            return found
        found = []
        largest = max(config.sizes) if config.stages is not None else config.final
        if largest > recipe.model.size:
            found.append(
                f"image_size: {largest} px is larger than model.size ({recipe.model.size}), the grid of the position "
                f"table; set model.size={largest}"
            )
        if config.stages is None and config.init > config.final:
            found.append(f"image_size.init: {config.init} is larger than image_size.final ({config.final})")
        elif config.stages is None and config.growth == "exponential":
            switches, sizes = config.switch_epochs, config.grown
            if len(switches) < len(sizes):
                found.append(
                    f"image_size.switch_epochs: {len(switches)} epochs for the {len(sizes)} sizes "
                    f"{', '.join(map(str, sizes))}; give one for each"
                )
            if not switches or switches[0] != 0 or list(switches) != sorted(set(switches)):
                found.append(f"image_size.switch_epochs: got {list(switches)}, expected 0 first, then growing numbers")
        return found

    @staticmethod
    def image_sizes(recipe: Recipe) -> Sequence[Stage]:
        return recipe.of("image_size").curriculum

    def plan(self, plan: Plan, at: Progress) -> Plan:
        # An epoch's share of images is exact in binary only by luck: 1e-9 of an epoch is less than an image.
        at = replace(at, epoch=at.epoch + 1e-9)
        return with_size(plan, next(s.size for s in self.stages if s.until is None or s.until.fraction_done(at) < 1))

    def changes(self) -> Sequence[Length]:
        return [stage.until for stage in self.stages if stage.until is not None]


def _stage_problems(stages: Sequence[Stage]) -> list[str]:
    """Where the stages of a curriculum do not follow each other."""
    if not stages or any(stage.until is None for stage in stages[:-1]) or stages[-1].until is not None:
        return [
            f"image_size.stages: got {', '.join(map(str, stages)) or 'none'}; expected each stage but the last to say "
            "until when, and the last not, as in 32px until 10%, 64px until 30%, 224px"
        ]
    ends = [stage.until for stage in stages[:-1]]
    if stages[0].until is not None and not stages[0].until.value:
        return [f"image_size.stages: {stages[0]} ends where it begins; leave it out"]
    return [
        f"image_size.stages: {after} does not come after {before}; expected growing lengths"
        for before, after in pairwise(ends)
        if after.kind == before.kind and after.value <= before.value
    ]
