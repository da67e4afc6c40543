"""AutoProg-Zero (Li et al. 2024, arXiv 2410.00350) for fine-tuning a Vision Transformer that classifies.

The whole network always runs; what grows over S stages is the set of blocks that are trained, and the image size. What
to take at each stage is chosen before it, without training: by the conditioning of the tangent kernel, by ZiCo and by
measured time, which vote by ranks. Published code trains diffusion transformers; what is ours for classification is
said where it is.

Symbols: l level (how many of the S groups of blocks are trained), r image size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vitlocal.errors import ConfigError
from vitlocal.methods.method import Claims, Method, MethodContext, Probe, ProbeResult, Recipe, StepResult
from vitlocal.methods.search import Net, NetText, falls, ladder, stages_of
from vitlocal.options import COUNT, SHARE, Choice, Flag, Maybe, Number, Section, Series, option
from vitlocal.plan import Growth, Plan, Shape, StageEmbedding, with_shape, with_size
from vitlocal.progress import Length, Progress, Stage


@dataclass(frozen=True)
class UnfreezeConfig(Section):
    stages: int = option(4, COUNT, "S, of equal length, and as many groups of blocks")
    groups: str = option(
        "mod", Choice("mod", "contiguous", "top", "released"), "block i is in group i mod S; in runs from the first "
        "block on; from the last; or as the released code's name prefixes have it"
    )  # fmt: skip
    outside: str = option(
        "all", Choice("all", "head"), "what is trained outside of the blocks: all, or the last norm and the head, so "
        "that (without a stage embedding) nothing below the first trained block has a backward"
    )  # fmt: skip
    moments: str = option("keep", Choice("keep", "reset"), "the optimizer's, from stage to stage")
    scale: float = option(0.25, SHARE, "smallest image size, as a part of model.size; 1: sizes do not grow")
    multiple: int = option(32, COUNT, "sizes are multiples of this, px")
    schedule: tuple[Net, ...] | None = option(
        None, Maybe(Series(NetText())), "level and size of all stages, without search: 1@64px,2@128px,3@160px,4@224px"
    )
    samples: int = option(16, Number(low=2, whole=True), "images a batch of the scores, over all processes")
    kernel_batches: int = option(2, COUNT, "by which the tangent kernel's condition is told")
    zico_batches: int = option(2, Number(low=2, whole=True), "by which ZiCo is told")
    timed_batches: int = option(6, COUNT, "by which forward and backward are timed")
    votes: tuple[float, float, float] = option(
        (1.0, 0.5, 0.5), Series(Number(low=0), 3), "weights of the ranks by time, conditioning and ZiCo"
    )
    tolerance: float = option(1e-6, Number(low=0), "numbers that differ by less share a rank; times in seconds a batch")
    stage_embedding: bool = option(True, Flag(), "the model is told the stage, by a learned vector")
    stage_std: float = option(
        0.0, Number(low=0), "of that vector's start (published: 0.02; 0 leaves the pretrained model as it is)"
    )
    stage_null: float = option(0.1, SHARE, "chance that an image's stage is not told, in training")
    stage_tokens: str = option("all", Choice("all", "class"), "the tokens that it is added to")
    evaluated: str = option("present", Choice("present", "last"), "the stage that an evaluation is told")


def groups_of(count: int, stages: int, how: str) -> list[tuple[int, ...]]:
    """The blocks that each level trains, of ``count``: nested, growing, the last all of them."""
    found = []
    for level in range(1, stages + 1):
        if how == "mod":
            blocks = [block for block in range(count) if block % stages < level]
        elif how == "released":  # "blocks.1" is meant for one block, and is a prefix of blocks.10 to blocks.19
            named = [str(block) for block in range(count) if block % stages < level]
            first = [str(block) for block in range(count) if block % stages == 0]
            blocks = [b for b in range(count) if any(str(b).startswith(name) for name in named)]
            if level == 1:
                blocks = [int(name) for name in first]
            elif level == stages:
                blocks = list(range(count))
        else:
            ends = [round(count * level / stages)]
            blocks = list(range(ends[0])) if how == "contiguous" else list(range(count - ends[0], count))
        found.append(tuple(blocks))
    return found


def ranks(values: Sequence[float], tolerance: float) -> list[int]:
    """Rank 1 for the smallest; values within ``tolerance`` of the one before share its rank. Not-a-numbers are last."""
    worth = [math.inf if math.isnan(value) else value for value in values]
    order = sorted(range(len(worth)), key=lambda place: worth[place])
    found, rank = [0] * len(worth), 0
    for number, place in enumerate(order):
        before = worth[order[number - 1]] if number else None
        same = before is not None and (worth[place] == before or worth[place] - before < tolerance)
        rank = rank if same else number + 1
        found[place] = rank
    return found


def vote(
    times: Sequence[float], conditions: Sequence[float], zicos: Sequence[float], weights: Sequence[float],
    tolerance: float,
) -> int:  # fmt: skip
    """The candidate of least weighted sum of ranks: fast, well conditioned, of high ZiCo; of equal ones the fastest."""
    by = [ranks(times, tolerance), ranks(conditions, tolerance), ranks([-value for value in zicos], tolerance)]
    sums = [sum(weight * rank for weight, rank in zip(weights, one, strict=True)) for one in zip(*by, strict=True)]
    return min(range(len(sums)), key=lambda place: (sums[place], times[place], place))


def sizes_of(recipe: Recipe) -> tuple[int, ...]:
    """The image sizes of its stages, or of the ladder that a search climbs."""
    config: UnfreezeConfig = recipe.of("unfreeze")
    stated = tuple(net.size for net in config.schedule or ())
    return stated or ladder(recipe.model.size, config.scale, config.stages, config.multiple)


class Unfreeze(Method):
    """See the module. What lies outside of the blocks (embeddings, norm, head) is trained throughout.

    Frozen blocks have no gradients, hence no decay and no update; what is saved is these. Gradients still pass through
    all blocks, to the embeddings, unless these are frozen too (``outside=head``).
    """

    name = "unfreeze"
    options = UnfreezeConfig

    def __init__(self, run: MethodContext):
        self.config: UnfreezeConfig = run.recipe.of(self.name)
        recipe, config = run.recipe, self.config
        self.size = recipe.model.size
        self.writes = self.claims(run.recipe).writes
        self.sizes, self.sizes_grow = sizes_of(recipe), bool(self.image_sizes(recipe))
        if not run.blocks:
            raise ConfigError(
                f"methods: unfreeze needs a Vision Transformer's blocks, and {recipe.model.name} has none"
            )
        self.groups = groups_of(run.blocks, config.stages, config.groups)
        self.embeds_stage = config.stage_embedding
        if config.samples < 2 * run.processes or config.samples % 2:
            raise ConfigError(
                f"unfreeze.samples: got {config.samples} for {run.processes} processes, each of which takes pairs; "
                f"use an even number of at least {2 * run.processes}"
            )
        self.samples = config.samples
        self.scores: dict[int, list[tuple[float, float]]] = {}  # by stage: conditioning and ZiCo of each candidate
        self.times: dict[int, list[float]] = {}  # ... and its seconds a batch
        self.asking = 0  # the stage of the last question
        self.memory: list[tuple[list[Net], Net | None]] | None = None  # of nets(), until more is known
        if self.embeds_stage:
            self.stage_embedding = StageEmbedding(
                config.stages + 1, config.stage_std, config.stage_null, config.stage_tokens
            )

    @classmethod
    def claims(cls, recipe: Recipe) -> Claims:
        config: UnfreezeConfig = recipe.of(cls.name)
        writes = {"shape.trainable_blocks": True, "feed.size": cls.image_sizes(recipe), "shape.stage": config.stage_embedding,
                  "growth": config.moments == "reset", "shape.head_only": config.outside == "head"}  # fmt: skip
        refuses = {"shape.block_order": "both choose which blocks there are to train; keep one of the two"}
        return Claims(cls.name, frozenset(field for field, does in writes.items() if does), refuses)

    @staticmethod
    def problems(recipe: Recipe) -> list[str]:
        config: UnfreezeConfig = recipe.of("unfreeze")
        found = []
        if config.schedule:
            if len(config.schedule) != config.stages:
                found.append(
                    f"unfreeze.schedule: {len(config.schedule)} entries for {config.stages} stages; give one for each"
                )
            levels = [net.depth for net in config.schedule]
            if levels != sorted(levels) or max(levels) > config.stages:
                found.append(f"unfreeze.schedule: levels {levels}, expected growing ones, of at most {config.stages}")
            if any(net.size is None or net.size > recipe.model.size for net in config.schedule):
                found.append("unfreeze.schedule: each entry needs a size of at most model.size, as in 1@64px")
            sizes = [net.size for net in config.schedule]
            if falls(sizes):
                found.append(f"unfreeze.schedule: got sizes {sizes}, expected ones that do not fall, up to model.size")
        if config.schedule == ():
            found.append("unfreeze.schedule: it is empty; give level and size of each stage, or none for a search")
        if "image_size" in recipe.methods and config.scale < 1 and not config.schedule:
            found.append("unfreeze.scale: image_size sets the sizes; set unfreeze.scale=1, or leave image_size out")
        return found

    @staticmethod
    def config_warnings(recipe: Recipe) -> list[str]:
        config, size, found = recipe.of("unfreeze"), recipe.model.size, []
        if config.schedule:
            last = config.schedule[-1]
            if last.depth < config.stages:
                found.append(
                    f"unfreeze.schedule ends with level {last.depth} of {config.stages}: the other groups' blocks are "
                    "never trained"
                )
            if last.size != size:
                found.append(
                    f"unfreeze.schedule ends with {last.size} px, and model.size is {size}: nothing is trained at that "
                    "size"
                )
        if not recipe.model.weights:
            found.append(
                "unfreeze is for fine-tuning, and without model.weights most blocks stay as they were drawn until "
                "their stage comes; give --model.weights=RUN or a file"
            )
        return found

    @staticmethod
    def image_sizes(recipe: Recipe) -> Sequence[Stage]:
        """Of a search the ladder: it may take larger sizes sooner, or later."""
        sizes = sizes_of(recipe)
        return stages_of(sizes, recipe.of("unfreeze").stages) if set(sizes) != {recipe.model.size} else ()

    # --- stages ---

    def stage(self, at: Progress) -> int:
        stages = self.config.stages
        return min(math.floor(at.fraction * stages + 1e-9), stages - 1)

    def nets(self) -> list[tuple[list[Net], Net | None]]:
        """Of each stage (level, size) to choose from, and what was chosen; None while that is not decided.

        A stage that the run has passed without asking has the least of its candidates.
        """
        if self.memory is None:
            self.memory = self._nets()
        return self.memory

    def _nets(self) -> list[tuple[list[Net], Net | None]]:
        stages, sizes = self.config.stages, self.sizes
        found: list[tuple[list[Net], Net | None]] = []
        levels, there = range(1, min(2, stages) + 1), sizes[:2]
        for stage in range(stages):
            if self.config.schedule is not None:
                options = [self.config.schedule[stage]]
            elif stage == stages - 1:
                options = [Net(stages, sizes[-1])]
            else:
                options = [Net(level, size) for size in dict.fromkeys(there) for level in levels]
            chosen = None
            if len(options) == 1:
                chosen = options[0]
            elif len(self.times.get(stage, ())) == len(options):
                conditions, zicos = zip(*self.scores[stage], strict=True)
                votes = vote(self.times[stage], conditions, zicos, self.config.votes, self.config.tolerance)
                chosen = options[votes]
            found.append((options, chosen))
            now = chosen or options[0]
            place = sizes.index(now.size)
            levels, there = range(now.depth, min(now.depth + 1, stages) + 1), sizes[place : place + 2]
        return found

    def plan(self, plan: Plan, at: Progress) -> Plan:
        stage, nets = self.stage(at), self.nets()
        while stage and nets[stage][1] is None:  # until the question is answered, all stays as it is
            stage -= 1
        options, chosen = nets[stage]
        return self._shaped(plan, chosen or options[0], stage)

    def _shaped(self, plan: Plan, net: Net, stage: int) -> Plan:
        blocks = self.groups[net.depth - 1]
        plan = with_shape(
            plan, trainable_blocks=None if len(blocks) == len(self.groups[-1]) else blocks,
            head_only=self.config.outside == "head", stage=stage if self.embeds_stage else plan.shape.stage,
        )  # fmt: skip
        if self.config.moments == "reset" and stage:
            plan = replace(plan, growth=Growth(stage, moments="reset"))
        if self.sizes_grow:
            plan = with_size(plan, net.size)
        return plan

    def evaluation_shape(self, shape: Shape) -> Shape:
        if self.embeds_stage and self.config.evaluated == "last":
            return replace(shape, stage=self.config.stages - 1)
        return shape

    def changes(self) -> Sequence[Length]:
        stages = self.config.stages
        return [Length(k / stages, "fraction", f"{100 * k / stages:.4g}%") for k in range(1, stages)]

    # --- the search ---

    def probes(self, at: Progress) -> Sequence[Probe]:
        stage = self.stage(at)
        options, chosen = self.nets()[stage]
        if chosen is not None:
            return ()
        self.asking, number = stage, len(self.times.get(stage, ()))
        config = self.config
        shape = Shape(
            trainable_blocks=self.groups[options[number].depth - 1], head_only=config.outside == "head",
            stage=stage if self.embeds_stage else None,
        )  # fmt: skip
        sets = ("trainable_blocks", "head_only", "stage") if self.embeds_stage else ("trainable_blocks", "head_only")
        size = options[number].size if self.sizes_grow else 0
        if len(self.scores.get(stage, ())) == number:
            batches, kernel = config.zico_batches, config.kernel_batches
            return [Probe("trainability", shape, size, batches, kernel, samples=self.samples, sets=sets)]
        return [Probe("seconds", shape, size, config.timed_batches, samples=self.samples, sets=sets)]

    def observe(self, seen: StepResult | ProbeResult) -> None:
        if not isinstance(seen, ProbeResult):
            return
        if seen.probe.kind == "trainability":
            self.scores.setdefault(self.asking, []).append(seen.value)
        else:
            self.times.setdefault(self.asking, []).append(seen.value * self.samples)
        self.memory = None

    def choices(self) -> Sequence[str]:
        return [str(self.nets()[stage][1]) for stage in sorted(self.times) if self.nets()[stage][1] is not None]

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores), "times": dict(self.times)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = {stage: [tuple(pair) for pair in pairs] for stage, pairs in state["scores"].items()}
        self.times, self.memory = dict(state["times"]), None
