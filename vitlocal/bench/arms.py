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
from collections.abc import Callable, Sequence
from pathlib import Path

from vitlocal.bench.entries import Arm, Entry, Key, entries, option_names, read_arms
from vitlocal.bench.outcomes import Outcome, draw, outcomes, read_outcomes, table, write_outcomes
from vitlocal.bench.parsing import budget, names, numbers, plot_file
from vitlocal.bench.runner import Runner, say, visible_gpus
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import ConfigError, DataError, Interrupted
from vitlocal.machine import cores
from vitlocal.progress import Length
from vitlocal.train.folder import changes


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


def planned(arms: Sequence[Arm], length: str, options: argparse.Namespace, stated: Sequence[str]) -> list[Entry]:
    """The runs, all with the trainer's options ``stated``; ConfigError for those that the bench sets itself."""
    if options.together < 1:
        raise ConfigError(f"--together: got {options.together}, expected at least 1")
    shared = [f"--data.root={options.data}"] if options.data else []
    if options.together > 1:
        option_names(stated, {"budget.counts": "--together counts processor time"})
        shared.append("--budget.counts=cpu")
    seeds = numbers(options.seeds, "--seeds", least=0)
    return entries(arms, seeds, length, Path(options.folder), [*shared, *stated])


def made_elsewhere(runs: Sequence[Entry], files: Sequence[str]) -> dict[Key, Outcome]:
    """Those of ``runs`` that the files of --add have; ConfigError where one has none, or none of this configuration."""
    wanted, found = {run.key: run for run in runs}, {}
    for path in files:
        here = {outcome.key: outcome for outcome in read_outcomes(path)}
        mine = here.keys() & wanted.keys()
        if not mine:
            had = ", ".join(f"'{arm}' with seed {seed} and {length}" for arm, seed, length in list(here)[:3])
            raise ConfigError(f"--add: {path} has none of these runs; it has {had or 'no runs'}, and so on")
        if twice := mine & found.keys():
            raise ConfigError(f"--add: {path} has '{min(twice)[0]}' with seed {min(twice)[1]}, and so has another file")
        for key in mine:
            if apart := changes(here[key].config, wanted[key].config()):
                raise ConfigError(
                    f"--add: {path} has '{key[0]}' with seed {key[1]} of another configuration: {'; '.join(apart)}"
                )
        found |= {key: here[key] for key in mine}
    return found


def carry_out(runs: Sequence[Entry], options: argparse.Namespace) -> None:
    """Trains the runs that are not done.

    Raises ConfigError before anything is trained, DataError where runs failed, Interrupted when all have saved.
    """
    configs = [run.config() for run in runs]
    for root in {config.data.root for config in configs}:
        for split in ("train", "val"):
            load_manifest(root, split)  # or an error that says how to write it
    on_gpus = any(config.run.device != "cpu" for config in configs)
    runner = Runner(options.jobs, options.together, Path(options.folder), visible_gpus() if on_gpus else ())
    length = Length.parse(runs[0].budget)
    at_once = options.jobs * options.together
    if length.kind == "seconds":
        busy = options.jobs if options.together == 1 else min(at_once, cores())
        hours = length.value * -(-len(runs) // busy) / 3600
        say(f"{len(runs)} runs to train, {at_once} at a time on {cores()} cores: {hours:.1f} h and more")
    if failed := runner.run(runs):
        which = ", ".join(entry.folder.name for entry in failed)
        raise DataError(f"{len(failed)} of the runs failed ({which}); what they said lies beside their folders")


def compete(runs: Sequence[Entry], options: argparse.Namespace, write: Callable[[Sequence[Outcome]], None]) -> None:
    """Trains what is not done, here or elsewhere, and has ``write`` tell of all there is, also after an interruption.

    Raises as :func:`carry_out` does, and ConfigError where nothing is to be trained and nothing is there.
    """
    for run in runs:
        run.config()
    elsewhere = made_elsewhere(runs, options.add)
    waiting = [run for run in runs if not run.done and run.key not in elsewhere]
    if options.no_run and len(waiting) == len(runs):
        raise ConfigError(
            f"--no-run: {options.folder} has none of these runs; leave it out to train them, or name another"
        )
    try:
        if waiting and not options.no_run:
            carry_out(waiting, options)
    except (DataError, Interrupted):
        write(outcomes(runs, elsewhere))
        raise
    write(outcomes(runs, elsewhere))


def main(argv: Sequence[str]) -> None:
    reader = parser("arms", __doc__)
    reader.add_argument("arms", metavar="ARMS.yaml")
    reader.add_argument("--budget", required=True, metavar="LENGTH", help="of each run: 4m, 90ep, 24h")
    reader.add_argument("--only", metavar="LIST", help="names of arms, with commas between")
    reader.add_argument("--plot", type=plot_file, metavar="FILE", help="draw top-1 against training time")
    options, stated = reader.parse_known_args(list(argv))
    arms = read_arms(options.arms)
    if options.only:
        chosen = names(options.only, [arm.name for arm in arms])
        arms = [arm for arm in arms if arm.name in chosen]
    length = budget(options.budget)

    def write(found: Sequence[Outcome]) -> None:
        if options.json:
            what = f"training runs of {length} each, arm by arm: the accuracy that they reached, and their passes"
            write_outcomes(options.json, what, found)
        if options.plot and found:
            draw(found, options.plot, f"{length} a run")
        say(table(found, arms))

    compete(planned(arms, length, options, stated), options, write)
