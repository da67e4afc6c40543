"""What benches' options say: lists, budgets and files, or a ConfigError that names the option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vitlocal.errors import ConfigError
from vitlocal.progress import Length


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    """Whole numbers with commas between, none of them below ``least``."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise ConfigError(
            f"{option}: got '{text}', expected whole numbers from {least} on with commas between, as in "
            f"{least},{least + 1}"
        )
    return list(dict.fromkeys(values))


def names(text: str, known: Sequence[str], option: str = "--only") -> list[str]:
    """Names with commas between, of those that are known."""
    found = [name.strip() for name in text.split(",")]
    if unknown := [name for name in found if name not in known]:
        raise ConfigError(f"{option}: got {', '.join(map(repr, unknown))}, expected some of {', '.join(known)}")
    return list(dict.fromkeys(found))


def budget(text: str, option: str = "--budget") -> str:
    """A length, as it is commonly written."""
    try:
        length = Length.parse(text)
        if length.kind == "fraction" or not length.value:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{option}: got '{text}', expected a length such as 24h, 15m or 90ep") from None
    return str(length)


def times(text: str, option: str = "--budgets") -> list[Length]:
    """Budgets in time with commas between."""
    found = [Length.parse(budget(part, option)) for part in text.split(",")]
    if any(length.kind != "seconds" for length in found):
        raise ConfigError(f"{option}: got '{text}', expected lengths of time with commas between, as in 45s,1h")
    return found


def plot_file(text: str) -> Path:
    """For argparse's ``type``: a file that a figure can be written to, told before the work is done."""
    path = Path(text)
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f"got '{text}', expected a name that ends in .png, .svg or .pdf")
    return path
