"""Recipes compared: python -m vitlocal.bench arms ARMS.yaml --data DIR --budget 4m [--seeds 0,1,2] [TRAINER'S OPTIONS]

Trains each arm once for each seed, with the same budget. The same command continues an interrupted bench. The yaml file
names recipes, relative to itself, and the options that each arm changes:

    recipes: [paper_64px.yaml]          # recipes and options of all arms
    options: {model.pool: avg}
    arms:
      base: {}
      larger rate: {train.lr: 2.0e-3}
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vitlocal.bench.measurement import write_json
from vitlocal.bench.parsing import at_least, bench_parser, budget, names, numbers, plot_file
from vitlocal.bench.runner import Arm, PlannedRun, Runner, option_names, plan_runs, read_arms, say, visible_gpus
from vitlocal.bench.runs import summary
from vitlocal.config import Config
from vitlocal.data.manifest import Manifest, load_manifest
from vitlocal.errors import ConfigError, DataError
from vitlocal.machine import cores
from vitlocal.progress import Length
from vitlocal.report.figures import Line, race, save
from vitlocal.report.run_folder import read_origin, read_run
from vitlocal.stored_config import changed_options, stated_options
from vitlocal.tasks.metrics import Metric, metrics_of, task_name
from vitlocal.train.build import make_model

PASS_FIELDS = ("epoch", "images_seen", "image_size", "loss", "lr", "train_seconds", "images_per_second",
               "macs_per_image", "flops")  # fmt: skip
# Options by which runs are judged. The metrics of runs that differ in them cannot be compared.
JUDGED_BY = ("evaluate.rows", *(f"diffusion.{name}" for name in (
    "steps", "schedule", "loss_passes", "sampler", "sample_steps", "guidance", "guided_channels", "last_samples",
    "features",
)))  # fmt: skip
Plots = Mapping[Path, Sequence[str]]  # files, and the names of the arms to plot


@dataclass(frozen=True)
class RunResult:
    """A finished run: its row, its passes, and its options that differ from the defaults, by dotted name."""

    row: dict[str, Any]
    curve: list[dict[str, Any]]
    config: dict[str, Any]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of the run's task."""
        return metrics_of(self.config.get("model.name", ""))

    @property
    def line(self) -> Line:
        """The run as a line in a figure."""
        return Line(self.row["run"], self.curve, metrics=self.metrics)


def machine_of(folder: Path) -> dict[str, Any]:
    """The processor, GPU and commit of a run: None if unknown, and all values if it ran on several machines."""
    origins = [{**origin["machine"], "commit": origin["commit"]} for origin in read_origin(folder)]
    found = {name: [origin[name] for origin in origins if origin[name]] for name in ("cpu", "gpu", "commit")}
    return {name: ", ".join(dict.fromkeys(values)) or None for name, values in found.items()}


def result_of(run: PlannedRun) -> RunResult:
    """The result of a finished run in its folder. Passes keep only the fields that are plotted or compared."""
    about = {"arm": run.arm.name, "seed": run.seed, "budget": run.budget, "published_top1": run.arm.published}
    found = read_run(run.folder)
    names = PASS_FIELDS + tuple(metric.name for metric in found.metrics)
    passes = [{name: record.get(name) for name in names} for record in found.records]
    return RunResult({**about, **summary(found), **machine_of(run.folder)}, passes, stated_options(run.config()))


def read_results(path: str, option: str = "--add") -> dict[tuple[str, int, str], RunResult]:
    """The results in a file of ``--json``, by arm, seed and budget. ConfigError if it is not such a file."""
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
        curves, configs = measured["curves"], measured["configs"]
        return {
            (row["arm"], row["seed"], row["budget"]): RunResult(row, curves[row["run"]], configs[row["run"]])
            for row in measured["rows"]
        }
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be read ({error.strerror}); give a file of --json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{option}: {path} is not a file that --json of this bench wrote ({error})") from error


def mean_and_deviation(values: Sequence[float], sign: str = "", digits: int = 2) -> str:
    """The mean and the standard deviation; of a single value, only the value; of none, nothing."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}" if values else ""


def results_table(results: Sequence[RunResult], arms: Sequence[Arm]) -> str:
    """A markdown table with one line for each arm, without empty columns. There must be a result.

    Differences from the first arm are paired by seed, because runs of one seed share the order of images. Runs on
    different machines are not paired.
    """
    by_arm = {arm.name: {r.row["seed"]: r.row for r in results if r.row["arm"] == arm.name} for arm in arms}
    arms = [arm for arm in arms if by_arm[arm.name]]
    (metric, *others), first, lines = results[0].metrics, arms[0].name, []
    others = [other for other in others if other.tabulated]
    for arm in arms:
        rows = by_arm[arm.name]
        scores = [row[metric.name] for row in rows.values()]
        differences = [
            row[metric.name] - other[metric.name]
            for seed, row in rows.items()
            if arm.name != first and (other := by_arm[first].get(seed))
            if row["cpu"] and all(row[part] == other[part] for part in ("cpu", "gpu"))
        ]
        about = f"{arm.name}: {arm.about}" if arm.about else arm.name
        paper = "" if arm.published is None else f"{arm.published:g}"
        seeds = ", ".join(f"{value:.{metric.digits}f}" for value in scores)
        epochs, rate = (statistics.mean(row[name] for row in rows.values()) for name in ("epochs", "images_per_second"))
        found = [
            mean_and_deviation([row[o.name] for row in rows.values() if row.get(o.name) is not None], digits=o.digits)
            for o in others
        ]
        teacher = ", ".join(dict.fromkeys(row["teacher"] for row in rows.values() if row.get("teacher")))
        means = (mean_and_deviation(values, sign, metric.digits) for values, sign in ((scores, ""), (differences, "+")))
        lines.append([about, paper, *means, seeds, *found, f"{epochs:.1f}", f"{rate:,.0f}", teacher])
    title, *further = (m.title if m.larger_is_better else f"{m.title} (lower is better)" for m in (metric, *others))
    titles = ["arm", f"paper, {title}", title, f"against {first}", "seeds", *further, "epochs", "images/s", "teacher"]
    filled = [column for column in zip(titles, *lines, strict=True) if any(column[1:])]
    head, *body = zip(*filled, strict=True)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def publish(
    results: Sequence[RunResult], arms: Sequence[Arm], budget: str, what: str, file: str | None, plots: Plots
) -> str:
    """Writes the file of ``--json`` and plots of some arms (by file name); prints and returns the table."""
    what = f"{what} with a budget of {budget} each: the metrics, and the log of passes"
    curves, configs = ({r.row["run"]: getattr(r, name) for r in results} for name in ("curve", "config"))
    write_json(file, what, [result.row for result in results], curves=curves, configs=configs)
    for path, drawn in plots.items():
        lines = {name: [r.line for r in results if r.row["arm"] == name] for name in drawn}
        if trained := {name: found for name, found in lines.items() if found}:
            save(race(trained, f"{budget} per run"), path)
    table = results_table(results, arms) if results else ""
    say(table)
    if differ := [name for name in JUDGED_BY if len({str(r.config.get(name)) for r in results}) > 1]:
        say(f"note: the runs differ in {', '.join(differ)}, so their metrics may not be comparable")
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


def added_results(runs: Sequence[PlannedRun], files: Sequence[str]) -> dict[Path, RunResult]:
    """The results of ``runs`` in the files of --add, by folder. ConfigError if a file has none, or other options."""
    wanted = {(run.arm.name, run.seed, run.budget): run for run in runs}
    found: dict[Path, RunResult] = {}
    for path in files:
        results = read_results(path)
        if not (keys := results.keys() & wanted.keys()):
            known = ", ".join(f"'{arm}' with seed {seed} and {length}" for arm, seed, length in list(results)[:3])
            raise ConfigError(f"--add: {path} has none of these runs; it has {known or 'no runs'}")
        for key in keys:
            run, has = wanted[key], f"--add: {path} has '{key[0]}' with seed {key[1]}"
            if run.folder in found:
                raise ConfigError(f"{has}, and so has another file")
            if changed := changed_options(results[key].config, run.config()):
                raise ConfigError(f"{has} of another configuration: {'; '.join(changed)}")
            found[run.folder] = results[key]
    return found


def check_model(arm: Arm, config: Config, manifest: Manifest) -> None:
    """Raises ConfigError if the arm's model cannot be made. The arm's turn may be hours after the start."""
    try:
        make_model(config, len(manifest.classes), torch.device("meta"), manifest.latents)
    except ConfigError as error:
        raise ConfigError(f"the arm '{arm.name}': {error}") from error


def compete(
    arms: Sequence[Arm], length: Length, options: argparse.Namespace, trainer: Sequence[str], write: Callable[..., Any]
) -> None:
    """Trains the runs that are not finished, and calls ``write`` with all results, also after an interruption.

    ``trainer``: options of the trainer. Raises ConfigError before training, and DataError after it if runs failed.
    """
    shared = [f"--data.root={options.data}"] if options.data else []
    if options.together > 1:
        option_names(trainer, {"budget.counts": "--together counts processor time"})
        shared.append("--budget.counts=cpu")
    runs = plan_runs(arms, options.seeds, str(length), options.folder, [*shared, *trainer])
    configs = {run.folder: run.config() for run in runs}
    if len({task_name(config.model.name) for config in configs.values()}) > 1:
        raise ConfigError("the arms classify and draw images: these have no common metric; compare them in two benches")
    added = added_results(runs, options.add)
    waiting = [run for run in runs if not run.done and run.folder not in added]
    if options.no_run and len(waiting) == len(runs):
        raise ConfigError(f"--no-run: {options.folder} has none of these runs; train them, or name another --folder")
    failure: BaseException | None = None
    if waiting and not options.no_run:
        roots = {configs[run.folder].data.root for run in waiting}
        # A missing split is an error that says how to write it.
        manifests = {(root, split): load_manifest(root, split) for root, split in product(roots, ("train", "val"))}
        for run in {run.arm.name: run for run in waiting}.values():
            config = configs[run.folder]
            check_model(run.arm, config, manifests[config.data.root, "train"])
        on_gpus = any(configs[run.folder].run.device != "cpu" for run in waiting)
        runner = Runner(options.jobs, options.together, visible_gpus() if on_gpus else ())
        say(f"{len(waiting)} runs of {length} to train, {options.jobs * options.together} at a time on {cores()} cores")
        try:
            if failed := [run.folder.name for run in runner.run(waiting)]:
                which = f"{len(failed)} of the runs failed ({', '.join(failed)})"
                failure = DataError(f"{which}; see the .txt files next to their folders")
        except KeyboardInterrupt as error:
            failure = error
    write([added.get(run.folder) or result_of(run) for run in runs if run.folder in added or run.done])
    if failure:
        raise failure


def main(argv: Sequence[str]) -> None:
    parser = arms_parser("arms", __doc__)
    add = parser.add_argument
    add("arms", metavar="ARMS.yaml", help="file of arms")
    add("--budget", type=budget, required=True, metavar="LENGTH", help="budget of each run: 4m, 90ep, 24h")
    add("--only", metavar="LIST", help="names of arms to train, separated by commas (default: all)")
    add("--plot", type=plot_file, metavar="FILE", help="plot the metric against training time")
    options, trainer = parser.parse_known_args(argv)
    arms, length = read_arms(options.arms), options.budget
    if options.only:
        chosen = names(options.only, [arm.name for arm in arms])
        arms = [arm for arm in arms if arm.name in chosen]
    plots = {options.plot: [arm.name for arm in arms]} if options.plot else {}
    what = "training runs by arm,"
    compete(arms, length, options, trainer, lambda found: publish(found, arms, str(length), what, options.json, plots))
