"""The image-size curriculum (Irandoust et al. 2022, arXiv 2211.05187, section 3.2)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from vitlocal.config import ImageSizeConfig
from vitlocal.plan import Plan, Progress, StepResult, with_size


class ImageSize:
    """Training crops start small and grow by ``step_pixels`` at a time, up to ``final``.

    With ``growth=linear`` they grow every ``step_epochs`` epochs; with ``exponential`` at the listed
    ``switch_epochs`` (the released code's 0, 2, 4, 8, 12, 20, 36).
    """

    name = "image_size"
    writes = frozenset({"feed.size"})

    def __init__(self, config: ImageSizeConfig):
        self.sizes = config.sizes
        self.starts = config.starts  # the epoch at which each size begins

    def plan(self, plan: Plan, at: Progress) -> Plan:
        # An epoch's share of images is exact in binary only by luck: 1e-9 of an epoch is less than an image.
        stage = bisect_right(self.starts, at.epoch + 1e-9) - 1
        return with_size(plan, self.sizes[stage])

    def changes(self) -> Sequence[Progress]:
        return [Progress(epoch=start) for start in self.starts]

    def observe(self, seen: StepResult) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
