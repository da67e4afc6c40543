"""Tri-level training (Kong et al. 2023, "Peeling the Onion", arXiv 2211.10801; details from the code Tri-Level-ViT).

docs/methods/trilevel.md describes the method. Symbols: r and r_a, the rates of kept tokens and connections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vitlocal.errors import ConfigError
from vitlocal.methods.method import Claims, Method, MethodContext, Needs, Probe, Recipe, StepResult
from vitlocal.options import FLAG, FRACTION, Choice, Duration, Number, Section, Series, messages, option
from vitlocal.plan import WHOLE_MODEL, Plan, Shape, with_shape
from vitlocal.progress import Length, Progress

if TYPE_CHECKING:  # reading a configuration must not load PyTorch: functions below import it
    from torch import Tensor

LEVELS = ("examples", "tokens", "attention")
PRUNED_AT = (0.25, 0.5, 0.75)  # fractions of the depth: blocks 3, 6 and 9 of 12
PRUNED_LEVEL, PRUNED_PLACES = 2, (1, 2, 3)  # of models in levels: the level and its blocks, as the code for Swin
WRONG, RIGHT = 1, 2  # results of examples in a record; 0: not seen


@dataclass(frozen=True)
class TrilevelConfig(Section):
    levels: tuple[str, ...] = option(LEVELS, Series(Choice(*LEVELS)), "levels that are on")
    held_out: float = option(0.2, FRACTION, "fraction of the examples that is held out")
    swap_fraction: float = option(0.05, FRACTION, "largest fraction of the examples that an update exchanges")
    update_every: Length = option(Length.parse("10%"), Duration(), "length between two updates of the examples")
    max_updates: int = option(5, Number(0, 10**6, whole=True), "largest number of updates of the examples")
    score: str = option(
        "forgetting",
        Choice("forgetting", "attention"),
        "easy examples are rarely forgotten; ties: random, or by how evenly the class token attends",
    )
    token_keep_rate: float = option(0.9, FRACTION, "final rate r of the tokens that each of the pruned blocks keeps")
    attention_keep_rate: float = option(0.1, FRACTION, "final rate r_a of the tokens that each token attends to")
    attention_masks: str = option(
        "shared", Choice("shared", "per_head"), "attention masks: one for all heads, or per head"
    )
    pruned_blocks: tuple[int, ...] | None = option(
        None, Series(Number(0, whole=True)), "blocks that drop tokens, from 0; none: at quarters of the depth"
    )
    strict_threshold: bool = option(
        False, FLAG, "Swin: keep the tokens that score above the last of the kept, one fewer, as the released code"
    )
    decay_start: Length = option(Length.parse("3.3333%"), Duration(), "when r and r_a start to fall from 1")
    decay_end: Length = option(Length.parse("36.6667%"), Duration(), "when r and r_a reach their final rates")
    decay_steps: int = option(
        8, Number(0, 1000, whole=True), "values of r, each compiled; 0: a new value at every step"
    )
    prune_evaluation: bool | None = option(
        None,
        FLAG,
        "evaluate with the final rates, or with all tokens; none: as the exported model, timm's Swin with all",
    )
    renamed = {"swapped": "swap_fraction", "every": "update_every", "updates": "max_updates", "kept": "token_keep_rate",
               "attended": "attention_keep_rate", "masks": "attention_masks", "blocks": "pruned_blocks",
               "begin": "decay_start", "end": "decay_end", "rungs": "decay_steps",
               "evaluate": "prune_evaluation"}  # fmt: skip

    @property
    def final_rates(self) -> dict[str, float]:
        """r and r_a at the end of the decay, by their field of the shape; 1 if the level is off."""
        return {
            "token_keep_rate": self.token_keep_rate if "tokens" in self.levels else 1.0,
            "attention_keep_rate": self.attention_keep_rate if "attention" in self.levels else 1.0,
        }


def forgetting(record: np.ndarray) -> np.ndarray:
    """The number of times that each example was forgotten, (n,) int64, from its results (E, n): WRONG or RIGHT.

    Counts right followed by wrong. An example that was never right counts E, and an example that was not seen -1.
    """
    epochs, count = record.shape
    times, before = np.zeros(count, np.int64), np.zeros(count, record.dtype)
    for seen in record:
        times += (before == RIGHT) & (seen == WRONG)
        before = np.where(seen > 0, seen, before)
    times[~(record == RIGHT).any(axis=0)] = epochs
    times[~(record > 0).any(axis=0)] = -1
    return times


def swap(
    kept: np.ndarray, pool: np.ndarray, times: np.ndarray, ties: np.ndarray, count: int, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Exchanges the ``count`` easiest rows of ``kept`` for ``count`` random rows of ``pool``: (kept, pool), sorted.

    The easiest have the smallest ``times`` forgotten, then the smallest ``ties``. Rows with ``times`` of -1 were not
    seen and stay. Removed rows cannot come back in the same exchange.
    """
    seen = kept[times[kept] >= 0]
    count = min(count, len(seen), len(pool))
    removed = seen[np.lexsort((ties[seen], times[seen]))[:count]]
    restored = draw.choice(pool, count, replace=False)
    return (
        np.sort(np.concatenate([np.setdiff1d(kept, removed), restored])),
        np.sort(np.concatenate([np.setdiff1d(pool, restored), removed])),
    )


def default_blocks(depths: Sequence[int]) -> tuple[int, ...]:
    """The blocks that drop tokens, counted from 0, of a model with these numbers of blocks by level."""
    if len(depths) == 1:
        return tuple(dict.fromkeys(round(part * depths[0]) for part in PRUNED_AT))
    first = sum(depths[:PRUNED_LEVEL])
    return tuple(first + place for place in PRUNED_PLACES if place < depths[PRUNED_LEVEL])


class ExampleRecord:
    """The results of ``count`` examples in each epoch, and their summed attention variance, on the device.

    Each process notes its own examples. Notes never wait for the device. ``tensors``: "records" (E, n) uint8 and, if it
    is measured, "attention_variance" (n,) float64. Before the first note it is empty.
    """

    def __init__(self, count: int):
        self.tensors: dict[str, Tensor] = {}
        self._count = count
        self._epochs: list[int] = []  # of the records

    def note(self, epoch: int, ids: Tensor, correct: Tensor, variance: Tensor | None) -> None:
        """Records a step: ``ids`` (B,) int64, ``correct`` (B,) bool and, if measured, ``variance`` (B,)."""
        import torch

        device = correct.device  # a checkpoint's tensors are on the CPU
        tensors = self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        if epoch not in self._epochs:
            row = torch.zeros(1, self._count, dtype=torch.uint8, device=device)
            tensors["records"] = torch.cat([tensors["records"], row]) if self._epochs else row
            self._epochs.append(epoch)
        ids = ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)
        tensors["records"][self._epochs.index(epoch)].index_copy_(0, ids, correct.to(torch.uint8) + WRONG)
        if variance is not None:
            if "attention_variance" not in tensors:
                tensors["attention_variance"] = torch.zeros(self._count, dtype=torch.float64, device=device)
            tensors["attention_variance"].index_add_(0, ids, variance.double())

    def state_dict(self) -> dict[str, Any]:
        """The kind of notes that there are, which is the same on every process."""
        return {"epochs": list(self._epochs), "attention_variance": "attention_variance" in self.tensors}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor] | None) -> None:
        """Restores :meth:`state_dict`, with the notes ``tensors``, or without notes."""
        import torch

        self._epochs, self.tensors = list(state["epochs"]), {}
        if self._epochs:
            self.tensors["records"] = torch.zeros(len(self._epochs), self._count, dtype=torch.uint8)
        if state["attention_variance"]:
            self.tensors["attention_variance"] = torch.zeros(self._count, dtype=torch.float64)
        for name, tensor in (tensors or {}).items():
            self.tensors[name].copy_(tensor)


class Trilevel(Method):
    """Fewer examples, tokens and connections. Each level is on or off."""

    name = "trilevel"
    options = TrilevelConfig

    def __init__(self, context: MethodContext):
        super().__init__(context)
        config = self._config = context.recipe.section(TrilevelConfig)
        self._seed, self._count = context.recipe.seed, context.images
        self._has_examples = "examples" in config.levels
        self._final_rates = config.final_rates
        self._prunes = min(self._final_rates.values()) < 1
        if self._prunes and context.parts is None:
            raise ConfigError(
                "trilevel.levels: tokens need a vitlocal_… model or timm's Swin, attention a vitlocal_… model, not "
                f"{context.recipe.model_name}; set trilevel.levels=examples"
            )
        depths = context.parts.depths if context.parts is not None else (0,)
        depth, blocks = sum(depths), config.pruned_blocks or default_blocks(depths)
        if config.strict_threshold and (len(depths) == 1 or self._final_rates["token_keep_rate"] == 1):
            raise ConfigError("trilevel.strict_threshold: only the tokens of Swin have this choice; leave it out")
        if wrong := [block for block in blocks if self._prunes and not block < depth]:
            raise ConfigError(f"trilevel.pruned_blocks: got {wrong[0]}; the model's {depth} blocks count from 0")
        # timm's Swin, which the export is, has no mask of tokens.
        stated = config.prune_evaluation
        self._prunes_evaluation = len(depths) == 1 if stated is None else stated
        per_head = config.attention_masks == "per_head" and self._final_rates["attention_keep_rate"] < 1
        self._pruning = {**self._final_rates, "pruned_blocks": blocks, "per_head_masks": per_head}
        self._pruning |= {"strict_threshold": True} if config.strict_threshold else {}
        # The outputs stay on after the last update, because without them the step would be compiled again.
        if self._has_examples and config.max_updates:
            by_attention = {"attention_variance"} if config.score == "attention" else set()
            self.needs = Needs(step_outputs=frozenset({"correct"} | by_attention))
        self._version = 1  # of the subset
        self._updated = Progress()  # when the subset was made
        order = np.random.default_rng((self._seed, 0x3E1)).permutation(self._count)
        out = round(config.held_out * self._count)
        self._pool, self._kept = np.sort(order[:out]), np.sort(order[out:])
        self._record = ExampleRecord(self._count)
        self._asked: Progress = Progress()
        self._answers: list[Tensor] = []

    @classmethod
    def claims(cls, recipe: Recipe) -> Claims:
        config = recipe.section(TrilevelConfig)
        examples = frozenset({"feed.subset"} if "examples" in config.levels else ())
        pruned = {f"shape.{name}" for name, rate in config.final_rates.items() if rate < 1}
        if not pruned:
            return Claims(cls.name, examples)
        masks = {"shape.per_head_masks"} if "shape.attention_keep_rate" in pruned else set()
        masks |= {"shape.strict_threshold"} if config.strict_threshold else set()
        reason = "the blocks that drop tokens and connections may not exist yet; set trilevel.levels=examples"
        writes, only = examples | pruned | masks | {"shape.pruned_blocks"}, "trilevel.levels=examples"
        spared_by = {"shape.token_keep_rate": only, "shape.attention_keep_rate": only} if examples else {}
        return Claims(cls.name, writes, {"shape.block_order": reason}, spared_by)

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        config = recipe.section(TrilevelConfig)
        examples, start, end = "examples" in config.levels, config.decay_start, config.decay_end
        return messages({
            "trilevel.levels: all levels are off; name some of them, or remove the method": not config.levels,
            "trilevel.levels: examples need one presentation per epoch; set augment.repeats=1, or leave out examples":
                examples and recipe.repeats > 1,
            f"trilevel.held_out: got {config.held_out:g}, expected a fraction between 0 and 1":
                examples and not 0 < config.held_out < 1,
            "trilevel.levels: a held-out example may replace a damaged one; set data.on_error=stop, or leave examples "
            "out": examples and recipe.on_error != "stop",
            "trilevel.update_every: got 0, expected a length above 0": examples and not config.update_every.value,
            "trilevel.score: attention needs a vitlocal_… model; use forgetting":
                examples and config.score == "attention" and not recipe.model_name.startswith("vitlocal_"),
            "trilevel.decay_steps: 0 would compile again at every step; set train.compile=no":
                not config.decay_steps and recipe.compiles,
            "trilevel.token_keep_rate: got 0, which keeps nothing; expected a rate above 0": not config.token_keep_rate,
            "trilevel.attention_keep_rate: got 0, which keeps nothing; expected a rate above 0":
                not config.attention_keep_rate,
            f"trilevel.decay_end: {end} does not come after trilevel.decay_start ({start})":
                start.kind == end.kind and start.value >= end.value,
        })  # fmt: skip

    # --- tokens and attention ---

    def _openness(self, progress: Progress) -> float:
        """The distance of r and r_a from their final rates: 1 until ``decay_start``, a cosine to 0 at ``decay_end``."""
        start, end, steps = self._config.decay_start, self._config.decay_end, self._config.decay_steps
        if start.kind == end.kind:
            part = (start.elapsed(progress) - start.value) / (end.value - start.value)
        else:  # of different units: the fraction of the end
            part = 0.0 if start.fraction_done(progress) < 1 else end.fraction_done(progress)
        exact = (1 + math.cos(math.pi * min(max(part, 0.0), 1.0))) / 2
        return math.ceil(exact * steps - 1e-9) / steps if steps else exact

    def plan(self, plan: Plan, progress: Progress) -> Plan:
        if self._has_examples:
            plan = replace(plan, feed=replace(plan.feed, subset=self._version))
        openness = self._openness(progress) if self._prunes else 1.0
        if openness == 1.0:
            return plan
        rates = {name: rate + (1 - rate) * openness for name, rate in self._final_rates.items()}
        return with_shape(plan, **(self._pruning | rates))

    def changes(self) -> Sequence[Length]:
        start, end, steps = self._config.decay_start, self._config.decay_end, self._config.decay_steps
        if not self._prunes or not steps:
            return []
        if start.kind != end.kind:
            return [end]
        parts = [math.acos(2 * (1 - step / steps) - 1) / math.pi for step in range(steps)]  # the inverse of the cosine
        values = [start.value + part * (end.value - start.value) + 1e-9 * max(end.value, 1.0) for part in parts]
        return [*(replace(end, value=value) for value in values), end]

    def evaluation_shape(self, shape: Shape) -> Shape:
        if not self._prunes:
            return shape
        whole = {name: getattr(WHOLE_MODEL, name) for name in self._pruning}
        return replace(shape, **(self._pruning if self._prunes_evaluation else whole))

    # --- examples ---

    def rows(self, subset: int) -> np.ndarray:
        assert subset == self._version, "only the current subset is known"
        return self._kept

    @property
    def _awaits_update(self) -> bool:
        """Whether a later update will read the notes of the steps."""
        return self._has_examples and self._version <= self._config.max_updates

    def observe(self, result: StepResult | Probe) -> None:
        if isinstance(result, Probe):
            self._answers.append(result.answer)
            if len(self._answers) == len(self._record.tensors):
                self._update(*self._answers)
        elif self._awaits_update and result.correct is not None:
            epoch = math.floor(result.progress.epoch + 1e-9)
            self._record.note(epoch, result.ids, result.correct, result.attention_variance)

    def probes(self, progress: Progress) -> Sequence[Probe]:
        """The notes of all processes, if an update is due. Updates fall between epochs, so that each epoch is whole."""
        whole, every = abs(progress.epoch - round(progress.epoch)) < 1e-9, self._config.update_every
        elapsed = every.elapsed(progress) - every.elapsed(self._updated)
        if not (self._awaits_update and whole and elapsed >= every.value - 1e-9):
            return ()
        self._asked, self._answers = progress, []
        return [Probe("sum", value=note.clone()) for note in self._record.tensors.values()]

    def _update(self, notes: Tensor, variance: Tensor | None = None) -> None:
        record = notes.numpy()
        draw = np.random.default_rng((self._seed, self._version, 0x5A9))
        ties = draw.random(self._count)
        if variance is not None:
            ties = variance.numpy() / np.maximum((record > 0).sum(axis=0), 1)
        count = round(self._config.swap_fraction * self._count)
        self._kept, self._pool = swap(self._kept, self._pool, forgetting(record), ties, count, draw)
        self._version += 1
        self._updated = self._asked
        self._record = ExampleRecord(self._count)

    def local_state(self) -> dict[str, Tensor]:
        return self._record.tensors

    def state_dict(self) -> dict[str, Any]:
        import torch

        rows = {"kept": torch.from_numpy(self._kept), "pool": torch.from_numpy(self._pool)}
        return {"version": self._version, "updated": asdict(self._updated), **rows, **self._record.state_dict()}

    def load_state_dict(self, state: dict[str, Any], local: dict[str, Tensor] | None = None) -> None:
        self._version, self._updated = state["version"], Progress(**state["updated"])
        self._kept, self._pool = state["kept"].numpy(), state["pool"].numpy()
        self._record.load_state_dict(state, local)
