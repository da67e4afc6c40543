"""Recipes against each other: python -m vitlocal.bench arms ARMS.yaml --data DIR --budget 4m [--seeds 0,1,2]

Each arm is trained once for each seed, under the same budget; an interrupted bench goes on where it was. The yaml file
names recipes beside it and the options that an arm changes:

    recipes: [paper_64px.yaml]          # what all arms share, and options over them
    options: {model.pool: avg}
    arms:
      base: {}
      larger rate: {train.lr: 2.0e-3}
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitlocal.bench.entries import Entry, entries, read_arms
from vitlocal.bench.outcomes import Outcome, draw, outcomes, read_outcomes, table, write_outcomes
from vitlocal.bench.runner import Runner
from vitlocal.config import read_config
from vitlocal.data.source import load_manifest
from vitlocal.errors import ConfigError, DataError, Interrupted
from vitlocal.machine import cores
from vitlocal.plan import Length


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The options that benches of arms share."""
    made = argparse.ArgumentParser(
        prog=f"python -m vitlocal.bench {name}", description=about, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--data", metavar="DIR", help="the data folder (default: what the recipes say)")
    made.add_argument("--seeds", default="0", metavar="LIST", help="0,1,2 for three runs an arm (default: 0)")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores (default: 1)")
    made.add_argument(
        "--together", type=int, default=1, metavar="N",
        help="of each job: so many runs share its cores, and time is processor time (default: 1)",
    )  # fmt: skip
    made.add_argument("--folder", default=f"runs/{name}", metavar="DIR", help=f"of the runs (default: runs/{name})")
    made.add_argument(
        "--add", action="append", default=[], metavar="FILE",
        help="what --json wrote on another machine: its runs are not trained again, and tabulated with those here",
    )  # fmt: skip
    made.add_argument("--no-run", action="store_true", help="train nothing: tabulate and draw what is there")
    made.add_argument("--json", metavar="FILE", help="write rows and curves")
    return made


def seeds_of(text: str) -> list[int]:
    """Seeds with commas between; ConfigError for anything else."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0:
        raise ConfigError(f"--seeds: got '{text}', expected whole numbers with commas between, as in 0,1,2")
    return list(dict.fromkeys(found))


def check_budget(text: str, option: str = "--budget") -> str:
    """``text`` as a budget; ConfigError where it is none."""
    try:
        length = Length.parse(text)
        if length.kind == "fraction" or not length.value:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{option}: got '{text}', expected a length such as 24h, 15m or 90ep") from None
    return str(length)


def budgets_of(text: str) -> list[Length]:
    """Budgets in time with commas between; ConfigError for anything else."""
    found = [Length.parse(check_budget(part, "--budgets")) for part in text.split(",")]
    if any(length.kind != "seconds" for length in found):
        raise ConfigError(f"--budgets: got '{text}', expected lengths of time with commas between, as in 45s,1h")
    return found


def shared_options(options: argparse.Namespace, stated: Sequence[str]) -> list[str]:
    """The trainer's options that all runs have; ConfigError for those that the bench sets itself."""
    if options.together < 1:
        raise ConfigError(f"--together: got {options.together}, expected at least 1")
    own = {"run.seed": "--seeds", "run.folder": "--folder", "budget.length": "--budget", "run.progress": None}
    if options.together > 1:
        own["budget.counts"] = None
    for word in stated:
        name = word.removeprefix("--").partition("=")[0]
        if name in own:
            better = f"; use {own[name]}" if own[name] else ""
            raise ConfigError(f"--{name}: the bench sets it for each run{better}")
    data = [f"--data.root={options.data}"] if options.data else []
    return [*data, *(["--budget.counts=cpu"] if options.together > 1 else []), *stated]


def made_elsewhere(options: argparse.Namespace) -> dict[tuple[str, int, str], Outcome]:
    """The runs of --add, by arm, seed and budget."""
    return {outcome.key: outcome for path in options.add for outcome in read_outcomes(path)}


def carry_out(runs: Sequence[Entry], options: argparse.Namespace, elsewhere: Collection[tuple[str, int, str]]) -> None:
    """Checks every run's configuration, then trains those that are not done, here or ``elsewhere`` (their keys).

    Raises ConfigError before anything is trained, DataError where runs failed, Interrupted when all have saved.
    """
    for run in runs:
        config = read_config(run.options)
        for split in () if options.no_run else ("train", "val"):
            load_manifest(config.data.root, split)  # or an error that says how to write it
    waiting = [run for run in runs if not run.done and run.key not in elsewhere]
    if options.no_run and len(waiting) == len(runs):
        raise ConfigError(
            f"--no-run: {options.folder} has none of these runs; leave it out to train them, or name another"
        )
    if options.no_run or not waiting:
        return
    jobs = options.jobs
    runner = Runner(jobs, options.together, Path(options.folder))
    budget = Length.parse(runs[0].budget)
    if budget.kind == "seconds":
        hours = budget.value * -(-len(waiting) // jobs) / 3600
        print(
            f"{len(waiting)} of {len(runs)} runs to train, {jobs * options.together} at a time on {cores()} cores: "
            f"{hours:.1f} h and more, if each keeps its cores busy"
        )
    if failed := runner.run(waiting):
        names = ", ".join(entry.folder.name for entry in failed)
        raise DataError(f"{len(failed)} of the runs failed ({names}); what they said lies beside their folders")


@contextmanager
def telling(write: Callable[[], None]) -> Iterator[None]:
    """Writes what there is at the end, also where runs failed or were stopped."""
    try:
        yield
    except (DataError, Interrupted):
        write()
        raise
    write()


def main(argv: Sequence[str]) -> None:
    reader = parser("arms", __doc__)
    reader.add_argument("arms", metavar="ARMS.yaml")
    reader.add_argument("--budget", required=True, metavar="LENGTH", help="of each run: 4m, 90ep, 24h")
    reader.add_argument("--only", metavar="LIST", help="names of arms, with commas between")
    reader.add_argument("--plot", metavar="FILE", help="draw top-1 against training time")
    options, shared = reader.parse_known_args(list(argv))
    arms = read_arms(options.arms)
    if options.only:
        names = [name.strip() for name in options.only.split(",")]
        if unknown := set(names) - {arm.name for arm in arms}:
            raise ConfigError(f"--only: {options.arms} has no arm {', '.join(sorted(unknown))}")
        arms = [arm for arm in arms if arm.name in names]
    folder, budget = Path(options.folder), check_budget(options.budget)
    runs = entries(arms, seeds_of(options.seeds), budget, folder, shared_options(options, shared))
    elsewhere = made_elsewhere(options)

    def write_results() -> None:
        found = outcomes(runs, elsewhere)
        print(table(found, arms))
        if options.json:
            what = f"training runs of {budget} each, arm by arm: the accuracy that they reached, and their passes"
            write_outcomes(options.json, what, found)
        if options.plot and found:
            draw(found, Path(options.plot), f"{budget} a run")

    with telling(write_results):
        carry_out(runs, options, elsewhere)
