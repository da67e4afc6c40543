"""The part of each global batch that a process reads, if several processes train together.

A *place* is the index of a sample in the global batch. Mixup and cutmix pair place i with its mirror place, so each
process takes mirrored pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np


@dataclass(frozen=True)
class BatchSlice:
    """A process's part of one global batch of ``total`` samples. It may be empty."""

    draws: np.ndarray  # (b,) int64
    places: np.ndarray  # (b,) int64, ascending
    total: int


@dataclass(frozen=True)
class Share:
    """Part ``rank`` of ``world`` equal parts of every global batch."""

    rank: int = 0
    world: int = 1

    def places(self, total: int) -> np.ndarray:
        """The places of this part in a batch of ``total``: (b,) int64, ascending.

        Each place is in exactly one part. If the batch cannot be shared evenly, parts differ by one pair.
        """
        half = (total + 1) // 2  # the middle of an odd batch is its own mirror
        # If there are too few pairs, the first ranks get one each: rank 0, whose BatchNorm is evaluated, has one.
        first, last = -(-half * self.rank // self.world), -(-half * (self.rank + 1) // self.world)
        front = np.arange(first, last)
        back = total - 1 - front[::-1]
        return np.concatenate([front, back[1:] if total % 2 and last == half and last > first else back])

    def slices(self, draws: np.ndarray, batch_size: int) -> Iterator[BatchSlice]:
        """This part of every global batch of ``batch_size``. The last batch holds what remains."""
        for start in range(0, len(draws), batch_size):
            batch = draws[start : start + batch_size]
            places = self.places(len(batch))
            yield BatchSlice(batch[places], places, len(batch))


class EqualShare(Share):
    """Part ``rank`` of ``world`` consecutive parts of every global batch. Those of a full batch are equal."""

    def places(self, total: int) -> np.ndarray:
        return np.arange(total * self.rank // self.world, total * (self.rank + 1) // self.world)


@dataclass(frozen=True)
class WholeBatches(Share):
    """The first ``count`` batches of a pass. The processes take turns with them, and divide none."""

    count: int = 1

    def slices(self, draws: np.ndarray, batch_size: int) -> Iterator[BatchSlice]:
        return islice(WHOLE.slices(draws, batch_size), self.rank, self.count, self.world)


WHOLE = Share()
