"""The base class of training methods, and what a method exchanges with the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vitlocal.plan import WHOLE_MODEL, Plan, Shape, StageEmbedding
from vitlocal.progress import Length, Progress, Stage

if TYPE_CHECKING:  # reading a configuration must not load PyTorch
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What a training step shows to the methods. Tensors are on the device; reading them would wait for it.

    With several processes, each one sees its own part: ``loss`` is that part's share of the batch mean.
    """

    loss: Tensor  # 0-D
    ids: Tensor  # (B,) int64, the rows that were trained on
    plan: Plan
    progress: Progress = Progress()  # before the step
    correct: Tensor | None = None  # (B,) bool, whether the top class is the label; step output "correct"
    attention_variance: Tensor | None = None  # (B,) of the last block's attention; step output "attention_variance"


@dataclass(frozen=True)
class Probe:
    """A measurement that a method asks the trainer for. It leaves no trace in the run. Every rank gets rank 0's result.

    ``sets`` names the fields of ``shape`` in which the candidate differs from the current plan. ``size`` 0 is the
    current size. The kinds:

    - "seconds": forward and backward, per image, the mean over ``batches`` batches: a float.
    - "loss": mean loss over ``batches`` batches of ``split``, with the weights of ``average``: a float.
    - "trainability": the mean condition number of the tangent kernel over ``kernel_batches`` batches, and ZiCo over
      ``batches`` batches, of ``samples`` images each: two floats.
    - "sum": ``value``, a tensor on the device, summed over all processes: a tensor on the CPU.
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
    """A probe and what the trainer measured."""

    probe: Probe
    value: Any


@dataclass(frozen=True)
class Claims:
    """The fields of the plan that a method sets (or "budget.length"), and the fields that no other method may set."""

    name: str
    writes: frozenset[str]
    refuses: Mapping[str, str]  # field -> reason


def conflicts(claims: Sequence[Claims]) -> list[str]:
    """One message for each pair of methods that cannot be combined."""
    found = []
    for place, first in enumerate(claims):
        for second in claims[place + 1 :]:
            if both := first.writes & second.writes:
                found.append(
                    f"methods: {first.name} and {second.name} both set {', '.join(sorted(both))}; keep one of the two"
                )
                continue  # one reason is enough
            for one, other in ((first, second), (second, first)):
                reasons = [reason for field, reason in one.refuses.items() if field in other.writes - one.writes]
                found += [f"methods: {one.name} and {other.name} cannot be combined: {reason}" for reason in reasons]
    return found


class Recipe(Protocol):
    """What a method may ask of the configuration that it is part of."""

    methods: tuple[str, ...]
    model: Any
    train: Any
    augment: Any
    evaluate: Any
    budget: Any
    data: Any
    run: Any

    def of(self, method: str) -> Any: ...  # that method's own options

    @property
    def claims(self) -> Sequence[Claims]: ...  # of its methods


@dataclass(frozen=True)
class MethodContext:
    """What a method's constructor may know of the run."""

    recipe: Any
    images: int = 1  # of the training split
    image_bytes: Callable[[int], int] = lambda size: size * size  # activation memory of an image of this size, bytes
    macs: Callable[[int, Shape], int] = lambda size, shape: size * size  # multiply-adds of a forward pass
    parts: Mapping[str, int] | None = None  # see models.shape.model_parts
    blocks: int = 0  # number of blocks; 0: the model has none
    processes: int = 1


class Method:
    """A training method. This base class changes nothing; subclasses override what they need.

    ``plan`` must be pure: equal state and equal progress give equal plans.
    """

    name: ClassVar[str]  # in a recipe's `methods`, and the name of its section
    options: ClassVar[type]  # a frozen dataclass, each field made by vitlocal.options.option
    writes: frozenset[str] = frozenset()  # the plan's fields that it may set, such as "feed.size"
    refuses: Mapping[str, str] = {}  # fields that no other method may set beside it -> why
    search_advice: ClassVar[str] = ""  # which options make its search cheaper

    step_outputs: frozenset[str] = frozenset()  # further outputs of each step: "correct", "attention_variance"
    ema_decays: Sequence[float] = ()  # decays, per step, of weight averages that it needs beside the run's own
    stage_embedding: StageEmbedding | None = None  # that the model needs
    budget_length: Length | None = None  # replaces budget.length, if the method computes it

    def __init__(self, context: MethodContext):
        pass

    # --- before a run exists -----------------------------------------------------------------------------------------

    @classmethod
    def claims(cls, recipe: Any) -> Claims:
        """What the method sets under this recipe."""
        return Claims(cls.name, cls.writes, cls.refuses)

    @staticmethod
    def problems(recipe: Any) -> list[str]:
        """Errors in the recipe: sentences with the option, its value and the remedy."""
        return []

    @staticmethod
    def config_warnings(recipe: Any) -> list[str]:
        """What is allowed but probably a mistake. The run prints it at the start."""
        return []

    @staticmethod
    def image_sizes(recipe: Any) -> Sequence[Stage]:
        """The image sizes that it will feed, as far as they are known before the run; empty if it sets none."""
        return []

    # --- planning ----------------------------------------------------------------------------------------------------

    def plan(self, plan: Plan, progress: Progress) -> Plan:
        """``plan`` with this method's changes."""
        raise NotImplementedError

    def changes(self) -> Sequence[Length]:
        """Where its plan will change, in order, as far as that is known. The trainer compiles these steps early."""
        return []

    def variants(self, plan: Plan, progress: Progress) -> Sequence[Plan]:
        """The plans that single steps of the coming pass may draw."""
        return []

    def evaluation_shape(self, shape: Shape) -> Shape:
        """The shape in which a model that was trained in ``shape`` is evaluated."""
        return shape

    def batch_size_at(self, size: int) -> int | None:
        """The batch size at ``size`` px; None if the method does not set it."""
        return None

    def rows(self, subset: int) -> np.ndarray:
        """The rows of ``feed.subset``, (n,) int64, of a method that sets it."""
        raise NotImplementedError

    # --- measuring and observing -------------------------------------------------------------------------------------

    def probes(self, progress: Progress) -> Sequence[Probe]:
        """What it must know before it can plan on. The trainer measures it and calls :meth:`observe`."""
        return []

    def observe(self, result: StepResult | ProbeResult) -> None:
        """Notes the result of a step or of a probe. Must not wait for the device."""

    def choices(self) -> Sequence[str]:
        """What its searches have decided so far, in order."""
        return []

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Its state, the same on every process: plain values and tensors on the CPU."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""

    def local_state(self) -> dict[str, Tensor]:
        """The part of its state that each process has for itself. A checkpoint stores the sum over processes."""
        return {}

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        """Restores the sums of :meth:`local_state`, on rank 0 only."""
