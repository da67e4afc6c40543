"""The training plan: the next part of a run. Methods propose it, and the trainer executes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from vitlocal.progress import Progress


@dataclass(frozen=True)
class Feed:
    """The batches of the loader: crops of ``size`` x ``size`` pixels, ``batch_size`` at a time over all processes.

    ``subset`` is the number of a subset of the rows, which the source knows; 0 stands for all rows.
    """

    size: int
    batch_size: int
    subset: int = 0


@dataclass(frozen=True)
class Shape:
    """The part of the full model that a step runs. None stands for the whole.

    - ``heads``, ``hidden``: by level, the number of heads of each attention, and of hidden units of each feed-forward
      part. The first ones run. A model whose blocks all have the same sizes has one level.
    - ``grid``: side of the centre crop of the token grid of the first level, in patches. With
      ``crop_before_embedding`` the image is cropped before the patch embedding, which gives the same tokens at less
      cost.
    - ``token_keep_rate``: fraction of the patch tokens that each of the ``pruned_blocks`` keeps. With
      ``strict_threshold``, Swin keeps those that score above the last of them, as the released code.
      ``attention_keep_rate``: fraction of the tokens that each token attends to from there on, by one mask for all
      heads or, with ``per_head_masks``, by one for each.
    - ``block_order``: the blocks that exist, in the order in which they run. ``skipped_blocks``: those among them that
      this step skips.
    - ``trainable_blocks``: the blocks that are trained. With ``head_only``, only the last norm, the head and the stage
      embedding are trained outside of blocks.
    - ``input_size``: images are resized to this size on the device, px; at most the feed's size.
    - ``stage``: the row of the stage embedding, if the model has one.
    """

    heads: tuple[int, ...] | None = None
    hidden: tuple[int, ...] | None = None
    grid: int | None = None
    crop_before_embedding: bool = False
    token_keep_rate: float = 1.0
    attention_keep_rate: float = 1.0
    per_head_masks: bool = False
    pruned_blocks: tuple[int, ...] = ()
    strict_threshold: bool = False
    block_order: tuple[int, ...] | None = None
    skipped_blocks: tuple[int, ...] = ()
    trainable_blocks: tuple[int, ...] | None = None
    head_only: bool = False
    input_size: int | None = None
    stage: int | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Shape:
        """The shape whose fields are ``state``. Lists, as JSON has them, become tuples.

        Older checkpoints have one number of heads and of hidden units, those of a model with one level.
        """
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in state.items()}
        old = {name: (values[name],) for name in ("heads", "hidden") if isinstance(values.get(name), int)}
        return cls(**(values | old))


WHOLE_MODEL = Shape()


@dataclass(frozen=True)
class ModelParts:
    """The sizes of a whole model. A :class:`Shape` selects a part of it.

    ``heads``, ``hidden`` and ``depths``, the numbers of blocks, are by level, as those of a shape. ``grid``: side of
    the token grid of the first level, in patches. The side of a crop of the grid is a multiple of ``grid_multiple``.
    """

    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    grid: int
    depths: tuple[int, ...]
    grid_multiple: int = 1

    @property
    def blocks(self) -> int:
        """The number of blocks of all levels."""
        return sum(self.depths)


@dataclass(frozen=True)
class StageEmbedding:
    """A learned vector for each stage of training, which is added to the tokens.

    ``rows`` includes a last row for "no stage". ``std`` is the standard deviation of the initial values; 0 leaves the
    model's outputs unchanged. ``null_prob`` is the probability that an image gets the last row in training.
    ``tokens``: "all", or "class" for the class token only.
    """

    rows: int
    std: float = 0.0
    null_prob: float = 0.0
    tokens: str = "all"


@dataclass(frozen=True)
class Growth:
    """A change of weights and optimizer moments that is made once, when ``number`` changes.

    New are the heads and hidden units by which the shape exceeds the shape before the growth, and the ``blocks``:
    pairs (new block, block that it copies). New heads and hidden units copy old ones, see :func:`growth_sources`.

    - ``weights``: the new parts start as a "copy" or at "random". ``scale`` multiplies the outgoing weights of copies
      and of the parts that were copied. ``noise`` is added to copies, in standard deviations of the weights.
    - ``average``: the index of one of the methods' weight averages. All weights are first replaced by it; with
      ``new_only``, only copies of blocks are taken from it.
    - ``moments`` of new parts: "zero" or "copy". "reset" sets all moments of the model to zero.
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
    """Scalars that may change at every step at no cost."""

    lr_scale: float = 1.0  # multiplies the scheduled learning rate
    strength: float = 1.0  # of augmentation and drop path, as a fraction of the recipe's values
    randaugment_strength: float | None = None  # of RandAugment; None: as strength

    @property
    def randaugment(self) -> float:
        """The strength of RandAugment."""
        return self.strength if self.randaugment_strength is None else self.randaugment_strength


@dataclass(frozen=True)
class Plan:
    """Everything that methods decide. A change of :attr:`pass_key` starts a new pass of the loader."""

    feed: Feed
    dials: Dials = Dials()
    shape: Shape = WHOLE_MODEL
    growth: Growth = Growth(0)

    @property
    def pass_key(self) -> tuple[Feed, Shape]:
        """The part of the plan that is constant within a pass: feed and shape, without what changes at single steps."""
        shape = replace(self.shape, skipped_blocks=(), input_size=None, token_keep_rate=1.0, attention_keep_rate=1.0)
        return self.feed, shape

    def changed(self, before: Plan | None) -> dict[str, Any]:
        """The fields in which this plan differs from ``before`` (None: from the whole model), by dotted name."""
        found = {}
        for part, default in (("feed", None), ("dials", None), ("shape", WHOLE_MODEL)):
            old = getattr(before, part, default)  # None has no parts
            for name, value in vars(getattr(self, part)).items():
                if old is None or value != getattr(old, name):
                    found[f"{part}.{name}"] = value
        if before is not None and self.growth != before.growth:
            found["growth"] = self.growth.number
        return found

    @classmethod
    def from_state(cls, state: dict[str, dict[str, Any]]) -> Plan:
        """The plan whose :func:`~dataclasses.asdict` is ``state``."""
        feed, dials = Feed(**state["feed"]), Dials(**state["dials"])
        return cls(feed, dials, Shape.from_state(state["shape"]), Growth(**state["growth"]))


def fold(methods: Sequence[Any], start: Plan, progress: Progress) -> Plan:
    """The plan for ``progress``: ``start``, changed by each :class:`~vitlocal.methods.method.Method` in order."""
    plan = start
    for method in methods:
        proposed = method.plan(plan, progress)
        assert proposed.changed(plan).keys() <= method.writes, f"{method.name} sets fields it does not own"
        plan = proposed
    return plan


def with_size(plan: Plan, size: int) -> Plan:
    """``plan`` with crops of ``size`` px."""
    return replace(plan, feed=replace(plan.feed, size=size))


def with_shape(plan: Plan, **changes: Any) -> Plan:
    """``plan`` with these fields of its shape."""
    return replace(plan, shape=replace(plan.shape, **changes))


def growth_sources(old: int, new: int, which: str = "first") -> list[int]:
    """The indices, below ``old``, that the new parts ``old`` to ``new`` copy: the "first" or the "last" ones.

    If there are more new parts than old ones, the sources repeat from the start.
    """
    count = new - old
    begin = max(0, old - count) if which == "last" else 0
    return [(begin + place) % old for place in range(count)]


def deepen(order: Sequence[int], after: int, count: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Grows the block order ``order`` to ``after`` blocks: the new order, and pairs (new block, block that it copies).

    The last blocks are repeated most, and copies follow their source: 6 to 8 gives 0, 1, 2, 3, 4, 4, 5, 5 (the
    "interpolation" of Li et al. 2022, as released). Copies take the free indices below ``count``, in order.
    """
    free = (index for index in range(count) if index not in order)
    times, more = divmod(after, len(order))
    grown: list[int] = []
    pairs: list[tuple[int, int]] = []
    for place, block in enumerate(order):
        copies = [next(free) for _ in range(times - 1 + (place >= len(order) - more))]
        grown += [block, *copies]
        pairs += [(copy, block) for copy in copies]
    return tuple(grown), tuple(pairs)
