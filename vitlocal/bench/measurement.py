"""The common output of all benches: the JSON file, the table, the line plot, and the progress bar."""

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitlocal.machine import commit, hardware, versions

PlottedLine = tuple[str, Sequence[tuple[float, float]], Mapping[str, Any]]  # label, points, matplotlib's style


def write_json(path: str | None, what: str, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """Writes the file of ``--json``, if there is a ``path``. ``rows`` are flat, ``more`` are further fields."""
    if path is None:
        return
    command = shlex.join(["python", "-m", "vitlocal.bench", *sys.argv[1:]])
    made = {"machine": hardware(), "versions": versions(), "commit": commit()}
    text = json.dumps({"what": what, "command": command, **more, **made, "rows": list(rows)}, indent=1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n", encoding="utf-8")


def text_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """Rows as an aligned text table. ``columns`` maps each title to a field of the rows and its format.

    A column without a format is text, and aligned to the left. A field that is None or missing is an empty cell.
    """
    lines = [list(columns)]
    for row in rows:
        cells = ("" if row.get(field) is None else format(row[field], form) for field, form in columns.values())
        lines.append(list(cells))
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    signs = [">" if form else "<" for _, form in columns.values()]
    return "\n".join(
        "  ".join(f"{cell:{sign}{width}}" for cell, sign, width in zip(line, signs, widths, strict=True)).rstrip()
        for line in lines
    )


def spread(rates: Sequence[float]) -> float | None:
    """(largest - smallest) / median; None for one rate."""
    if len(rates) == 1:
        return None
    return round((max(rates) - min(rates)) / statistics.median(rates), 3)


def progress_bar(turns: int) -> tqdm:
    """A line on the terminal with the number of finished turns and an estimate of the remaining time."""
    return tqdm(total=turns, leave=False, bar_format="{desc}: {n} of {total} turns, {remaining} left")


def plot_lines(
    panels: Mapping[str, Sequence[PlottedLine]], x_name: str, path: Path, inches: tuple[float, float], log: bool = False
) -> None:
    """Writes a figure with one plot for each title of ``panels``, and one legend for all of them."""
    from matplotlib.figure import Figure

    from vitlocal.report.figures import save

    figure = Figure(figsize=inches, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, points, style in lines:
            if points:
                axes.plot(*zip(*sorted(points), strict=True), label=label, **style)
        axes.set(xlabel=x_name, ylabel=title, yscale="log" if log else "linear")
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    save(figure, path)
