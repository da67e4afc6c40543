"""What runs of arms came to: read from their folders, or from what a bench on another machine wrote; told as a table,
drawn against time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitlocal.bench.entries import Arm, Entry, Key
from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.runs import summary
from vitlocal.errors import ConfigError
from vitlocal.report.figures import Line, race, save
from vitlocal.report.run_folder import read_log
from vitlocal.train.folder import origin_of, stated

PASS = ("epoch", "images_seen", "image_size", "loss", "top1", "lr", "train_seconds", "images_per_second",
        "macs_per_image", "flops")  # fmt: skip
FIELDS = {"arm", "seed", "budget", "run", "top1", "epochs", "images_per_second", "cpu", "gpu"}


@dataclass(frozen=True)
class Outcome:
    """A finished run: a flat row that says which, how well and where, its passes, a record each, and its options."""

    row: dict[str, Any]
    curve: list[dict[str, Any]]
    config: dict[str, Any]  # the options that matter and are not as by default, by their dotted names

    @property
    def key(self) -> Key:
        return self.row["arm"], self.row["seed"], self.row["budget"]

    @property
    def place(self) -> tuple[str | None, str | None]:
        """The machine that it was trained on."""
        return self.row["cpu"], self.row["gpu"]


def place_of(folder: Path) -> dict[str, Any]:
    """Processor, GPU and commit by which a run was trained: None where it does not say, of several all."""
    origins = origin_of(folder)
    found = {"cpu": [one["machine"]["cpu"] for one in origins], "gpu": [one["machine"]["gpu"] for one in origins],
             "commit": [one["commit"] for one in origins]}  # fmt: skip
    return {name: ", ".join(dict.fromkeys(filter(None, values))) or None for name, values in found.items()}


def outcome_of(run: Entry) -> Outcome:
    """Of a run finished here; of its passes only what differs between them and is drawn."""
    about = {"arm": run.arm.name, "seed": run.seed, "budget": run.budget, "published_top1": run.arm.published}
    passes = [{name: record.get(name) for name in PASS} for record in read_log(run.folder)]
    return Outcome({**about, **summary(run.folder), **place_of(run.folder)}, passes, stated(run.config()))


def outcomes(runs: Sequence[Entry], elsewhere: Mapping[Key, Outcome]) -> list[Outcome]:
    """Of the runs that are done, here or ``elsewhere``, in their order."""
    return [elsewhere.get(run.key) or outcome_of(run) for run in runs if run.key in elsewhere or run.done]


def read_outcomes(path: str) -> list[Outcome]:
    """What ``--json`` wrote. ConfigError for a file of another kind."""
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
        rows, curves, configs = measured["rows"], measured["curves"], measured["configs"]
        if any(not row.keys() >= FIELDS or not curves[row["run"]] for row in rows):
            raise ValueError("a run lacks its row or its passes")
        return [Outcome(row, curves[row["run"]], dict(configs[row["run"]])) for row in rows]
    except OSError as error:
        raise ConfigError(f"--add: {path} cannot be read ({error.strerror}); give what --json wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--add: {path} is not what --json of this bench wrote ({error})") from error


def write_outcomes(path: str, what: str, found: Sequence[Outcome]) -> None:
    curves = {outcome.row["run"]: outcome.curve for outcome in found}
    configs = {outcome.row["run"]: outcome.config for outcome in found}
    write_json(path, measurement(what, [outcome.row for outcome in found], curves=curves, configs=configs))


def over_seeds(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation, of one value the value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def table(found: Sequence[Outcome], arms: Sequence[Arm]) -> str:
    """A markdown table, an arm a line.

    Mean and standard deviation over seeds, and of the differences from the first arm, seed by seed: what runs of a seed
    have in common (the machine and its speed, the order of the images) is not in those. Runs of one seed on different
    machines are not compared.
    """
    of = {arm.name: {o.row["seed"]: o for o in found if o.row["arm"] == arm.name} for arm in arms}
    arms = [arm for arm in arms if of[arm.name]]
    published = any(arm.published is not None for arm in arms)
    first = arms[0].name if len(arms) > 1 else None
    head = ["arm", *(["paper, top-1 %"] if published else []), "top-1 %", *([f"against {first}"] if first else [])]
    head += ["seeds", "epochs", "images/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in arms:
        mine = of[arm.name]
        rows = [outcome.row for outcome in mine.values()]
        top1 = [row["top1"] for row in rows]
        cells = [arm.name + (f": {arm.about}" if arm.about else "")]
        cells += ["" if arm.published is None else f"{arm.published:g}"] if published else []
        cells += [over_seeds(top1)]
        if first:
            pairs = [
                outcome.row["top1"] - other.row["top1"]
                for seed, outcome in mine.items()
                if (other := of[first].get(seed)) and outcome.row["cpu"] and other.place == outcome.place
            ]
            cells += [over_seeds(pairs, "+") if pairs and arm.name != first else ""]
        cells += [", ".join(f"{one:.2f}" for one in top1)]
        cells += [f"{statistics.mean(row['epochs'] for row in rows):.1f}"]
        cells += [f"{statistics.mean(row['images_per_second'] for row in rows):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: Sequence[Outcome], path: Path, title: str) -> None:
    """Top-1 against training time."""
    lines: dict[str, list[Line]] = {}
    for outcome in found:
        lines.setdefault(outcome.row["arm"], []).append(Line(outcome.row["run"], outcome.curve))
    save(race(lines, title), path)
