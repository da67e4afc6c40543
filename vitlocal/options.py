"""Kinds of option values, and how a dataclass declares that a field is an option.

A kind is a ``Checker`` of fastargs: ``check`` converts a value from yaml, the environment or the command line, or
raises an error. ``help`` completes the sentence "expected ...".
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastargs.validation import Checker

from vitlocal.progress import Length, Stage

# The arguments of timm's models whose names differ from those of the section "model".
TIMM_NAMES = {
    "width": "embed_dim", "heads": "num_heads", "drop_path": "drop_path_rate", "size": "img_size",
    "patch_drop": "patch_drop_rate", "layer_scale": "init_values",
}  # fmt: skip


class Parsed(Checker):
    """The values that ``parse`` accepts. ``expected`` describes them."""

    def __init__(self, parse: Callable[[Any], Any], expected: str):
        self.parse, self.expected = parse, expected

    def check(self, value: Any) -> Any:
        return self.parse(value)

    def help(self) -> str:
        return self.expected


class Number(Parsed):
    """A finite number in [low, high], or below ``high`` if it is ``open``.

    With ``whole`` it is an ``int``, and a fraction is an error.
    """

    def __init__(self, low: float = -math.inf, high: float = math.inf, whole: bool = False, open: bool = False):
        self.low, self.high, self.whole = low, high, whole

        def parse(value: Any) -> float | int:
            number = math.nan if isinstance(value, bool) else float(value)
            if not low <= number <= high or math.isinf(number) or (open and number == high):
                raise ValueError
            if whole and number != int(number):
                raise ValueError
            return int(number) if whole else number

        kind, least, most = "a whole number" if whole else "a number", low > -math.inf, high < math.inf
        end = f"below {high:,g}" if open else f"to {high:,.12g}"
        bounds = f" from {low:g} {end}" if least and most else f" of at least {low:g}" if least else ""
        super().__init__(parse, kind + (bounds or (f" of at most {high:g}" if most else "")))


class Choice(Parsed):
    """One of ``names``."""

    def __init__(self, *names: str):
        self.names = names

        def parse(value: Any) -> str:
            word = {"True": "yes", "False": "no"}.get(str(value), str(value))  # YAML takes yes and no for booleans
            return names[names.index(word)]

        super().__init__(parse, "one of " + ", ".join(names))


class Duration(Parsed):
    """A length of training. With ``part`` it may be a percentage of the budget, at most 100%."""

    def __init__(self, part: bool = True):
        self.part = part

        def parse(value: Any) -> Length:
            length = value if isinstance(value, Length) else Length.parse(str(value))
            if length.kind == "fraction" and (not part or length.value > 1):
                raise ValueError
            return length

        expected = "a length: 90ep, 5000steps, 45s, 30m, 24h or 3PF"
        super().__init__(parse, expected + (", or 10% of the budget" if part else ""))


class Series(Parsed):
    """A yaml list, or text with commas, of values of one kind. ``none`` is the empty list."""

    def __init__(self, kind: Parsed, count: int | None = None):
        self.kind, self.count = kind, count

        def parse(value: Any) -> tuple[Any, ...]:
            if isinstance(value, str):
                value = [] if value in ("none", "[]", "") else [part.strip() for part in value.split(",")]
            values = tuple(kind.check(part) for part in value)
            if count is not None and len(values) != count:
                raise ValueError
            return values

        super().__init__(parse, f"{count or 'a list'} of: {kind.help()}")


class Maybe(Parsed):
    """A value of ``kind``, or ``none``."""

    def __init__(self, kind: Parsed):
        self.kind = kind
        super().__init__(
            lambda value: None if value is None or value == "none" else kind.check(value), f"{kind.help()}, or none"
        )


FLAG_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
BYTE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
              "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _bytes(value: Any) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)", str(value).strip())
    if match is None or (count := int(float(match[1]) * BYTE_UNITS[match[2].upper()])) < 1:
        raise ValueError
    return count


def _stage(value: Any) -> Stage:
    stage = value if isinstance(value, Stage) else Stage.parse(str(value))
    if stage.until is not None:
        Duration().check(stage.until)
    return stage


TEXT = Parsed(_text, "text")
BYTES = Parsed(_bytes, "bytes with a unit: 150GB, 64GiB")
STAGE = Parsed(_stage, "a size and its end (32px until 10%, or until 5ep); the last without an end")
FLAG = Parsed(lambda value: FLAG_WORDS[str(value).lower()], "true or false")
# Larger numbers than these are typing errors, which would take all memory, or never end.
COUNT = Number(low=1, high=10**6, whole=True)
PIXELS = Number(low=1, high=16384, whole=True)
THOUSAND = Number(low=1, high=1000, whole=True)
STAGES = Number(low=1, high=100, whole=True)
FRACTION = Number(low=0, high=1)
DECAY = Number(low=0, high=1, open=True)


def option(default: Any, kind: Parsed, meaning: str, none_is: str | None = None) -> Any:
    """A dataclass field that is also an option of recipes and of the command line.

    If the default is None, it may be ``none``. Then it has the value of the option ``none_is``, if that is given.
    """
    kind = Maybe(kind) if default is None else kind
    return field(default=default, metadata={"kind": kind, "meaning": meaning, "none_is": none_is})


@dataclass(frozen=True)
class Section:
    """The options of a training method."""

    renamed: ClassVar[Mapping[str, str]] = {}  # old name -> new name


def messages(checks: Mapping[str, Any]) -> list[str]:
    """The messages of ``checks`` whose condition is true, in order."""
    return [message for message, wrong in checks.items() if wrong]


def as_argument(value: Any) -> str:
    """``value``, as yaml gave it, in the form of the command line."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_argument, value)) or "none"
    return "none" if value is None else str(value)
