"""Budgeted training (Xia et al. 2023, "Budgeted Training for Vision Transformer", ICLR 2023).

A narrow model on few tokens grows, in stages, to the full one. Each stage runs the first heads of each attention, the
first hidden units of each feed-forward part, and the centre of the token grid; what a stage adds starts as a copy of
what is there, with moments of zero.

Symbols as in the paper: K stages, C_k multiply-adds of an image in stage k, T_k its epochs, B the budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fastargs.validation import Checker

from vitlocal.errors import ConfigError
from vitlocal.methods.method import Claims, Method, MethodContext, Probe, ProbeResult, Recipe, StepResult
from vitlocal.options import COUNT, SHARE, Choice, Maybe, Number, Section, Series, option
from vitlocal.plan import Growth, Plan, Shape, with_shape
from vitlocal.progress import Length, Progress

GROWS = ("heads", "hidden", "tokens")
FEWEST_TOKENS = 0.5  # of all, in the first stage: 50 %, 75 %, 100 % for three
PROBED_BATCHES = 4
CHEAPENED = frozenset({"feed.size", "feed.subset", "shape.token_keep_rate"})  # what changes an epoch's cost beside it


class Compute(Checker):
    """``50%`` of full training, or ``691.2GFLOPs``."""

    def check(self, value: Any) -> str:
        if not re.fullmatch(r"\d+(\.\d+)?(%|GFLOPs)", str(value)) or not float(re.match(r"[\d.]+", str(value))[0]):
            raise ValueError
        return str(value)

    def help(self) -> str:
        return "a part of full training, as 50%, or 691.2GFLOPs an image, summed over epochs (multiply-adds)"


@dataclass(frozen=True)
class BudgetedConfig(Section):
    stages: int = option(3, COUNT, "K")
    grow: tuple[str, ...] = option(GROWS, Series(Choice(*GROWS)), "what grows; the rest is whole from the start")
    budget: str | None = option(
        None, Maybe(Compute()), "the whole compute, from which the epochs follow; none: budget.length, shared out"
    )
    reference: float = option(300.0, Number(low=1), "epochs of full training, for a budget in %")
    epochs: tuple[int, ...] | None = option(
        None, Maybe(Series(Number(low=0, whole=True))), "of each stage, in place of what follows"
    )
    alpha: float = option(2.0, Number(), "how much longer later stages are; 0: equal")
    seed: int = option(0, Number(low=0, whole=True), "of the random numbers that stage lengths are drawn from")
    cost: str = option(
        "flops",
        Choice("flops", "time"),
        "what a stage's images cost, for a budget in time: reckoned, or measured first",
    )
    heads: tuple[float, ...] | None = option(None, Maybe(Series(SHARE)), "part of the heads in each stage; none: k / K")
    hidden: tuple[float, ...] | None = option(
        None, Maybe(Series(SHARE)), "part of the hidden width in each stage; none: doubling up to all"
    )
    tokens: tuple[float, ...] | None = option(
        None, Maybe(Series(SHARE)), "part of the tokens in each stage; none: evenly from 50 % to all"
    )
    crop: str = option(
        "after", Choice("after", "before"),
        "the grid is cropped after the embedding, as published, or before: cheaper, and the same tokens",
    )  # fmt: skip
    weights: str = option("copy", Choice("copy", "random"), "what is new starts as")
    sources: str = option(
        "first", Choice("first", "last"), "which heads and hidden units are copied, where not all are"
    )
    moments: str = option("zero", Choice("zero", "copy", "reset"), "of what is new; reset: of everything")
    scale: float = option(1.0, Number(low=0), "of what slots and their copies give, once copied; 0.5 keeps their sum")
    noise: float = option(0.0, Number(low=0), "added to copies, in standard deviations of the weights")


def grown(config: BudgetedConfig) -> list[str]:
    """The fields of the shape that grow."""
    fields = {"heads": ("heads",), "hidden": ("hidden",), "tokens": ("grid", "crop_before_embedding")}
    return [name for unit in config.grow for name in fields[unit]]


def stage_weights(stages: int, alpha: float, seeds: Sequence[float]) -> tuple[float, ...]:
    """t_k = exp(α · s_k), the proportions of the stages' epochs; seeds in ascending order, as later stages are longer.

    (The paper does not say that seeds are sorted; its schedules only follow if they are.)
    """
    return tuple(math.exp(alpha * seed) for seed in sorted(seeds)[:stages])


def solve(budget: float, costs: Sequence[float], weights: Sequence[float]) -> tuple[int, ...]:
    """Epochs T_k of each stage, whole numbers in proportion to ``weights``, with Σ C_k · T_k at most ``budget``.

    T_k = ⌊B · t_k / Σ C_j · t_j⌋. (In the paper b_j stands for C_j · t_j without being defined.)
    """
    scale = budget / sum(cost * weight for cost, weight in zip(costs, weights, strict=True))
    return tuple(math.floor(scale * weight) for weight in weights)


class Budgeted(Method):
    """Heads, hidden width and tokens grow over K stages whose lengths follow from the budget.

    A budget in time or steps is cut at fractions: where it is time, a stage's is C_k · t_k / Σ C_j · t_j, by FLOPs or,
    with ``cost=time``, by the times measured before the first step. Published methods save more FLOPs than time.
    """

    name = "budgeted"
    options = BudgetedConfig

    def __init__(self, run: MethodContext):
        self.config: BudgetedConfig = run.recipe.of(self.name)
        self.run, self.kind = run, run.recipe.budget.length.kind
        self.shapes = self._shapes(run.recipe)
        self.costs = tuple(run.macs(self.size, shape) for shape in self.shapes)
        self.measured: list[float] = []  # seconds an image in each stage
        seeds = np.random.default_rng((self.config.seed, 0xB0D6)).uniform(size=self.config.stages)
        self.weights = stage_weights(self.config.stages, self.config.alpha, seeds.tolist())
        self.epochs = self._epochs(run.recipe)
        if self.epochs is not None:
            self.budget_length = Length.parse(f"{sum(self.epochs)}ep")
        self.grown = grown(self.config)
        self.writes = self.claims(run.recipe).writes

    @classmethod
    def claims(cls, recipe: Recipe) -> Claims:
        config: BudgetedConfig = recipe.of(cls.name)
        reason = "both take away tokens; leave them out of one of the two, as with budgeted.grow=heads,hidden"
        refuses = {"feed.size": reason, "shape.token_keep_rate": reason} if "tokens" in config.grow else {}
        length = {"budget.length"} if config.epochs is not None or config.budget is not None else set()
        return Claims(cls.name, frozenset({"growth", *(f"shape.{name}" for name in grown(config)), *length}), refuses)

    @staticmethod
    def config_warnings(recipe: Recipe) -> list[str]:
        config: BudgetedConfig = recipe.of("budgeted")
        found = []
        if "budget.length" in Budgeted.claims(recipe).writes:
            found.append(f"budgeted.epochs or budgeted.budget set the run's length; {recipe.budget.length} has no say")
        beside = " and ".join(claims.name for claims in recipe.claims if claims.writes & CHEAPENED)
        if config.budget is not None and beside:
            found.append(
                f"budgeted.budget ({config.budget}) is reckoned for images of model.size, all of them and all of their "
                f"tokens; with {beside} the run will cost less, and its stages other parts of that"
            )
        if config.cost == "time" and beside:
            found.append(
                "budgeted.cost=time measures all stages as the run begins; what an image costs then changes with "
                f"{beside}, and the stages will take other parts of the time"
            )
        if recipe.model.weights and {"heads", "hidden"} & set(config.grow):
            names = {"heads": "heads", "hidden": "hidden units"}
            units = " and ".join(name for unit, name in names.items() if unit in config.grow)
            found.append(
                f"of model.weights the first stage's {units} alone are used: what lies beyond them is overwritten as "
                "the model grows; leave budgeted out to train all that was loaded"
            )
        return found

    @property
    def size(self) -> int:
        return self.run.recipe.model.size

    @staticmethod
    def problems(recipe: Recipe) -> list[str]:
        config: BudgetedConfig = recipe.of("budgeted")
        found = []
        for name in ("heads", "hidden", "tokens", "epochs"):
            values = getattr(config, name)
            if values is not None and len(values) != config.stages:
                found.append(f"budgeted.{name}: {len(values)} values for {config.stages} stages; give one for each")
            elif values is not None and name != "epochs" and (list(values) != sorted(values) or values[-1] != 1):
                found.append(f"budgeted.{name}: got {list(values)}, expected growing parts, and 1 at last")
            elif values is not None and name != "epochs" and not values[0]:
                found.append(f"budgeted.{name}: a stage with none of it cannot train; start above 0")
        if config.epochs is not None and config.budget is not None:
            found.append(
                "budgeted.epochs: they state the stages' lengths, and budgeted.budget too; keep one of the two"
            )
        if config.epochs is not None and not (sum(config.epochs) and config.epochs[-1]):
            found.append(f"budgeted.epochs: got {list(config.epochs)}; the last stage, the full model, needs some")
        if not config.grow:
            found.append("budgeted.grow: nothing grows; name some of heads, hidden, tokens, or leave the method out")
        copies = config.moments == "copy" or config.sources != "first" or config.scale != 1 or config.noise
        if config.weights == "random" and copies:
            found.append(
                "budgeted.weights: random ones have no copies; leave moments, sources, scale and noise as they are"
            )
        if config.cost == "time" and recipe.budget.length.kind != "seconds":
            found.append(f"budgeted.cost: time is for a budget in time, and budget.length is {recipe.budget.length}")
        if config.cost == "time" and (config.epochs is not None or config.budget is not None):
            found.append("budgeted.cost: time has no say where epochs or compute are given; leave it out")
        return found

    def _shapes(self, recipe: Recipe) -> tuple[Shape, ...]:
        config, count = self.config, self.config.stages
        whole = self.run.parts
        if whole is None:
            raise ConfigError(
                f"methods: budgeted needs a vitlocal_… model with heads of its own, not {recipe.model.name}"
            )
        ladder = {
            "heads": config.heads or tuple((k + 1) / count for k in range(count)),
            "hidden": config.hidden or tuple(2.0 ** (k + 1 - count) for k in range(count)),
            "tokens": config.tokens
            or tuple(FEWEST_TOKENS + (1 - FEWEST_TOKENS) * k / max(1, count - 1) for k in range(count)),
        }
        if count == 1:
            ladder["tokens"] = (1.0,)
        shapes = []
        for k in range(count):
            heads, hidden = (max(1, round(ladder[unit][k] * whole[unit])) for unit in ("heads", "hidden"))
            side = max(1, round(math.sqrt(ladder["tokens"][k]) * whole["grid"]))
            shapes.append(
                Shape(
                    heads=heads if "heads" in config.grow and heads < whole["heads"] else None,
                    hidden=hidden if "hidden" in config.grow and hidden < whole["hidden"] else None,
                    grid=side if "tokens" in config.grow and side < whole["grid"] else None,
                    crop_before_embedding="tokens" in config.grow and config.crop == "before",
                )
            )
        return tuple(shapes)

    def _epochs(self, recipe: Recipe) -> tuple[int, ...] | None:
        """T_k, where the budget is compute; None where it is the run's."""
        config = self.config
        if config.epochs is not None:
            return config.epochs
        if config.budget is None:
            return None
        number = float(re.match(r"[\d.]+", config.budget)[0])
        budget = number / 100 * config.reference * self.costs[-1] if config.budget[-1] == "%" else number * 1e9
        epochs = solve(budget, self.costs, self.weights)
        if not epochs[-1]:
            least = sum(c * w for c, w in zip(self.costs, self.weights, strict=True)) / self.weights[-1] / 1e9
            raise ConfigError(
                f"budgeted.budget: {config.budget} buys no epoch of the full model; give at least {least:.3g}GFLOPs"
            )
        return epochs

    # --- where the stages end ---

    def ends(self) -> tuple[Length, ...]:
        """Where each stage but the last ends."""
        if self.epochs is not None:
            return tuple(in_epochs(end) for end in np.cumsum(self.epochs)[:-1].tolist())
        if self.kind == "epochs":
            whole = self.run.recipe.budget.length.value
            each = [whole * weight / sum(self.weights) for weight in self.weights]
            ends = np.cumsum([math.floor(epochs) if whole >= 4 * len(each) else epochs for epochs in each])
            return tuple(in_epochs(end) for end in ends[:-1].tolist())
        measured = len(self.measured) == len(self.costs)
        costs = [1.0] * len(self.costs) if self.kind == "steps" else self.measured if measured else self.costs
        parts = np.array([cost * weight for cost, weight in zip(costs, self.weights, strict=True)])
        ends = np.cumsum(parts / parts.sum())[:-1]
        return tuple(Length(end, "fraction", f"{100 * end:.4g}%") for end in ends.tolist())

    def stage(self, at: Progress) -> int:
        at = replace(at, epoch=at.epoch + 1e-9)  # less than an image
        return sum(end.fraction_done(at) >= 1 for end in self.ends())

    def plan(self, plan: Plan, at: Progress) -> Plan:
        number = self.stage(at)
        shape, config = self.shapes[number], self.config
        growth = Growth(
            number, sources=config.sources, weights=config.weights, scale=config.scale, noise=config.noise,
            moments=config.moments,
        )  # fmt: skip
        plan = with_shape(plan, **{name: getattr(shape, name) for name in self.grown})
        return replace(plan, growth=growth if number else plan.growth)

    def changes(self) -> Sequence[Length]:
        return self.ends()

    # --- measured costs ---

    def probes(self, at: Progress) -> Sequence[Probe]:
        if self.config.cost != "time" or self.kind != "seconds" or self.epochs is not None:
            return ()
        sets = tuple(self.grown)
        return [Probe("seconds", shape, 0, PROBED_BATCHES, sets=sets) for shape in self.shapes[len(self.measured) :]]

    def observe(self, seen: StepResult | ProbeResult) -> None:
        if isinstance(seen, ProbeResult):
            self.measured.append(seen.value)

    def choices(self) -> Sequence[str]:
        """Where the stages end, once they are measured."""
        return [str(end) for end in self.ends()] if len(self.measured) == len(self.costs) else []

    def state_dict(self) -> dict[str, Any]:
        return {"measured": list(self.measured)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.measured = list(state["measured"])


def in_epochs(value: float) -> Length:
    return Length(float(value), "epochs", f"{value:g}ep")
