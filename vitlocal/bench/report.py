"""Shows runs on one page: python -m vitlocal.bench report RUN [RUN ...] [--out FILE] [--forecast FILE] [--board]

Writes one HTML file without external links, for a screen, a phone or paper: curves, schedules, throughput, crops as the
model saw them, the ten worst classes, and how the configurations differ. With --board, it writes no page: it checks
the runs against the rules of docs/board.md, and prints them as an entry.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlocal.bench.board import show_entry
from vitlocal.bench.measurement import text_table, write_json
from vitlocal.bench.parsing import bench_parser
from vitlocal.errors import ConfigError
from vitlocal.report.figures import by_size
from vitlocal.report.page import page_of, rows_table
from vitlocal.report.run_folder import RunRecord, duration, names_of, read_run
from vitlocal.tasks.metrics import is_evaluated

# Options that change nothing in a forecast.
RUN_OPTIONS = ("seed", "folder", "resume", "progress", "keep_weights", "save_every")
IGNORED = {"data.root", "data.source", *(f"run.{name}" for name in RUN_OPTIONS)}
COLUMNS = {"": ("what", ""), "forecast": ("forecast", ",.6g"), "actual": ("happened", ",.6g"),
           "deviation": ("off", "+.1%")}  # fmt: skip


def compare(forecast: dict[str, Any], run: RunRecord) -> list[dict[str, Any]]:
    """The rows of the comparison: images/s of each size, then epochs, images and the time of the first evaluation."""
    last, by_crop = run.records[-1], by_size(run)
    pairs = [
        (f"images/s at {row['size']} px", row["together"], by_crop[row["size"]]["images_per_second"])
        for row in {row["size"]: row for row in forecast["rows"]}.values()
        if row["size"] in by_crop and by_crop[row["size"]]["images"]
    ]
    images = sum(row["images"] for row in forecast["rows"])
    pairs += [("epochs", forecast["epochs"], last["epoch"]), ("images", images, last["images_seen"])]
    if forecast["first_point_seconds"] is not None:
        first = next(record for record in run.records if is_evaluated(record, run.metric))
        pairs.append(("first evaluation, s", forecast["first_point_seconds"], first["train_seconds"]))
    return [
        {"what": what, "forecast": said, "happened": actual, "off": said / actual - 1 if actual else 0.0}
        for what, said, actual in pairs
    ]


def mismatches(forecast: dict[str, Any], run: RunRecord) -> list[str]:
    """Sentences that say why the forecast does not apply to the run: another recipe, or a run that has not ended."""
    said, actual = forecast["recipe"], run.config.flat()
    differ = [name for name in actual if name not in IGNORED and said.get(name) != actual[name]]
    found = [f"the forecast is for another recipe: {', '.join(differ)} differ"] if differ else []
    if run.records[-1]["fraction"] < 1:
        found.append(f"the run has spent {run.records[-1]['fraction']:.0%} of the budget that the forecast is for")
    return found


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    where = "file to write (default: report.html in a single RUN, else here)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    parser.add_argument("--forecast", metavar="FILE", help="forecast for the first run, from bench forecast --json")
    parser.add_argument("--no-crops", action="store_true", help="do not read the data for crops")
    parser.add_argument("--board", action="store_true", help="check runs of three seeds, and print them as an entry")
    options = parser.parse_args(argv)
    if options.board and (options.out or options.forecast or options.json or options.no_crops):
        raise ConfigError("--board: it writes no page; leave out --out, --forecast, --json and --no-crops")
    if options.json and not options.forecast:
        raise ConfigError("--json: it writes the comparison of a forecast with the run; give --forecast FILE too")
    folders = [run.absolute() for run in options.runs]
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    if options.board:
        return show_entry(runs)
    parts: list[str] = []
    if options.forecast:
        try:
            forecast = json.loads(Path(options.forecast).read_text(encoding="utf-8"))
            rows, notes = compare(forecast, runs[0]), mismatches(forecast, runs[0])
        except OSError as error:
            raise ConfigError(f"--forecast: {options.forecast} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            wrong = f"{options.forecast} is not what bench forecast --json writes"
            raise ConfigError(f"--forecast: {wrong} ({error})") from error
        cells = [[format(row[field], form) for field, form in COLUMNS.values()] for row in rows]
        paragraphs = [f"<p>Note: {html.escape(note)}.</p>" for note in notes]
        parts = ["<h2>Forecast and run</h2>", *paragraphs, rows_table(list(COLUMNS), cells)]
        print("\n".join([*(f"note: {note}" for note in notes), text_table(rows, COLUMNS)]))
        write_json(options.json, "a forecast compared with the run that followed", rows)
    out = options.out or (folders[0] if len(runs) == 1 else Path()) / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page_of(runs, not options.no_crops, parts), encoding="utf-8")
    scores = ", ".join(f"{run.name} {run.metric.number(run.score)}" for run in runs)
    print(f"{out}: {scores}, {duration(sum(run.last['train_seconds'] for run in runs))} of training")
