"""Budgeted training (Xia et al. 2023, "Budgeted Training for Vision Transformer", ICLR 2023).

docs/methods/budgeted.md describes the method. Symbols as in the paper: K stages, C_k multiply-adds of an image in
stage k, T_k its epochs, B the budget.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from vitlocal.errors import ConfigError
from vitlocal.methods.method import Claims, Method, MethodContext, Needs, Probe, Recipe, StepResult
from vitlocal.methods.search import as_fraction
from vitlocal.options import FRACTION, STAGES, Choice, Number, Parsed, Section, Series, messages, option
from vitlocal.plan import Growth, ModelParts, Plan, Shape, with_shape
from vitlocal.progress import Length, Progress

GROWS = {"heads": ("heads",), "hidden": ("hidden",), "tokens": ("grid", "crop_before_embedding")}  # fields of the shape
FEWEST_TOKENS = 0.5  # fraction of the tokens in the first stage: 50 %, 75 %, 100 % for three stages
PROBED_BATCHES = 4
# The paper's heads of PVTv2, by stage and level (table 6). No fractions, rounded, give these numbers.
PUBLISHED_HEADS = {(1, 2, 5, 8): ((1, 1, 2, 2), (1, 2, 4, 4), (1, 2, 5, 8))}
CHANGES_COST = frozenset({"feed.size", "feed.subset", "shape.token_keep_rate"})  # of an epoch, set by other methods


def parse_compute(value: Any) -> str:
    """Checks ``50%`` (of full training) or ``691.2GFLOPs``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%|GFLOPs)", str(value))
    if match is None or not float(match[1]):
        raise ValueError
    return str(value)


class StatedHeads(tuple[tuple[int, ...], ...]):
    """The heads of each stage, by level. As text: ``1,1,2,2 | 1,2,4,4 | 1,2,5,8``."""

    def __str__(self) -> str:
        return " | ".join(",".join(map(str, heads)) for heads in self)


def parse_heads(value: Any) -> tuple[float, ...] | StatedHeads:
    """Reads :class:`StatedHeads`, or the fraction of each stage: ``1/3, 2/3, 1``."""
    text = value if isinstance(value, str) else ",".join(map(str, value))
    if "|" in text:
        return StatedHeads(tuple(map(int, heads.split(","))) for heads in text.split("|"))
    return tuple(FRACTION.check(float(Fraction(part.strip()))) for part in text.split(","))


HEADS = Parsed(parse_heads, "fractions (1/3,2/3,1), or numbers by stage and level (1,1,2,2 | 1,2,4,4 | 1,2,5,8)")
COMPUTE = Parsed(parse_compute, "a part of full training, such as 50%, or 691.2GFLOPs per image, over all epochs")


@dataclass(frozen=True)
class BudgetedConfig(Section):
    stages: int = option(3, STAGES, "number K of stages")
    grow: tuple[str, ...] = option(tuple(GROWS), Series(Choice(*GROWS)), "what grows; the rest has its full size")
    compute: str | None = option(None, COMPUTE, "compute of the run, which sets its epochs; none: budget.length")
    reference_epochs: float = option(300.0, Number(1), "epochs of full training, for budgeted.compute in %")
    epochs: tuple[int, ...] | None = option(
        None, Series(Number(0, whole=True)), "epochs of each stage; none: they follow from alpha, seed and cost"
    )
    alpha: float = option(2.0, Number(), "how much longer later stages are; 0: all stages have the same length")
    seed: int = option(0, Number(0, 2**31 - 1, whole=True), "seed of the random numbers that set the stages' lengths")
    cost: str = option("flops", Choice("flops", "time"), "cost of a stage's images: FLOPs, or time measured first")
    heads: tuple[float, ...] | StatedHeads | None = option(None, HEADS, "heads in each stage")
    hidden: tuple[float, ...] | None = option(None, Series(FRACTION), "fraction of the hidden width, by stage")
    tokens: tuple[float, ...] | None = option(None, Series(FRACTION), "fraction of the tokens in each stage")
    crop: str = option("after", Choice("after", "before"), "crop tokens after the patch embedding, or images before it")
    new_weights: str = option("copy", Choice("copy", "random"), "weights of new heads and hidden units")
    copy_from: str = option("first", Choice("first", "last"), "heads and hidden units to copy, if not all are copied")
    new_moments: str = option("zero", Choice("zero", "copy", "reset"), "moments of new parts; reset: all become zero")
    copy_scale: float = option(1.0, Number(0), "factor on the outputs of copies and sources; 0.5 keeps their sum")
    copy_noise: float = option(0.0, Number(0), "noise added to copies, in standard deviations of the weights")
    renamed = {"budget": "compute", "reference": "reference_epochs", "weights": "new_weights", "sources": "copy_from",
               "moments": "new_moments", "scale": "copy_scale", "noise": "copy_noise"}  # fmt: skip

    @property
    def grown_fields(self) -> list[str]:
        """The fields of the shape that grow."""
        return [name for unit in self.grow for name in GROWS[unit]]

    @property
    def sets_length(self) -> bool:
        """Whether the options set the run's length."""
        return self.epochs is not None or self.compute is not None


def stage_weights(alpha: float, seeds: Sequence[float]) -> tuple[float, ...]:
    """t_k = exp(α · s_k), the proportions of the stages' epochs. Seeds are sorted, because later stages are longer."""
    return tuple(math.exp(alpha * seed) for seed in sorted(seeds))


def solve(budget: float, costs: Sequence[float], weights: Sequence[float]) -> tuple[int, ...]:
    """Whole epochs T_k = ⌊B · t_k / Σ C_j · t_j⌋ of each stage, with Σ C_k · T_k at most ``budget``."""
    scale = budget / sum(cost * weight for cost, weight in zip(costs, weights, strict=True))
    return tuple(math.floor(scale * weight) for weight in weights)


def in_epochs(value: float) -> Length:
    """``value`` epochs as a length."""
    return Length(float(value), "epochs", f"{value:g}ep")


def stage_shapes(config: BudgetedConfig, whole: ModelParts) -> tuple[Shape, ...]:
    """The shape of each stage of a model with the sizes ``whole``."""
    count, grown = config.stages, config.grown_fields
    steps = [k / (count - 1) for k in range(count)] if count > 1 else [1.0]
    multiple = whole.grid_multiple
    tokens = config.tokens or [FEWEST_TOKENS + (1 - FEWEST_TOKENS) * step for step in steps]
    heads = stage_heads(config, whole.heads)
    hidden = config.hidden or [2.0 ** (k + 1 - count) for k in range(count)]
    found = []
    for k in range(count):
        sizes: dict[str, Any] = {
            "heads": heads[k],
            "hidden": _parts_of(hidden[k], whole.hidden),
            "grid": min(max(1, round(math.sqrt(tokens[k]) * whole.grid / multiple)) * multiple, whole.grid),
        }
        smaller = {name: size for name, size in sizes.items() if name in grown and size != getattr(whole, name)}
        found.append(Shape(**smaller, crop_before_embedding="grid" in grown and config.crop == "before"))
    return tuple(found)


def stage_heads(config: BudgetedConfig, whole: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
    """The heads of each stage, by level, of a model with the heads ``whole``."""
    stated, count = config.heads, config.stages
    if isinstance(stated, StatedHeads):
        rise = all(sorted(column) == list(column) and column[0] for column in zip(*stated, strict=False))
        if not rise or stated[-1] != whole or any(len(heads) != len(whole) for heads in stated):
            raise ConfigError(
                f"budgeted.heads: got {stated}, expected {len(whole)} numbers for each stage, from 1 and none smaller "
                f"than before, and the model's own heads as the last: {','.join(map(str, whole))}"
            )
        return stated
    if stated is None and count == 3 and whole in PUBLISHED_HEADS:
        return PUBLISHED_HEADS[whole]
    return [_parts_of(part, whole) for part in stated or [(k + 1) / count for k in range(count)]]


def _parts_of(fraction: float, numbers: Sequence[int]) -> tuple[int, ...]:
    """The fraction of each level's number, at least 1."""
    return tuple(max(1, round(fraction * number)) for number in numbers)


class Budgeted(Method):
    """Heads, hidden width and tokens grow over K stages, whose lengths follow from the budget."""

    name = "budgeted"
    options = BudgetedConfig

    def __init__(self, context: MethodContext):
        super().__init__(context)
        config = self._config = context.recipe.section(BudgetedConfig)
        if context.parts is None:
            name = context.recipe.model_name
            raise ConfigError(f"methods: budgeted needs a vitlocal_… model, or timm's PVTv2 or Swin, not {name}")
        self._budget = context.recipe.budget
        self._shapes = stage_shapes(config, context.parts)
        self._costs = tuple(context.macs(context.recipe.model_size, shape) for shape in self._shapes)
        self._measured: list[float] = []  # seconds per image in each stage
        seeds = np.random.default_rng((config.seed, 0xB0D6)).uniform(size=config.stages)
        self._weights = stage_weights(config.alpha, seeds.tolist())
        self._epochs = self._solved_epochs()
        if config.sets_length:
            self.needs = Needs(budget_length=in_epochs(sum(self._epochs)))

    @classmethod
    def claims(cls, recipe: Recipe) -> Claims:
        config = recipe.section(BudgetedConfig)
        reason = "both remove tokens; let one of the two keep them, as with budgeted.grow=heads,hidden"
        excludes = {"feed.size": reason, "shape.token_keep_rate": reason} if "tokens" in config.grow else {}
        writes = {"growth", *(f"shape.{name}" for name in config.grown_fields)}
        writes -= {"shape.crop_before_embedding"} if config.crop == "after" else set()
        writes |= {"budget.length"} if config.sets_length else set()
        spared_by = {"shape.grid": "budgeted.grow=heads,hidden", "shape.crop_before_embedding": "budgeted.crop=after"}
        return Claims(cls.name, frozenset(writes), excludes, spared_by)

    @classmethod
    def config_warnings(cls, recipe: Recipe) -> list[str]:
        config = recipe.section(BudgetedConfig)
        others = " and ".join(claims.name for claims in recipe.claims if claims.writes & CHANGES_COST)
        names = {"heads": "heads", "hidden": "hidden units"}
        units = " and ".join(name for unit, name in names.items() if unit in config.grow)
        return messages({
            f"budgeted.epochs or budgeted.compute set the run's length; {recipe.budget} is ignored":
                config.sets_length,
            f"budgeted.compute ({config.compute}) assumes all images at model.size and all their tokens; with {others} "
            "the run costs less, and its stages take other fractions of the budget":
                config.compute is not None and others,
            "budgeted.cost=time measures all stages when the run begins, but the cost of an image changes with "
            f"{others}, and the stages will take other fractions of the time": config.cost == "time" and others,
            f"the first stage uses only its own {units} of model.weights: growth overwrites the others; remove "
            "budgeted from methods to train all loaded weights": recipe.model_weights and units,
        })  # fmt: skip

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        config, budget = recipe.section(BudgetedConfig), recipe.budget
        fractions = {name: list(getattr(config, name) or ()) for name in ("heads", "hidden", "tokens")}
        epochs, measures = list(config.epochs or ()), config.cost == "time"
        copies = config.new_moments == "copy" or config.copy_from != "first" or config.copy_scale != 1
        return messages({
            **{
                f"budgeted.{name}: got {len(values)} values for {config.stages} stages; give one for each":
                    getattr(config, name) is not None and len(values) != config.stages
                for name, values in {**fractions, "epochs": epochs}.items()
            },
            **{
                f"budgeted.{name}: got {values}, expected increasing fractions above 0, and 1 as the last":
                    values and (values != sorted(values) or values[-1] != 1 or not values[0])
                for name, values in fractions.items() if not isinstance(getattr(config, name), StatedHeads)
            },
            "budgeted.epochs: budgeted.compute sets the stages' lengths too; remove one of the two":
                epochs and config.compute is not None,
            f"budgeted.epochs: got {epochs}; the last stage, the full model, needs epochs": epochs and not epochs[-1],
            "budgeted.grow: nothing grows; name some of heads, hidden, tokens, or remove the method": not config.grow,
            "budgeted.new_weights: random weights are no copies; leave new_moments, copy_from, copy_scale and "
            "copy_noise at their defaults": config.new_weights == "random" and (copies or config.copy_noise),
            f"budgeted.cost: time needs a budget in time, but budget.length is {budget}":
                measures and budget.kind != "seconds",
            "budgeted.cost: time has no effect if budgeted.epochs or budgeted.compute is set; remove one of them":
                measures and config.sets_length,
        })  # fmt: skip

    def _solved_epochs(self) -> Sequence[float]:
        """T_k, if the options state epochs or compute, or the budget is in epochs. Otherwise empty."""
        config, whole = self._config, self._budget.value
        if config.epochs is not None:
            return config.epochs
        if config.compute is None:
            if self._budget.kind != "epochs":
                return ()
            each = [whole * weight / sum(self._weights) for weight in self._weights]
            return [math.floor(epochs) for epochs in each] if whole >= 4 * len(each) else each
        number = float(config.compute.rstrip("%GFLOPs"))
        full = config.reference_epochs * self._costs[-1]
        budget = number / 100 * full if config.compute.endswith("%") else number * 1e9
        epochs = solve(budget, self._costs, self._weights)
        if not epochs[-1]:
            least = sum(c * w for c, w in zip(self._costs, self._weights, strict=True)) / self._weights[-1] / 1e9
            raise ConfigError(
                f"budgeted.compute: {config.compute} is less than one epoch of the full model, {least:.3g}GFLOPs"
            )
        return epochs

    def changes(self) -> Sequence[Length]:
        """The ends of all stages except the last."""
        if self._epochs:
            return [in_epochs(end) for end in np.cumsum(self._epochs)[:-1].tolist()]
        costs: Sequence[float] = self._measured if self._is_measured else self._costs
        if self._budget.kind == "steps":
            costs = [1.0] * len(self._costs)
        parts = np.array([cost * weight for cost, weight in zip(costs, self._weights, strict=True)])
        return [as_fraction(end) for end in np.cumsum(parts / parts.sum())[:-1].tolist()]

    def plan(self, plan: Plan, progress: Progress) -> Plan:
        progress = replace(progress, epoch=progress.epoch + 1e-9)  # less than an image
        number = sum(end.fraction_done(progress) >= 1 for end in self.changes())
        shape, config = self._shapes[number], self._config
        growth = Growth(
            number, sources=config.copy_from, weights=config.new_weights, scale=config.copy_scale,
            noise=config.copy_noise, moments=config.new_moments,
        )  # fmt: skip
        plan = with_shape(plan, **{name: getattr(shape, name) for name in config.grown_fields})
        return replace(plan, growth=growth if number else plan.growth)

    @property
    def _is_measured(self) -> bool:
        return len(self._measured) == len(self._costs)

    def probes(self, progress: Progress) -> Sequence[Probe]:
        if self._config.cost != "time":
            return ()
        sets = tuple(self._config.grown_fields)
        return [Probe("seconds", shape, 0, PROBED_BATCHES, sets=sets) for shape in self._shapes[len(self._measured) :]]

    def observe(self, result: StepResult | Probe) -> None:
        if isinstance(result, Probe):
            self._measured.append(result.answer)

    def choices(self) -> Sequence[str]:
        """The ends of the stages, once their costs are measured."""
        return [str(end) for end in self.changes()] if self._is_measured else []

    def state_dict(self) -> dict[str, Any]:
        return {"measured": list(self._measured)}

    def load_state_dict(self, state: dict[str, Any], local: Any = None) -> None:
        self._measured = list(state["measured"])
