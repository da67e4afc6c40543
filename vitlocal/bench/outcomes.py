"""What runs of arms came to: read from their folders, or from what a bench on another machine wrote; told as a table,
drawn against time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitlocal.bench.entries import Arm, Entry
from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.runs import summary
from vitlocal.errors import ConfigError
from vitlocal.train.figures import Line, race
from vitlocal.train.log import read_log

PASS = ("epoch", "images_seen", "image_size", "loss", "top1", "lr", "train_seconds", "images_per_second")


@dataclass(frozen=True)
class Outcome:
    """A finished run: a flat row that names arm, seed and budget, and its passes, a record each."""

    name: str  # of its folder
    row: dict[str, Any]
    curve: list[dict[str, Any]]

    @property
    def key(self) -> tuple[str, int, str]:
        """As an Entry has it."""
        return self.row["arm"], self.row["seed"], self.row["budget"]


def outcome_of(run: Entry) -> Outcome:
    """Of a finished run; of its passes only what differs between them and is drawn."""
    about = {"arm": run.arm.name, "seed": run.seed, "budget": run.budget, "published_top1": run.arm.published}
    row = {name: value for name, value in summary(run.folder).items() if name != "run"}
    passes = [{name: record[name] for name in PASS} for record in read_log(run.folder)]
    return Outcome(run.folder.name, about | row, passes)


def outcomes(runs: Sequence[Entry], elsewhere: Mapping[tuple[str, int, str], Outcome]) -> list[Outcome]:
    """Of the runs that are done, here or ``elsewhere``, in their order."""
    here = {run.key: outcome_of(run) for run in runs if run.done}
    found = {**elsewhere, **here}
    return [found[run.key] for run in runs if run.key in found]


def read_outcomes(path: str) -> list[Outcome]:
    """What ``--json`` wrote; each row then says on what machine and by which commit it was made.

    Raises ConfigError for a file of another kind.
    """
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
        place = {"cpu": measured["machine"]["cpu"], "gpu": measured["machine"]["gpu"], "commit": measured["commit"]}
        rows, curves = measured["rows"], measured["curves"]
        return [
            Outcome(name, {**row, **place, **row}, curve)  # a row that came from elsewhere then keeps its own place
            for row, (name, curve) in zip(rows, curves.items(), strict=True)
            if row.keys() >= {"arm", "seed", "budget", "top1", "epochs", "images_per_second"}
        ]
    except OSError as error:
        raise ConfigError(f"--add: {path} cannot be read ({error.strerror}); give what --json wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--add: {path} is not what --json of this bench wrote ({error})") from error


def write_outcomes(path: str, what: str, found: Sequence[Outcome]) -> None:
    curves = {outcome.name: outcome.curve for outcome in found}
    write_json(path, measurement(what, [outcome.row for outcome in found], curves=curves))


def over_seeds(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation, of one value the value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def table(found: Sequence[Outcome], arms: Sequence[Arm]) -> str:
    """A markdown table, an arm a line.

    Mean and standard deviation over seeds, and of the differences from the first arm, seed by seed: what seeds have in
    common (the machine's speed, the order of the images) is not in those.
    """
    of = {arm.name: {o.row["seed"]: o.row for o in found if o.row["arm"] == arm.name} for arm in arms}
    arms = [arm for arm in arms if of[arm.name]]
    published = any(arm.published is not None for arm in arms)
    first = arms[0].name if len(arms) > 1 else None
    head = ["arm", *(["paper, top-1 %"] if published else []), "top-1 %", *([f"against {first}"] if first else [])]
    head += ["seeds", "epochs", "images/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in arms:
        rows = of[arm.name]
        top1 = [row["top1"] for row in rows.values()]
        cells = [arm.name + (f": {arm.about}" if arm.about else "")]
        cells += ["" if arm.published is None else f"{arm.published:g}"] if published else []
        cells += [over_seeds(top1)]
        if first:
            pairs = [row["top1"] - of[first][seed]["top1"] for seed, row in rows.items() if seed in of[first]]
            cells += [over_seeds(pairs, "+") if pairs and arm.name != first else ""]
        cells += [", ".join(f"{one:.2f}" for one in top1)]
        cells += [f"{statistics.mean(row['epochs'] for row in rows.values()):.1f}"]
        cells += [f"{statistics.mean(row['images_per_second'] for row in rows.values()):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: Sequence[Outcome], path: Path, title: str) -> None:
    """Top-1 against training time."""
    lines: dict[str, list[Line]] = {}
    for outcome in found:
        lines.setdefault(outcome.row["arm"], []).append(Line(outcome.name, outcome.curve))
    path.parent.mkdir(parents=True, exist_ok=True)
    race(lines, title).savefig(path, dpi=120)
