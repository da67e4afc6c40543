"""Figures of runs, drawn from their logs: SVG for a page, PNG for a file."""

import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitlocal.jsonl import replacing
from vitlocal.tasks.metrics import METRICS, Metric, is_evaluated

BLUE, GREY, ORANGE = "#1f6feb", "#57606a", "#d1600a"
COLOURS = (BLUE, ORANGE, "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#0e7490", GREY)

Record = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A run as a line in a figure: its name and its log."""

    name: str
    records: Sequence[Record]  # one for each pass, oldest first
    metrics: tuple[Metric, ...] = field(default=METRICS["classification"], kw_only=True)  # those of its task

    @property
    def last(self) -> Record:
        """The record of the last pass that was evaluated."""
        return next(record for record in reversed(self.records) if is_evaluated(record, self.metric))

    @property
    def metric(self) -> Metric:
        """The metric that curves and tables show."""
        return self.metrics[0]

    @property
    def score(self) -> float:
        """The metric at the last evaluation."""
        return self.last[self.metric.name]

    @property
    def starts(self) -> list[float]:
        """Training seconds at the start of each pass."""
        return [0.0, *(record["train_seconds"] for record in self.records[:-1])]


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which to show a length of time, and its seconds."""
    return next((unit, scale) for unit, scale in (("hours", 3600), ("minutes", 60), ("seconds", 1))
                if seconds > 2 * scale or scale == 1)  # fmt: skip


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element. ``name`` must be unique in the page, because the ids start with it."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # not needed inside HTML
    return re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", text.replace("xlink:href", "href"))


def _plain(*axes: Axes) -> None:
    for each in axes:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)


def _plot(axes: Axes, line: Line, y: str, scale: float, x: str = "train_seconds", **style: Any) -> None:
    """Plots the field ``y`` of the log against ``x`` / ``scale``. Records without ``y`` are left out."""
    known = [record for record in line.records if record.get(y) is not None]
    axes.plot([record[x] / scale for record in known], [record[y] for record in known], **style)


def _plain_name(name: str) -> str:
    """A name as it is: matplotlib takes what is between two $ for a formula."""
    return name.replace("$", r"\$")


def _axis(metric: Metric) -> str:
    if not metric.larger_is_better:
        return f"{metric.title} (lower is better)"
    return f"validation {metric.label}" + (f", {metric.unit}" if metric.unit else "")


def save(figure: Figure, path: Path) -> None:
    """Writes the figure in the format that the file's name ends in. Makes the folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb", sync=False) as file:
        figure.savefig(file, dpi=120, format=path.suffix.removeprefix(".") or None)


def curves(lines: Sequence[Line], along: str) -> Figure:
    """The metric and the loss of runs of one task against "time", "epochs" or "images"."""
    x_field = {"time": "train_seconds", "epochs": "epoch", "images": "images_seen"}[along]
    most = max(line.records[-1][x_field] for line in lines)
    if along == "time":
        unit, scale = time_unit(most)
        label = f"training time, {unit}"
    elif along == "images":
        unit, scale = ("millions", 1e6) if most > 2e6 else ("thousands", 1e3)
        label = f"images, {unit}"
    else:
        scale, label = 1.0, "epochs"
    figure = Figure(figsize=(4.4, 4.6), layout="constrained")  # text is 11 px high on a phone
    score, loss = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        dots = {"marker": "o", "markersize": 3.5, "linewidth": 1.4, "label": _plain_name(line.name)}
        _plot(score, line, line.metric.name, scale, x_field, color=colour, **dots)
        _plot(loss, line, "loss", scale, x_field, color=colour, linewidth=1.2)
    score.set_ylabel(_axis(lines[0].metric))
    loss.set_ylabel("training loss")
    loss.set_xlabel(label)
    if len(lines) > 1:
        score.legend(frameon=False, fontsize=9)
    _plain(score, loss)
    return figure


def schedule(line: Line, rates: Sequence[tuple[float, float]], fields: Mapping[str, float]) -> Figure:
    """Image size, learning rate and each of ``fields`` against training time.

    ``rates``: points (training seconds, learning rate). ``fields``: fields of the log, with the value to draw until
    they are logged.
    """
    unit, scale = time_unit(line.records[-1]["train_seconds"])
    figure = Figure(figsize=(6, 2.6 + 0.8 * len(fields)), layout="constrained")
    rows = figure.subplots(2 + len(fields), 1, sharex=True)
    _image_sizes(rows[0], line, scale, "{}")
    rows[0].set_ylabel("px")
    rows[1].plot([at / scale for at, _ in rates], [rate for _, rate in rates], color=ORANGE)
    rows[1].set_ylabel("learning rate")
    rows[1].set_ylim(0)
    names = {"shape.block_order": "blocks", "shape.trainable_blocks": "trained_blocks"}
    for axes, (name, default) in zip(rows[2:], fields.items(), strict=True):
        _stairs(axes, line, name, scale, GREY, default=default)
        axes.set_ylabel(names.get(name, name.rpartition(".")[2]).replace("_", "\n"), fontsize=9)
    rows[-1].set_xlabel(f"training time, {unit}")
    _plain(*rows)
    return figure


def drawn_value(field: str, value: Any) -> float:
    """A logged value as a number: of heads and hidden units the sum over levels, of blocks their count."""
    if isinstance(value, (list, tuple)):
        return float(sum(value) if field in ("shape.heads", "shape.hidden") else len(value))
    return float(value)


def _stairs(
    axes: Axes, line: Line, field: str, scale: float, colour: str, filled: bool = False, default: float = math.nan
) -> None:
    """Draws the last logged value of a field, or ``default`` while there is none."""
    values: list[float] = []
    value: Any = None
    for record in line.records:
        value = record.get(field, value)
        values.append(default if value is None else drawn_value(field, value))
    edges = [at / scale for at in (*line.starts, line.records[-1]["train_seconds"])]
    if filled:
        axes.stairs(values, edges, color=colour, alpha=0.25, fill=True)
    axes.stairs(values, edges, color=colour, linewidth=1.5)
    axes.set_ylim(0, max(value for value in values if value == value) * 1.15 or 1)


def _image_sizes(axes: Axes, line: Line, scale: float, form: str) -> None:
    """Draws the image size, and writes it at the start of each stage."""
    _stairs(axes, line, "image_size", scale, BLUE, filled=True)
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": GREY}
    before = None
    for start, record in zip(line.starts, line.records, strict=True):
        size = record["image_size"]
        if size != before:
            axes.annotate(form.format(size), (start / scale, size), (2, -10), **style)
        before = size


def throughput(lines: Sequence[Line]) -> Figure:
    """Images/s, and the fraction of the time that was spent waiting for data, by image size. One bar per run."""
    sizes = sorted({record["image_size"] for line in lines for record in line.records})
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    rate_axes, wait_axes = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
    width = 0.8 / len(lines)
    for number, line in enumerate(lines):
        found = by_size(line)
        places = [sizes.index(size) + (number - (len(lines) - 1) / 2) * width for size in found]
        rates = [row["images_per_second"] for row in found.values()]
        waits = [100 * row["data_wait_fraction"] for row in found.values()]
        colour = COLOURS[number % len(COLOURS)]
        rate_axes.bar(places, rates, width, color=colour, label=_plain_name(line.name))
        wait_axes.bar(places, waits, width, color=colour)
    rate_axes.set_ylabel("images/s")
    wait_axes.set_ylabel("waited, %")
    wait_axes.set_ylim(0, max(1.0, wait_axes.get_ylim()[1]))
    wait_axes.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
    if len(lines) > 1:
        rate_axes.legend(frameon=False, fontsize=9)
    _plain(rate_axes, wait_axes)
    return figure


def by_size(line: Line) -> dict[int, Record]:
    """For each image size: images, epochs, seconds, images/s, and the fraction of the time waited for data."""
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


SAME_COST = 0.01  # relative difference of multiply-adds below which two passes cost the same
# Fields that change within a pass. They start no new stage.
CHANGING = {"shape.token_keep_rate", "shape.attention_keep_rate", "shape.skipped_blocks", "shape.input_size"}


def by_cost(line: Line) -> list[Record]:
    """The stages of a run: passes in a row whose images cost the same and that train the same blocks.

    Each has images, epochs, seconds, multiply-adds per image, and how many blocks are trained (None: all). Frozen
    blocks still run forward, so equal multiply-adds do not mean equal stages. Empty if the log has no costs.
    """
    found: list[Record] = []
    images_before = epoch_before = 0.0
    reshaped, trained = True, None
    for record in line.records:
        images, epochs = record["images_seen"] - images_before, record["epoch"] - epoch_before
        images_before, epoch_before = record["images_seen"], record["epoch"]
        macs = record.get("macs_per_image")
        reshaped |= any(name.startswith("shape.") and name not in CHANGING for name in record)
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
        row["seconds"] += images / record["images_per_second"]  # without searches
    return found


def savings(stages: Sequence[Record]) -> tuple[float, float]:
    """The fractions of multiply-adds and time that were saved, compared with every image at the highest cost."""
    most = max(row["macs"] for row in stages)
    full = [row for row in stages if row["macs"] > (1 - SAME_COST) * most]
    costliest = max(full, key=lambda row: row["seconds"] / row["images"])  # not one with frozen blocks, if possible
    images = sum(row["images"] for row in stages)
    macs = sum(row["macs"] * row["images"] for row in stages) / (costliest["macs"] * images)
    pace = costliest["seconds"] / costliest["images"]
    return 1 - macs, 1 - sum(row["seconds"] for row in stages) / (pace * images)


def draw_curve(line: Line, path: Path) -> None:
    """Draws metric, loss, image size and throughput of one run against training time, as a PNG."""
    unit, scale = time_unit(line.records[-1]["train_seconds"])
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.3, 1.3])
    _plot(axes[0], line, line.metric.name, scale, color=BLUE, marker="o", markersize=4)
    end = line.last["train_seconds"] / scale, line.score
    text: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "color": BLUE, "weight": "bold"}
    place = -6, -16 if line.metric.larger_is_better else 10
    axes[0].annotate(line.metric.number(line.score), end, place, **text)
    axes[0].set_ylabel(_axis(line.metric), color=BLUE)
    axes[0].set_title(_plain_name(line.name), loc="left")
    losses = axes[0].twinx()
    _plot(losses, line, "loss", scale, color=ORANGE, linewidth=1.2)
    losses.set_ylabel("training loss", color=ORANGE)
    _image_sizes(axes[1], line, scale, "{} px")
    axes[1].set_ylabel("image size")
    _stairs(axes[2], line, "images_per_second", scale, GREY)
    axes[2].set_ylabel("images/s")
    axes[2].set_xlabel(f"training time, {unit}")
    _plain(*axes)
    save(figure, path)


def race(runs: Mapping[str, Sequence[Line]], title: str = "") -> Figure:
    """The metric against training time. Each name has a colour and one line per run (for example, per seed)."""
    unit, scale = time_unit(max(line.records[-1]["train_seconds"] for lines in runs.values() for line in lines))
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, lines) in enumerate(runs.items()):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 3.5}
        metric = lines[0].metric
        label = f"{_plain_name(name)}: {metric.number(statistics.mean(line.score for line in lines))}"
        for place, line in enumerate(lines):
            style |= {"alpha": 0.45, "label": None} if place else {"alpha": 1, "label": label}
            _plot(axes, line, metric.name, scale, linewidth=1.3, **style)
    axes.set_xlabel(f"training time, {unit}")
    axes.set_ylabel(_axis(metric))
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    _plain(axes)
    return figure
