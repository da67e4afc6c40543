"""The base class of training methods, and the values that methods exchange with the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from vitlocal.options import Section
from vitlocal.plan import WHOLE_MODEL, ModelParts, Plan, Shape, StageEmbedding
from vitlocal.progress import Length, Progress, Stage

if TYPE_CHECKING:  # reading a configuration must not load PyTorch
    import numpy as np
    from torch import Tensor

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True)
class StepResult:
    """The results of a training step that methods may observe. Reading the tensors waits for the device.

    With several processes, each process has its own part of the batch. ``loss`` is that part's share of the mean.
    """

    loss: Tensor  # 0-D, on the device
    ids: Tensor  # (B,) int64, the rows that were trained on
    plan: Plan
    progress: Progress = Progress()  # before the step
    correct: Tensor | None = None  # (B,) bool, whether the top class is the label; step output "correct"
    attention_variance: Tensor | None = None  # (B,) of the last block's attention; step output "attention_variance"


@dataclass(frozen=True)
class Probe:
    """A measurement that the trainer makes for a method. It leaves the run unchanged. All ranks get rank 0's result.

    ``sets`` names the fields of ``shape`` in which the candidate differs from the current plan. ``size`` 0 means the
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
    samples: int = 0  # images per batch; 0: the batch size at that size
    value: Any = None
    sets: tuple[str, ...] = ()
    answer: Any = None  # the value that the trainer measured


@dataclass(frozen=True)
class Claims:
    """The fields of the plan that a method sets (or "budget.length"), and the fields that no other method may set.

    ``spared_by``: options with which the method does not set a field, for models that cannot change it.
    """

    name: str
    writes: frozenset[str] = frozenset()
    excludes: Mapping[str, str] = field(default_factory=dict)  # field -> reason
    spared_by: Mapping[str, str] = field(default_factory=dict)  # field -> option=value


@dataclass(frozen=True)
class Needs:
    """The things that a method needs from the trainer."""

    step_outputs: frozenset[str] = frozenset()  # further outputs of each step: "correct", "attention_variance"
    ema_decays: tuple[float, ...] = ()  # decays, per step, of weight averages of its own
    stage_embedding: StageEmbedding | None = None  # to be added to the model
    budget_length: Length | None = None  # replaces budget.length, if the method computes it


@dataclass(frozen=True)
class Recipe:
    """The part of the configuration that methods may read, as plain values."""

    methods: tuple[str, ...]
    options: Mapping[str, Any]  # the section of every known method, by its name
    model_name: str
    model_size: int  # px
    model_weights: str | None
    drop_path: float
    batch_size: int
    grad_accum_steps: int
    compiles: bool  # whether steps may be compiled
    budget: Length
    seed: int
    randaugment: float  # magnitude
    has_augmentation: bool  # beyond crop and flip
    repeats: int  # of each image in an epoch
    on_error: str  # at a damaged image
    claims: tuple[Claims, ...] = ()  # of ``methods``, in their order

    def section(self, kind: type[SectionT]) -> SectionT:
        """The options of the method whose options have the type ``kind``."""
        return next(section for section in self.options.values() if type(section) is kind)


@dataclass(frozen=True)
class MethodContext:
    """The facts about a run that a method's constructor may use. Without a model, the defaults apply."""

    recipe: Recipe
    images: int = 1  # of the training split
    image_bytes: Callable[[int], int] = lambda size: size * size  # activation memory of an image of this size, bytes
    macs: Callable[[int, Shape], int] = lambda size, shape: size * size  # multiply-adds of a forward pass
    parts: ModelParts | None = None  # None: the model is not ours, and no shape can select heads, tokens and such
    blocks: int = 0  # number of blocks; 0: the model has none
    processes: int = 1
    varies_drop_path: bool = True  # False: drop path is a constant of the model's forward pass


class Method:
    """A training method. This base class changes nothing; subclasses override what they need.

    ``plan`` must be pure: equal state and equal progress give equal plans.
    """

    name: ClassVar[str]  # in a recipe's `methods`, and the name of its section
    options: ClassVar[type[Section]]  # a frozen dataclass; vitlocal.options.option makes each field
    writes: frozenset[str] = frozenset()  # the plan's fields that it may set, such as "feed.size"
    needs: Needs = Needs()

    def __init__(self, context: MethodContext):
        self.writes = self.claims(context.recipe).writes

    @classmethod
    def claims(cls, recipe: Recipe) -> Claims:
        """The fields that the method sets under this recipe."""
        return Claims(cls.name, cls.writes)

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        """Errors in the recipe: sentences with the option, its value and the remedy."""
        return []

    @classmethod
    def config_warnings(cls, recipe: Recipe) -> list[str]:
        """Settings that are allowed but probably a mistake. The run prints them at the start."""
        return []

    @classmethod
    def image_sizes(cls, recipe: Recipe) -> Sequence[Stage]:
        """The image sizes that it will feed, if they are known before the run. Empty if it sets none."""
        return ()

    def plan(self, plan: Plan, progress: Progress) -> Plan:
        """``plan`` with this method's changes."""
        raise NotImplementedError

    def changes(self) -> Sequence[Length]:
        """The lengths at which its plan will change, in order, if known. The trainer compiles these steps early."""
        return ()

    def variants(self, plan: Plan, progress: Progress) -> Sequence[Plan]:
        """The plans that single steps of the coming pass may draw."""
        return ()

    def evaluation_shape(self, shape: Shape) -> Shape:
        """The shape in which a model that was trained in ``shape`` is evaluated."""
        return shape

    def batch_size_at(self, size: int) -> int | None:
        """The batch size at ``size`` px; None if the method does not set it."""
        return None

    def rows(self, subset: int) -> np.ndarray:
        """The rows of ``feed.subset``, (n,) int64, if the method sets that field."""
        raise NotImplementedError

    def probes(self, progress: Progress) -> Sequence[Probe]:
        """The measurements that it needs before it can plan further. :meth:`observe` gets each result."""
        return ()

    def observe(self, result: StepResult | Probe) -> None:
        """Records the result of a step, or the answer to a probe. Must not wait for the device."""

    def choices(self) -> Sequence[str]:
        """The decisions of its searches so far, in order."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Its state, the same on every process: plain values and tensors on the CPU."""
        return {}

    def load_state_dict(self, state: dict[str, Any], local: dict[str, Tensor] | None = None) -> None:
        """Restores :meth:`state_dict`. ``local``, on rank 0 only, is the sum of all :meth:`local_state`."""

    def local_state(self) -> dict[str, Tensor]:
        """The part of its state that differs between processes. A checkpoint stores the sum over processes."""
        return {}
