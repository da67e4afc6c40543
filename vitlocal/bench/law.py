"""A law of accuracy: top-1 as a function of a model's size and of the epochs it sees, fitted to finished runs.

    -ln(top-1) = level x (a + b (M / M0)^-alpha + c (E / E0)^-beta)

M is the multiply-adds of an image at the full size, and E the number of epochs. M0 and E0 are the geometric means of
the runs. The form is that of Hoffmann et al. 2022 (arXiv 2203.15556) with -ln(top-1) in place of the loss, so that each
prediction is between 0 and 100 %. Coefficients and exponents are positive: a larger model and more epochs never hurt.
Each recipe among the runs has a level, and shares the other coefficients. A law belongs to one data set.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import geometric_mean, mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import least_squares

from vitlocal.bench.arms import RunResult, read_results
from vitlocal.bench.published import IMAGENET, MACS, PUBLISHED
from vitlocal.errors import ConfigError
from vitlocal.progress import Length
from vitlocal.report.figures import COLOURS, GREY

Array = np.ndarray[Any, Any]
NAMES = ("a", "b", "alpha", "c", "beta")
LOWEST, HIGHEST = (1e-4, 1e-4, 0.05, 1e-4, 0.05), (3.0, 3.0, 1.5, 3.0, 1.5)  # of these coefficients
STARTS = ((0.02, 0.2, 0.3, 0.3, 0.3), (0.2, 0.05, 0.3, 0.1, 0.8), (0.02, 0.02, 0.3, 0.8, 0.3))  # of the search
MOST_LEVEL = 1.0  # the logarithm of the largest level
SPARE = 3  # runs beyond the number of coefficients, without which the leave-one-out error means nothing
SIZE_OPTIONS = ("model.width", "model.depth", "model.heads", "budget.", "run.", "data.")  # the rest is the recipe
SIZE_IN_NAME = re.compile(r"_(tiny|small|base)_")


@dataclass(frozen=True)
class LawRun:
    """A finished run, as the law sees it."""

    model: str  # "192x6", or the name of its arm
    recipe: str
    macs: float  # of an image at the largest size that it trained at
    epochs: float
    top1: float  # percent
    epoch_images: int
    budget: str = ""
    seconds: float = 0.0  # of training


def recipe_of(options: Mapping[str, Any]) -> str:
    """A text that is equal for runs that differ only in the model's size, the budget, the data's place or the seed.

    ``options``: those that differ from the defaults, by dotted name.
    """
    kept = {name: value for name, value in options.items() if not name.startswith(SIZE_OPTIONS)}
    if "model.name" in kept:
        kept["model.name"] = SIZE_IN_NAME.sub("_", kept["model.name"])
    return json.dumps(kept, sort_keys=True, default=str)


def law_run(result: RunResult, file: str) -> LawRun:
    """A run of ``bench arms``. ConfigError if the file is from a version that did not store the cost of an image."""
    row, options = result.row, result.config
    macs = max((record.get("macs_per_image") or 0 for record in result.curve), default=0)
    if not macs:
        raise ConfigError(f"--runs: {file} has no macs_per_image: an earlier version wrote it; train the runs again")
    if row.get("top1") is None:
        raise ConfigError(f"--runs: {file} has runs without top-1; a law is for classifiers")
    width, depth = options.get("model.width"), options.get("model.depth")
    model = f"{width}x{depth}" if width and depth else row["arm"]
    images = round(row["images_seen"] / row["epochs"])
    values = row["epochs"], row["top1"], images, row["budget"], row["train_seconds"]
    return LawRun(model, recipe_of(options), macs, *values)


def read_runs(files: Sequence[str]) -> list[LawRun]:
    """The runs in files of ``bench arms`` or ``bench paper``. ConfigError if they are of several data sets."""
    runs = [law_run(result, file) for file in files for result in read_results(file, "--runs").values()]
    sizes = sorted({run.epoch_images for run in runs})
    if len(sizes) > 1:
        both = " and ".join(f"{size:,}" for size in sizes[:2])
        raise ConfigError(f"--runs: the runs have epochs of {both} images; a law belongs to one data set")
    return runs


def published_runs() -> list[LawRun]:
    """The published runs on ImageNet."""
    return [
        LawRun(f"ViT-{size}", recipe, MACS[size], epochs, top1, IMAGENET)
        for recipe, (_, rows) in PUBLISHED.items()
        for size, epochs, top1 in rows
    ]


@dataclass(frozen=True)
class Law:
    """A fitted law. ``vectors``: its coefficients, then those of the fits that leave out one run each."""

    runs: tuple[LawRun, ...]
    recipes: tuple[str, ...]
    vectors: tuple[Array, ...]

    @cached_property
    def centre(self) -> tuple[float, float]:
        """M0 and E0."""
        return _centre(self.runs)

    def predict(self, macs: float, epochs: float, recipe: str | None = None, fit: int = 0) -> float:
        """Top-1, percent, of a recipe among the runs, or at the mean level. ``fit``: a place in ``vectors``."""
        vector = self.vectors[fit]
        place = self.recipes.index(recipe) if recipe in self.recipes else None
        level = 0.0 if place is None else _levels(vector)[place]
        return float(_top1(vector, np.log(macs / self.centre[0]), np.log(epochs / self.centre[1]), level))

    @cached_property
    def fitted(self) -> list[float]:
        return [self.predict(run.macs, run.epochs, run.recipe) for run in self.runs]

    @cached_property
    def rms(self) -> float:
        """The root mean square of the residuals, points of top-1."""
        return _rms([value - run.top1 for value, run in zip(self.fitted, self.runs, strict=True)])

    @cached_property
    def left_out(self) -> list[float]:
        """The prediction of each run by the law of the other runs."""
        return [self.predict(run.macs, run.epochs, run.recipe, 1 + place) for place, run in enumerate(self.runs)]

    @cached_property
    def left_out_rms(self) -> float:
        """The leave-one-out error, points of top-1."""
        return _rms([value - run.top1 for value, run in zip(self.left_out, self.runs, strict=True)])

    def error(self, macs: float, epochs: float, recipe: str | None = None) -> float:
        """The error of a prediction, points: the leave-one-out error or, if it is larger, the jackknife's.

        The latter grows outside the range of the runs. A recipe that is not among several ones may have any level: the
        standard deviation of the levels is added in quadrature.
        """
        values = [self.predict(macs, epochs, recipe, fit) for fit in range(1, len(self.vectors))]
        jackknife = float(np.sqrt(len(values) - 1) * np.std(values))
        levels = _levels(self.vectors[0])
        unknown = recipe not in self.recipes and len(levels) > 1
        top1 = self.predict(macs, epochs)
        spread = -top1 * np.log(top1 / 100) * np.std(levels, ddof=1) if unknown else 0.0
        return float(np.hypot(max(self.left_out_rms, jackknife), spread))

    def outside(self, macs: float, epochs: float) -> bool:
        """Whether the runs have no model so small or large, or none with so few or many epochs (by more than 1 %)."""
        pairs = ((macs, [run.macs for run in self.runs]), (epochs, [run.epochs for run in self.runs]))
        return any(value < 0.99 * min(known) or value > 1.01 * max(known) for value, known in pairs)

    @property
    def coefficients(self) -> dict[str, float]:
        return {name: float(value) for name, value in zip(NAMES, self.vectors[0], strict=False)}

    def describe(self) -> str:
        """The form, the coefficients, the number of runs and the errors."""
        a, b, alpha, c, beta = self.coefficients.values()
        macs, epochs = self.centre
        models = _distinct([run.macs for run in self.runs])
        levels = f", a level for each of {len(self.recipes)} recipes" if len(self.recipes) > 1 else ""
        spans = [
            f"{min(values):.3g} to {max(values):.3g} {unit}"
            for values, unit in (
                ([run.epochs for run in self.runs], "epochs"),
                ([1e-9 * run.macs for run in self.runs], "G multiply-adds an image"),
            )
        ]
        return (
            f"law: -ln(top-1) = {a:.3g} + {b:.3g} (M / {1e-9 * macs:.3g}G)^-{alpha:.2f} + "
            f"{c:.3g} (E / {epochs:.3g})^-{beta:.2f}{levels}\n"
            f"fitted to {len(self.runs)} runs of {models} models, {' and '.join(spans)}; "
            f"RMS error {self.rms:.2f} points of top-1, leave-one-out {self.left_out_rms:.2f}"
        )


def _centre(runs: Sequence[LawRun]) -> tuple[float, float]:
    """The geometric means of multiply-adds and epochs."""
    return geometric_mean(run.macs for run in runs), geometric_mean(run.epochs for run in runs)


def _distinct(values: Sequence[float]) -> int:
    """The number of values that differ by 2 % or more from the next smaller one."""
    ordered = np.sort(values)
    return 1 + int(np.sum(ordered[1:] > 1.02 * ordered[:-1])) if len(ordered) else 0


def _rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _levels(vector: Array) -> Array:
    """The logarithms of the recipes' levels. Their sum is 0."""
    free = vector[len(NAMES) :]
    return np.append(free, -free.sum())


def _top1(vector: Array, macs: Any, epochs: Any, level: Any) -> Any:
    """Top-1, percent, from the logarithms of M / M0, E / E0 and the level."""
    a, b, alpha, c, beta = vector[: len(NAMES)]
    return 100 * np.exp(-np.exp(level) * (a + b * np.exp(-alpha * macs) + c * np.exp(-beta * epochs)))


def fit_law(runs: Sequence[LawRun], option: str = "--runs") -> Law:
    """Fits the law by robust least squares on top-1. A recipe with a single run is left out, because its level fits it.

    Raises ConfigError if the runs are too few, or have too few models or lengths.
    """
    counts = Counter(run.recipe for run in runs)
    used = [run for run in runs if counts[run.recipe] > 1]
    recipes = tuple(dict.fromkeys(run.recipe for run in used))
    needed = len(NAMES) + max(0, len(recipes) - 1) + SPARE
    models, lengths = _distinct([run.macs for run in used]), _distinct([run.epochs for run in used])
    if len(used) < needed or models < 2 or lengths < 3:
        raise ConfigError(
            f"{option}: a law of {max(1, len(recipes))} recipes needs {needed} runs, of two models or more and three "
            f"lengths or more; got {len(used)} of {models} models and {lengths} lengths, and {len(runs) - len(used)} "
            "runs that are the only ones of their recipe. Train the recipe with other models and budgets (bench arms)"
        )
    centre = _centre(used)
    macs, epochs = (np.log([getattr(run, name) for run in used]) - np.log(value)
                    for name, value in zip(("macs", "epochs"), centre, strict=True))  # fmt: skip
    top1, groups = np.array([run.top1 for run in used]), np.array([recipes.index(run.recipe) for run in used])
    free = len(recipes) - 1
    bounds = np.array([*LOWEST, *[-MOST_LEVEL] * free]), np.array([*HIGHEST, *[MOST_LEVEL] * free])

    def search(kept: Array, starts: Sequence[Any]) -> Array:
        def residuals(vector: Array) -> Array:
            return _top1(vector, macs[kept], epochs[kept], _levels(vector)[groups[kept]]) - top1[kept]

        found = [least_squares(residuals, start, bounds=bounds, loss="soft_l1", x_scale="jac") for start in starts]
        return min(found, key=lambda each: each.cost).x

    everything = np.arange(len(used))
    best = search(everything, [(*start, *[0.0] * free) for start in STARTS])
    inside = np.clip(best, bounds[0] + 1e-6, bounds[1] - 1e-6)
    return Law(tuple(used), recipes, (best, *(search(np.delete(everything, place), [inside]) for place in everything)))


# --- held-out runs ----------------------------------------------------------------------------------------------------


def hold_out(
    runs: Sequence[LawRun], budgets: Sequence[Length], models: Sequence[str]
) -> tuple[Law, list[dict[str, Any]]]:
    """Fits the law to the runs of other budgets, and predicts those of ``budgets`` and ``models`` (empty: all).

    A row has two predictions: from the epochs that the run had, and from those that the speed of the fitted runs gives.
    """
    values = {length.text for length in budgets}
    fitted = [run for run in runs if run.budget not in values]
    held = [run for run in runs if run.budget in values]
    for option, wanted, known in (
        ("--hold-out", values, {run.budget for run in runs}),
        ("--models", set(models), {run.model for run in held}),
    ):
        if missing := sorted(wanted - known):
            raise ConfigError(f"{option}: the runs have no {', '.join(missing)}; they have {', '.join(sorted(known))}")
    held = [run for run in held if not models or run.model in models]
    law, rows = fit_law(fitted), []
    if unknown := sorted({run.model for run in held if run.recipe not in law.recipes}):
        raise ConfigError(f"--hold-out: no fitted runs have the recipe of the held-out {', '.join(unknown)}")
    for run in held:
        same = [each for each in fitted if (each.model, each.recipe) == (run.model, run.recipe)]
        seconds = sum(each.seconds for each in same)
        forecast = run.seconds * sum(each.epochs for each in same) / seconds if seconds else None
        predicted = law.predict(run.macs, run.epochs, run.recipe)
        rows.append({
            "budget": run.budget, "model": run.model, "epochs": run.epochs, "predicted": predicted,
            "measured": run.top1, "off": predicted - run.top1, "epochs_by_speed": forecast,
            "predicted_by_speed": law.predict(run.macs, forecast, run.recipe) if forecast else None,
        })  # fmt: skip
    return law, rows


def named_right(rows: Sequence[Mapping[str, Any]], field: str = "predicted") -> tuple[int, int]:
    """In how many pairs of models at one budget the better one was named, and the number of pairs; means of seeds."""
    right = pairs = 0
    for budget in dict.fromkeys(row["budget"] for row in rows):
        means = {
            model: [mean(row[name] for row in rows if (row["budget"], row["model"]) == (budget, model))
                    for name in (field, "measured")]
            for model in dict.fromkeys(row["model"] for row in rows if row["budget"] == budget)
        }  # fmt: skip
        for one, other in combinations(means.values(), 2):
            pairs += 1
            right += (one[0] - other[0]) * (one[1] - other[1]) > 0
    return right, pairs


def draw_law(law: Law, rows: Sequence[Mapping[str, Any]] = ()) -> Figure:
    """Predicted against measured top-1: each fitted run by the law of the others, and the held-out ``rows``."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, model in enumerate(dict.fromkeys(run.model for run in law.runs)):
        points = [(run.top1, value) for run, value in zip(law.runs, law.left_out, strict=True) if run.model == model]
        axes.plot(*zip(*points, strict=True), "o", color=COLOURS[number % len(COLOURS)], markersize=4, label=model)
    if rows:
        held = [(row["measured"], row["predicted"]) for row in rows]
        axes.plot(*zip(*held, strict=True), "x", color="black", markersize=7, label="held out")
    axes.axline((law.runs[0].top1, law.runs[0].top1), slope=1, color=GREY, linewidth=1)
    axes.set(xlabel="measured top-1, %", ylabel="predicted top-1 (by the law of the other runs), %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
