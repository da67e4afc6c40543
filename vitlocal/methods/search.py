"""Ladders: the sizes, depths and levels that the methods which search climb."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from fastargs.validation import Checker

from vitlocal.progress import Length, Stage


class Net(NamedTuple):
    """A candidate: so many blocks, at this image size (None: what the other methods feed)."""

    depth: int
    size: int | None

    def __str__(self) -> str:
        return f"{self.depth}" + (f"@{self.size}px" if self.size else "")


class NetText(Checker):
    """``8@160px``: a depth and a size; ``8``: a depth."""

    def check(self, value: Any) -> Net:
        match = re.fullmatch(r"(\d+)(?:@(\d+)px)?", str(value).replace(" ", ""))
        if match is None or not int(match[1]):
            raise ValueError
        return Net(int(match[1]), int(match[2]) if match[2] else None)

    def help(self) -> str:
        return "a depth and a size: 6@128px, 8@160px, 12@224px; or depths alone"


def falls(sizes: Sequence[int | None]) -> bool:
    """Whether a size is followed by a smaller one."""
    return any(size is not None and then is not None and then < size for size, then in pairwise(sizes))


def divisible(value: float, divisor: int) -> int:
    """``value`` as the nearest multiple of ``divisor``, at least one, and not less than nine tenths of it."""
    found = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return found + divisor if found < 0.9 * value else found


def ladder(largest: int, scale: float, stages: int, divisor: int) -> tuple[int, ...]:
    """From ``scale`` of the largest to all of it in equal steps, each once: 128, 160, 192, 224 for 224, 0.5, 4, 32.

    The last is the largest, also where the divisor does not divide it.
    """
    parts = np.linspace(scale, 1.0, stages).tolist() if stages > 1 else [1.0]
    found = [min(divisible(part * largest, divisor), largest) for part in parts[:-1]]
    return tuple(dict.fromkeys((*found, largest)))


def stages_of(sizes: Sequence[int], stages: int) -> tuple[Stage, ...]:
    """Equal stages of growing sizes; where there are fewer sizes than stages, the last goes on."""
    return tuple(
        Stage(size, Length(k / stages, "fraction", f"{100 * k / stages:.4g}%") if k < stages else None)
        for k, size in enumerate((*sizes, *[sizes[-1]] * (stages - len(sizes))), 1)
    )
