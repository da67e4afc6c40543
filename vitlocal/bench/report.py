"""Runs on one page: python -m vitlocal.bench report RUN [RUN …] [--out FILE] [--forecast FILE]

One HTML file without outside links, for a screen, a phone or paper: curves against time, epochs and images; schedules;
throughput; crops as the model saw them; the ten worst classes; where the runs' configurations differ. With a forecast
(of `bench forecast --json FILE`), what it said of the first run beside what happened, which --json writes.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlocal.bench.measurement import measurement, write_json
from vitlocal.errors import ConfigError
from vitlocal.report.figures import by_size
from vitlocal.report.page import page_of, rows_table
from vitlocal.report.run_folder import RunRecord, duration, names_of, read_run

# Options that change nothing that is forecast.
ASIDE = {"data.root", "data.source"} | {
    f"run.{name}" for name in ("seed", "folder", "resume", "progress", "keep_weights", "save_every")
}


def compare(forecast: dict[str, Any], run: RunRecord) -> list[dict[str, Any]]:
    """What was forecast and what happened, a row each: images/s by size, then epochs and images in all."""
    said: dict[int, dict[str, float]] = {}
    for row in forecast["rows"]:
        said.setdefault(row["size"], {"rate": row["together"], "images": 0})["images"] += row["images"]
    rows = []
    for size, happened in by_size(run.line).items():
        if size in said and happened["images"]:
            rows.append(_compared(f"images/s at {size} px", said[size]["rate"], happened["images_per_second"]))
    last = run.records[-1]
    rows.append(_compared("epochs", forecast["epochs"], last["epoch"]))
    rows.append(_compared("images", sum(row["images"] for row in forecast["rows"]), last["images_seen"]))
    if forecast["first_point_seconds"] is not None:
        first = next(record for record in run.records if record["top1"] is not None)
        rows.append(_compared("first accuracy, s", forecast["first_point_seconds"], first["train_seconds"]))
    return rows


def _compared(what: str, forecast: float, happened: float) -> dict[str, Any]:
    off = forecast / happened - 1 if happened else 0.0
    return {"what": what, "forecast": forecast, "happened": happened, "off": off}


def mismatch(forecast: dict[str, Any], run: RunRecord) -> list[str]:
    """In what the forecast's recipe is not the run's, and whether the run has come to its end: sentences."""
    said, done = forecast.get("recipe", {}), json.loads(json.dumps(run.config.flat()))
    apart = [name for name in said if name in done and name not in ASIDE and said[name] != done[name]]
    found = []
    if apart:
        found.append(f"the forecast was of another recipe: {', '.join(apart)} differ")
    if run.records[-1]["fraction"] < 1:
        found.append(f"the run has spent {run.records[-1]['fraction']:.0%} of its budget, and the forecast is of all")
    return found


def comparison_part(rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    cells = [[row["what"], f"{row['forecast']:,.6g}", f"{row['happened']:,.6g}", f"{row['off']:+.1%}"] for row in rows]
    said = "".join(f"<p>Note: {html.escape(note)}.</p>" for note in notes)
    return "<h2>Forecast and run</h2>" + said + rows_table(["", "forecast", "happened", "off by"], cells)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vitlocal.bench report", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the run's folder, or here)")
    parser.add_argument("--forecast", metavar="FILE", help="of the first run, written by bench forecast --json")
    parser.add_argument("--json", metavar="FILE", help="write forecast and run, side by side")
    parser.add_argument("--no-crops", action="store_true", help="read no data")
    options = parser.parse_args(list(argv))
    if options.json and not options.forecast:
        raise ConfigError("--json: it writes what a forecast said beside what happened; give --forecast FILE too")
    folders = [Path(run).absolute() for run in options.runs]
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    more = []
    if options.forecast:
        try:
            forecast = json.loads(Path(options.forecast).read_text(encoding="utf-8"))
            rows = compare(forecast, runs[0])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--forecast: {options.forecast} is not what bench forecast --json writes ({error})"
            ) from error
        notes = mismatch(forecast, runs[0])
        more = [comparison_part(rows, notes)]
        print(f"{'':24} {'forecast':>12} {'happened':>12} {'off by':>7}")
        for row in rows:
            print(f"{row['what']:24} {row['forecast']:12,.6g} {row['happened']:12,.6g} {row['off']:+7.1%}")
        for note in notes:
            print(f"note: {note}")
        if options.json:
            write_json(options.json, measurement("what was forecast of a run, and what happened", rows))
    out = Path(options.out) if options.out else folders[0] / "report.html" if len(runs) == 1 else Path("report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page_of(runs, not options.no_crops, more), encoding="utf-8")
    said = ", ".join(f"{run.name} {run.last['top1']:.2f} %" for run in runs)
    in_all = " in all" if len(runs) > 1 else ""
    print(f"{out}: {said}, {duration(sum(run.last['train_seconds'] for run in runs))} of training{in_all}")
