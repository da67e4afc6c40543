"""AutoProg-Zero (Li et al. 2024, arXiv 2410.00350) for fine-tuning a classifier or a diffusion transformer.

docs/methods/unfreeze.md describes the method. A level is the number of groups of blocks that are trained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vitlocal.errors import ConfigError
from vitlocal.methods.method import Claims, MethodContext, Needs, Probe, Recipe, StepResult
from vitlocal.methods.search import NET, Net, SearchMethod, remembered
from vitlocal.options import COUNT, FLAG, FRACTION, PIXELS, STAGES, Choice, Number, Section, Series, messages, option
from vitlocal.plan import Growth, Plan, Shape, StageEmbedding, with_shape, with_size
from vitlocal.progress import Progress


@dataclass(frozen=True)
class UnfreezeConfig(Section):
    stages: int = option(4, STAGES, "number S of equal stages, and of groups of blocks")
    groups: str = option(
        "mod", Choice("mod", "contiguous", "top", "released"), "mod: block i is in group i mod S; contiguous, top: "
        "consecutive blocks, from the first or last on; released: as the released code, which compares name prefixes"
    )  # fmt: skip
    non_blocks: str = option(
        "all",
        Choice("all", "head"),
        "layers outside of the blocks that are trained; head: only the head and the last norm",
    )
    moments: str = option("keep", Choice("keep", "reset"), "optimizer moments at the start of each stage")
    min_scale: float = option(0.25, FRACTION, "smallest image size, as a fraction of model.size; 1: sizes do not grow")
    size_multiple: int = option(32, PIXELS, "image sizes are multiples of this number, px")
    schedule: tuple[Net, ...] | None = option(
        None, Series(NET), "level and size of every stage, without a search: 1@64px,2@128px,3@160px,4@224px"
    )
    probe_batch_size: int = option(16, Number(2, whole=True), "images per batch of a probe, over all processes")
    kernel_batches: int = option(2, COUNT, "batches that measure the condition number of the tangent kernel")
    zico_batches: int = option(2, Number(2, whole=True), "batches that measure ZiCo")
    timed_batches: int = option(6, COUNT, "batches that measure the time of forward and backward")
    rank_weights: tuple[float, float, float] = option(
        (1.0, 0.5, 0.5), Series(Number(0), 3), "weights of the ranks by time, by conditioning and by ZiCo"
    )
    rank_tolerance: float = option(1e-6, Number(0), "values this close share a rank; times are in seconds per batch")
    stage_embedding: bool = option(True, FLAG, "add a learned vector of the current stage to the tokens")
    stage_init_std: float = option(0.0, Number(0), "standard deviation of the initial stage vectors (published: 0.02)")
    stage_null_prob: float = option(
        0.1, FRACTION, "probability that a training image gets the vector of no stage; but see diffusion.stage_drop"
    )
    stage_tokens: str = option("all", Choice("all", "class"), "tokens to which the stage vector is added")
    evaluate_stage: str = option("present", Choice("present", "last"), "stage whose vector evaluations use")
    renamed = {"outside": "non_blocks", "scale": "min_scale", "multiple": "size_multiple",
               "samples": "probe_batch_size", "votes": "rank_weights", "tolerance": "rank_tolerance",
               "stage_std": "stage_init_std", "stage_null": "stage_null_prob",
               "evaluated": "evaluate_stage"}  # fmt: skip


def groups_of(count: int, stages: int, how: str) -> list[tuple[int, ...]]:
    """The trained blocks of each level, for ``count`` blocks. The sets are nested, and the last contains all blocks."""
    found = []
    for level in range(1, stages + 1):
        end = round(count * level / stages)
        blocks = [block for block in range(count) if block % stages < level]
        if how == "contiguous":
            blocks = list(range(end))
        elif how == "top":
            blocks = list(range(count - end, count))
        elif how == "released" and level == stages:
            blocks = list(range(count))
        elif how == "released" and level > 1:  # the prefix "blocks.1" also matches blocks.10 to blocks.19
            prefixes = tuple(map(str, blocks))
            blocks = [block for block in range(count) if str(block).startswith(prefixes)]
        found.append(tuple(blocks))
    return found


def ranks(values: Sequence[float], tolerance: float) -> list[int]:
    """Ranks from 1 for the smallest value. Values within ``tolerance`` of the value before share a rank. NaN: last."""
    comparable = [math.inf if math.isnan(value) else value for value in values]
    found, rank, before = [0] * len(values), 1, -math.inf
    for number, (value, place) in enumerate(sorted(zip(comparable, range(len(values)), strict=True)), start=1):
        if not (value == before or value - before < tolerance):
            rank = number
        found[place], before = rank, value
    return found


def vote(times: Sequence[float], scores: Sequence[Sequence[float]], weights: Sequence[float], tolerance: float) -> int:
    """The candidate with the smallest weighted sum of ranks: fast, well conditioned, high ZiCo. Ties: the fastest."""
    conditions, zicos = zip(*scores, strict=True)
    by = [ranks(values, tolerance) for values in (times, conditions, [-value for value in zicos])]
    sums = [sum(weight * rank for weight, rank in zip(weights, one, strict=True)) for one in zip(*by, strict=True)]
    return min(range(len(sums)), key=lambda place: (sums[place], times[place], place))


class Unfreeze(SearchMethod):
    """Groups of blocks are unfrozen, and images grow, stage by stage. The whole network always runs."""

    name = "unfreeze"
    options = UnfreezeConfig

    def __init__(self, context: MethodContext):
        super().__init__(context)
        config, recipe = context.recipe.section(UnfreezeConfig), context.recipe
        self._config, self._sizes, self._sizes_grow = config, self._ladder(recipe), bool(self.image_sizes(recipe))
        if not context.blocks:
            raise ConfigError(f"methods: unfreeze needs a Vision Transformer with blocks, not {recipe.model_name}")
        self._groups = groups_of(context.blocks, config.stages, config.groups)
        least = 2 * context.processes
        if config.probe_batch_size < least or config.probe_batch_size % 2:
            raise ConfigError(
                f"unfreeze.probe_batch_size: got {config.probe_batch_size} for {context.processes} processes, each of "
                f"which takes pairs of images; use an even number of at least {least}"
            )
        self._scores: dict[int, list[tuple[float, float]]] = {}  # by stage: conditioning and ZiCo of each candidate
        self._times: dict[int, list[float]] = {}  # by stage: seconds per batch of each candidate
        if config.stage_embedding:
            rows, std, null_prob = config.stages + 1, config.stage_init_std, config.stage_null_prob
            self.needs = Needs(stage_embedding=StageEmbedding(rows, std, null_prob, config.stage_tokens))

    @classmethod
    def claims(cls, recipe: Recipe) -> Claims:
        config = recipe.section(UnfreezeConfig)
        writes = {"shape.trainable_blocks": True, "feed.size": bool(cls.image_sizes(recipe)),
                  "shape.stage": config.stage_embedding, "growth": config.moments == "reset",
                  "shape.head_only": config.non_blocks == "head"}  # fmt: skip
        excludes = {"shape.block_order": "both choose which blocks are trained; remove one of the two"}
        spared_by = {"shape.stage": "unfreeze.stage_embedding=no"}
        return Claims(cls.name, frozenset(field for field, does in writes.items() if does), excludes, spared_by)

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        config, size = recipe.section(UnfreezeConfig), recipe.model_size
        schedule = config.schedule or ()
        levels = [net.depth for net in schedule]
        return super().problems(recipe) + messages({
            f"unfreeze.schedule: got levels {levels}, expected increasing levels of at most {config.stages}":
                levels != sorted(levels) or any(level > config.stages for level in levels),
            "unfreeze.schedule: each entry needs a size of at most model.size, as in 1@64px":
                any(net.size is None or net.size > size for net in schedule),
            "unfreeze.min_scale: image_size sets the sizes; set unfreeze.min_scale=1, or remove image_size":
                "image_size" in recipe.methods and config.min_scale < 1 and not schedule,
        })  # fmt: skip

    @classmethod
    def config_warnings(cls, recipe: Recipe) -> list[str]:
        config = recipe.section(UnfreezeConfig)
        last = config.schedule[-1].depth if config.schedule else config.stages
        return super().config_warnings(recipe) + messages({
            f"unfreeze.schedule ends with level {last} of {config.stages}: the blocks of the other groups are never "
            "trained": last < config.stages,
            "unfreeze is for fine-tuning: without model.weights most blocks keep their random weights until their "
            "stage begins; give --model.weights=RUN or a file": not recipe.model_weights,
        })  # fmt: skip

    @remembered
    def _candidates(self, stage: int) -> list[Net]:
        """{current, next} level x {current, next} size. A stage that was skipped counts with its smallest candidate."""
        stages, sizes = self._config.stages, self._sizes
        if self._config.schedule is not None:
            return [self._config.schedule[stage]]
        if stage == stages - 1:
            return [Net(stages, sizes[-1])]
        now = self._chosen(stage - 1) if stage else Net(1, sizes[0])
        place = sizes.index(now.size)  # type: ignore[arg-type]
        return [Net(level, size) for size in sizes[place : place + 2] for level in (now.depth, now.depth + 1)]

    def _best(self, stage: int) -> Net | None:
        nets, times = self._candidates(stage), self._times.get(stage, [])
        if len(times) < len(nets):
            return None
        return nets[vote(times, self._scores[stage], self._config.rank_weights, self._config.rank_tolerance)]

    def _shape_fields(self, stage: int, net: Net) -> dict[str, Any]:
        """The fields of the shape that ``net`` sets."""
        fields = {"trainable_blocks": self._groups[net.depth - 1], "head_only": self._config.non_blocks == "head"}
        return fields | ({"stage": stage} if self._config.stage_embedding else {})

    def plan(self, plan: Plan, progress: Progress) -> Plan:
        stage = self._stage(progress)
        while stage and not self._decided(stage):  # until the choice is made, the stage before continues
            stage -= 1
        net = self._chosen(stage)
        plan = with_shape(plan, **self._shape_fields(stage, net))
        if plan.shape.trainable_blocks == self._groups[-1]:
            plan = with_shape(plan, trainable_blocks=None)
        if self._config.moments == "reset" and stage:
            plan = replace(plan, growth=Growth(stage, moments="reset"))
        return with_size(plan, net.size) if self._sizes_grow and net.size is not None else plan

    def evaluation_shape(self, shape: Shape) -> Shape:
        if self._config.stage_embedding and self._config.evaluate_stage == "last":
            return replace(shape, stage=self._config.stages - 1)
        return shape

    def probes(self, progress: Progress) -> Sequence[Probe]:
        stage, config = self._stage(progress), self._config
        if self._decided(stage):
            return ()
        self._asked_stage, number = stage, len(self._times.get(stage, ()))
        net = self._candidates(stage)[number]
        fields, samples = self._shape_fields(stage, net), config.probe_batch_size
        size = net.size if self._sizes_grow and net.size else 0
        kind, batches, kernel_batches = "seconds", config.timed_batches, 0
        if len(self._scores.get(stage, ())) == number:
            kind, batches, kernel_batches = "trainability", config.zico_batches, config.kernel_batches
        return [Probe(kind, Shape(**fields), size, batches, kernel_batches, samples=samples, sets=tuple(fields))]

    def observe(self, result: StepResult | Probe) -> None:
        if not isinstance(result, Probe):
            return
        if result.kind == "trainability":
            self._scores.setdefault(self._asked_stage, []).append(result.answer)
        else:
            self._times.setdefault(self._asked_stage, []).append(result.answer * self._config.probe_batch_size)
        self._memory.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self._scores), "times": dict(self._times)}

    def load_state_dict(self, state: dict[str, Any], local: Any = None) -> None:
        self._scores = {stage: [tuple(pair) for pair in pairs] for stage, pairs in state["scores"].items()}
        self._times = dict(state["times"])
        self._memory.clear()
