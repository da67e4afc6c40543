"""The command lines of the benches. A wrong value raises a ConfigError that names the option."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from vitlocal.errors import ConfigError
from vitlocal.options import BYTES
from vitlocal.progress import Length


class BenchParser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError, where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def bench_parser(name: str, description: str | None) -> BenchParser:
    """The parser of a bench, with ``--json``."""
    form, program = argparse.RawDescriptionHelpFormatter, f"python -m vitlocal.bench {name}"
    parser = BenchParser(prog=program, description=description, allow_abbrev=False, formatter_class=form)
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
    with suppress(ValueError):
        values = [int(part) for part in text.split(",")]
        if min(values) >= least:
            return list(dict.fromkeys(values))
    raise argparse.ArgumentTypeError(f"got '{text}', expected whole numbers of at least {least}, separated by commas")


def budget(text: str) -> Length:
    """An argparse type: a length of training, neither a percentage nor zero."""
    with suppress(ValueError):
        length = Length.parse(text)
        if length.kind != "fraction" and length.value:
            return length
    raise argparse.ArgumentTypeError(f"got '{text}', expected a length such as 24h, 15m or 90ep")


def times(text: str) -> list[Length]:
    """An argparse type: budgets in time, separated by commas, or "none"."""
    found = [budget(part) for part in text.split(",")] if text != "none" else []
    if any(length.kind != "seconds" for length in found):
        raise argparse.ArgumentTypeError(f"got '{text}', expected lengths of time, separated by commas: 45s,1h")
    return found


def byte_count(text: str) -> int:
    """An argparse type: bytes with a unit."""
    with suppress(ValueError, KeyError):
        return int(BYTES.check(text))
    raise argparse.ArgumentTypeError(f"got '{text}', expected {BYTES.help()}")


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


def check_multiples(sizes: Sequence[int], multiple: int, model: str) -> None:
    """Raises ConfigError if a size of ``--sizes`` is no multiple of what the model needs, such as its patch size."""
    if wrong := [str(size) for size in sizes if size % multiple]:
        raise ConfigError(f"--sizes: got {', '.join(wrong)}, expected multiples of {multiple}, as {model} needs")
