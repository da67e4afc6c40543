"""Parses the options of the benches. A wrong value raises a ConfigError that names the option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vitlocal.errors import ConfigError
from vitlocal.progress import Length

PLOT_FORMATS = (".png", ".svg", ".pdf")


def bench_parser(name: str, description: str | None, trainer_options: bool = False) -> argparse.ArgumentParser:
    """The parser of a bench, with ``--json``. ``trainer_options``: the bench also takes those of the trainer."""
    more = "[options] [options of train_imagenet.py]" if trainer_options else None
    parser = argparse.ArgumentParser(
        prog=f"python -m vitlocal.bench {name}", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, usage=more and f"%(prog)s {more}",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the measurement to FILE")
    return parser


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    """Whole numbers, separated by commas. Each must be at least ``least``."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise ConfigError(
            f"{option}: got '{text}', expected whole numbers of at least {least}, separated by commas, such as "
            f"{least},{least + 1}"
        )
    return list(dict.fromkeys(values))


def names(text: str, known: Sequence[str], option: str = "--only") -> list[str]:
    """Names, separated by commas. Each must be in ``known``."""
    found = [name.strip() for name in text.split(",")]
    if unknown := [name for name in found if name not in known]:
        raise ConfigError(f"{option}: got {', '.join(map(repr, unknown))}, expected some of {', '.join(known)}")
    return list(dict.fromkeys(found))


def budget(text: str, option: str = "--budget") -> Length:
    """A length of training; not a percentage and not zero."""
    try:
        length = Length.parse(text)
        if length.kind == "fraction" or not length.value:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{option}: got '{text}', expected a length such as 24h, 15m or 90ep") from None
    return length


def times(text: str, option: str = "--budgets") -> list[Length]:
    """Budgets in time, separated by commas."""
    found = [budget(part, option) for part in text.split(",")]
    if any(length.kind != "seconds" for length in found):
        raise ConfigError(f"{option}: got '{text}', expected lengths of time, separated by commas, such as 45s,1h")
    return found


def plot_file(text: str) -> Path:
    """The path of a plot, for argparse's ``type``. The format is checked before the bench starts."""
    if Path(text).suffix.lower() not in PLOT_FORMATS:
        raise argparse.ArgumentTypeError(f"got '{text}', expected a name that ends in .png, .svg or .pdf")
    return Path(text)


def check_multiples(sizes: Sequence[int], patch: int, model: str) -> None:
    """Raises ConfigError if a size of ``--sizes`` is not a multiple of the model's patch size."""
    if wrong := [size for size in sizes if size % patch]:
        better = ",".join(str(max(1, round(size / patch)) * patch) for size in wrong)
        raise ConfigError(
            f"--sizes: got {', '.join(map(str, wrong))}, expected multiples of {patch}, the patch size of {model}; "
            f"use {better}, or another --model.patch_size"
        )
