"""The image-size curriculum (Irandoust et al. 2022, arXiv 2211.05187, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitlocal.config import ImageSizeConfig
from vitlocal.plan import Length, Memoryless, Plan, Progress, with_size


class ImageSize(Memoryless):
    """Training crops start small and grow by ``step_pixels`` at a time, up to ``final``.

    With ``growth=linear`` they grow every ``step_epochs`` epochs; with ``exponential`` at the listed
    ``switch_epochs`` (the released code's 0, 2, 4, 8, 12, 20, 36); with ``stages`` as listed there, by epochs, steps,
    time or parts of the budget (as EfficientTrain++, Wang et al. 2024, arXiv 2405.08768, divides its compute).
    """

    name = "image_size"
    writes = frozenset({"feed.size"})

    def __init__(self, config: ImageSizeConfig):
        self.stages = config.curriculum

    def plan(self, plan: Plan, at: Progress) -> Plan:
        # An epoch's share of images is exact in binary only by luck: 1e-9 of an epoch is less than an image.
        at = replace(at, epoch=at.epoch + 1e-9)
        return with_size(plan, next(s.size for s in self.stages if s.until is None or s.until.done(at) < 1))

    def changes(self) -> Sequence[Length]:
        return [stage.until for stage in self.stages if stage.until is not None]
