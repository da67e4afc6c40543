"""Recipes compared: python -m vitlocal.bench arms ARMS.yaml --data DIR --budget 4m [--seeds 0,1,2] [TRAINER'S OPTIONS]

Trains each arm once for each seed, with the same budget. The same command continues an interrupted bench. The yaml file
names recipes, relative to itself, and the options that each arm changes:

    recipes: [paper_64px.yaml]          # recipes and options of all arms
    options: {model.pool: avg}
    arms:
      base: {}
      larger rate: {train.lr: 2.0e-3}
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vitlocal.bench.measurement import write_json
from vitlocal.bench.parsing import at_least, bench_parser, budget, names, numbers, plot_file
from vitlocal.bench.runner import Arm, PlannedRun, RunKey, Runner, option_names, plan_runs, read_arms, say, visible_gpus
from vitlocal.bench.runs import summary
from vitlocal.config import changed_options, stated_options
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import ConfigError, DataError, Interrupted
from vitlocal.machine import cores
from vitlocal.progress import Length
from vitlocal.report.figures import Line, race, save
from vitlocal.report.run_folder import read_log
from vitlocal.train.run_folder import read_origin

PASS_FIELDS = ("epoch", "images_seen", "image_size", "loss", "top1", "lr", "train_seconds", "images_per_second",
               "macs_per_image", "flops")  # fmt: skip
Plots = Mapping[Path, Sequence[str]]  # files, and the names of the arms to plot
ROW_FIELDS = {"arm", "seed", "budget", "run", "top1", "epochs", "images_per_second", "cpu", "gpu"}


@dataclass(frozen=True)
class RunResult:
    """A finished run: its row, its passes, and its options that differ from the defaults, by dotted name."""

    row: dict[str, Any]
    curve: list[dict[str, Any]]
    config: dict[str, Any]

    @property
    def key(self) -> RunKey:
        return self.row["arm"], self.row["seed"], self.row["budget"]


def machine_of(folder: Path) -> dict[str, Any]:
    """The processor, GPU and commit of a run: None if unknown, and all values if it ran on several machines."""
    origins = read_origin(folder)
    found = {name: [origin["machine"][name] for origin in origins] for name in ("cpu", "gpu")}
    found["commit"] = [origin["commit"] for origin in origins]
    return {name: ", ".join(dict.fromkeys(filter(None, values))) or None for name, values in found.items()}


def result_of(run: PlannedRun) -> RunResult:
    """The result of a finished run in its folder. Passes keep only the fields that are plotted or compared."""
    about = {"arm": run.arm.name, "seed": run.seed, "budget": run.budget, "published_top1": run.arm.published}
    passes = [{name: record.get(name) for name in PASS_FIELDS} for record in read_log(run.folder)]
    return RunResult({**about, **summary(run.folder), **machine_of(run.folder)}, passes, stated_options(run.config()))


def read_results(path: str) -> list[RunResult]:
    """The results in a file of ``--json``. ConfigError if it is not such a file."""
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
        rows, curves, configs = measured["rows"], measured["curves"], measured["configs"]
        if any(not row.keys() >= ROW_FIELDS or not curves[row["run"]] for row in rows):
            raise ValueError("a run lacks its row or its passes")
        return [RunResult(row, curves[row["run"]], dict(configs[row["run"]])) for row in rows]
    except OSError as error:
        raise ConfigError(f"--add: {path} cannot be read ({error.strerror}); give a file of --json") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--add: {path} is not a file that --json of this bench wrote ({error})") from error


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """The mean and the standard deviation; of a single value, only the value."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"


def results_table(results: Sequence[RunResult], arms: Sequence[Arm]) -> str:
    """A markdown table with one line for each arm.

    It has the mean and the standard deviation over seeds, and those of the differences from the first arm. Differences
    are paired by seed, because runs of one seed share the order of images. Runs on different machines are not paired.
    """
    by_arm = {arm.name: {r.row["seed"]: r for r in results if r.row["arm"] == arm.name} for arm in arms}
    arms = [arm for arm in arms if by_arm[arm.name]]
    published = any(arm.published is not None for arm in arms)
    first = arms[0].name if len(arms) > 1 else None
    titles = ["arm", "paper, top-1 %" * published, "top-1 %", f"against {first}" if first else ""]
    titles = [*filter(None, titles), "seeds", "epochs", "images/s"]
    lines = []
    for arm in arms:
        by_seed = by_arm[arm.name]
        rows = [result.row for result in by_seed.values()]
        top1 = [row["top1"] for row in rows]
        cells = {
            "arm": arm.name + (f": {arm.about}" if arm.about else ""),
            "paper, top-1 %": "" if arm.published is None else f"{arm.published:g}",
            "top-1 %": mean_and_deviation(top1),
            "seeds": ", ".join(f"{value:.2f}" for value in top1),
            "epochs": f"{statistics.mean(row['epochs'] for row in rows):.1f}",
            "images/s": f"{statistics.mean(row['images_per_second'] for row in rows):,.0f}",
        }
        differences = [
            result.row["top1"] - other.row["top1"]
            for seed, result in by_seed.items()
            if first not in (None, arm.name) and (other := by_arm[first].get(seed))
            if result.row["cpu"] and all(result.row[part] == other.row[part] for part in ("cpu", "gpu"))
        ]
        cells[f"against {first}"] = mean_and_deviation(differences, "+") if differences else ""
        lines.append([cells[title] for title in titles])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, ["---"] * len(titles), *lines])


def publish(
    results: Sequence[RunResult], arms: Sequence[Arm], budget: str, what: str, file: str | None, plots: Plots
) -> str:
    """Writes the file of ``--json`` and plots of some arms (by file name); prints and returns the table."""
    what = f"{what} with a budget of {budget} each: the accuracy, and the log of passes"
    curves, configs = ({r.row["run"]: getattr(r, name) for r in results} for name in ("curve", "config"))
    write_json(file, what, [result.row for result in results], curves=curves, configs=configs)
    for path, drawn in plots.items():
        lines = {name: [Line(r.row["run"], r.curve) for r in results if r.row["arm"] == name] for name in drawn}
        save(race({name: found for name, found in lines.items() if found}, f"{budget} per run"), path)
    table = results_table(results, arms)
    say(table)
    return table


def arms_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all benches of arms share."""
    parser = bench_parser(name, description)
    add = parser.add_argument
    add("--data", metavar="DIR", help="data folder (default: that of the recipes)")
    add("--seeds", type=partial(numbers, least=0), default="0", help="seeds; 0,1,2 is three runs per arm (default: 0)")
    add("--jobs", type=int, default=1, help="places for runs; they divide the cores (default: 1)")
    add("--together", type=at_least(1), default=1, help="runs that share a place; budgets count CPU time (default: 1)")
    add("--folder", type=Path, default=f"runs/{name}", metavar="DIR", help="folder for runs (default: %(default)s)")
    add("--add", action="append", default=[], metavar="FILE", help="runs to add without training, from another --json")
    add("--no-run", action="store_true", help="train nothing; tabulate and plot the finished runs")
    return parser


def added_results(runs: Sequence[PlannedRun], files: Sequence[str]) -> dict[RunKey, RunResult]:
    """The results of ``runs`` in the files of --add. ConfigError if a file has none, or a different configuration."""
    wanted: dict[RunKey, PlannedRun] = {run.key: run for run in runs}
    found: dict[RunKey, RunResult] = {}
    for path in files:
        results = {result.key: result for result in read_results(path)}
        if not (keys := results.keys() & wanted.keys()):
            known = ", ".join(f"'{arm}' with seed {seed} and {length}" for arm, seed, length in list(results)[:3])
            raise ConfigError(f"--add: {path} has none of these runs; it has {known or 'no runs'}")
        if twice := keys & found.keys():
            raise ConfigError(f"--add: {path} has '{min(twice)[0]}' with seed {min(twice)[1]}, and so has another file")
        for key in keys:
            if changed := changed_options(results[key].config, wanted[key].config()):
                what = f"'{key[0]}' with seed {key[1]} of another configuration"
                raise ConfigError(f"--add: {path} has {what}: {'; '.join(changed)}")
            found[key] = results[key]
    return found


def train_runs(runs: Sequence[PlannedRun], options: argparse.Namespace) -> None:
    """Trains the runs.

    Raises ConfigError before training, and DataError after it if runs failed. Raises Interrupted after a signal, when
    all runs have saved.
    """
    configs = [run.config() for run in runs]
    for root in {config.data.root for config in configs}:
        for split in ("train", "val"):
            load_manifest(root, split)  # a missing split is an error that says how to write it
    on_gpus = any(config.run.device != "cpu" for config in configs)
    runner = Runner(options.jobs, options.together, options.folder, visible_gpus() if on_gpus else ())
    length, at_once = Length.parse(runs[0].budget), options.jobs * options.together
    if length.kind == "seconds":
        busy = options.jobs if options.together == 1 else min(at_once, cores())
        hours = length.value * -(-len(runs) // busy) / 3600
        say(f"{len(runs)} runs to train, {at_once} at a time on {cores()} cores: at least {hours:.1f} h")
    if failed := runner.run(runs):
        which = ", ".join(run.folder.name for run in failed)
        raise DataError(f"{len(failed)} of the runs failed ({which}); see the .txt files next to their folders")


def compete(
    arms: Sequence[Arm], length: Length, options: argparse.Namespace, trainer: Sequence[str], write: Callable[..., None]
) -> None:
    """Trains the runs that are not finished, and calls ``write`` with all results, also after an interruption.

    ``trainer``: options of the trainer. Raises ConfigError if the bench itself sets one of them, or if there are no
    results and no runs to train. Also raises the errors of :func:`train_runs`.
    """
    shared = [f"--data.root={options.data}"] if options.data else []
    if options.together > 1:
        option_names(trainer, {"budget.counts": "--together counts processor time"})
        shared.append("--budget.counts=cpu")
    runs = plan_runs(arms, options.seeds, str(length), options.folder, [*shared, *trainer])
    for run in runs:
        run.config()
    added = added_results(runs, options.add)
    waiting = [run for run in runs if not run.done and run.key not in added]
    if options.no_run and len(waiting) == len(runs):
        raise ConfigError(f"--no-run: {options.folder} has none of these runs; train them, or name another --folder")
    failure = None
    try:
        if waiting and not options.no_run:
            train_runs(waiting, options)
    except (DataError, Interrupted) as error:
        failure = error
    write([added.get(run.key) or result_of(run) for run in runs if run.key in added or run.done])
    if failure:
        raise failure


def main(argv: Sequence[str]) -> None:
    parser = arms_parser("arms", __doc__)
    add = parser.add_argument
    add("arms", metavar="ARMS.yaml", help="file of arms")
    add("--budget", type=budget, required=True, metavar="LENGTH", help="budget of each run: 4m, 90ep, 24h")
    add("--only", metavar="LIST", help="names of arms to train, separated by commas (default: all)")
    add("--plot", type=plot_file, metavar="FILE", help="plot top-1 against training time")
    options, trainer = parser.parse_known_args(argv)
    arms, length = read_arms(options.arms), options.budget
    if options.only:
        chosen = names(options.only, [arm.name for arm in arms])
        arms = [arm for arm in arms if arm.name in chosen]

    def write(results: Sequence[RunResult]) -> None:
        plots = {options.plot: [arm.name for arm in arms]} if options.plot and results else {}
        publish(results, arms, str(length), "training runs by arm,", options.json, plots)

    compete(arms, length, options, trainer, write)
