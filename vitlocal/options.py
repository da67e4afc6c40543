"""Kinds of option values, and how a dataclass's field is declared to be an option."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fastargs.validation import Checker

from vitlocal.progress import Length, Stage


class Text(Checker):
    def check(self, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value

    def help(self) -> str:
        return "text"


@dataclass(frozen=True)
class Number(Checker):
    """A number in [low, high]; whole ones stay ``int``, and no fraction is cut off in silence."""

    low: float = float("-inf")
    high: float = float("inf")
    whole: bool = False

    def check(self, value: Any) -> float | int:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if self.whole:
            if number != int(number):
                raise ValueError
            number = int(number)
        if not self.low <= number <= self.high:
            raise ValueError
        return number

    def help(self) -> str:
        bounds = {
            (False, False): "",
            (True, False): f" of at least {self.low:g}",
            (False, True): f" of at most {self.high:g}",
            (True, True): f" from {self.low:g} to {self.high:g}",
        }[self.low > float("-inf"), self.high < float("inf")]
        return ("a whole number" if self.whole else "a number") + bounds


class Flag(Checker):
    words = {
        "true": True,
        "yes": True,
        "on": True,
        "1": True,
        "false": False,
        "no": False,
        "off": False,
        "0": False,
    }

    def check(self, value: Any) -> bool:
        return self.words[str(value).lower()]

    def help(self) -> str:
        return "true or false"


class Choice(Checker):
    def __init__(self, *names: str):
        self.names = names

    def check(self, value: Any) -> str:
        if str(value) not in self.names:
            raise ValueError
        return str(value)

    def help(self) -> str:
        return "one of " + ", ".join(self.names)


@dataclass(frozen=True)
class Duration(Checker):
    part: bool = True  # it may be a part of the budget

    def check(self, value: Any) -> Length:
        length = value if isinstance(value, Length) else Length.parse(str(value))
        if length.kind == "fraction" and (not self.part or length.value > 1):
            raise ValueError
        return length

    def help(self) -> str:
        return "a length: 90ep, 5000steps, 45s, 30m, 24h or 3PF" + (", or 10% of the budget" if self.part else "")


class StageText(Checker):
    def check(self, value: Any) -> Stage:
        stage = value if isinstance(value, Stage) else Stage.parse(str(value))
        if stage.until is not None:
            Duration().check(stage.until)
        return stage

    def help(self) -> str:
        return "a size and its end (32px until 10%, or until 5ep); the last without an end"


class Bytes(Checker):
    """A number of bytes; decimal units as disks are sold in, or binary ones."""

    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
             "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip

    def check(self, value: Any) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(value).strip())
        if match is None or match[2].upper() not in self.units:
            raise ValueError
        count = int(float(match[1]) * self.units[match[2].upper()])
        if count < 1:
            raise ValueError
        return count

    def help(self) -> str:
        return "bytes with a unit: 150GB, 64GiB"


class Series(Checker):
    """Several values: a yaml list, or text with commas. ``none`` is the empty series."""

    def __init__(self, kind: Checker, count: int | None = None):
        self.kind, self.count = kind, count

    def check(self, value: Any) -> tuple:
        if isinstance(value, str):
            value = [] if value in ("none", "[]", "") else [part.strip() for part in value.split(",")]
        values = tuple(self.kind.check(part) for part in value)
        if self.count is not None and len(values) != self.count:
            raise ValueError
        return values

    def help(self) -> str:
        return f"{self.count or 'a list'} of: {self.kind.help()}"


class Maybe(Checker):
    """The kind, or ``none``."""

    def __init__(self, kind: Checker):
        self.kind = kind

    def check(self, value: Any) -> Any:
        return None if value is None or value == "none" else self.kind.check(value)

    def help(self) -> str:
        return f"{self.kind.help()}, or none"


COUNT = Number(low=1, whole=True)
SHARE = Number(low=0, high=1)


def option(default: Any, kind: Checker, meaning: str) -> Any:
    """A dataclass field that is also an option of the command line and of recipes."""
    return field(default=default, metadata={"kind": kind, "meaning": meaning})


@dataclass(frozen=True)
class Section:
    """A method's options."""

    def completed(self, model: Any) -> Section:
        """With what is left open as the model's own options have it."""
        return self


def as_argument(value: Any) -> str:
    """A value that yaml gave, as the command line takes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_argument, value)) or "none"
    return "none" if value is None else str(value)


def plain_value(value: Any) -> Any:
    """``value`` as yaml has it, in the form that its kind reads: numbers, text, and lists of them."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return [plain_value(part) for part in value] if type(value) is tuple else str(value)
