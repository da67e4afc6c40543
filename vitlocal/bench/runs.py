"""Finished runs side by side: python -m vitlocal.bench runs RUN [RUN …] [--json FILE] [--plot FILE]"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.parsing import plot_file
from vitlocal.report.figures import Line, by_size, race, save
from vitlocal.report.run_folder import duration, names_of, read_log, read_run


def summary(folder: Path) -> dict[str, Any]:
    """One row: where the run ended, and its curve. ConfigError where ``folder`` holds no evaluated run."""
    run = read_run(folder)
    last = run.last
    waited = sum(row["data_wait_fraction"] * row["seconds"] for row in by_size(run.line).values())
    return {
        "run": folder.name,
        "top1": last["top1"],
        "top5": last["top5"],
        "epochs": last["epoch"],
        "images_seen": last["images_seen"],
        "train_seconds": last["train_seconds"],
        "wall_seconds": last["wall_seconds"],
        "images_per_second": round(last["images_seen"] / last["train_seconds"], 1),
        "data_wait_fraction": round(waited / run.records[-1]["train_seconds"], 5),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m vitlocal.bench runs", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--json", metavar="FILE", help="write the rows and the curves")
    parser.add_argument(
        "--plot", type=plot_file, metavar="FILE", help="draw top-1 against training time (png, svg or pdf)"
    )
    options = parser.parse_args(argv)
    folders = [Path(run) for run in options.runs]
    names = names_of(folders)
    rows = [summary(folder) | {"run": name} for folder, name in zip(folders, names, strict=True)]
    curves = {name: read_log(folder) for folder, name in zip(folders, names, strict=True)}
    print(f"{'run':32} {'top-1 %':>8} {'top-5 %':>8} {'epochs':>7} {'trained':>9} {'in all':>9} {'images/s':>9}")
    for row in rows:
        print(
            f"{row['run']:32} {row['top1']:8.2f} {row['top5']:8.2f} {row['epochs']:7.1f} "
            f"{duration(row['train_seconds']):>9} {duration(row['wall_seconds']):>9} {row['images_per_second']:9,.0f}"
        )
    if options.json:
        what = "training runs: the accuracy that each reached, and the log of its passes"
        write_json(options.json, measurement(what, rows, curves=curves))
    if options.plot:
        save(race({name: [Line(name, curve)] for name, curve in curves.items()}), options.plot)
