"""The line plots of the benches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vitlocal.report.figures import save


@dataclass(frozen=True)
class PlottedLine:
    """A line of a plot. ``style`` is what matplotlib's ``plot`` takes. Without points, nothing is drawn."""

    label: str
    points: Sequence[tuple[float, float]]
    style: Mapping[str, Any] = field(default_factory=dict)


def plot_lines(
    panels: Mapping[str, Sequence[PlottedLine]], x_title: str, path: Path, inches: tuple[float, float],
    log: bool = False,
) -> None:  # fmt: skip
    """Writes a figure with one plot for each title of ``panels``, and one legend for all of them."""
    figure = Figure(figsize=inches, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for line in lines:
            if line.points:
                axes.plot(*zip(*sorted(line.points), strict=True), label=line.label, **line.style)
        axes.set(xlabel=x_title, ylabel=title, yscale="log" if log else "linear")
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    save(figure, path)
