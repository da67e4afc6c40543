"""Runs on one page: python -m vitlocal.bench report RUN [RUN …] [--out FILE] [--forecast FILE]

One HTML file without outside links, for a screen, a phone or paper: curves against time, epochs and images; schedules;
throughput; crops as the model saw them; the ten worst classes; where the runs' configurations differ. With a forecast
(of `bench forecast --json FILE`), what it said of the first run beside what happened.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlocal.errors import ConfigError
from vitlocal.train.figures import by_size
from vitlocal.train.report import Told, duration, page_of, read_run, rows_table


def compare(forecast: dict[str, Any], run: Told) -> list[dict[str, Any]]:
    """What was forecast and what happened, a row each: images/s by size, then epochs and images in all."""
    said: dict[int, dict[str, float]] = {}
    for row in forecast["rows"]:
        said.setdefault(row["size"], {"rate": row["together"], "images": 0})["images"] += row["images"]
    rows = []
    for size, happened in by_size(run.line).items():
        if size in said and happened["images"]:
            rows.append(
                _compared(f"images/s at {size} px", said[size]["rate"], happened["images_per_second"])
                | {"part": happened["seconds"] / run.records[-1]["train_seconds"]}
            )
    last = run.records[-1]
    rows.append(_compared("epochs", forecast["epochs"], last["epoch"]))
    rows.append(_compared("images", sum(row["images"] for row in forecast["rows"]), last["images_seen"]))
    if forecast["first_point_seconds"] is not None:
        first = next(record for record in run.records if record["top1"] is not None)
        rows.append(_compared("first accuracy, s", forecast["first_point_seconds"], first["train_seconds"]))
    return rows


def _compared(what: str, forecast: float, happened: float) -> dict[str, Any]:
    off = forecast / happened - 1 if happened else 0.0
    return {"what": what, "forecast": forecast, "happened": happened, "off": off, "part": None}


def comparison_part(rows: Sequence[dict[str, Any]]) -> str:
    cells = [[row["what"], f"{row['forecast']:,.6g}", f"{row['happened']:,.6g}", f"{row['off']:+.1%}"] for row in rows]
    return "<h2>Forecast and run</h2>" + rows_table(["", "forecast", "happened", "off by"], cells)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the path as tells them apart."""
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(set(folders)) and parts < 20:
        parts += 1
    return ["/".join(folder.parts[-parts:]) for folder in folders]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vitlocal.bench report", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the run's folder, or here)")
    parser.add_argument("--forecast", metavar="FILE", help="of the first run, written by bench forecast --json")
    parser.add_argument("--no-crops", action="store_true", help="read no data")
    options = parser.parse_args(list(argv))
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
        more = [comparison_part(rows)]
        print(f"{'':24} {'forecast':>12} {'happened':>12} {'off by':>7}")
        for row in rows:
            print(f"{row['what']:24} {row['forecast']:12,.6g} {row['happened']:12,.6g} {row['off']:+7.1%}")
    out = Path(options.out) if options.out else folders[0] / "report.html" if len(runs) == 1 else Path("report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page_of(runs, not options.no_crops, more), encoding="utf-8")
    said = ", ".join(f"{run.name} {run.last['top1']:.2f} %" for run in runs)
    print(f"{out}: {said}, {duration(sum(run.last['train_seconds'] for run in runs))} of training")
