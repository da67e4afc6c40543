"""Tri-level training (Kong et al. 2023, "Peeling the Onion", arXiv 2211.10801; details from the code Tri-Level-ViT).

Fewer examples: some are held out, and easy ones change places with held-out ones. Fewer tokens: those that the class
token attends to least are dropped. Fewer connections: each token attends to the few that it attends to most.

Shapes: n rows of the training split, E epochs of a window, r and r_a the parts of tokens and connections that stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitlocal.errors import ConfigError
from vitlocal.methods.method import Claims, Method, MethodContext, Probe, ProbeResult, Recipe, StepResult
from vitlocal.options import SHARE, Choice, Duration, Flag, Maybe, Number, Section, Series, option
from vitlocal.plan import Plan, Shape, with_shape
from vitlocal.progress import Length, Progress

NARROWED = (
    "token_keep_rate",
    "attention_keep_rate",
    "per_head_masks",
    "pruned_blocks",
)  # fields of the shape, by tokens and attention
LEVELS = ("examples", "tokens", "attention")
WRONG, RIGHT = 1, 2  # in a record; 0: not seen
PRUNED_AT = (0.25, 0.5, 0.75)  # of the depth: blocks 3, 6 and 9 of 12


@dataclass(frozen=True)
class TrilevelConfig(Section):
    levels: tuple[str, ...] = option(LEVELS, Series(Choice(*LEVELS)), "which levels are on")
    held_out: float = option(0.2, SHARE, "part of the examples that is held out")
    swapped: float = option(0.05, SHARE, "part of all examples that changes places at an update, at most")
    every: Length = option(Length.parse("10%"), Duration(), "between updates (published: 30 of 300 epochs)")
    updates: int = option(5, Number(low=0, whole=True), "how many of them")
    score: str = option(
        "forgetting", Choice("forgetting", "attention"),
        "easiest first: by times forgotten, ties broken at random, or by how evenly the class token attends",
    )  # fmt: skip
    kept: float = option(0.9, SHARE, "r: part of the tokens that stay, at each of the blocks")
    attended: float = option(0.1, SHARE, "r_a: part of the tokens that each attends to, from there on")
    masks: str = option("shared", Choice("shared", "own"), "whom to attend to is chosen for all heads, or by each")
    blocks: tuple[int, ...] | None = option(
        None,
        Maybe(Series(Number(low=0, whole=True))),
        "where tokens are dropped, from 0; none: at quarters of the depth",
    )
    begin: Length = option(Length.parse("3.3333%"), Duration(), "until when all stay (published: 10 of 300 epochs)")
    end: Length = option(Length.parse("36.6667%"), Duration(), "from when on r and r_a are reached (published: 110)")
    rungs: int = option(8, Number(low=0, whole=True), "steps from 1 to r, each of which compiles; 0: at every step")
    evaluate: bool = option(True, Flag(), "evaluations drop what training does in the end; no: nothing")


def narrowed_to(config: TrilevelConfig) -> tuple[float, float]:
    """r and r_a in the end; 1 for a level that is off."""
    kept = config.kept if "tokens" in config.levels else 1.0
    return kept, config.attended if "attention" in config.levels else 1.0


def forgetting(record: np.ndarray) -> np.ndarray:
    """How often each example was forgotten, (n,) int64, from its presentations (E, n): 0 unseen, 1 wrong, 2 right.

    Counts right followed by wrong. An example that was never right counts E, one that was not seen at all -1.
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
    """The ``count`` easiest of ``kept`` change places with as many of ``pool``, drawn uniformly: (kept, pool), sorted.

    Easiest is least often forgotten (``times``, -1 for what was not seen and stays), then of smallest ``ties``.
    What is removed now cannot be restored now.
    """
    seen = kept[times[kept] >= 0]
    count = min(count, len(seen), len(pool))
    removed = seen[np.lexsort((ties[seen], times[seen]))[:count]]
    restored = draw.choice(pool, count, replace=False)
    return (
        np.sort(np.concatenate([np.setdiff1d(kept, removed), restored])),
        np.sort(np.concatenate([np.setdiff1d(pool, restored), removed])),
    )


class Trilevel(Method):
    """Examples, tokens and attention, each level on or off.

    Correctness is noted on the device as training goes, a byte an example and epoch, and read at updates alone, when
    all processes' notes are added up: all train on one subset (in the released code each has its own).
    """

    name = "trilevel"
    options = TrilevelConfig

    def __init__(self, run: MethodContext):
        self.config: TrilevelConfig = run.recipe.of(self.name)
        self.seed, self.count = run.recipe.run.seed, run.images
        self.writes = self.claims(run.recipe).writes
        self.examples = "examples" in self.config.levels
        kept, attended = narrowed_to(self.config)
        self.narrows = kept < 1 or attended < 1
        depth = run.parts["blocks"] if run.parts is not None else 0
        blocks = self.config.blocks or tuple(dict.fromkeys(round(part * depth) for part in PRUNED_AT))
        if wrong := [block for block in blocks if self.narrows and not block < depth]:
            raise ConfigError(f"trilevel.blocks: there is no block {wrong[0]}; the model's {depth} are numbered from 0")
        own_masks = self.config.masks == "own" and attended < 1
        self.narrowest = Shape(
            token_keep_rate=kept, attention_keep_rate=attended, per_head_masks=own_masks, pruned_blocks=blocks
        )
        if self.narrows and run.parts is None:
            raise ConfigError(
                f"trilevel.levels: tokens and attention need a vitlocal_… model, not {run.recipe.model.name}; keep "
                "trilevel.levels=examples"
            )
        by_attention = self.examples and self.config.score == "attention"
        # To the run's end, also after the last update: without them the step would be compiled anew.
        taps = ({"correct"} if self.examples else set()) | ({"attention_variance"} if by_attention else set())
        self.step_outputs = frozenset(taps if self.config.updates else ())
        self.version = 1  # of the subset
        self.updated = Progress()  # when it was made
        order = np.random.default_rng((self.seed, 0x3E1)).permutation(self.count)
        out = round(self.config.held_out * self.count)
        self.pool, self.kept = np.sort(order[:out]), np.sort(order[out:])
        self.records: dict[int, Tensor] = {}  # by epoch: (n,) uint8 on the device
        self.spread: Tensor | None = None  # (n,) summed over the window
        self._asked, self._answers = Progress(), []

    @classmethod
    def claims(cls, recipe: Recipe) -> Claims:
        config: TrilevelConfig = recipe.of(cls.name)
        examples = {"feed.subset"} if "examples" in config.levels else set()
        kept, attended = narrowed_to(config)
        narrowed = ({"token_keep_rate", "pruned_blocks"} if kept < 1 else set()) | (
            {"attention_keep_rate", "per_head_masks", "pruned_blocks"} if attended < 1 else set()
        )
        reason = "tokens and connections go at blocks that may not be there yet; set trilevel.levels=examples"
        refuses = {"shape.block_order": reason} if narrowed else {}
        return Claims(cls.name, frozenset(examples | {f"shape.{name}" for name in narrowed}), refuses)

    @staticmethod
    def problems(recipe: Recipe) -> list[str]:
        config: TrilevelConfig = recipe.of("trilevel")
        found = []
        if not config.levels:
            found.append(
                "trilevel.levels: all are off; name some of examples, tokens, attention, or leave the method out"
            )
        if "examples" in config.levels:
            if recipe.augment.repeats > 1:
                found.append(
                    "trilevel.levels: examples are told apart by one presentation an epoch; set augment.repeats=1"
                )
            if not 0 < config.held_out < 1:
                found.append(f"trilevel.held_out: got {config.held_out:g}, expected a part between 0 and 1")
            if recipe.data.on_error != "stop":
                found.append(
                    "trilevel.levels: with data.on_error=skip an example that is held out may take a damaged one's "
                    "place; write the files without damaged images (--on-error skip), or leave examples out"
                )
            if not config.every.value:
                found.append("trilevel.every: got 0, expected a length")
            if config.score == "attention" and not recipe.model.name.startswith("vitlocal_"):
                found.append("trilevel.score: attention is seen in vitlocal_… models alone; use forgetting")
        if not config.rungs and recipe.train.compile != "no":
            found.append("trilevel.rungs: 0 moves at every step, each of which would be compiled; set train.compile=no")
        for name in ("kept", "attended"):
            if not getattr(config, name):
                found.append(f"trilevel.{name}: nothing would be left; expected a part above 0")
        begin, end = config.begin, config.end
        if begin.kind == end.kind and begin.value >= end.value:
            found.append(f"trilevel.end: {end} does not come after trilevel.begin ({begin})")
        return found

    # --- tokens and attention ---

    def openness(self, at: Progress) -> float:
        """How far r and r_a are from their end: 1 until ``begin``, a cosine down to 0 at ``end``."""
        begin, end = self.config.begin, self.config.end
        if begin.kind == end.kind:
            part = (begin.elapsed(at) - begin.value) / (end.value - begin.value)
        else:  # of different units the end's rate counts
            part = 0.0 if begin.fraction_done(at) < 1 else end.fraction_done(at)
        exact = (1 + math.cos(math.pi * min(max(part, 0.0), 1.0))) / 2
        rungs = self.config.rungs
        return math.ceil(exact * rungs - 1e-9) / rungs if rungs else exact

    def plan(self, plan: Plan, at: Progress) -> Plan:
        if self.examples:
            plan = replace(plan, feed=replace(plan.feed, subset=self.version))
        open_ = self.openness(at) if self.narrows else 1.0
        if open_ == 1.0:
            return plan
        last = self.narrowest
        kept, attended = (end + (1 - end) * open_ for end in (last.token_keep_rate, last.attention_keep_rate))
        return with_shape(
            plan,
            token_keep_rate=kept,
            attention_keep_rate=attended,
            per_head_masks=last.per_head_masks,
            pruned_blocks=last.pruned_blocks,
        )

    def changes(self) -> Sequence[Length]:
        if not self.narrows or not self.config.rungs:
            return []
        begin, end = self.config.begin, self.config.end
        if begin.kind != end.kind:
            return [end]
        found = []
        for rung in range(self.config.rungs):  # the cosine turned around
            part = math.acos(2 * (1 - rung / self.config.rungs) - 1) / math.pi
            value = begin.value + part * (end.value - begin.value)
            found.append(replace(end, value=value + 1e-9 * max(end.value, 1.0)))
        return [*found, end]

    def evaluation_shape(self, shape: Shape) -> Shape:
        if not self.narrows:
            return shape
        last = self.narrowest if self.config.evaluate else Shape()
        return replace(shape, **{name: getattr(last, name) for name in NARROWED})

    # --- examples ---

    def rows(self, number: int) -> np.ndarray:
        """The subset of that number, (m,) int64; only the present one is known."""
        assert number == self.version
        return self.kept

    def observe(self, seen: StepResult | ProbeResult) -> None:
        if isinstance(seen, ProbeResult):
            self._answers.append(seen.value)
            if len(self._answers) == 1 + (self.spread is not None):
                self._swap(*self._answers)
        elif self.watches and seen.correct is not None:
            epoch, device = math.floor(seen.progress.epoch + 1e-9), seen.correct.device
            if self.records and next(iter(self.records.values())).device != device:  # read from a checkpoint
                self.records = {each: record.to(device) for each, record in self.records.items()}
                self.spread = None if self.spread is None else self.spread.to(device)
            if epoch not in self.records:
                self.records[epoch] = torch.zeros(self.count, dtype=torch.uint8, device=device)
            ids = seen.ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else seen.ids
            self.records[epoch].index_copy_(0, ids, seen.correct.to(torch.uint8) + WRONG)
            if seen.attention_variance is not None:
                if self.spread is None:
                    self.spread = torch.zeros(self.count, dtype=torch.float64, device=device)
                self.spread.index_add_(0, ids, seen.attention_variance.double())

    @property
    def watches(self) -> bool:
        """Whether there is an update to come, for which steps are noted."""
        return self.examples and self.version <= self.config.updates

    def due(self, at: Progress) -> bool:
        """Whether the subset is to change: between epochs, so that each is whole."""
        whole = abs(at.epoch - round(at.epoch)) < 1e-9
        every = self.config.every
        return (
            self.watches and bool(self.records) and whole
            and every.elapsed(at) - every.elapsed(self.updated) >= every.value - 1e-9
        )  # fmt: skip

    def probes(self, at: Progress) -> Sequence[Probe]:
        if not self.due(at):
            return ()
        self._asked, self._answers = at, []
        notes = [torch.stack([record for _, record in sorted(self.records.items())])]  # (E, n)
        return [Probe("sum", value=note) for note in (*notes, *([self.spread] if self.spread is not None else []))]

    def _swap(self, notes: Tensor, spread: Tensor | None = None) -> None:
        record = notes.numpy()
        times = forgetting(record)
        draw = np.random.default_rng((self.seed, self.version, 0x5A9))
        ties = draw.random(self.count)
        if spread is not None:
            ties = spread.numpy() / np.maximum((record > 0).sum(axis=0), 1)
        count = round(self.config.swapped * self.count)
        self.kept, self.pool = swap(self.kept, self.pool, times, ties, count, draw)
        self.version += 1
        self.updated, self.records, self.spread = self._asked, {}, None

    def local_state(self) -> dict[str, Any]:
        if not self.records:
            return {}
        spread = {} if self.spread is None else {"attention_variance": self.spread}
        return {"records": torch.stack([record for _, record in sorted(self.records.items())]), **spread}

    def load_local_state(self, notes: dict[str, Any]) -> None:
        for record, noted in zip(
            (self.records[epoch] for epoch in sorted(self.records)), notes["records"], strict=True
        ):
            record.copy_(noted)
        if self.spread is not None:
            self.spread.copy_(notes["attention_variance"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "updated": asdict(self.updated),
            "kept": torch.from_numpy(self.kept),
            "pool": torch.from_numpy(self.pool),
            "epochs": sorted(self.records),
            "attention_variance": self.spread is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Without the notes: these are each process's own."""
        self.version, self.updated = state["version"], Progress(**state["updated"])
        self.kept, self.pool = state["kept"].numpy(), state["pool"].numpy()
        self.records = {epoch: torch.zeros(self.count, dtype=torch.uint8) for epoch in state["epochs"]}
        self.spread = torch.zeros(self.count, dtype=torch.float64) if state["attention_variance"] else None
