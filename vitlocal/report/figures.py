"""Figures of runs, as SVG for a page and PNG for a file, drawn from their logs alone."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")
BLUE, GREY, ORANGE = "#1f6feb", "#57606a", "#d1600a"
COLOURS = (BLUE, ORANGE, "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#0e7490", GREY)

Record = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A run, as figures know it."""

    name: str
    records: Sequence[Record]  # of the log, a pass each, oldest first

    @property
    def scored(self) -> list[Record]:
        return [record for record in self.records if record["top1"] is not None]

    @property
    def starts(self) -> list[float]:
        """Training seconds at the beginning of each pass."""
        return [0.0, *(record["train_seconds"] for record in self.records[:-1])]


def time_unit(seconds: float) -> tuple[str, float]:
    """In what ``seconds`` are told, and how many seconds that is."""
    return next((unit, scale) for unit, scale in (("hours", 3600), ("minutes", 60), ("seconds", 1))
                if seconds > 2 * scale or scale == 1)  # fmt: skip


def svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page; ``name`` keeps its ids apart from other figures'."""
    held = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(held, format="svg", metadata={"Date": None}, transparent=True)
    text = held.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)  # as wide as the page lets it
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # a page's svg needs none
    text = text.replace("xlink:href", "href")
    # Ids that are the same in every figure of matplotlib's.
    return re.sub(r'id="((?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib|PolyCollection|PathCollection|'
                  r'FillBetweenPolyCollection|LineCollection|legend)[\w.]*)"', rf'id="{name}-\1"', text)  # fmt: skip


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def curves(lines: Sequence[Line], along: str) -> Figure:
    """Top-1 and loss of runs ``along`` "time", "epochs" or "images"."""
    if along == "time":
        unit, scale = time_unit(max(line.records[-1]["train_seconds"] for line in lines))
        key, label = "train_seconds", f"training time, {unit}"
    elif along == "epochs":
        key, scale, label = "epoch", 1.0, "epochs"
    else:
        most = max(line.records[-1]["images_seen"] for line in lines)
        scale, unit = (1e6, "millions") if most > 2e6 else (1e3, "thousands")
        key, label = "images_seen", f"images, {unit}"
    figure = Figure(figsize=(4.4, 4.6), layout="constrained")  # at a phone's width, text is of 11 px
    top1, loss = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        dots = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.4}
        top1.plot([r[key] / scale for r in line.scored], [r["top1"] for r in line.scored], label=line.name, **dots)
        known = [record for record in line.records if record["loss"] is not None]
        loss.plot([r[key] / scale for r in known], [r["loss"] for r in known], color=colour, linewidth=1.2)
    top1.set_ylabel("validation top-1, %")
    loss.set_ylabel("training loss")
    loss.set_xlabel(label)
    if len(lines) > 1:
        top1.legend(frameon=False, fontsize=9)
    for axes in (top1, loss):
        _plain(axes)
    return figure


def schedule(line: Line, rates: Sequence[tuple[float, float]], dials: Mapping[str, float]) -> Figure:
    """The run as a strip over training time: image size, learning rate, and each of ``dials``: fields of the log, and
    what stands for none of them (a part of the model: all there is).

    ``rates``: (training seconds, learning rate), as finely as is known.
    """
    unit, scale = time_unit(line.records[-1]["train_seconds"])
    figure = Figure(figsize=(6, 2.6 + 0.8 * len(dials)), layout="constrained")
    rows = figure.subplots(2 + len(dials), 1, sharex=True)
    _stairs(rows[0], line, "image_size", scale, BLUE, filled=True)
    _name_sizes(rows[0], line, scale, "{}")
    rows[0].set_ylabel("px")
    rows[1].plot([at / scale for at, _ in rates], [rate for _, rate in rates], color=ORANGE)
    rows[1].set_ylabel("learning rate")
    rows[1].set_ylim(0)
    for axes, (dial, whole) in zip(rows[2:], dials.items(), strict=True):
        _stairs(axes, line, dial, scale, GREY, whole=whole)
        name = {"shape.block_order": "blocks", "shape.trainable_blocks": "trained_blocks"}.get(
            dial, dial.rpartition(".")[2]
        )
        axes.set_ylabel(name.replace("_", "\n"), fontsize=9)
    rows[-1].set_xlabel(f"training time, {unit}")
    for axes in rows:
        _plain(axes)
    return figure


def _stairs(
    axes: Axes, line: Line, field: str, scale: float, colour: str, filled: bool = False, whole: float = math.nan
) -> None:
    """A field of the log over training time, pass by pass; one that is logged when it changes goes on until then.

    ``whole`` is drawn until it is logged and where it is None; of a list, the length is.
    """
    values, value = [], None
    for record in line.records:
        value = record.get(field, value)
        values.append(whole if value is None else len(value) if isinstance(value, list) else value)
    edges = [at / scale for at in (*line.starts, line.records[-1]["train_seconds"])]
    if filled:
        axes.stairs(values, edges, color=colour, alpha=0.25, fill=True)
    axes.stairs(values, edges, color=colour, linewidth=1.5)
    axes.set_ylim(0, max(value for value in values if value == value) * 1.15 or 1)


def _name_sizes(axes: Axes, line: Line, scale: float, form: str) -> None:
    """Writes each image size where it begins."""
    before = None
    for start, record in zip(line.starts, line.records, strict=True):
        size = record["image_size"]
        if size != before:
            style = {"textcoords": "offset points", "fontsize": 9, "color": GREY}
            axes.annotate(form.format(size), (start / scale, size), (2, -10), **style)
        before = size


def throughput(lines: Sequence[Line]) -> Figure:
    """Images/s and the part of the time waited for data, by image size: a bar a run."""
    sizes = sorted({record["image_size"] for line in lines for record in line.records})
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    rate_axes, wait_axes = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
    width = 0.8 / len(lines)
    for number, line in enumerate(lines):
        found = by_size(line)
        places = [sizes.index(size) + (number - (len(lines) - 1) / 2) * width for size in found]
        colour = COLOURS[number % len(COLOURS)]
        rate_axes.bar(
            places, [row["images_per_second"] for row in found.values()], width, color=colour, label=line.name
        )
        wait_axes.bar(places, [100 * row["data_wait_fraction"] for row in found.values()], width, color=colour)
    rate_axes.set_ylabel("images/s")
    wait_axes.set_ylabel("waited, %")
    wait_axes.set_ylim(0, max(1.0, wait_axes.get_ylim()[1]))
    wait_axes.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
    if len(lines) > 1:
        rate_axes.legend(frameon=False, fontsize=9)
    for axes in (rate_axes, wait_axes):
        _plain(axes)
    return figure


def by_size(line: Line) -> dict[int, Record]:
    """Of each image size: images, epochs, seconds, images/s and the part of the time waited for data."""
    found: dict[int, Record] = {}
    images_before = epoch_before = 0.0
    for start, record in zip(line.starts, line.records, strict=True):
        row = found.setdefault(record["image_size"], {"images": 0, "epochs": 0.0, "seconds": 0.0, "waited": 0.0})
        seconds = record["train_seconds"] - start
        row["images"] += record["images_seen"] - images_before
        row["epochs"] += record["epoch"] - epoch_before
        row["seconds"] += seconds
        row["waited"] += record["data_wait_fraction"] * seconds
        images_before, epoch_before = record["images_seen"], record["epoch"]
    for row in found.values():
        row["images_per_second"] = row["images"] / max(row["seconds"], 1e-9)
        row["data_wait_fraction"] = row.pop("waited") / max(row["seconds"], 1e-9)
    return found


SAME_COST = 0.01  # multiply-adds that differ by less are the same
MOVING = frozenset(
    f"shape.{name}" for name in ("token_keep_rate", "attention_keep_rate", "skipped_blocks", "input_size")
)  # within a pass, too


def by_cost(line: Line) -> list[Record]:
    """The run's stages: passes in a row whose images cost alike and are trained alike, with images, epochs, seconds,
    multiply-adds an image, and how many blocks are trained (None: all). Empty for a run whose log does not tell costs.

    Frozen blocks have their forward pass all the same: by multiply-adds alone, stages of theirs would be one.
    """
    found: list[Record] = []
    images_before = epoch_before = 0.0
    reshaped, trained = True, None
    for record in line.records:
        images, epochs = record["images_seen"] - images_before, record["epoch"] - epoch_before
        images_before, epoch_before = record["images_seen"], record["epoch"]
        macs = record.get("macs_per_image")
        reshaped |= any(name.startswith("shape.") and name not in MOVING for name in record)
        trained = record.get("shape.trainable_blocks", trained)
        if not images:
            continue
        if macs is None:
            return []
        if reshaped or abs(macs / found[-1]["macs"] - 1) > SAME_COST:
            found.append({"macs": macs, "images": 0, "epochs": 0.0, "seconds": 0.0, "size": record["image_size"],
                          "trained": None if trained is None else len(trained)})  # fmt: skip
        row, reshaped = found[-1], False
        row["macs"] = (row["macs"] * row["images"] + macs * images) / (row["images"] + images)
        row["images"] += images
        row["epochs"] += epochs
        row["seconds"] += images / record["images_per_second"]  # searching apart
    return found


def savings(stages: Sequence[Record]) -> tuple[float, float]:
    """Parts saved of multiply-adds and of time, against as many images at the cost of the dearest stage."""
    most = max(row["macs"] for row in stages)
    full = [row for row in stages if row["macs"] > (1 - SAME_COST) * most]
    dearest = max(full, key=lambda row: row["seconds"] / row["images"])  # of frozen blocks and none, the latter
    images = sum(row["images"] for row in stages)
    macs = sum(row["macs"] * row["images"] for row in stages) / (dearest["macs"] * images)
    pace = dearest["seconds"] / dearest["images"]
    return 1 - macs, 1 - sum(row["seconds"] for row in stages) / (pace * images)


def draw_curve(line: Line, path: Path) -> None:
    """Accuracy, loss, image size and throughput of one run against training time, as a PNG."""
    unit, scale = time_unit(line.records[-1]["train_seconds"])
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.3, 1.3])
    scored = [(record["train_seconds"] / scale, record["top1"]) for record in line.scored]
    axes[0].plot(*zip(*scored, strict=True), color=BLUE, marker="o", markersize=4)
    text = {"textcoords": "offset points", "ha": "right", "color": BLUE, "weight": "bold"}
    axes[0].annotate(f"{scored[-1][1]:.2f} %", scored[-1], (-6, -16), **text)
    axes[0].set_ylabel("validation top-1, %", color=BLUE)
    axes[0].set_title(line.name, loc="left")
    losses = axes[0].twinx()
    known = [record for record in line.records if record["loss"] is not None]
    losses.plot([r["train_seconds"] / scale for r in known], [r["loss"] for r in known], color=ORANGE, linewidth=1.2)
    losses.set_ylabel("training loss", color=ORANGE)
    _stairs(axes[1], line, "image_size", scale, BLUE, filled=True)
    _name_sizes(axes[1], line, scale, "{} px")
    axes[1].set_ylabel("image size")
    _stairs(axes[2], line, "images_per_second", scale, GREY)
    axes[2].set_ylabel("images/s")
    axes[2].set_xlabel(f"training time, {unit}")
    for ax in axes:
        _plain(ax)
    save(figure, path)


def race(runs: Mapping[str, Sequence[Line]], title: str = "") -> Figure:
    """Top-1 against training time, a mark an evaluation: a colour a name, a line each of its runs (seeds, say)."""
    unit, scale = time_unit(max(line.records[-1]["train_seconds"] for lines in runs.values() for line in lines))
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, lines) in enumerate(runs.items()):
        last = statistics.mean(line.scored[-1]["top1"] for line in lines)
        for place, line in enumerate(lines):
            axes.plot(
                [record["train_seconds"] / scale for record in line.scored], [r["top1"] for r in line.scored],
                color=COLOURS[number % len(COLOURS)], marker="o", markersize=3.5, linewidth=1.3,
                alpha=0.45 if place else 1, label=None if place else f"{name}: {last:.1f} %",
            )  # fmt: skip
    axes.set_xlabel(f"training time, {unit}")
    axes.set_ylabel("validation top-1, %")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    _plain(axes)
    return figure
