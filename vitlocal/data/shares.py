"""Who reads what of a global batch, where several processes train together.

A *place* is a sample's number in the global batch. Mixup and cutmix pair place i with its mirror place, so a process
takes mirrored pairs: what it takes, flipped, is again what it takes, and pairs are found without asking anyone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Slice:
    """A process's part of one global batch of ``total`` samples; it may be empty."""

    draws: np.ndarray  # (b,) int64
    places: np.ndarray  # (b,) int64, ascending
    total: int


@dataclass(frozen=True)
class Share:
    """Part ``rank`` of ``world`` equal ones of every global batch."""

    rank: int = 0
    world: int = 1

    def places(self, total: int) -> np.ndarray:
        """The places that this part takes of a batch of ``total``: (b,) int64, ascending.

        Every place is in one part; where a batch cannot be shared evenly, parts differ by a pair.
        """
        half = (total + 1) // 2  # an odd batch's middle is its own mirror
        # Of too few pairs the first processes get one each: rank 0, whose BatchNorm is evaluated, never goes without.
        first, last = -(-half * self.rank // self.world), -(-half * (self.rank + 1) // self.world)
        front = np.arange(first, last)
        back = total - 1 - front[::-1]
        return np.concatenate([front, back[1:] if total % 2 and last == half and last > first else back])

    def slices(self, draws: np.ndarray, batch_size: int) -> Slices:
        """This part of every global batch of ``batch_size``, the last of which is as small as it comes out."""
        return Slices(self, draws, batch_size)


class Slices(Sequence[Slice]):
    """A part's slices of a pass, cut when they are asked for: small batches are a hundred thousand to an epoch."""

    def __init__(self, share: Share, draws: np.ndarray, batch_size: int):
        self.share, self.draws, self.batch_size = share, draws, batch_size

    def __len__(self) -> int:
        return -(-len(self.draws) // self.batch_size)

    def __getitem__(self, number: int) -> Slice:
        if not 0 <= number < len(self):
            raise IndexError(number)
        batch = self.draws[number * self.batch_size : (number + 1) * self.batch_size]
        places = self.share.places(len(batch))
        return Slice(batch[places], places, len(batch))

    @property
    def largest(self) -> int:
        """Samples of the largest slice: a whole batch's or the last one's, of which a part may get a pair more."""
        whole, rest = min(self.batch_size, len(self.draws)), len(self.draws) % self.batch_size
        return max(len(self.share.places(total)) for total in (whole, rest))


WHOLE = Share()
