"""AutoProg (Li et al. 2022, arXiv 2203.14509; details from the released code): depth and image size grow, by search.

docs/methods/autoprog.md describes the method. Symbols: S stages, L mean loss of a candidate, T its time per image.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vitlocal.errors import ConfigError
from vitlocal.methods.method import Claims, MethodContext, Needs, Probe, Recipe, StepResult
from vitlocal.methods.search import NET, Net, SearchMethod, ladder, remembered
from vitlocal.options import (
    COUNT,
    DECAY,
    FLAG,
    FRACTION,
    PIXELS,
    STAGES,
    Choice,
    Duration,
    Number,
    Section,
    Series,
    messages,
    option,
)
from vitlocal.plan import Growth, Plan, Shape, deepen, with_shape, with_size
from vitlocal.progress import Length, Progress, Stage

SPACE = ("depth", "size")
EMA_DECAYS = (0.998, 0.9996)  # per step; the released code keeps two more averages between them and never uses them
ROUNDING = 1e-6  # relative difference of L · T^w below which candidates count as equal, because losses are rounded


@dataclass(frozen=True)
class AutoProgConfig(Section):
    stages: int = option(4, STAGES, "number S of equal stages")
    space: tuple[str, ...] = option(SPACE, Series(Choice(*SPACE)), "what grows; image_size may set the size instead")
    min_scale: float = option(0.5, FRACTION, "smallest depth and image size, as a fraction of the largest")
    size_multiple: int = option(32, PIXELS, "image sizes are multiples of this number, px")
    schedule: tuple[Net, ...] | None = option(
        None, Series(NET), "depth and size of every stage, without a search: 6@128px,8@160px,10@192px,12@224px"
    )
    search_length: Length = option(Length.parse("2%"), Duration(), "training steps of each search, without its probes")
    probe_batches: int = option(50, COUNT, "batches that measure the time and the loss of a candidate")
    grow: str = option(
        "momentum", Choice("momentum", "momentum_new", "clone", "random"), "momentum: all weights are replaced by the "
        "slow average; momentum_new: new blocks copy the average; clone: new blocks copy the weights; random: neither"
    )  # fmt: skip
    ema_decays: tuple[float, ...] = option(EMA_DECAYS, Series(DECAY), "decays per step of the fast and slow average")
    loss_of: str = option("average", Choice("average", "online"), "measure the loss of the average, or of the weights")
    loss_on: str = option("train", Choice("train", "val"), "split that measures the loss; val biases the accuracy")
    loss_at: tuple[float, ...] = option(
        (0.5, 0.625, 0.75, 0.875, 1.0), Series(FRACTION), "fractions of the search at which losses are measured"
    )
    cost: str = option("time", Choice("time", "flops"), "cost T of a candidate: measured time, or FLOPs")
    exponent: float | None = option(None, Number(0), "w in the score L * T^w; none: fitted to the candidates")
    moments: str = option("reset", Choice("reset", "keep"), "optimizer moments when the network grows or shrinks")
    grow_augmentation: bool = option(True, FLAG, "augmentation and drop path grow with the stages")
    randaugment_start: float = option(0.5, FRACTION, "fraction of RandAugment's magnitude in the first stage")
    renamed = {"scale": "min_scale", "multiple": "size_multiple", "search": "search_length", "batches": "probe_batches",
               "averages": "ema_decays", "asked": "loss_at", "strengthen": "grow_augmentation",
               "operations": "randaugment_start"}  # fmt: skip

    @property
    def deepens(self) -> bool:
        """Whether the depth grows."""
        if self.schedule is not None:
            return len({net.depth for net in self.schedule}) > 1
        return "depth" in self.space and self.min_scale < 1 and self.stages > 1


def fitted_exponent(losses: Sequence[float], times: Sequence[float]) -> float:
    """w of the power law L ≈ a · T^-w through the candidates (least squares of logarithms), at least 0."""
    if len(set(times)) < 2:
        return 0.0
    slope = np.polyfit(np.log(times), np.log(losses), 1)[0]
    return max(-float(slope), 0.0)


def best(losses: Sequence[float], times: Sequence[float], exponent: float | None = None) -> int:
    """The candidate with the smallest L · T^w. Ties: the first. (Two candidates always lie on the curve they fit.)"""
    w = fitted_exponent(losses, times) if exponent is None else exponent
    scores = np.array([loss * time**w for loss, time in zip(losses, times, strict=True)])
    return int(np.argmax(scores <= scores.min() * (1 + ROUNDING)))


@dataclass
class SearchRecord:
    """The results of AutoProg's searches, by stage. Checkpoints store it.

    A search's length counts training steps, without the measurements. ``searched`` is the fraction of the budget that
    its steps took before the last round of losses began. ``since`` is the fraction at which the first step after that
    round began, or None if there was no step yet.
    """

    times: dict[int, list[float]] = field(default_factory=dict)  # seconds per image of each candidate
    losses: dict[int, list[list[float]]] = field(default_factory=dict)  # of each complete round, of each candidate
    under_way: dict[int, list[float]] = field(default_factory=dict)  # losses of an incomplete round
    began: dict[int, float] = field(default_factory=dict)  # fraction at each stage's first step
    searched: dict[int, float] = field(default_factory=dict)
    since: float | None = None


class AutoProg(SearchMethod):
    """Depth and image size grow, by search. With ``schedule`` the nets of all stages are given, without a search."""

    name = "autoprog"
    options = AutoProgConfig
    _undecided = -1  # the largest candidate

    def __init__(self, context: MethodContext):
        super().__init__(context)
        config, budget = context.recipe.section(AutoProgConfig), context.recipe.budget
        if budget.kind == "epochs" and budget.value >= config.stages:  # whole epochs
            self._bounds = [math.floor(budget.value * k / config.stages) / budget.value for k in range(config.stages)]
        if context.parts is None:
            name = context.recipe.model_name
            raise ConfigError(f"methods: autoprog needs a vitlocal_… model, or timm's PVTv2 or Swin, not {name}")
        self._config, self._context, self._depth = config, context, context.parts.blocks
        if config.schedule is not None and config.schedule[-1].depth != self._depth:
            raise ConfigError(f"autoprog.schedule: the last entry must have the model's depth, {self._depth} blocks")
        length = config.search_length
        self._search = length.value / (budget.value if length.kind == "epochs" else 1.0)  # fraction of the budget
        fast, slow = config.ema_decays
        measured = config.schedule is None and config.loss_of == "average"
        # The first average is measured. The last one is the source of growth. An average without a use is not kept.
        self.needs = Needs(ema_decays=(fast,) * measured + (slow,) * config.grow.startswith("momentum"))
        self._record = SearchRecord()

    @classmethod
    def claims(cls, recipe: Recipe) -> Claims:
        config = recipe.section(AutoProgConfig)
        blocks = {"shape.block_order", "shape.skipped_blocks"} if config.deepens else set()
        sizes = {"feed.size", "shape.input_size"} if "size" in config.space else set()
        dials = {"dials.strength", "dials.randaugment_strength"} if config.grow_augmentation else set()
        spared_by = {"shape.input_size": "autoprog.space=depth", "shape.block_order": "autoprog.space=size"}
        return Claims(cls.name, frozenset({"growth"} | blocks | sizes | dials), spared_by=spared_by)

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        config, budget = recipe.section(AutoProgConfig), recipe.budget
        length, loss_at, decays = config.search_length, list(config.loss_at), list(config.ema_decays)
        searches, schedule = config.schedule is None, config.schedule or ()
        depths = [net.depth for net in schedule]
        most = {"fraction": 1.0, "epochs": budget.value}.get(length.kind, math.inf)
        is_part = length.kind == "fraction" or length.kind == budget.kind == "epochs"
        return super().problems(recipe) + messages({
            "autoprog.space: nothing grows; name depth, size or both": not config.space,
            f"autoprog.search_length: got {length}, and budget.length is {budget}; give a part of it, such as 2%":
                searches and not is_part,
            "autoprog.search_length: 0 leaves no steps; use a part, such as 2%": searches and not length.value,
            f"autoprog.search_length: {length} is as long as one of {config.stages} stages, so that no step is left "
            "to train the chosen net; use a shorter search": searches and length.value * config.stages >= most,
            "autoprog.schedule: every entry needs a size if autoprog.space has size (6@128px), else none may have "
            "a size (6)": any((net.size is None) == ("size" in config.space) for net in schedule),
            f"autoprog.schedule: got depths {depths}, expected depths that do not decrease": depths != sorted(depths),
            f"autoprog.loss_at: got {loss_at}, expected increasing fractions of the search above 0, and 1 at last":
                not loss_at or loss_at != sorted(set(loss_at)) or not loss_at[0] or loss_at[-1] != 1,
            f"autoprog.ema_decays: got {decays}, expected two decays, the smaller one first":
                len(decays) != 2 or decays != sorted(decays),
            "autoprog.space: if the depth grows, copies replace blocks of model.weights, and a search reorders the "
            "blocks; set autoprog.space=size, give an autoprog.schedule of one depth, or remove model.weights":
                config.deepens and recipe.model_weights,
        })  # fmt: skip

    @classmethod
    def image_sizes(cls, recipe: Recipe) -> Sequence[Stage]:
        return super().image_sizes(recipe) if "size" in recipe.section(AutoProgConfig).space else ()

    def _stage_before(self, stage: int) -> int | None:
        """The last earlier stage that was trained. A run that was killed may have skipped stages."""
        return max((entered for entered in self._record.began if entered < stage), default=None)

    @remembered
    def _candidates(self, stage: int) -> list[Net]:
        config = self._config
        if config.schedule is not None:
            return [config.schedule[stage]]
        scale = config.min_scale if "depth" in config.space else 1.0
        depths: tuple[int, ...] = ladder(self._depth, scale, config.stages, 1)
        sizes: tuple[int | None, ...] = self._ladder(self._context.recipe) if "size" in config.space else (None,)
        if stage == config.stages - 1:
            return [Net(depths[-1], sizes[-1])]
        before = self._stage_before(stage)
        if before is None:
            depths = tuple(dict.fromkeys((depths[0], depths[len(depths) // 2], depths[-1])))
            sizes = tuple(dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1])))
        else:
            now = self._chosen(before)
            next_depth, place = depths.index(now.depth) + 1, sizes.index(now.size)
            depths, sizes = depths[next_depth : next_depth + 3] or depths[-1:], sizes[place : place + 2]
        return [Net(depth, size) for size in sizes for depth in depths]

    def _due_rounds(self, searched: float) -> int:
        """The number of rounds of losses that are due after a search of this length, a fraction of the budget."""
        return sum(searched >= part * self._search - 1e-12 for part in self._config.loss_at)

    def _best(self, stage: int) -> Net | None:
        record, nets, model_size = self._record, self._candidates(stage), self._context.recipe.model_size
        rounds = self._due_rounds(record.searched.get(stage, 0.0))
        if rounds < len(self._config.loss_at) or stage in record.under_way:
            return None
        losses = np.mean(record.losses[stage], axis=0).tolist()
        costs: Sequence[float] = record.times.get(stage, ())
        if self._config.cost == "flops":
            shapes = [Shape(block_order=tuple(range(net.depth))) for net in nets]
            costs = [self._context.macs(net.size or model_size, shape) for net, shape in zip(nets, shapes, strict=True)]
        return nets[best(losses, costs, self._config.exponent)]

    @remembered
    def _supernet(self, stage: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """The block order at the stage's start, and pairs (new block, block that it copies)."""
        depths, before = [net.depth for net in self._candidates(stage)], self._stage_before(stage)
        # In the first stage nothing is copied. The new blocks are those that the smallest net does not have.
        order = tuple(range(min(depths))) if before is None else self._extracted(before)
        return deepen(order, max(depths), self._depth)

    def _skipped(self, stage: int, depth: int) -> tuple[int, ...]:
        """The blocks that a candidate of ``depth`` skips: the first of the new blocks."""
        order, pairs = self._supernet(stage)
        return tuple(block for block, _ in pairs)[: len(order) - depth]

    @remembered
    def _extracted(self, stage: int) -> tuple[int, ...]:
        """The blocks of the stage's net, in order."""
        gone = self._skipped(stage, self._chosen(stage).depth)
        return tuple(block for block in self._supernet(stage)[0] if block not in gone)

    def _block_order(self, blocks: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if blocks == tuple(range(self._depth)) else blocks

    def plan(self, plan: Plan, progress: Progress) -> Plan:
        stage = self._stage(progress)
        if self._decided(stage):
            return self._plan_of(plan, stage, self._chosen(stage))
        nets = self._candidates(stage)
        # The step number draws depth and size: the same on every process, and after a restart.
        random = np.random.default_rng((self._context.recipe.seed, progress.step, 0xA9))
        return self._plan_of(plan, stage, nets[int(random.integers(len(nets)))])

    def variants(self, plan: Plan, progress: Progress) -> Sequence[Plan]:
        stage = self._stage(progress)
        return () if self._decided(stage) else [self._plan_of(plan, stage, net) for net in self._candidates(stage)]

    def _plan_of(self, plan: Plan, stage: int, net: Net) -> Plan:
        """The plan for a step of ``net``. Until the search of the stage ends, the net is a part of the supernet."""
        searching = not self._decided(stage)
        blocks = self._supernet(stage)[0] if searching else self._extracted(stage)
        skipped = self._skipped(stage, net.depth) if searching else ()
        plan = with_shape(plan, block_order=self._block_order(blocks), skipped_blocks=skipped)
        if net.size is not None:
            feed_size = max(each.size or 0 for each in self._candidates(stage)) if searching else net.size
            plan = with_shape(with_size(plan, feed_size), input_size=None if net.size == feed_size else net.size)
        plan = replace(plan, growth=self._growth(stage, searching) or plan.growth)
        if not self._config.grow_augmentation:
            return plan
        way = 1.0 if searching else stage / max(1, self._config.stages - 1)
        magnitude, start = self._context.recipe.randaugment, self._config.randaugment_start
        part = start + (1 - start) * way
        if magnitude >= 1 and way < 1:  # whole magnitudes: 4, 6, 7, 9
            part = math.floor(magnitude * part + 1e-9) / magnitude
        return replace(plan, dials=replace(plan.dials, strength=way, randaugment_strength=part))

    def _growth(self, stage: int, searching: bool) -> Growth | None:
        moments = "reset" if self._config.moments == "reset" else "zero"
        searched = len(self._candidates(stage)) > 1
        if not searching and searched:
            return Growth(2 * stage + 2, moments=moments)  # taken out of the supernet
        before = self._stage_before(stage)
        if before is None:
            return None
        if not searched and self._candidates(stage)[0] == self._chosen(before):
            return self._growth(before, False)  # nothing grows
        how, pairs, last = self._config.grow, self._supernet(stage)[1], len(self.needs.ema_decays) - 1
        return Growth(
            2 * stage + 1, blocks=pairs, weights="random" if how == "random" else "copy", moments=moments,
            average=last if how.startswith("momentum") else None, new_only=how == "momentum_new",
        )  # fmt: skip

    def probes(self, progress: Progress) -> Sequence[Probe]:
        stage, record = self._stage(progress), self._record
        if self._decided(stage):
            return ()
        self._asked_stage, nets = stage, self._candidates(stage)
        timed = len(record.times.get(stage, ()))
        if self._config.cost == "time" and timed < len(nets):
            return [self._probe("seconds", stage, net) for net in nets[timed:]]
        if stage not in record.under_way:
            if stage not in record.began or record.since is None:  # no step of this stage since the last round
                return ()
            searched = record.searched[stage] + progress.fraction - record.since
            # If several rounds are due after one step, only one round is measured.
            if self._due_rounds(searched) == self._due_rounds(record.searched[stage]):
                return ()
            record.searched[stage], record.since, record.under_way[stage] = searched, None, []
        return [self._probe("loss", stage, net) for net in nets[len(record.under_way[stage]) :]]

    def _probe(self, kind: str, stage: int, net: Net) -> Probe:
        order = self._block_order(self._supernet(stage)[0])
        shape = Shape(block_order=order, skipped_blocks=self._skipped(stage, net.depth))
        average = 0 if kind == "loss" and self._config.loss_of == "average" else None
        sets = ("block_order", "skipped_blocks", "input_size")
        split = self._config.loss_on if kind == "loss" else "train"
        return Probe(kind, shape, net.size or 0, self._config.probe_batches, split=split, average=average, sets=sets)

    def observe(self, result: StepResult | Probe) -> None:
        if isinstance(result, StepResult):
            return self._observe_step(result)
        stage, record = self._asked_stage, self._record
        if result.kind == "seconds":
            record.times.setdefault(stage, []).append(result.answer)
        else:
            record.under_way[stage].append(result.answer)
            if len(record.under_way[stage]) == len(self._candidates(stage)):
                record.losses.setdefault(stage, []).append(record.under_way.pop(stage))
        self._memory.clear()

    def _observe_step(self, result: StepResult) -> None:
        stage, record, fraction = self._stage(result.progress), self._record, result.progress.fraction
        if stage not in record.began:
            if self._stage_before(stage) is not None and result.plan.growth.number <= 2 * stage:
                return  # the step was planned in the stage before, and the clock has moved on: nothing has grown yet
            record.began[stage], record.searched[stage], record.since = fraction, 0.0, None
            self._memory.clear()
        if record.since is None:
            record.since = fraction

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._record)

    def load_state_dict(self, state: dict[str, Any], local: Any = None) -> None:
        self._record = SearchRecord(**state)
        self._memory.clear()
