"""A run's curve and its one-page report, drawn from ``log.jsonl`` alone."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vitlocal.errors import DataError
from vitlocal.train.log import read_log

matplotlib.use("Agg")
BLUE, GREY, ORANGE = "#1f6feb", "#57606a", "#d1600a"

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }}
h1 {{ margin-bottom: 0 }} .lead {{ font-size: 1.25rem; margin-top: .25rem }} img {{ max-width: 100% }}
.scroll {{ overflow-x: auto }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #d0d7de; white-space: nowrap }}
pre {{ background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: 85% }}
@media print {{ pre {{ white-space: pre-wrap }} }}
</style></head><body>
<h1>{name}</h1><p class="lead">{lead}</p>
<img alt="Top-1 accuracy, loss, image size and throughput over training time" src="data:image/png;base64,{curve}">
<h2>Passes</h2><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>
<h2>Configuration</h2><pre>{config}</pre>
</body></html>
"""

COLUMNS = {
    "epoch": ("epoch", "{:.2f}"),
    "image_size": ("px", "{:d}"),
    "loss": ("loss", "{:.3f}"),
    "top1": ("top-1 %", "{:.2f}"),
    "top5": ("top-5 %", "{:.2f}"),
    "lr": ("learning rate", "{:.2e}"),
    "images_per_second": ("images/s", "{:,.0f}"),
    "data_wait_fraction": ("waited for data", "{:.1%}"),
    "train_seconds": ("trained", ""),
    "wall_seconds": ("in all", ""),
}


def duration(seconds: float) -> str:
    """``1:02:03`` for 3723 seconds."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def draw_curve(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy, loss, image size and throughput against training time, as a PNG."""
    longest = records[-1]["train_seconds"]
    unit, scale = next(
        (unit, scale)
        for unit, scale in (("hours", 3600), ("minutes", 60), ("seconds", 1))
        if longest > 2 * scale or scale == 1
    )
    ends = [record["train_seconds"] / scale for record in records]
    starts = [0.0, *ends[:-1]]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.3, 1.3])
    scored = [(x, record["top1"]) for x, record in zip(ends, records, strict=True) if record["top1"] is not None]
    axes[0].plot(*zip(*scored, strict=True), color=BLUE, marker="o", markersize=4)
    text = {"textcoords": "offset points", "ha": "right", "color": BLUE, "weight": "bold"}
    axes[0].annotate(f"{scored[-1][1]:.2f} %", scored[-1], (-6, -16), **text)
    axes[0].set_ylabel("validation top-1, %", color=BLUE)
    axes[0].set_title(title, loc="left")
    losses = axes[0].twinx()
    losses.plot(ends, [record["loss"] for record in records], color=ORANGE, linewidth=1.2)
    losses.set_ylabel("training loss", color=ORANGE)
    sizes = [record["image_size"] for record in records]
    for start, end, size in zip(starts, ends, sizes, strict=True):
        axes[1].fill_between([start, end], size, color=BLUE, alpha=0.25, linewidth=0)
        axes[1].plot([start, end], [size, size], color=BLUE)
    for place, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if place == 0 or sizes[place - 1] != size:
            axes[1].annotate(f"{size} px", (start, size), (2, -10), textcoords="offset points", fontsize=8, color=GREY)
    axes[1].set_ylabel("image size")
    axes[1].set_ylim(0, max(sizes) * 1.15)
    for start, end, record in zip(starts, ends, records, strict=True):
        rate = record["images_per_second"]
        axes[2].plot([start, end], [rate, rate], color=GREY)
    axes[2].set_ylabel("images/s")
    axes[2].set_ylim(0)
    axes[2].set_xlabel(f"training time, {unit}")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def write_classes(folder: Path, classes: Sequence[str], by_class: np.ndarray) -> None:
    """``classes.json``: of each class at the last evaluation, its images and those whose class came first.

    ``by_class`` (C, 2): right, all.
    """
    found = [{"class": name, "right": int(right), "images": int(count)}
             for name, (right, count) in zip(classes, by_class, strict=True)]  # fmt: skip
    (folder / "classes.json").write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")


def rehearse_report(folder: Path) -> None:
    """Draws a curve of nothing much: takes the time that a report takes, and has fonts loaded by then."""
    record = {"train_seconds": 1.0, "top1": 0.0, "loss": 1.0, "image_size": 1, "images_per_second": 1.0}
    draw_curve([record, record | {"train_seconds": 2.0}], folder / "curve.png", "")


def write_report(folder: Path) -> dict[str, Any]:
    """Draws ``curve.png`` and ``report.html`` into the run's folder; returns the last evaluated record."""
    records = read_log(folder)
    scored = [record for record in records if record["top1"] is not None]
    if not scored:
        raise DataError(f"{folder}/log.jsonl holds no evaluation: there is nothing to draw")
    last = scored[-1]
    draw_curve(records, folder / "curve.png", folder.name)
    lead = (
        f"Top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} % after {last['epoch']:.1f} epochs: "
        f"{last['images_seen']:,} images in {duration(last['train_seconds'])} of training "
        f"({duration(last['wall_seconds'])} with evaluation and saving)."
    )
    rows = []
    for record in records:
        cells = []
        for name, (_, form) in COLUMNS.items():
            value = record[name]
            cells.append("" if value is None else duration(value) if not form else form.format(value))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    page = PAGE.format(
        name=html.escape(folder.name),
        lead=lead,
        curve=base64.b64encode((folder / "curve.png").read_bytes()).decode(),
        head="".join(f"<th>{title}</th>" for title, _ in COLUMNS.values()),
        rows="\n".join(rows),
        config=html.escape((folder / "config.yaml").read_text(encoding="utf-8")),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return last
