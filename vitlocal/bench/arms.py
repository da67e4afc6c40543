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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from vitlocal.bench.parsing import at_least, bench_parser, budget, names, numbers, plot_file
from vitlocal.bench.planned_runs import Arm, PlannedRun, RunKey, option_names, plan_runs, read_arms
from vitlocal.bench.run_results import RunResult, draw, read_results, results_of, results_table, write_results
from vitlocal.bench.runner import Runner, say, visible_gpus
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import ConfigError, DataError, Interrupted
from vitlocal.machine import cores
from vitlocal.progress import Length
from vitlocal.recipes import changed_options


def arms_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all benches of arms share."""
    parser = bench_parser(name, description)
    parser.add_argument("--data", metavar="DIR", help="data folder (default: that of the recipes)")
    parser.add_argument(
        "--seeds", type=partial(numbers, least=0), default="0", metavar="LIST",
        help="seeds; 0,1,2 is three runs per arm (default: 0)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="places for runs; they divide the cores (default: 1)")
    parser.add_argument(
        "--together", type=at_least(1), default=1, metavar="N",
        help="runs in each place; they share its cores, and budgets count processor time (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, default=f"runs/{name}", metavar="DIR", help="folder for runs (default: %(default)s)"
    )
    parser.add_argument(
        "--add", action="append", default=[], metavar="FILE",
        help="add the runs that --json wrote on another machine; they are not trained again",
    )  # fmt: skip
    parser.add_argument("--no-run", action="store_true", help="train nothing; tabulate and plot the finished runs")
    return parser


def planned(
    arms: Sequence[Arm], length: Length, options: argparse.Namespace, trainer: Sequence[str]
) -> list[PlannedRun]:
    """The runs with the trainer's options ``trainer``. ConfigError if the bench itself sets one of those."""
    shared = [f"--data.root={options.data}"] if options.data else []
    if options.together > 1:
        option_names(trainer, {"budget.counts": "--together counts processor time"})
        shared.append("--budget.counts=cpu")
    return plan_runs(arms, options.seeds, str(length), options.folder, [*shared, *trainer])


def added_results(runs: Sequence[PlannedRun], files: Sequence[str]) -> dict[RunKey, RunResult]:
    """The results of ``runs`` in the files of --add. ConfigError if a file has none, or a different configuration."""
    wanted: dict[RunKey, PlannedRun] = {run.key: run for run in runs}
    found: dict[RunKey, RunResult] = {}
    for path in files:
        results = {result.key: result for result in read_results(path)}
        if not (keys := results.keys() & wanted.keys()):
            there = ", ".join(f"'{arm}' with seed {seed} and {length}" for arm, seed, length in list(results)[:3])
            raise ConfigError(f"--add: {path} has none of these runs; it has {there or 'no runs'}")
        if twice := keys & found.keys():
            raise ConfigError(f"--add: {path} has '{min(twice)[0]}' with seed {min(twice)[1]}, and so has another file")
        for key in keys:
            if changed := changed_options(results[key].config, wanted[key].config()):
                raise ConfigError(
                    f"--add: {path} has '{key[0]}' with seed {key[1]} of another configuration: {'; '.join(changed)}"
                )
            found[key] = results[key]
    return found


def train_runs(runs: Sequence[PlannedRun], options: argparse.Namespace) -> None:
    """Trains the runs. ConfigError before training, DataError if runs failed, Interrupted when all have saved."""
    configs = [run.config() for run in runs]
    for root in {config.data.root for config in configs}:
        for split in ("train", "val"):
            load_manifest(root, split)  # its error says how to write the data
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
    runs: Sequence[PlannedRun], options: argparse.Namespace, write: Callable[[Sequence[RunResult]], None]
) -> None:
    """Trains the runs that are not finished, and calls ``write`` with all results, also after an interruption.

    Raises as :func:`train_runs` does, and ConfigError if there are neither results nor runs to train.
    """
    for run in runs:
        run.config()
    added = added_results(runs, options.add)
    waiting = [run for run in runs if not run.done and run.key not in added]
    if options.no_run and len(waiting) == len(runs):
        raise ConfigError(f"--no-run: {options.folder} has none of these runs; train them, or name another --folder")
    try:
        if waiting and not options.no_run:
            train_runs(waiting, options)
    except (DataError, Interrupted):
        write(results_of(runs, added))
        raise
    write(results_of(runs, added))


def main(argv: Sequence[str]) -> None:
    parser = arms_parser("arms", __doc__)
    parser.add_argument("arms", metavar="ARMS.yaml", help="file of arms")
    parser.add_argument(
        "--budget", type=budget, required=True, metavar="LENGTH", help="budget of each run: 4m, 90ep, 24h"
    )
    parser.add_argument("--only", metavar="LIST", help="names of arms to train, separated by commas (default: all)")
    parser.add_argument("--plot", type=plot_file, metavar="FILE", help="plot top-1 against training time")
    options, trainer = parser.parse_known_args(argv)
    arms, length = read_arms(options.arms), options.budget
    if options.only:
        chosen = names(options.only, [arm.name for arm in arms])
        arms = [arm for arm in arms if arm.name in chosen]

    def write(results: Sequence[RunResult]) -> None:
        what = f"training runs with a budget of {length} each, by arm: the accuracy, and the log of passes"
        write_results(options.json, what, results)
        if options.plot and results:
            draw(results, options.plot, f"{length} per run")
        say(results_table(results, arms))

    compete(planned(arms, length, options, trainer), options, write)
