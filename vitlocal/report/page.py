"""The page that shows a run or compares several: one HTML file without links to other files."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitlocal.data.augment import Augment
from vitlocal.data.batch import Sources
from vitlocal.data.sources import open_sources
from vitlocal.errors import ConfigError, DataError
from vitlocal.jsonl import replace_text
from vitlocal.methods import METHODS
from vitlocal.methods.method import MethodContext
from vitlocal.models.dit import reads_latents
from vitlocal.models.factory import build_model
from vitlocal.models.shape import model_blocks, model_parts
from vitlocal.options import as_argument
from vitlocal.plan import Dials, Feed, Plan, fold
from vitlocal.progress import Position, Progress
from vitlocal.report.figures import (
    by_cost,
    by_size,
    curves,
    draw_curve,
    drawn_value,
    savings,
    schedule,
    svg,
    throughput,
)
from vitlocal.report.pictures import image_data, pictures_part
from vitlocal.report.run_folder import RunRecord, duration, escaped, read_run
from vitlocal.tasks.metrics import is_evaluated

WORST_CLASSES = 10
POINTS_PER_PASS = 40  # of the learning rate's curve
CROPS = 6  # of each size
AUGMENTATION_DIALS = ("strength", "randaugment_strength")
# Fields of the log that the schedule shows if they change. Until a field is logged, its value is that of the whole
# model's part with this name in ModelParts, or 1 without a name.
SCHEDULE_FIELDS = {
    "batch_size": "", "dials.strength": "", "dials.randaugment_strength": "", "dials.lr_scale": "",
    "shape.token_keep_rate": "", "shape.attention_keep_rate": "", "shape.heads": "heads", "shape.hidden": "hidden",
    "shape.grid": "grid", "shape.block_order": "blocks", "shape.trainable_blocks": "blocks",
}  # fmt: skip

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
.picture img {{ max-width: 100% }} .pictures {{ display: flex; flex-wrap: wrap; gap: .5rem }}
.pictures figure {{ width: min(15rem, 45%) }} .pictures img {{ width: 100% }}
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


# --- parts of the page -----------------------------------------------------------------------------------------------


def rows_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table. Cells are escaped."""
    titles = "".join(f"<th>{escaped(title)}</th>" for title in head)
    cells = ("".join(f"<td>{escaped(cell)}</td>" for cell in row) for row in rows)
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="scroll"><table><tr>{titles}</tr>{lines}</table></div>'


def _figure(drawing: str, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{drawing}<figcaption>{escaped(caption)}</figcaption></figure>'


def summary_part(runs: Sequence[RunRecord]) -> str:
    """A table with the result of each run. Runs of different tasks have different metrics."""
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.metrics if is_evaluated(run.last, metric)))
    head = ["run", *(metric.title for metric in metrics), "epochs", "images", "trained", "in all", "images/s"]
    has_teacher = any(run.teacher for run in runs)
    head += ["teacher"] if has_teacher else []
    rows = []
    for run in runs:
        last = run.last
        rate = last["images_seen"] / max(last["train_seconds"], 1e-9)
        rows.append([
            run.name, *(f"{last[m.name]:.{m.digits}f}" if is_evaluated(last, m) else "" for m in metrics),
            f"{last['epoch']:.2f}", f"{last['images_seen']:,}",
            duration(last["train_seconds"]), duration(last["wall_seconds"]), f"{rate:,.0f}",
            *([run.teacher or "none"] if has_teacher else []),
        ])  # fmt: skip
    return rows_table(head, rows)


def remarks_part(runs: Sequence[RunRecord]) -> str:
    """What a reader of the numbers must know: rewinds, and damaged lines of the log. Empty if there are none."""
    found = []
    for run in runs:
        if rewinds := max(record.get("rewinds", 0) for record in run.records):
            found.append(f"{run.name} diverged and went back to an earlier state (run.on_nan=rewind): {rewinds}×.")
        if run.damaged_lines:
            found.append(f"The log of {run.name} has damaged lines ({run.damaged_lines}); their passes are missing.")
    return "".join(f"<p>{escaped(sentence)}</p>" for sentence in found)


def curves_part(runs: Sequence[RunRecord]) -> str:
    """Metric and loss against time, epochs and images. There are curves for each task."""
    by_metric = {run.metric: [other for other in runs if other.metric == run.metric] for run in runs}
    drawn = [
        _figure(svg(curves(found, along), f"curves-{metric.name}-{along}"), f"{metric.label} and loss against {along}")
        for metric, found in by_metric.items()
        for along in ("time", "epochs", "images")
    ]
    return f'<h2>Curves</h2><div class="grid">{"".join(drawn)}</div>'


def learning_rates(run: RunRecord) -> list[tuple[float, float]]:
    """Points (training seconds, learning rate) of the recipe's schedule. Within a pass, progress is interpolated."""
    lr_at = run.config.train.lr_schedule
    clock = "wall_seconds" if run.config.budget.counts == "wall" else "train_seconds"
    fields = ("epoch", "step", "images_seen", clock, "fraction", "flops")
    points, scale = [], 1.0
    for before, record in pairwise([dict.fromkeys((*fields, "train_seconds"), 0.0), *run.records]):
        scale = record.get("dials.lr_scale", scale)
        for part in np.linspace(0, 1, POINTS_PER_PASS):
            epoch, step, images, *others = ((1 - part) * before.get(f, 0.0) + part * record.get(f, 0.0) for f in fields)
            seconds = (1 - part) * before["train_seconds"] + part * record["train_seconds"]
            points.append((seconds, scale * lr_at(Progress(epoch, int(step), int(images), *others))))
    return points


def changed_fields(run: RunRecord) -> dict[str, float]:
    """The fields of the log that the run's methods changed, with the value before they are logged."""
    changed = {name: part for name, part in SCHEDULE_FIELDS.items() if _changes(run.records, name)}
    parts: dict[str, Any] = {"": 1}
    if any(changed.values()):
        with torch.device("meta"):  # only the shapes are needed
            model, _ = build_model(run.config.model.name, run.config.model.arguments(), len(run.classes) or 1)
        found = model_parts(model)
        parts |= vars(found) if found is not None else {}
        parts["blocks"] = len(model_blocks(model))
    return {name: drawn_value(name, parts[part]) for name, part in changed.items() if part in parts}


def _changes(records: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether a field changes after the first record. Some fields are logged always, others only when they change."""
    values = [record[name] for record in records if name in record]
    return bool(values) and (name not in records[0] or any(value != values[0] for value in values))


def schedule_part(runs: Sequence[RunRecord]) -> str:
    """Image size, learning rate and the fields that methods changed, against time."""
    figures = [schedule(run, learning_rates(run), changed_fields(run)) for run in runs]
    drawn = [_figure(svg(figure, f"schedule-{n}"), runs[n].name, "wide") for n, figure in enumerate(figures)]
    return "<h2>Schedule</h2>" + "".join(drawn)


def throughput_part(runs: Sequence[RunRecord]) -> str:
    """Images/s and data wait by image size."""
    rows = [
        [run.name, f"{size} px", f"{row['epochs']:.2f}", f"{row['images']:,.0f}", duration(row["seconds"]),
         f"{row['images_per_second']:,.0f}", f"{row['data_wait_fraction']:.1%}"]
        for run in runs for size, row in by_size(run).items()
    ]  # fmt: skip
    head = ["run", "size", "epochs", "images", "trained", "images/s", "waited for data"]
    drawing = svg(throughput(runs), "throughput")
    caption = "Images per second, and the fraction of the time that the trainer waited for data"
    return f"<h2>Throughput</h2>{_figure(drawing, caption, 'wide')}{rows_table(head, rows)}"


def costs_part(runs: Sequence[RunRecord]) -> str:
    """The cost of an image in each stage, and the savings by cheaper stages. Empty if no run has several stages."""
    rows, lines = [], []
    stages_of = [by_cost(run) for run in runs]
    freezes = any(stage["trained"] is not None for stages in stages_of for stage in stages)
    for run, stages in zip(runs, stages_of, strict=True):
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
            f"{escaped(run.name)}: {100 * macs:.0f} % fewer multiply-adds and {100 * seconds:.0f} % less time "
            "than if every image cost as much as in the most expensive stage"
            + (f". Searches took {duration(probing)} more." if probing else ".")
        )
    if not rows:
        return ""
    head = ["run", "size", *(["blocks trained"] if freezes else []), "epochs", "multiply-adds per image, forward",
            "time per image"]  # fmt: skip
    return f"<h2>What images cost</h2>{rows_table(head, rows)}<p>{'<br>'.join(lines)}</p>"


def crops_part(runs: Sequence[RunRecord]) -> str:
    """The first crops of each size, or a sentence that says why they are missing."""
    parts = []
    for run in runs:
        parts.append(f"<h3>{escaped(run.name)}</h3>" if len(runs) > 1 else "")
        if reads_latents(run.config.model.name):
            parts.append("<p>No crops: the model learned latents of the whole central square of each photo.</p>")
            continue
        try:
            stages = stage_crops(run)
        except (ConfigError, DataError) as error:
            parts.append(f"<p>No crops: {escaped(error)}</p>")
            continue
        for size, crops in stages:
            drawn = (image_data(Image.fromarray(crop)) for crop in crops)
            images = "".join(f'<img alt="a crop at {size} px" src="{data}">' for data in drawn)
            parts.append(f'<div class="crops"><span>{size} px</span>{images}</div>')
    return "<h2>What the model saw</h2><p>The first crops of each size.</p>" + "".join(parts)


def stage_crops(run: RunRecord) -> list[tuple[int, list[np.ndarray]]]:
    """The first training crops (S, S, 3) of each image size, with their augmentation.

    Crops and augmentation have keys, so they can be made again. If a method fed a subset of the rows, the crops are
    from all rows, because the log does not hold the subset. Raises ConfigError or DataError if the data cannot be read.
    """
    config, dials = run.config, Dials()
    # The log has the dials at the end of a pass. For its start, ask the methods that set only dials.
    context = MethodContext(config.recipe)
    claims = [each for each in config.recipe.claims if each.writes]
    methods = [METHODS[each.name](context) for each in claims if all(f.startswith("dials.") for f in each.writes)]
    augment = Augment(**config.augment.arguments())
    found: dict[int, list[np.ndarray]] = {}
    with closing(open_sources(**config.source_arguments(), device=torch.device("cpu"))) as sources:
        start = {"epoch": 0.0, "step": 0, "images_seen": 0, "fraction": 0.0}
        for before, record in pairwise([start, *run.records]):
            logged = {name: record[f"dials.{name}"] for name in AUGMENTATION_DIALS if f"dials.{name}" in record}
            dials = replace(dials, **logged)
            if record["image_size"] not in found and record["step"] > before["step"]:
                plan = Plan(Feed(record["image_size"], record["batch_size"]), dials)
                plan = fold(methods, plan, Progress(fraction=before["fraction"]))
                found[plan.feed.size] = first_crops(sources, augment, plan, config.run.seed, before)
    return list(found.items())


def first_crops(sources: Sources, augment: Augment, plan: Plan, seed: int, start: dict[str, Any]) -> list[np.ndarray]:
    """Up to CROPS crops (S, S, 3), uint8, of the first batch of a pass that starts at the record ``start``."""
    # If the run trained on a subset of the rows, this position is approximate.
    done = round(start["epoch"] % 1 * sources.train.count)
    with sources.train.open(plan.feed, Position(int(start["epoch"]), done)) as batches:
        batch = next(batches)
        key = seed, start["step"]
        images = augment.prepare(batch.images, *key, batch.places, plan.dials.randaugment)
        params = augment.draw(*key, batch.places, batch.total, plan.feed.size, plan.dials.strength)
        pixels = augment(images, params)[:CROPS]  # (B, 3, S, S)
    levels = (pixels - augment.normalize.shift) / augment.normalize.scale
    return list(levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())  # (B, S, S, 3)


def classes_part(runs: Sequence[RunRecord]) -> str:
    """The classes with the lowest accuracy."""
    drawn = []
    for run in runs:
        counted = [each for each in run.classes if each["images"]]
        rates = sorted((each["right"] / each["images"], each["class"], each["images"]) for each in counted)
        rows = [[name, f"{100 * rate:.1f}", images] for rate, name, images in rates[:WORST_CLASSES]]
        if rows:
            table = rows_table(["class", "top-1 %", "images"], rows)
            drawn.append(f"<div><h3>{escaped(run.name)}</h3>{table}</div>")
    return f'<h2>The ten worst classes</h2><div class="grid">{"".join(drawn)}</div>' if drawn else ""


def differences_part(runs: Sequence[RunRecord]) -> str:
    """The options in which runs differ, except their folder, with the value of each run."""
    if len(runs) < 2:
        return ""
    options = [run.config.flat() for run in runs]
    rows = [[name, *(as_argument(each[name]) for each in options)] for name in options[0] if name != "run.folder"]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    table = rows_table(["option", *(run.name for run in runs)], rows) if rows else "<p>In no option.</p>"
    return "<h2>Where they differ</h2>" + table


def configuration_part(runs: Sequence[RunRecord]) -> str:
    """The whole configuration of each run, folded."""
    parts = ["<h2>Configuration</h2>"]
    for run in runs:
        text = escaped((run.folder / "config.yaml").read_text(encoding="utf-8"))
        parts.append(f"<details><summary>{escaped(run.name)}</summary><pre>{text}</pre></details>")
    return "".join(parts)


# --- the page --------------------------------------------------------------------------------------------------------


def page_of(runs: Sequence[RunRecord], crops: bool, more: Sequence[str] = ()) -> str:
    """The page as one HTML text. ``crops`` reads the data; ``more`` are further parts, shown after the summary."""
    if len(runs) == 1:
        last = runs[0].last
        title = runs[0].name
        lead = (
            f"{scores_text(runs[0])} after {last['epoch']:.1f} epochs: "
            f"{last['images_seen']:,} images in {duration(last['train_seconds'])} of training "
            f"({duration(last['wall_seconds'])} with evaluation and saving)."
        )
    else:
        title = f"{len(runs)} runs"
        of_one_task = [run for run in runs if run.metric == runs[0].metric]
        best = max(of_one_task, key=lambda run: run.metric.key(run.score))
        lead = f"The best is {best.name}: {best.metric.text(best.score)}."
    parts = [
        summary_part(runs), remarks_part(runs), *more,
        pictures_part(runs), curves_part(runs), schedule_part(runs), throughput_part(runs),
        costs_part(runs), crops_part(runs) if crops else "", classes_part(runs), differences_part(runs),
        configuration_part(runs),
    ]  # fmt: skip
    return PAGE.format(title=escaped(title), lead=escaped(lead), body="\n".join(parts))


def scores_text(run: RunRecord) -> str:
    """The metrics at the last evaluation: ``top-1 48.20 %, top-5 73.40 %``."""
    return ", ".join(metric.text(run.last[metric.name]) for metric in run.metrics if is_evaluated(run.last, metric))


def write_report(folder: Path) -> RunRecord:
    """Writes ``curve.png`` and ``report.html`` into a run's folder. Returns the run."""
    run = read_run(folder)
    draw_curve(run, folder / "curve.png")
    replace_text(folder / "report.html", page_of([run], crops=False))
    return run
