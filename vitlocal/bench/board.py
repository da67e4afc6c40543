"""Checks finished runs against the rules of docs/board.md, and makes the line of their entry: bench report --board."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from vitlocal.bench.arms import mean_and_deviation
from vitlocal.config import Config
from vitlocal.errors import DataError
from vitlocal.models.exported import file_digest
from vitlocal.report.run_folder import TEACHER_DIGITS, RunRecord, duration, read_origin
from vitlocal.stored_config import changed_options, stated_options
from vitlocal.tasks.metrics import is_evaluated, task_name

TRAINING_IMAGES, CLASSES, VALIDATION_IMAGES, SIZE = 1_281_167, 1000, 50_000, 224
LENGTHS = {3600.0: "1h", 86_400.0: "24h"}
SEEDS = 3
LATE = {"train": 1.001, "wall": 1.01}  # parts of the budget; what docs/budget.md says about the ends of runs
TITLES = ("entry", "model", "GPU", "budget", "top-1 %", "seeds", "epochs", "in all", "teacher", "notes", "commit",
          "recipe")  # fmt: skip


class Check(NamedTuple):
    """A rule, and what is wrong with the runs by it: empty if they keep it."""

    rule: str
    problem: str
    remedy: str


@dataclass(frozen=True)
class BoardRun:
    """A run of an entry, as its folder has it."""

    record: RunRecord

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def config(self) -> Config:
        return self.record.config

    @cached_property
    def origins(self) -> list[dict[str, Any]]:
        return read_origin(self.record.folder)

    @cached_property
    def weights(self) -> str:
        """The SHA-256 of the exported weights; empty without them."""
        path = self.record.folder / "model.safetensors"
        return file_digest(path) if path.exists() else ""

    @property
    def data(self) -> list[dict[str, Any]]:
        """The training data, as each line of trained_on.jsonl has them."""
        return [origin.get("data") or {} for origin in self.origins]

    @property
    def gpus(self) -> list[str]:
        """The different GPUs that trained the run, by name."""
        if self.config.run.device == "cpu":
            return []
        return list(dict.fromkeys(str(origin["machine"]["gpu"]) for origin in self.origins if _gpu(origin)))

    @property
    def commits(self) -> list[str]:
        """The different commits of the code; "unknown" for code outside a checkout."""
        return list(dict.fromkeys(str(origin["commit"] or "unknown") for origin in self.origins))

    @property
    def spent(self) -> float:
        """Seconds that the budget has paid for."""
        return float(
            self.record.records[-1]["wall_seconds" if self.config.budget.counts == "wall" else "train_seconds"]
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """The options that can change the result, without the seed."""
        return {name: value for name, value in stated_options(self.config).items() if name != "run.seed"}

    def largest(self, field: str) -> int:
        """The largest value of a field of the log that not every record has."""
        return max(record.get(field, 0) for record in self.record.records)


def _gpu(origin: dict[str, Any]) -> str | None:
    return origin["machine"].get("gpu")


# --- rules for each run: what is wrong with it, or nothing ------------------------------------------------------------


def unfinished(run: BoardRun) -> str:
    last = run.record.records[-1]
    if last["fraction"] < 1:
        return f"{last['fraction']:.1%} of the budget is spent"
    if not is_evaluated(last, run.record.metric):
        return "the end is not evaluated"
    return "" if run.weights else "it has no model.safetensors"


def unreadable(run: BoardRun) -> str:
    lines = run.record.damaged_lines
    return f"log.jsonl has {lines} damaged lines" if lines else "" if run.origins else "trained_on.jsonl is missing"


def other_budget(run: BoardRun) -> str:
    length, counts = run.config.budget.length, run.config.budget.counts
    if length.kind != "seconds" or length.value not in LENGTHS:
        return f"budget.length={length}"
    if counts not in LATE:
        return f"budget.counts={counts}"
    return f"it took {run.spent:.1f} s" if run.spent > LATE[counts] * length.value else ""


def other_data(run: BoardRun) -> str:
    found = {(data.get("images"), data.get("classes")) for data in run.data}
    different = [f"{images} images of {classes} classes" for images, classes in found - {(TRAINING_IMAGES, CLASSES)}]
    return ", ".join(sorted(different))


def other_start(run: BoardRun) -> str:
    return "" if run.config.model.weights is None else f"model.weights={run.config.model.weights}"


def other_evaluation(run: BoardRun) -> str:
    if task_name(run.config.model.name) != "classification":
        return f"{run.config.model.name} does not classify"
    count, size = sum(each["images"] for each in run.record.classes), run.config.evaluate.size or run.config.model.size
    wrong = {
        f"{count} validation images": count != VALIDATION_IMAGES,
        f"evaluate.rows={run.config.evaluate.rows}": run.config.evaluate.rows != "all",
        f"{size} px": size != SIZE,
    }
    return ", ".join(text for text, is_wrong in wrong.items() if is_wrong)


def other_machine(run: BoardRun) -> str:
    processes = run.largest("processes")
    if processes != 1:
        return f"{processes} processes"
    without = not run.gpus or not all(_gpu(origin) for origin in run.origins)
    return "a part was trained without a GPU" if without else ", ".join(run.gpus) if len(run.gpus) > 1 else ""


def borrowed_time(run: BoardRun) -> str:
    return "" if run.config.run.replay_search is None else f"run.replay_search={run.config.run.replay_search}"


def unknown_code(run: BoardRun) -> str:
    return ", ".join(commit for commit in run.commits if commit == "unknown" or commit.endswith("-dirty"))


def unknown_teacher(run: BoardRun) -> str:
    return "the teacher is not recorded" if run.record.teacher == "unknown" else ""


RULES: dict[str, tuple[Callable[[BoardRun], str], str]] = {
    "each run is finished and evaluated": (unfinished, "the command that started it continues it"),
    "each folder can be read": (unreadable, "restore the folder, or train the run again"),
    "the budget is 1 h or 24 h, and is kept": (other_budget, "use --budget.length=24h --budget.counts=train"),
    f"the data are ImageNet-1k: {TRAINING_IMAGES:,} training images of {CLASSES} classes":
        (other_data, "write all of ImageNet-1k with write_dataset.py, and train on that"),
    "training starts from random weights": (other_start, "leave out model.weights"),
    f"the score is top-1 of all {VALIDATION_IMAGES:,} validation images at {SIZE} px":
        (other_evaluation, f"use --evaluate.size={SIZE} --evaluate.rows=all and the whole validation split"),
    "one GPU trained each run": (other_machine, "train on one GPU, in one process, from the start to the end"),
    "the budget pays for searches": (borrowed_time, "leave out run.replay_search"),
    "the code is a commit": (unknown_code, "commit the changes, and train from that checkout"),
    "a teacher is known": (unknown_teacher, "train the run again: this version records the teacher"),
}  # fmt: skip


# --- rules for all runs together --------------------------------------------------------------------------------------


def chosen_seeds(runs: Sequence[BoardRun]) -> str:
    """Whether there are other seeds than 0, 1, 2 and so on, or runs that are copies of each other."""
    seeds, weights = sorted(run.config.run.seed for run in runs), [run.weights for run in runs if run.weights]
    if seeds != list(range(max(SEEDS, len(runs)))):
        return f"runs with the seeds {', '.join(map(str, seeds))}"
    return "runs with different seeds have the same weights" if len(set(weights)) < len(weights) else ""


def different_recipes(runs: Sequence[BoardRun]) -> str:
    first = runs[0].config.flat()
    changed = [
        f"{run.name}: {change}" for run in runs[1:] for change in changed_options(first, run.config)
        if not change.startswith("run.seed ")
    ]  # fmt: skip
    return "; ".join(changed)


def different_circumstances(runs: Sequence[BoardRun]) -> str:
    """GPUs, commits, classes and teachers that are not the same in all runs."""
    found = {
        "GPU": {name for run in runs for name in run.gpus},
        "commit": {commit for run in runs for commit in run.commits},
        "classes": {str(data.get("digest")) for run in runs for data in run.data},
        "teacher": {run.record.teacher for run in runs},
    }
    return "; ".join(f"{name}: {', '.join(sorted(values))}" for name, values in found.items() if len(values) > 1)


TOGETHER: dict[str, tuple[Callable[[Sequence[BoardRun]], str], str]] = {
    f"at least {SEEDS} runs, with the seeds 0, 1, 2 and so on": (
        chosen_seeds,
        "train the recipe with --run.seed=0, 1 and 2",
    ),
    "the recipe is the same, except for the seed": (different_recipes, "train all runs with the same options"),
    "GPU, code, classes and teacher are the same": (
        different_circumstances,
        "train all runs under the same conditions",
    ),
}


def checks(runs: Sequence[BoardRun]) -> Iterator[Check]:
    """Every rule, and what is wrong by it."""
    for rule, (problem_of, remedy) in RULES.items():
        found = [(run.name, problem_of(run)) for run in runs]
        yield Check(rule, "; ".join(f"{name}: {problem}" for name, problem in found if problem), remedy)
    for rule, (problem_in, remedy) in TOGETHER.items():
        yield Check(rule, problem_in(runs), remedy)


# --- the entry --------------------------------------------------------------------------------------------------------


def notes_on(runs: Sequence[BoardRun]) -> str:
    """What a reader of the board should know, and what breaks no rule."""
    found = {
        "the budget counts all time": int(runs[0].config.budget.counts == "wall"),
        "rewinds after divergence": sum(run.largest("rewinds") for run in runs),
        "damaged training images skipped": max(run.largest("damaged_images") for run in runs),
    }
    return ", ".join(text if text.startswith("the") else f"{count} {text}" for text, count in found.items() if count)


def entry_line(runs: Sequence[BoardRun]) -> str:
    """The entry as a line of a Markdown table with the columns ``TITLES``."""
    first, metric = runs[0], runs[0].record.metric
    scores = [run.record.score for run in runs]
    recipe = hashlib.sha256(str(sorted(first.recipe.items())).encode()).hexdigest()[:TEACHER_DIGITS]
    length = first.config.budget.length
    cells = (
        first.name, first.config.model.name, ", ".join(first.gpus) or "none",
        LENGTHS.get(length.value, str(length)) if length.kind == "seconds" else str(length),
        mean_and_deviation(scores), ", ".join(f"{score:.{metric.digits}f}" for score in scores),
        f"{sum(run.record.last['epoch'] for run in runs) / len(runs):.1f}",
        duration(max(run.record.last["wall_seconds"] for run in runs)), first.record.teacher or "none",
        notes_on(runs) or "–", ", ".join(first.commits), recipe,
    )  # fmt: skip
    return table_line(cells)


def table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def show_entry(records: Sequence[RunRecord]) -> None:
    """Prints every rule and the entry. Raises DataError if a rule is broken."""
    runs = [BoardRun(record) for record in records]
    found = list(checks(runs))
    for rule, problem, remedy in found:
        print(f"broken  {rule}: {problem}; {remedy}" if problem else f"kept    {rule}")
    for run in runs:
        print(f"weights of {run.name}: SHA-256 {run.weights or 'none'}")
    print("\n".join(["", table_line(TITLES), table_line(["---"] * len(TITLES)), entry_line(runs)]))
    if broken := [check.rule for check in found if check.problem]:
        raise DataError(f"--board: {len(broken)} of {len(found)} rules are broken, so this is no entry yet")
