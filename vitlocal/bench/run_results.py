"""The results of a bench of arms: read from run folders or from the JSON of another machine, tabulated and plotted."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitlocal.bench.measurement import write_json
from vitlocal.bench.planned_runs import Arm, PlannedRun, RunKey
from vitlocal.bench.runs import summary
from vitlocal.errors import ConfigError
from vitlocal.recipes import stated_options
from vitlocal.report.figures import Line, race, save
from vitlocal.report.run_folder import read_log
from vitlocal.train.run_folder import read_origin

PASS_FIELDS = ("epoch", "images_seen", "image_size", "loss", "top1", "lr", "train_seconds", "images_per_second",
               "macs_per_image", "flops")  # fmt: skip
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

    @property
    def machine(self) -> tuple[str | None, str | None]:
        """The processor and the GPU that it was trained on."""
        return self.row["cpu"], self.row["gpu"]


def machine_of(folder: Path) -> dict[str, Any]:
    """Processor, GPU and commit of a run. None if unknown; all of them if the run moved."""
    origins = read_origin(folder)
    found = {"cpu": [origin["machine"]["cpu"] for origin in origins],
             "gpu": [origin["machine"]["gpu"] for origin in origins],
             "commit": [origin["commit"] for origin in origins]}  # fmt: skip
    return {name: ", ".join(dict.fromkeys(filter(None, values))) or None for name, values in found.items()}


def result_of(run: PlannedRun) -> RunResult:
    """The result of a finished run in its folder. Passes keep only the fields that are plotted or compared."""
    about = {"arm": run.arm.name, "seed": run.seed, "budget": run.budget, "published_top1": run.arm.published}
    passes = [{name: record.get(name) for name in PASS_FIELDS} for record in read_log(run.folder)]
    return RunResult({**about, **summary(run.folder), **machine_of(run.folder)}, passes, stated_options(run.config()))


def results_of(runs: Sequence[PlannedRun], added: Mapping[RunKey, RunResult]) -> list[RunResult]:
    """The results of all runs that are ``added`` or finished here, in order."""
    return [added.get(run.key) or result_of(run) for run in runs if run.key in added or run.done]


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


def write_results(path: str | None, what: str, results: Sequence[RunResult]) -> None:
    """Writes the file of ``--json``, if there is a ``path``."""
    curves = {result.row["run"]: result.curve for result in results}
    configs = {result.row["run"]: result.config for result in results}
    write_json(path, what, [result.row for result in results], curves=curves, configs=configs)


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
    head = ["arm", *(["paper, top-1 %"] if published else []), "top-1 %", *([f"against {first}"] if first else [])]
    lines = [[*head, "seeds", "epochs", "images/s"]]
    for arm in arms:
        by_seed = by_arm[arm.name]
        rows = [result.row for result in by_seed.values()]
        top1 = [row["top1"] for row in rows]
        cells = [arm.name + (f": {arm.about}" if arm.about else "")]
        cells += ["" if arm.published is None else f"{arm.published:g}"] if published else []
        cells.append(mean_and_deviation(top1))
        if first:
            differences = [
                result.row["top1"] - other.row["top1"]
                for seed, result in by_seed.items()
                if (other := by_arm[first].get(seed)) and result.row["cpu"] and other.machine == result.machine
            ]
            cells.append(mean_and_deviation(differences, "+") if differences and arm.name != first else "")
        cells.append(", ".join(f"{value:.2f}" for value in top1))
        cells.append(f"{statistics.mean(row['epochs'] for row in rows):.1f}")
        cells.append(f"{statistics.mean(row['images_per_second'] for row in rows):,.0f}")
        lines.append(cells)
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])


def draw(results: Sequence[RunResult], path: Path, title: str) -> None:
    """Plots top-1 against training time."""
    lines: dict[str, list[Line]] = {}
    for result in results:
        lines.setdefault(result.row["arm"], []).append(Line(result.row["run"], result.curve))
    save(race(lines, title), path)
