"""What a run does next: methods propose a plan, the trainer acts on it.

A *method* (image-size curriculum, budgeted growth, …) is a pure function from where the run stands
(:class:`Progress`) to what it should do (:class:`Plan`). :func:`fold` applies a recipe's methods in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from typing import Any, Protocol

UNITS = {"ep": ("epochs", 1.0), "steps": ("steps", 1.0), "s": ("seconds", 1.0), "m": ("seconds", 60.0),
         "h": ("seconds", 3600.0), "%": ("fraction", None), "TF": ("flops", 1e12), "PF": ("flops", 1e15),
         "EF": ("flops", 1e18)}  # fmt: skip

# Of Progress.
FIELDS = {"epochs": "epoch", "steps": "step", "seconds": "seconds", "fraction": "fraction", "flops": "flops"}
TRAINING_FLOPS = 6  # to a multiply-add of the forward pass: two operations, and a backward of twice the forward


@dataclass(frozen=True)
class Length:
    """A length of training: ``90ep``, ``5000steps``, ``45s``, ``30m``, ``24h``, ``3PF`` (floating-point operations, in
    units of 1e12, 1e15 or 1e18), or ``10%`` of the budget."""

    value: float
    kind: str  # "epochs", "steps", "seconds", "flops" or "fraction"
    text: str

    @classmethod
    def parse(cls, text: str) -> Length:
        """Raises ValueError where ``text`` is not a non-negative number and one of the units."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*(ep|steps|s|m|h|%|TF|PF|EF)", text.strip())
        if match is None:
            raise ValueError("a number and a unit: 90ep, 5000steps, 45s, 30m, 24h, 3PF or 10%")
        kind, scale = UNITS[match[2]]
        number = float(match[1])
        # Divided: 0.35 is the number next to 35 / 100, and not next to 35 × 0.01.
        return cls(number / 100 if scale is None else number * scale, kind, f"{match[1]}{match[2]}")

    def done(self, at: Progress) -> float:
        """The part of this length that lies behind ``at``: 0 at the start, 1 and more once it is over."""
        return self.spent(at) / self.value if self.value else 1.0

    def spent(self, at: Progress) -> float:
        """What ``at`` has behind it, in this length's kind."""
        return getattr(at, FIELDS[self.kind])

    def end(self, now: Progress) -> Progress:
        """``now``, moved to where this length ends (what other kinds will read there is not known)."""
        return replace(now, **{FIELDS[self.kind]: self.value})

    def __str__(self) -> str:
        return self.text


def points(changes: Sequence[Length], now: Progress) -> list[Progress]:
    """Where each of ``changes``, in order, is reached: what is behind ``now`` is left out, and of other kinds than the
    change's own, what was known before it."""
    found = []
    for change in changes:
        if change.done(now) < 1:
            now = change.end(now)
            found.append(now)
    return found


@dataclass(frozen=True)
class Stage:
    """A stage of a curriculum: crops of ``size`` px, until the run has come to ``until``; the last has no end."""

    size: int
    until: Length | None = None

    @classmethod
    def parse(cls, text: str) -> Stage:
        """From ``32px until 10%`` or, without an end, ``224px``; raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)\s*px(?:\s+until\s+(.+))?", text.strip())
        if match is None or not int(match[1]):
            raise ValueError("a size and where it ends: 32px until 10%, 64px until 5ep, and 224px last")
        return cls(int(match[1]), Length.parse(match[2]) if match[2] else None)

    def __str__(self) -> str:
        return f"{self.size}px" + (f" until {self.until}" if self.until else "")


@dataclass(frozen=True)
class Position:
    """Where the next batch begins: ``images`` of epoch ``epoch`` are done."""

    epoch: int = 0
    images: int = 0


@dataclass(frozen=True)
class Progress:
    """Where a run stands. ``seconds`` is the budget's clock, ``fraction`` the part of the budget spent."""

    epoch: float = 0.0  # with its fraction: 2.5 is the middle of the third epoch
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    fraction: float = 0.0
    flops: float = 0.0  # of training steps: TRAINING_FLOPS to a multiply-add of a forward pass, whatever is frozen


@dataclass(frozen=True)
class Feed:
    """What the loader cuts: crops of ``size`` × ``size`` pixels, ``batch_size`` at a time.

    ``subset`` is a number by which the source keeps the rows to draw from; 0 stands for all rows.
    """

    size: int
    batch_size: int
    subset: int = 0


@dataclass(frozen=True)
class Shape:
    """The part of the full model that a step runs. None stands for all there is.

    - ``heads``, ``hidden``: so many heads of each attention and hidden units of each feed-forward part, the first ones.
    - ``grid``: side, in patches, of the centre crop of the token grid; ``crops_images``: taken before the patches are
      embedded, which gives the same tokens for less.
    - ``kept``: part of the patch tokens that stay at each of the ``pruned`` blocks; ``attended``: part of the tokens
      that each token attends to, from there on, by one mask for all heads or by ``own_masks``.
    - ``slots``: the blocks that there are, in order; ``skipped``: those that this step passes over.
    - ``trainable``: the blocks that are trained; ``head_only``: of what lies outside of blocks, the last norm, the head
      and the stages' vectors alone are.
    - ``input_size``: images are resized to it on the device, px; at most the feed's size.
    - ``stage``: the number that the model is told, where it has an embedding for that.
    """

    heads: int | None = None
    hidden: int | None = None
    grid: int | None = None
    crops_images: bool = False
    kept: float = 1.0
    attended: float = 1.0
    own_masks: bool = False
    pruned: tuple[int, ...] = ()
    slots: tuple[int, ...] | None = None
    skipped: tuple[int, ...] = ()
    trainable: tuple[int, ...] | None = None
    head_only: bool = False
    input_size: int | None = None
    stage: int | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Shape:
        """The shape of which ``asdict`` gave ``state``, perhaps by way of JSON."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in state.items()})


WHOLE_MODEL = Shape()


@dataclass(frozen=True)
class Growth:
    """What to do once to weights and moments: when ``number`` first differs from that of the last growth done.

    New are the heads and hidden units that the shape has beyond those of the shape before the growth, which take from
    old ones (``sources``: see :func:`sources_of`), and the ``blocks``: pairs (new slot, the slot that it takes from).

    - ``weights``: what new slots start as: "copy", or "random", drawn anew. ``scale``: both the copies' and the
      sources' outgoing weights are multiplied by it where a source has copies; ``noise``: standard deviation of what
      is added to copies, in standard deviations of the weights.
    - ``average``: before that, all weights become those of this one of the methods' averages; with ``new_only``, none
      do, and copies of blocks are taken from it.
    - ``moments``: of new slots "zero" or "copy" (old ones are kept), or "reset": all moments are zeroed.
    """

    number: int
    _: KW_ONLY
    blocks: tuple[tuple[int, int], ...] = ()
    sources: str = "first"
    weights: str = "copy"
    scale: float = 1.0
    noise: float = 0.0
    average: int | None = None
    new_only: bool = False
    moments: str = "zero"


@dataclass(frozen=True)
class Dials:
    """Scalars that change at no cost, from step to step."""

    lr_scale: float = 1.0  # on top of the schedule
    strength: float = 1.0  # of augmentation and drop path: a part of what the recipe says
    operations: float | None = None  # ... of RandAugment, where it is not the same

    @property
    def of_operations(self) -> float:
        """The strength of RandAugment."""
        return self.strength if self.operations is None else self.operations


@dataclass(frozen=True)
class Plan:
    """All that a method may decide. A change of ``feed`` or ``shape`` starts a new pass of the loader."""

    feed: Feed
    dials: Dials = Dials()
    shape: Shape = WHOLE_MODEL
    growth: Growth = Growth(0)

    @property
    def of_pass(self) -> tuple[Feed, Shape]:
        """What stays as it is within a pass: all that a step feeds and runs, but for what may move at every step."""
        return self.feed, replace(self.shape, skipped=(), input_size=None, kept=1.0, attended=1.0)

    def changed(self, before: Plan | None) -> dict[str, Any]:
        """The fields in which this plan differs from ``before``; without one, from a plan that asks for nothing."""
        found = {}
        for part in ("feed", "dials", "shape"):
            new = getattr(self, part)
            old = getattr(before, part) if before else {"feed": None, "dials": None, "shape": WHOLE_MODEL}[part]
            for field in fields(new):
                value = getattr(new, field.name)
                if old is None or value != getattr(old, field.name):
                    found[f"{part}.{field.name}"] = value
        if before is not None and self.growth != before.growth:
            found["growth"] = self.growth.number
        return found

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, dict[str, Any]]) -> Plan:
        """The plan whose :meth:`state_dict` is given."""
        return cls(
            Feed(**state["feed"]), Dials(**state["dials"]), Shape.from_state(state["shape"]), Growth(**state["growth"])
        )


@dataclass(frozen=True)
class StepResult:
    """What a step tells the methods; tensors are on the device, and not yet read.

    Of several processes each tells of its own part: ``loss`` is that part of the batch's mean, the rest in the others.
    """

    loss: Any  # 0-D
    ids: Any  # (B,) int64, the rows that were trained on
    plan: Plan
    at: Progress = Progress()  # before the step
    hits: Any = None  # (B,) bool: the class of highest logit is the row's own; tap "hits"
    spread: Any = None  # (B,) how unevenly the last block's class token attends; tap "spread"


@dataclass(frozen=True)
class Probe:
    """Something that the trainer finds out for a method, apart from training. Rank 0's answer reaches every rank.

    ``sets`` names the fields in which the candidate differs from the present plan's shape; ``size`` of 0 is the present
    feed's.

    - "seconds": of forward and backward, an image, the mean over ``batches`` batches: a float.
    - "loss": the mean loss of ``batches`` batches of ``split``, the weights being those of ``average``: a float.
    - "trainability": (mean condition number of the tangent kernel over ``kernel_batches`` batches, ZiCo's sum over
      ``batches`` more): two floats; ``samples`` a batch.
    - "sum": ``value``, a tensor on the device, added up over all processes: a tensor on the CPU.
    """

    kind: str
    shape: Shape = WHOLE_MODEL
    size: int = 0
    batches: int = 0
    kernel_batches: int = 0
    split: str = "train"
    average: int | None = None
    samples: int | None = None
    value: Any = None
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProbeResult:
    probe: Probe
    value: Any


@dataclass(frozen=True)
class Claims:
    """What a recipe has a method set, fields of the plan, such as "feed.size", or "budget.length"; and what no other
    may set beside it, and why."""

    name: str
    writes: frozenset[str]
    refuses: Mapping[str, str]


class Method(Protocol):
    """A way to train cheaply. ``plan`` is pure: with the same state, the same progress gives the same plan."""

    name: str
    writes: frozenset[str]  # the plan's fields it may set, such as "feed.size"
    taps: frozenset[str]  # what it wants of each step: "hits", "spread"
    averages: Sequence[float]  # decays of copies of the weights that are to follow them
    stage_rows: int  # of a table of stages that the model is to have; 0: none
    length: Length | None  # of the run, where the method reckons it

    def claims(self, recipe: Any) -> Claims: ...  # the same, told before anything is built, and what goes not beside it

    def doubts(self, recipe: Any) -> list[str]: ...  # what the recipe may hardly mean: sentences

    def plan(self, plan: Plan, at: Progress) -> Plan: ...

    def changes(self) -> Sequence[Length]: ...  # where its plan will change, in order, as far as that is known

    def variants(self, plan: Plan, at: Progress) -> Sequence[Plan]: ...  # what steps like ``plan``'s may draw, if any

    def evaluated(self, shape: Shape) -> Shape: ...  # in which shape a model trained in ``shape`` is evaluated

    def probes(self, at: Progress) -> Sequence[Probe]: ...  # what it must know before it can plan on, usually nothing

    def observe(self, seen: StepResult | ProbeResult) -> None: ...  # must not wait for the device

    def choices(self) -> Sequence[str]: ...  # what it has decided by what it was told, in order

    def notes(self) -> dict[str, Any]: ...  # of state_dict's kind, each process's own: tensors, to be added up

    def load_notes(self, notes: dict[str, Any]) -> None: ...  # the sums, on rank 0 alone

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def conflicts(methods: Sequence[Claims]) -> list[str]:
    """Names every pair of methods that do not go together, and why."""
    found = []
    for place, first in enumerate(methods):
        for second in methods[place + 1 :]:
            if both := first.writes & second.writes:
                found.append(
                    f"methods: {first.name} and {second.name} both set {', '.join(sorted(both))}; keep one of the two"
                )
                continue  # one reason is enough
            for one, other in ((first, second), (second, first)):
                reasons = [reason for field, reason in one.refuses.items() if field in other.writes - one.writes]
                found += [f"methods: {one.name} and {other.name} do not go together: {reason}" for reason in reasons]
    return found


def fold(methods: Sequence[Method], start: Plan, at: Progress) -> Plan:
    """The plan for ``at``: ``start`` with every method's wishes, in the recipe's order."""
    plan = start
    for method in methods:
        proposed = method.plan(plan, at)
        assert proposed.changed(plan).keys() <= method.writes, f"{method.name} sets fields it does not own"
        plan = proposed
    return plan


def with_size(plan: Plan, size: int) -> Plan:
    return replace(plan, feed=replace(plan.feed, size=size))


def reshaped(plan: Plan, **changes: Any) -> Plan:
    """``plan`` with these fields of its shape."""
    return replace(plan, shape=replace(plan.shape, **changes))


# --- growth: where what is new comes from ----------------------------------------------------------------------------


def sources_of(old: int, new: int, which: str = "first") -> list[int]:
    """Where slots ``old`` to ``new`` take from, of the ``old`` ones: the "first" or the "last" as many.

    Of more new slots than old ones all are taken, from the start again where they end.
    """
    count = new - old
    begin = max(0, old - count) if which == "last" else 0
    return [(begin + place) % old for place in range(count)]


def duplicated(before: int, after: int) -> list[int]:
    """Where each of ``after`` layers comes from, of ``before`` layers: the last ones appear once more than the first.

    Copies are adjacent: 6 to 8 gives 0, 1, 2, 3, 4, 4, 5, 5 (the released code's "interpolation").
    """
    times, more = divmod(after, before)
    return [layer for layer in range(before) for _ in range(times + (layer >= before - more))]


def deepened(slots: Sequence[int], after: int, count: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The order of ``after`` blocks grown from ``slots``, and what each new one takes from: pairs (slot, source).

    New blocks take free slots of the ``count`` that there are, in order; the first of several copies stays where it is.
    """
    free = iter(slot for slot in range(count) if slot not in set(slots))
    order, pairs, last = [], [], None
    for layer in duplicated(len(slots), after):
        if layer != last:
            order.append(slots[layer])
        else:
            order.append(next(free))
            pairs.append((order[-1], slots[layer]))
        last = layer
    return tuple(order), tuple(pairs)
