"""Finished runs compared: python -m vitlocal.bench runs RUN [RUN ...] [--json FILE] [--plot FILE]"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlocal.bench.measurement import text_table, write_json
from vitlocal.bench.parsing import bench_parser, plot_file
from vitlocal.errors import ConfigError
from vitlocal.report.figures import by_size, race, save
from vitlocal.report.run_folder import RunRecord, duration, names_of, read_run
from vitlocal.tasks.metrics import is_evaluated

COLUMNS = {
    "epochs": ("epochs", ".1f"), "training": ("training", ">"), "total": ("total", ">"),
    "images/s": ("images_per_second", ",.0f"),
}  # fmt: skip


def summary(run: RunRecord) -> dict[str, Any]:
    """A row with the end of a run."""
    last = run.last
    waited = sum(row["data_wait_fraction"] * row["seconds"] for row in by_size(run).values())
    return {
        "run": run.name, **{metric.name: last.get(metric.name) for metric in run.metrics}, "epochs": last["epoch"],
        **{name: last[name] for name in ("images_seen", "train_seconds", "wall_seconds")},
        "images_per_second": round(last["images_seen"] / last["train_seconds"], 1),
        "data_wait_fraction": round(waited / run.records[-1]["train_seconds"], 5),
        **({"teacher": run.teacher} if run.teacher else {}),
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("runs", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--plot", type=plot_file, metavar="FILE", help="plot the metric against training time")
    options = parser.parse_args(argv)
    runs = [read_run(folder, name) for folder, name in zip(options.runs, names_of(options.runs), strict=True)]
    if len({run.metric for run in runs}) > 1 and options.plot:
        raise ConfigError("--plot: these runs have different tasks; plot the runs of one task")
    rows = [summary(run) for run in runs]
    times = {"training": "train_seconds", "total": "wall_seconds"}
    metrics = dict.fromkeys(metric for run in runs for metric in run.metrics if is_evaluated(run.last, metric))
    columns = {"run": ("run", ""), **{m.title: (m.name, f".{m.digits}f") for m in metrics}, **COLUMNS}
    columns |= {"teacher": ("teacher", "")} if any(run.teacher for run in runs) else {}
    print(text_table([row | {title: duration(row[name]) for title, name in times.items()} for row in rows], columns))
    what = "training runs: the metrics that each reached, and the log of its passes"
    write_json(options.json, what, rows, curves={run.name: run.records for run in runs})
    if options.plot:
        save(race({run.name: [run] for run in runs}), options.plot)
