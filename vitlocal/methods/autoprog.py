"""AutoProg (Li et al. 2022, arXiv 2203.14509; details from the released code): depth and image size grow, by search.

Training is cut into stages. At the start of each but the last, the network grows into a *supernet*, whose steps sample
depths and sizes; then the candidate of the best trade of loss against time is taken out of it, with the weights that
it has, and trained to the end of the stage. Steps of the supernet are steps of training like others.

Symbols: S stages, l depth, r image size, L̄ mean loss of a candidate, T its time an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from vitlocal.errors import ConfigError
from vitlocal.methods.method import Claims, Method, MethodContext, Probe, ProbeResult, Recipe, StepResult
from vitlocal.methods.search import Net, NetText, falls, ladder, stages_of
from vitlocal.options import COUNT, SHARE, Choice, Duration, Flag, Maybe, Number, Section, Series, option
from vitlocal.plan import Growth, Plan, Shape, deepen, with_shape
from vitlocal.progress import Length, Progress, Stage

T = TypeVar("T")

SPACE = ("depth", "size")
AVERAGES = (0.998, 0.9996)  # decays a step; the published code keeps two between them, which nothing reads
ROUNDING = 1e-6  # candidates whose L · T^w differ by less, as a part of it, are equal: losses are told no more exactly


@dataclass(frozen=True)
class AutoProgConfig(Section):
    stages: int = option(4, COUNT, "S, of equal length")
    space: tuple[str, ...] = option(SPACE, Series(Choice(*SPACE)), "what grows; sizes may be left to image_size")
    scale: float = option(0.5, SHARE, "smallest depth and size, as a part of the largest; 0: the least")
    multiple: int = option(32, COUNT, "sizes are multiples of this, px")
    schedule: tuple[Net, ...] | None = option(
        None, Maybe(Series(NetText())), "the nets of all stages, without search: 6@128px,8@160px,10@192px,12@224px"
    )
    search: Length = option(
        Length.parse("2%"),
        Duration(),
        "length of a search's training (published: 2 of 100 epochs); asking comes on top",
    )
    batches: int = option(50, COUNT, "by which a candidate's time and loss are told")
    grow: str = option(
        "momentum", Choice("momentum", "momentum_new", "clone", "random"), "new blocks are copies in a net taken over "
        "from its slow average; copies of averages in the net as it is; copies; or as drawn"
    )  # fmt: skip
    averages: tuple[float, ...] = option(
        AVERAGES, Series(SHARE), "decays a step: of the fast one, whose loss is taken, and of the slow one, from which "
        "nets grow"
    )  # fmt: skip
    loss_of: str = option("average", Choice("average", "online"), "whose loss is taken: the fast average's")
    loss_on: str = option(
        "train", Choice("train", "val"), "of which split's images; val is then no fair judge any more"
    )
    asked: tuple[float, ...] = option(
        (0.5, 0.625, 0.75, 0.875, 1.0), Series(SHARE), "parts of the search at which losses are taken, to be averaged"
    )
    cost: str = option("time", Choice("time", "flops"), "what a candidate costs")
    exponent: float | None = option(None, Maybe(Number(low=0)), "w in L · T^w; none: fitted to the candidates")
    moments: str = option(
        "reset", Choice("reset", "keep"), "the optimizer's, when a net grows and when one is taken out"
    )
    strengthen: bool = option(True, Flag(), "augmentation and drop path grow with the stages")
    operations: float = option(0.5, SHARE, "part of RandAugment's magnitude in the first stage; the rest starts at 0")


def deepens(config: AutoProgConfig) -> bool:
    """Whether depth grows."""
    if config.schedule is not None:
        return len({net.depth for net in config.schedule}) > 1
    return "depth" in config.space and config.scale < 1 and config.stages > 1


def fitted_exponent(losses: Sequence[float], times: Sequence[float]) -> float:
    """w of the power law L ≈ a · T^-w through the candidates (least squares of logs); 0 where it does not fall."""
    if len(set(times)) < 2:
        return 0.0
    slope = np.polyfit(np.log(times), np.log(losses), 1)[0]
    return max(-float(slope), 0.0)


def best(losses: Sequence[float], times: Sequence[float], exponent: float | None = None) -> int:
    """The candidate of least L · T^w; of equal ones the first. (Of two candidates, both lie on the fitted curve.)"""
    w = fitted_exponent(losses, times) if exponent is None else exponent
    scores = np.array([loss * time**w for loss, time in zip(losses, times, strict=True)])
    return int(np.argmax(scores <= scores.min() * (1 + ROUNDING)))


def remembered(reckon: Callable[[AutoProg, int], T]) -> Callable[[AutoProg, int], T]:
    """What a stage's ``reckon`` gives, until more has been observed: plans are made at every step."""

    @wraps(reckon)
    def reckoned(self: AutoProg, stage: int) -> T:
        key = (reckon.__name__, stage)
        if key not in self.memory:
            self.memory[key] = reckon(self, stage)
        return self.memory[key]

    return reckoned


class AutoProg(Method):
    """See the module. With ``schedule`` the nets of all stages are given, and nothing is searched."""

    name = "autoprog"
    options = AutoProgConfig

    def __init__(self, run: MethodContext):
        self.config: AutoProgConfig = run.recipe.of(self.name)
        self.run, recipe = run, run.recipe
        if run.parts is None:
            raise ConfigError(f"methods: autoprog needs a vitlocal_… model, not {recipe.model.name}")
        self.count, self.seed = run.parts["blocks"], recipe.run.seed
        self.sizes_grow = "size" in self.config.space
        self.writes = self.claims(run.recipe).writes
        config = self.config
        if config.schedule is not None and config.schedule[-1].depth != self.count:
            raise ConfigError(
                f"autoprog.schedule: it ends with {config.schedule[-1].depth} blocks, the model has {self.count}"
            )
        self.depths = ladder(self.count, config.scale, config.stages, 1) if "depth" in config.space else (self.count,)
        self.ladder = (
            ladder(recipe.model.size, config.scale, config.stages, config.multiple) if self.sizes_grow else (None,)
        )
        self.magnitude = recipe.augment.randaugment
        fast, slow = config.averages
        judged = config.schedule is None and config.loss_of == "average"
        # The first is what is judged, the last what nets grow from.
        self.ema_decays = (fast,) * judged + (slow,) * config.grow.startswith("momentum")
        self.length_kind, self.whole = recipe.budget.length.kind, recipe.budget.length.value
        # What searches found, stage by stage and candidate by candidate: seconds an image, and rounds of losses.
        self.times: dict[int, list[float]] = {}
        self.began: dict[int, float] = {}  # the fraction at which each stage's first step was taken
        self.losses: dict[int, list[list[float]]] = {}
        self.asking = 0  # the stage of the last question
        self.under_way: dict[int, list[float]] = {}  # the losses of a round that is not over
        # Of a search's steps, as a part of the budget: those before its last round of losses, and where those after it
        # began. What a round takes is not of the search's length.
        self.searched: dict[int, float] = {}
        self.since: float | None = None
        self.round_at = 0.0  # where the present round was asked
        self.memory: dict[tuple[str, int], Any] = {}

    @classmethod
    def claims(cls, recipe: Recipe) -> Claims:
        config: AutoProgConfig = recipe.of(cls.name)
        blocks = {"shape.block_order", "shape.skipped_blocks"} if deepens(config) else set()
        sizes = {"feed.size", "shape.input_size"} if "size" in config.space else set()
        dials = {"dials.strength", "dials.randaugment_strength"} if config.strengthen else set()
        return Claims(cls.name, frozenset({"growth"} | blocks | sizes | dials), {})

    @staticmethod
    def problems(recipe: Recipe) -> list[str]:
        config: AutoProgConfig = recipe.of("autoprog")
        found = []
        if not config.space:
            found.append("autoprog.space: nothing grows; name depth, size or both")
        if config.schedule is None and recipe.budget.length.kind != "epochs" and config.search.kind != "fraction":
            found.append(
                f"autoprog.search: got {config.search}; of a budget of {recipe.budget.length} give a part, as 2%"
            )
        if config.schedule is None and not config.search.value:
            found.append("autoprog.search: 0 leaves nothing to search in; give a part of the budget, as 2%")
        parts = {"fraction": 1.0, "epochs": recipe.budget.length.value}
        if config.schedule is None and config.search.value * config.stages >= parts.get(config.search.kind, math.inf):
            found.append(
                f"autoprog.search: {config.search} is no less than one of {config.stages} stages: none is left to "
                "train what is chosen; search for less"
            )
        if config.search.kind not in ("epochs", "fraction"):
            found.append(f"autoprog.search: got {config.search}, expected epochs, or a part of the budget, as 2%")
        if config.schedule is not None:
            if len(config.schedule) != config.stages:
                found.append(
                    f"autoprog.schedule: {len(config.schedule)} nets for {config.stages} stages; give one for each"
                )
            if any((net.size is None) == ("size" in config.space) for net in config.schedule):
                found.append(
                    "autoprog.schedule: sizes are for a space with size: 6@128px, or depths alone, for each stage"
                )
            depths = [net.depth for net in config.schedule]
            if depths != sorted(depths):
                found.append(f"autoprog.schedule: depths {depths} must not fall")
            sizes = [net.size for net in config.schedule]
            if falls(sizes):
                found.append(f"autoprog.schedule: got sizes {sizes}, expected ones that do not fall, up to model.size")
        asked = list(config.asked)
        if not asked or asked != sorted(set(asked)) or not asked[0] or asked[-1] != 1:
            found.append(f"autoprog.asked: got {asked}, expected growing parts of the search above 0, and 1 at last")
        if len(config.averages) != 2 or list(config.averages) != sorted(config.averages):
            found.append(f"autoprog.averages: got {list(config.averages)}, expected two decays, the smaller one first")
        if deepens(config) and recipe.model.weights:
            found.append(
                "autoprog.space: where depth grows, copies take the places of blocks of model.weights, and a search "
                "begins with them in another order; set autoprog.space=size, give an autoprog.schedule of one depth, "
                "or train from scratch"
            )
        return found

    @staticmethod
    def config_warnings(recipe: Recipe) -> list[str]:
        schedule, size = recipe.of("autoprog").schedule, recipe.model.size
        if not schedule or schedule[-1].size in (None, size):
            return []
        return [
            f"autoprog.schedule ends with {schedule[-1]}, and model.size is {size}: nothing is trained at that size"
        ]

    @staticmethod
    def image_sizes(recipe: Recipe) -> Sequence[Stage]:
        """Of a search the ladder: it may take larger sizes sooner."""
        config: AutoProgConfig = recipe.of("autoprog")
        if "size" not in config.space:
            return ()
        if config.schedule is not None:
            return stages_of([net.size for net in config.schedule], config.stages)
        return stages_of(ladder(recipe.model.size, config.scale, config.stages, config.multiple), config.stages)

    # --- stages ---

    def bounds(self) -> list[float]:
        """Where the stages begin, as parts of the budget."""
        stages = self.config.stages
        if self.length_kind == "epochs" and self.whole >= stages:
            return [math.floor(self.whole * k / stages) / self.whole for k in range(stages)]
        return [k / stages for k in range(stages)]

    @property
    def search(self) -> float:
        """A search's part of the budget."""
        length = self.config.search
        return length.value / self.whole if length.kind == "epochs" else length.value

    def stage(self, at: Progress) -> int:
        return sum(at.fraction >= bound - 1e-12 for bound in self.bounds()) - 1

    def before(self, stage: int) -> int | None:
        """The last stage before it of which a step was taken: a run that was killed may have passed over some."""
        return max((entered for entered in self.began if entered < stage), default=None)

    @remembered
    def candidates(self, stage: int) -> list[Net]:
        """What a stage chooses from; one where there is nothing to choose."""
        if self.config.schedule is not None:
            return [self.config.schedule[stage]]
        if stage == self.config.stages - 1:
            return [Net(self.depths[-1], self.ladder[-1])]
        depths, sizes, before = self.depths, self.ladder, self.before(stage)
        if before is None:
            some = [dict.fromkeys((values[0], values[len(values) // 2], values[-1])) for values in (depths, sizes)]
            return [Net(depth, size) for size in some[1] for depth in some[0]]
        now = self.chosen(before)
        further, place = depths.index(now.depth) + 1, sizes.index(now.size)
        deeper = depths[further : further + 3] or depths[-1:]
        return [Net(depth, size) for size in sizes[place : place + 2] for depth in deeper]

    def decided(self, stage: int) -> bool:
        nets = self.candidates(stage)
        whole = self.due_rounds(self.searched.get(stage, 0.0)) == len(self.config.asked)
        return len(nets) == 1 or (whole and stage not in self.under_way)

    def due_rounds(self, searched: float) -> int:
        """How many rounds of losses are due after so much of a search, as a part of the budget."""
        return sum(searched >= part * self.search - 1e-12 for part in self.config.asked)

    @remembered
    def chosen(self, stage: int) -> Net:
        """The stage's net; the largest candidate as long as the search is on."""
        nets = self.candidates(stage)
        if not self.decided(stage):
            return nets[-1]
        if len(nets) == 1:
            return nets[0]
        losses = np.mean(self.losses[stage], axis=0).tolist()
        return nets[best(losses, self._costs(stage), self.config.exponent)]

    def _costs(self, stage: int) -> list[float]:
        if self.config.cost == "time":
            return self.times[stage]
        size = self.run.recipe.model.size
        return [
            float(self.run.macs(net.size or size, Shape(block_order=tuple(range(net.depth)))))
            for net in self.candidates(stage)
        ]

    @remembered
    def supernet(self, stage: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """The order of blocks that a stage begins with, and which of them are copies of which."""
        nets, before = self.candidates(stage), self.before(stage)
        deepest = max(net.depth for net in nets)
        # At the start nothing is copied; new are the blocks that the smallest net would have to be given.
        there = tuple(range(min(net.depth for net in nets))) if before is None else self.extracted(before)
        return deepen(there, deepest, self.count)

    def skipped(self, stage: int, depth: int) -> tuple[int, ...]:
        """The blocks that a candidate of ``depth`` passes over: the first of the new ones."""
        order, pairs = self.supernet(stage)
        return tuple(slot for slot, _ in pairs)[: len(order) - depth]

    @remembered
    def extracted(self, stage: int) -> tuple[int, ...]:
        """The blocks of the stage's net, in order."""
        gone = self.skipped(stage, self.chosen(stage).depth)
        return tuple(slot for slot in self.supernet(stage)[0] if slot not in gone)

    # --- plans ---

    def plan(self, plan: Plan, at: Progress) -> Plan:
        stage = self.stage(at)
        if self.decided(stage):
            return self._planned(plan, stage, self.chosen(stage))
        nets = self.candidates(stage)
        # Depth and size are drawn by the step's number: the same on every process, and after a restart.
        return self._planned(
            plan, stage, nets[int(np.random.default_rng((self.seed, at.step, 0xA9)).integers(len(nets)))]
        )

    def variants(self, plan: Plan, at: Progress) -> Sequence[Plan]:
        stage = self.stage(at)
        return () if self.decided(stage) else [self._planned(plan, stage, net) for net in self.candidates(stage)]

    def _planned(self, plan: Plan, stage: int, net: Net) -> Plan:
        """The plan for a step of ``net``: of the supernet where the stage is not decided."""
        searching = not self.decided(stage)
        order, pairs = self.supernet(stage)
        if searching:
            nets = self.candidates(stage)
            slots, skipped = order, self.skipped(stage, net.depth)
            feed_size = max((net.size for net in nets if net.size), default=None)
        else:
            skipped: tuple[int, ...] = ()
            slots, feed_size = self.extracted(stage), net.size
        whole = slots == tuple(range(self.count))
        plan = with_shape(plan, block_order=None if whole else slots, skipped_blocks=skipped)
        if self.sizes_grow:
            smaller = net.size if net.size != feed_size else None
            plan = replace(with_shape(plan, input_size=smaller), feed=replace(plan.feed, size=feed_size))
        plan = replace(plan, growth=self._growth(stage, searching, pairs) or plan.growth)
        return self._strengthened(plan, 1.0 if searching else stage / max(1, self.config.stages - 1))

    def _growth(self, stage: int, searching: bool, pairs: tuple[tuple[int, int], ...]) -> Growth | None:
        moments = "reset" if self.config.moments == "reset" else "zero"
        searched = len(self.candidates(stage)) > 1
        if not searching and searched:
            return Growth(2 * stage + 2, moments=moments)  # taken out of the supernet
        before = self.before(stage)
        if before is None:
            return None
        if not searched and self.candidates(stage)[0] == self.chosen(before):
            return self._growth(before, False, self.supernet(before)[1])  # nothing grows
        how, last = self.config.grow, len(self.ema_decays) - 1
        return Growth(
            2 * stage + 1, blocks=pairs, weights="random" if how == "random" else "copy", moments=moments,
            average=last if how.startswith("momentum") else None, new_only=how == "momentum_new",
        )  # fmt: skip

    def _strengthened(self, plan: Plan, way: float) -> Plan:
        if not self.config.strengthen:
            return plan
        part = self.config.operations + (1 - self.config.operations) * way
        if self.magnitude >= 1 and way < 1:  # whole magnitudes: 4, 6, 7, 9
            part = math.floor(self.magnitude * part + 1e-9) / self.magnitude
        return replace(plan, dials=replace(plan.dials, strength=way, randaugment_strength=part))

    def changes(self) -> Sequence[Length]:
        return [Length(bound, "fraction", f"{100 * bound:.4g}%") for bound in self.bounds()[1:]]

    # --- the search ---

    def probes(self, at: Progress) -> Sequence[Probe]:
        if self.config.schedule is not None:
            return ()
        stage = self.stage(at)
        if self.decided(stage):
            return ()
        self.asking, nets = stage, self.candidates(stage)
        timed = len(self.times.get(stage, ()))
        if self.config.cost == "time" and timed < len(nets):
            return [self._probe("seconds", stage, net) for net in nets[timed:]]
        if stage not in self.began:  # nothing has grown yet: there is nothing to judge
            return ()
        answered = len(self.under_way.get(stage, ()))
        if not answered:
            if self.since is None:  # no step was taken since the last round
                return ()
            # Of rounds that fall due within one step, one is asked.
            before = self.searched[stage]
            if self.due_rounds(before + at.fraction - self.since) == self.due_rounds(before):
                return ()
            self.round_at = at.fraction
        return [self._probe("loss", stage, net) for net in nets[answered:]]

    def _probe(self, kind: str, stage: int, net: Net) -> Probe:
        order = self.supernet(stage)[0]
        slots = None if order == tuple(range(self.count)) else order
        shape = Shape(block_order=slots, skipped_blocks=self.skipped(stage, net.depth))
        average = 0 if kind == "loss" and self.config.loss_of == "average" else None
        sets = ("block_order", "skipped_blocks", "input_size")
        split = self.config.loss_on if kind == "loss" else "train"
        return Probe(kind, shape, net.size or 0, self.config.batches, split=split, average=average, sets=sets)

    def observe(self, seen: StepResult | ProbeResult) -> None:
        if isinstance(seen, StepResult):
            self._stepped(seen)
            return
        stage = self.asking
        if seen.probe.kind == "seconds":
            self.times.setdefault(stage, []).append(seen.value)
        else:
            if self.since is not None:
                self.searched[stage] += self.round_at - self.since
                self.since = None
            self.under_way.setdefault(stage, []).append(seen.value)
            if len(self.under_way[stage]) == len(self.candidates(stage)):
                self.losses.setdefault(stage, []).append(self.under_way.pop(stage))
        self.memory.clear()

    def choices(self) -> Sequence[str]:
        return [str(self.chosen(stage)) for stage in sorted(self.losses) if self.decided(stage)]

    def _stepped(self, seen: StepResult) -> None:
        stage = self.stage(seen.progress)
        if stage not in self.began:
            if self.before(stage) is not None and seen.plan.growth.number <= 2 * stage:
                return  # a step of the stage before, which the clock has left meanwhile: nothing has grown yet
            self.began[stage], self.searched[stage], self.since = seen.progress.fraction, 0.0, None
            self.memory.clear()
        if self.since is None:
            self.since = seen.progress.fraction

    def state_dict(self) -> dict[str, Any]:
        return {
            "times": dict(self.times),
            "losses": dict(self.losses),
            "under_way": dict(self.under_way),
            "began": dict(self.began),
            "searched": dict(self.searched),
            "since": self.since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.times, self.losses, self.began = dict(state["times"]), dict(state["losses"]), dict(state["began"])
        self.under_way, self.searched = dict(state["under_way"]), dict(state["searched"])
        self.since = state["since"]
        self.memory.clear()
