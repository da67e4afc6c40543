"""The command lines of the benches. A wrong value raises a ConfigError that names the option."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vitlocal.errors import ConfigError
from vitlocal.progress import Length


class BenchParser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError, where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def bench_parser(name: str, description: str | None, trainer_options: bool = False) -> BenchParser:
    """The parser of a bench, with ``--json``. ``trainer_options``: the bench also takes those of the trainer."""
    more = "[options] [options of train_imagenet.py]" if trainer_options else None
    parser = BenchParser(
        prog=f"python -m vitlocal.bench {name}", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, usage=more and f"%(prog)s {more}",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the measurement to FILE")
    return parser


def at_least(least: int, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """An argparse type: a number of at least ``least``."""

    def number(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"got {text}, expected at least {least}")
        return value

    return number


def numbers(text: str, least: int = 1) -> list[int]:
    """An argparse type: whole numbers of at least ``least``, separated by commas."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least:
        expected = f"whole numbers of at least {least}, separated by commas, such as {least},{least + 1}"
        raise argparse.ArgumentTypeError(f"got '{text}', expected {expected}")
    return list(dict.fromkeys(values))


def budget(text: str) -> Length:
    """An argparse type: a length of training, neither a percentage nor zero."""
    try:
        length = Length.parse(text)
        if length.kind == "fraction" or not length.value:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"got '{text}', expected a length such as 24h, 15m or 90ep") from None
    return length


def times(text: str) -> list[Length]:
    """An argparse type: budgets in time, separated by commas."""
    found = [budget(part) for part in text.split(",")]
    if any(length.kind != "seconds" for length in found):
        raise argparse.ArgumentTypeError(f"got '{text}', expected lengths of time, separated by commas: 45s,1h")
    return found


def plot_file(text: str) -> Path:
    """An argparse type: the path of a plot in a format that can be written."""
    if not text.lower().endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"got '{text}', expected a name that ends in .png, .svg or .pdf")
    return Path(text)


def names(text: str, known: Sequence[str], option: str = "--only") -> list[str]:
    """Names, separated by commas. ConfigError if one is not in ``known``."""
    found = [name.strip() for name in text.split(",")]
    if unknown := [name for name in found if name not in known]:
        raise ConfigError(f"{option}: got {', '.join(map(repr, unknown))}, expected some of {', '.join(known)}")
    return list(dict.fromkeys(found))


def check_multiples(sizes: Sequence[int], patch: int, model: str) -> None:
    """Raises ConfigError if a size of ``--sizes`` is not a multiple of the model's patch size."""
    if wrong := [str(size) for size in sizes if size % patch]:
        raise ConfigError(f"--sizes: got {', '.join(wrong)}, expected multiples of {patch}, the patch size of {model}")
