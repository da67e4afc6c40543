"""Runs on one page, without outside links: curves, schedules, throughput, crops, worst classes, differences."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from vitlocal.config import Config, read_config
from vitlocal.data.augment import Augment
from vitlocal.data.batch import open_sources
from vitlocal.errors import ConfigError, DataError
from vitlocal.methods import build_methods
from vitlocal.methods.method import MethodContext
from vitlocal.models.factory import build_model
from vitlocal.models.shape import model_blocks, model_parts
from vitlocal.plan import Dials, Feed, Plan, fold
from vitlocal.progress import Position, Progress
from vitlocal.report.figures import Line, by_cost, by_size, curves, draw_curve, savings, schedule, svg, throughput
from vitlocal.train.log import read_log
from vitlocal.train.optim import Schedule

WORST = 10  # classes
CROPS = 6  # of each size
RATE_POINTS = 40  # of the learning rate, a pass
# Shown where they change. Of shapes: what there is of each in the whole model, as model_parts() has it.
DIALS = (
    "batch_size",
    "dials.strength",
    "dials.randaugment_strength",
    "dials.lr_scale",
    "shape.token_keep_rate",
    "shape.attention_keep_rate",
)
PARTS = {"shape.heads": "heads", "shape.hidden": "hidden", "shape.grid": "grid", "shape.block_order": "blocks",
         "shape.trainable_blocks": "blocks"}  # fmt: skip
TURNED = ("strength", "randaugment_strength")  # dials that crops show

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2.5rem }} .lead {{ font-size: 1.25rem; margin-top: .25rem }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 1rem }}
figure {{ margin: 0; break-inside: avoid }} figure svg {{ width: 100%; height: auto }}
figcaption {{ color: #57606a; font-size: .9rem }}
.wide {{ max-width: 54rem; overflow-x: auto }} .wide svg {{ min-width: 30rem }} .scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #d0d7de; white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left; padding-left: 0 }}
.crops {{ display: flex; flex-wrap: wrap; gap: 4px; align-items: center; margin-bottom: 4px }}
.crops img {{ width: min(96px, 14vw); image-rendering: pixelated }} .crops span {{ min-width: 4.5rem }}
@media (max-width: 40rem) {{ .crops span {{ width: 100% }} }}
pre {{ background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: 85% }}
@media print {{ body {{ margin: 0; max-width: none; font-size: 11pt }} details {{ display: none }}
  .scroll, .wide {{ overflow: visible }} .wide svg {{ min-width: 0 }} td, th {{ white-space: normal }}
  .grid {{ grid-template-columns: 1fr 1fr }} tr {{ break-inside: avoid }} }}
</style></head><body>
<h1>{title}</h1><p class="lead">{lead}</p>
{body}
</body></html>
"""


def duration(seconds: float) -> str:
    """``1:02:03`` for 3723 seconds."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


@dataclass(frozen=True)
class RunRecord:
    """A run as it lies in its folder."""

    folder: Path
    name: str
    records: list[dict[str, Any]]
    config: Config
    classes: list[dict[str, Any]]  # of the last evaluation: class, right, images

    @property
    def last(self) -> dict[str, Any]:
        """The last pass that was evaluated."""
        return [record for record in self.records if record["top1"] is not None][-1]

    @property
    def line(self) -> Line:
        return Line(self.name, self.records)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the path as tells them apart."""
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(set(folders)) and parts < 20:
        parts += 1
    return ["/".join(folder.parts[-parts:]) for folder in folders]


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """The run in ``folder``; ConfigError where there is none, or none that was evaluated."""
    records = read_log(folder)
    if not any(record["top1"] is not None for record in records) or not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} holds no run with an evaluation; expected a folder that train_imagenet.py made")
    classes = folder / "classes.json"
    found = json.loads(classes.read_text(encoding="utf-8")) if classes.exists() else []
    config = read_config(["--config-file", str(folder / "config.yaml")], {})
    return RunRecord(folder, name or folder.name, records, config, found)


def write_classes(folder: Path, classes: Sequence[str], by_class: np.ndarray) -> None:
    """``classes.json``: of each class at the last evaluation, its images and those whose class came first.

    ``by_class`` (C, 2): right, all.
    """
    found = [{"class": name, "right": int(right), "images": int(count)}
             for name, (right, count) in zip(classes, by_class, strict=True)]  # fmt: skip
    (folder / "classes.json").write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")


# --- parts of the page ----------------------------------------------------------------------------------------------


def rows_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; cells are escaped."""
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    return (
        f'<div class="scroll"><table><tr>{titles}</tr>' + "".join(f"<tr>{row}</tr>" for row in cells) + "</table></div>"
    )


def _figure(drawing: str, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>'


def summary_part(runs: Sequence[RunRecord]) -> str:
    head = ["run", "top-1 %", "top-5 %", "epochs", "images", "trained", "in all", "images/s"]
    rows = []
    for run in runs:
        last = run.last
        rate = last["images_seen"] / max(last["train_seconds"], 1e-9)
        rows.append([
            run.name, f"{last['top1']:.2f}", f"{last['top5']:.2f}", f"{last['epoch']:.2f}", f"{last['images_seen']:,}",
            duration(last["train_seconds"]), duration(last["wall_seconds"]), f"{rate:,.0f}",
        ])  # fmt: skip
    return rows_table(head, rows)


def curves_part(runs: Sequence[RunRecord]) -> str:
    lines = [run.line for run in runs]
    drawn = [
        _figure(svg(curves(lines, along), f"curves-{along}"), f"Top-1 and loss against {along}")
        for along in ("time", "epochs", "images")
    ]
    return f'<h2>Curves</h2><div class="grid">{"".join(drawn)}</div>'


def learning_rates(run: RunRecord) -> list[tuple[float, float]]:
    """(training seconds, learning rate), by the recipe's schedule between the passes' ends."""
    rate_at = Schedule(run.config.train)
    clock = "wall_seconds" if run.config.budget.counts == "wall" else "train_seconds"
    fields = ("epoch", "step", "images_seen", clock, "fraction", "flops")
    points, scale = [], 1.0
    for before, record in pairwise([dict.fromkeys((*fields, "train_seconds"), 0.0), *run.records]):
        scale = record.get("dials.lr_scale", scale)
        for part in np.linspace(0, 1, RATE_POINTS):
            epoch, step, images, *others = ((1 - part) * before.get(f, 0.0) + part * record.get(f, 0.0) for f in fields)
            seconds = (1 - part) * before["train_seconds"] + part * record["train_seconds"]
            points.append((seconds, scale * rate_at(Progress(epoch, int(step), int(images), *others))))
    return points


def dials_of(run: RunRecord) -> dict[str, float]:
    """What the run's methods turned, fields of its log, and what each is where the log has none."""
    found, changing = {}, {name for name in (*DIALS, *PARTS) if _changes(run.records, name)}
    if changing & PARTS.keys():
        with torch.device("meta"):  # its shapes are all that counts
            model, _ = build_model(run.config.model.name, run.config.model.arguments(), len(run.classes) or 1)
        parts = model_parts(model) or {"blocks": len(model_blocks(model))}
        found |= {name: float(parts[PARTS[name]]) for name in PARTS if name in changing and PARTS[name] in parts}
    return {name: 1.0 for name in DIALS if name in changing} | found


def _changes(records: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether a field that is logged when it changes, or always, does so after the first record."""
    values = [record[name] for record in records if name in record]
    return bool(values) and (name not in records[0] or any(value != values[0] for value in values))


def schedule_part(runs: Sequence[RunRecord]) -> str:
    drawn = []
    for number, run in enumerate(runs):
        figure = schedule(run.line, learning_rates(run), dials_of(run))
        drawn.append(_figure(svg(figure, f"schedule-{number}"), run.name, "wide"))
    return "<h2>Schedule</h2>" + "".join(drawn)


def throughput_part(runs: Sequence[RunRecord]) -> str:
    rows = [
        [run.name, f"{size} px", f"{row['epochs']:.2f}", f"{row['images']:,.0f}", duration(row["seconds"]),
         f"{row['images_per_second']:,.0f}", f"{row['data_wait_fraction']:.1%}"]
        for run in runs for size, row in by_size(run.line).items()
    ]  # fmt: skip
    head = ["run", "size", "epochs", "images", "trained", "images/s", "waited for data"]
    drawing = svg(throughput([run.line for run in runs]), "throughput")
    caption = "Images a second, and the part of the time that the trainer waited for data"
    return f"<h2>Throughput</h2>{_figure(drawing, caption, 'wide')}{rows_table(head, rows)}"


def costs_part(runs: Sequence[RunRecord]) -> str:
    """What each stage's images cost, in multiply-adds and in time, and what the stages before the full model saved."""
    rows, lines = [], []
    told = [by_cost(run.line) for run in runs]
    freezes = any(stage["trained"] is not None for stages in told for stage in stages)
    for run, stages in zip(runs, told, strict=True):
        if len(stages) < 2:
            continue
        for stage in stages:
            trained = ["all" if stage["trained"] is None else str(stage["trained"])] if freezes else []
            rows.append([
                run.name, f"{stage['size']} px", *trained, f"{stage['epochs']:.2f}", f"{stage['macs'] / 1e9:.3g} G",
                f"{1000 * stage['seconds'] / stage['images']:.3g} ms",
            ])  # fmt: skip
        macs, seconds = savings(stages)
        probing = run.records[-1].get("probe_seconds")
        lines.append(
            f"{html.escape(run.name)}: its images took {100 * macs:.0f} % fewer multiply-adds, and "
            f"{100 * seconds:.0f} % less time, than if all had cost what they cost in its dearest stage"
            + (f"; searches took {duration(probing)} beside." if probing else ".")
        )
    if not rows:
        return ""
    frozen = ["blocks trained"] if freezes else []
    head = ["run", "size", *frozen, "epochs", "multiply-adds an image, forward", "time an image"]
    return f"<h2>What images cost</h2>{rows_table(head, rows)}<p>{'<br>'.join(lines)}</p>"


def stage_crops(run: RunRecord) -> list[tuple[int, list[np.ndarray]]]:
    """Of each image size, the first training crops (S, S, 3) as the model saw them, augmentation and all.

    Crops and augmentation are keyed, so that they are made again here; where a method chose among examples, of all of
    them: the log does not tell which it chose. Raises ConfigError or DataError where the data are not there any more.
    """
    device, found, seen, dials = torch.device("cpu"), [], set(), Dials()
    augment = Augment(run.config.augment)
    methods = build_methods(MethodContext(run.config.recipe), writing="dials.")
    sources = open_sources(run.config, device)
    try:
        began = {"epoch": 0.0, "step": 0, "images_seen": 0, "fraction": 0.0}
        for before, record in pairwise([began, *run.records]):
            size = record["image_size"]
            turned = {name: record[f"dials.{name}"] for name in TURNED if f"dials.{name}" in record}
            dials = replace(dials, **turned)
            if size in seen or record["step"] == before["step"]:
                continue
            seen.add(size)
            feed, at = Feed(size, record["batch_size"]), Progress(fraction=before["fraction"])
            # The log has a pass's last dials; this method's change within one, and are told anew.
            then = fold(methods, Plan(feed), at).dials if methods else dials
            done = round(before["epoch"] % 1 * sources.train.count)  # (of a subset, whose rows are not kept: about)
            with sources.train.open(feed, Position(int(before["epoch"]), done)) as batches:
                batch = next(batches)
                key = run.config.run.seed, before["step"]
                images = augment.prepare(batch.images, *key, batch.places, then.randaugment)
                drawn = augment.draw(*key, batch.places, batch.total, size, then.strength)
                pixels = augment(images, drawn)[:CROPS]
            levels = (pixels - augment.normalize.shift) / augment.normalize.scale
            crops = levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
            found.append((size, list(crops)))
    finally:
        sources.close()
    return found


def crops_part(runs: Sequence[RunRecord]) -> str:
    rows = []
    for run in runs:
        title = f"<h3>{html.escape(run.name)}</h3>" if len(runs) > 1 else ""
        try:
            stages = stage_crops(run)
        except (ConfigError, DataError) as error:
            rows.append(f"{title}<p>No crops: {html.escape(str(error))}</p>")
            continue
        rows.append(title)
        for size, crops in stages:
            images = "".join(f'<img alt="a crop at {size} px" src="{_png(crop)}">' for crop in crops)
            rows.append(f'<div class="crops"><span>{size} px</span>{images}</div>')
    return "<h2>What the model saw</h2><p>The first crops of each size.</p>" + "".join(rows)


def _png(pixels: np.ndarray) -> str:
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def classes_part(runs: Sequence[RunRecord]) -> str:
    drawn = []
    for run in runs:
        known = [entry for entry in run.classes if entry["images"]]
        worst = sorted(known, key=lambda entry: (entry["right"] / entry["images"], entry["class"]))[:WORST]
        rows = [[entry["class"], f"{100 * entry['right'] / entry['images']:.1f}", entry["images"]] for entry in worst]
        if rows:
            drawn.append(
                f"<div><h3>{html.escape(run.name)}</h3>{rows_table(['class', 'top-1 %', 'images'], rows)}</div>"
            )
    return f'<h2>The ten worst classes</h2><div class="grid">{"".join(drawn)}</div>' if drawn else ""


def differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The options in which runs differ, with each run's value; not where the run was kept."""
    flat = [run.config.flat() for run in runs]
    return {
        name: [one[name] for one in flat]
        for name in flat[0]
        if name != "run.folder" and any(one[name] != flat[0][name] for one in flat)
    }


def differences_part(runs: Sequence[RunRecord]) -> str:
    found = differences(runs)
    if len(runs) < 2:
        return ""
    head = ["option", *(run.name for run in runs)]
    rows = [[name, *("none" if value is None else _flow(value) for value in values)] for name, values in found.items()]
    return "<h2>Where they differ</h2>" + (rows_table(head, rows) if rows else "<p>In no option.</p>")


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return text.removesuffix("\n...").strip()


def configuration_part(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        text = html.escape((run.folder / "config.yaml").read_text(encoding="utf-8"))
        parts.append(f"<details><summary>{html.escape(run.name)}</summary><pre>{text}</pre></details>")
    return "<h2>Configuration</h2>" + "".join(parts)


# --- pages ----------------------------------------------------------------------------------------------------------


def page_of(runs: Sequence[RunRecord], crops: bool, more: Sequence[str] = ()) -> str:
    """The page: HTML in one piece. With ``crops``, the data are read; ``more`` are further parts."""
    if len(runs) == 1:
        last = runs[0].last
        title = runs[0].name
        lead = (
            f"Top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} % after {last['epoch']:.1f} epochs: "
            f"{last['images_seen']:,} images in {duration(last['train_seconds'])} of training "
            f"({duration(last['wall_seconds'])} with evaluation and saving)."
        )
    else:
        best = max(runs, key=lambda run: run.last["top1"])
        title = f"{len(runs)} runs"
        lead = f"The best is {best.name}: {best.last['top1']:.2f} % top-1."
    parts = [
        summary_part(runs), *more, curves_part(runs), schedule_part(runs), throughput_part(runs), costs_part(runs),
        crops_part(runs) if crops else "", classes_part(runs), differences_part(runs), configuration_part(runs),
    ]  # fmt: skip
    return PAGE.format(title=html.escape(title), lead=html.escape(lead), body="\n".join(parts))


def rehearse_report(folder: Path, config: Config, sizes: Sequence[int]) -> None:
    """Makes the report of a made-up run through image ``sizes`` in ``folder``.

    It takes the time that such a run's takes, and has fonts loaded by then.
    """
    fields = ("loss", "top1", "top5", "lr", "epoch", "step", "images_seen", "fraction", "data_wait_fraction")
    records = [
        dict.fromkeys(fields, 0.1 * number)
        | {"train_seconds": number, "wall_seconds": number, "image_size": size, "images_per_second": 1.0}
        for number, size in enumerate(sizes, start=1)
    ]
    (folder / "config.yaml").write_text(config.yaml(), encoding="utf-8")
    run = RunRecord(folder, "", records, config, [])
    draw_curve(run.line, folder / "curve.png")
    page_of([run], crops=False)


def write_report(folder: Path) -> dict[str, Any]:
    """Draws ``curve.png`` and ``report.html`` into the run's folder; returns the last evaluated record."""
    run = read_run(folder)
    draw_curve(run.line, folder / "curve.png")
    (folder / "report.html").write_text(page_of([run], crops=False), encoding="utf-8")
    return run.last
