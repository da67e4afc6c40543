"""The state of a training run, which is everything that a checkpoint holds, and the meter of its open pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from vitlocal.data.batch import Batch
from vitlocal.errors import DataError
from vitlocal.methods.method import Method
from vitlocal.plan import WHOLE_MODEL, Plan, Shape
from vitlocal.progress import Progress
from vitlocal.tasks.task import sum_type
from vitlocal.train.budget import Clock, FinalReserve
from vitlocal.train.distributed import Ranks
from vitlocal.train.optim import CombinedOptimizer, ModelEma
from vitlocal.train.search_log import SearchLog
from vitlocal.train.timing import WaitMeter


class Phase(Enum):
    """What the loop does next."""

    TRAIN = "train"
    EVALUATE = "evaluate"  # close the pass: evaluate if it is due, log, save
    DONE = "done"


# The parts of a state that have a state of their own, which a checkpoint holds under the same name.
PARTS = ("model", "optimizer", "scaler", "clock", "search_log")


@dataclass
class PassTotals:
    """Sums over the open pass. A pass that is interrupted continues with them after the restart."""

    loss: float = 0.0  # summed over images
    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0  # of the device, for the loader
    macs: int = 0  # multiply-adds of forward passes


@dataclass
class TrainState:
    """The state of a run. A checkpoint is its :meth:`state_dict`, and nothing else."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | CombinedOptimizer
    scaler: torch.amp.GradScaler
    clock: Clock
    methods: Sequence[Method] = ()
    ema: ModelEma | None = None
    method_emas: Sequence[ModelEma] = ()  # weight averages that methods need
    reserve: FinalReserve = field(default_factory=FinalReserve)
    search_log: SearchLog = field(default_factory=SearchLog)
    data: Mapping[str, Any] = field(default_factory=dict)  # the fingerprint of the training data

    phase: Phase = Phase.TRAIN
    current_plan: Plan | None = None  # of the last step of the open pass; None: no pass is open
    logged_plan: Plan | None = None  # of the last logged pass
    totals: PassTotals = field(default_factory=PassTotals)
    last_evaluation: Progress | None = None
    growth_number: int = 0  # of the last growth
    initialized_shape: Shape = WHOLE_MODEL  # the shape of the first step, or after the last growth

    def update_phase(self, plan: Plan, now: Progress) -> Phase:
        """Decides what the loop does next. ``now`` is the current progress, and ``plan`` the plan for it.

        A pass ends when the budget is spent, at the end of an epoch, and when feed or shape change.
        """
        spent = now.is_end
        if self.current_plan is None:
            evaluated = self.last_evaluation is not None and self.last_evaluation.step == now.step
            self.phase = Phase.TRAIN if not spent else Phase.DONE if evaluated else Phase.EVALUATE
        else:
            changed = plan.pass_key != self.current_plan.pass_key
            ended = self.clock.position.images == 0 or changed or spent
            self.phase = Phase.EVALUATE if ended else Phase.TRAIN
        return self.phase

    def state_dict(self, total: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Tensors and plain values. ``total`` sums a part of a method's local state over all processes."""
        return {
            **{name: getattr(self, name).state_dict() for name in PARTS},
            "data": dict(self.data),
            "ema": self.ema and self.ema.model.state_dict(),
            "method_emas": [ema.model.state_dict() for ema in self.method_emas],
            "reserve": asdict(self.reserve),
            "methods": {method.name: method.state_dict() for method in self.methods},
            "local_states": {
                method.name: {name: total(value) for name, value in method.local_state().items()}
                for method in self.methods
            },
            "phase": self.phase.value,
            "current_plan": self.current_plan and asdict(self.current_plan),
            "logged_plan": self.logged_plan and asdict(self.logged_plan),
            "totals": asdict(self.totals),
            "last_evaluation": self.last_evaluation and asdict(self.last_evaluation),
            "growth_number": self.growth_number,
            "initialized_shape": asdict(self.initialized_shape),
        }

    def load_state_dict(self, state: Mapping[str, Any], first: bool = True) -> None:
        """Restores :meth:`state_dict`. Only the ``first`` process gets the summed local states of the methods."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        if self.ema is not None:
            self.ema.model.load_state_dict(state["ema"])
        for ema, weights in zip(self.method_emas, state["method_emas"], strict=True):
            ema.model.load_state_dict(weights)
        self.reserve = FinalReserve(**state["reserve"])
        for method in self.methods:
            local = state["local_states"].get(method.name) if first else None
            method.load_state_dict(state["methods"][method.name], local or None)
        self.phase = Phase(state["phase"])
        self.current_plan = state["current_plan"] and Plan.from_state(state["current_plan"])
        self.logged_plan = state["logged_plan"] and Plan.from_state(state["logged_plan"])
        self.totals = PassTotals(**state["totals"])
        self.last_evaluation = state["last_evaluation"] and Progress(**state["last_evaluation"])
        self.growth_number = state["growth_number"]
        self.initialized_shape = Shape.from_state(state["initialized_shape"])


def trained_plan(state: TrainState) -> Plan:
    """The plan under which the weights were trained last."""
    plan = state.current_plan or state.logged_plan
    assert plan is not None, "no step was taken"
    return plan


class PassMeter:
    """Adds up the open pass in ``state.totals``. The loss is summed on the device and read only in :meth:`read`."""

    def __init__(self, state: TrainState, device: torch.device, ranks: Ranks):
        self._state, self._timer, self._ranks = state, state.clock.timer, ranks
        self._loss_sum = torch.zeros((), dtype=sum_type(device), device=device)
        self._waits = WaitMeter(device, self._timer.train_now)
        self._since: float | None = None  # training seconds when the pass was opened

    def load(self) -> None:
        """Continues from ``state.totals``: those of a new pass, or from a checkpoint."""
        self._loss_sum.fill_(self._state.totals.loss if self._ranks.first else 0.0)  # each process adds its own part

    def begin(self) -> None:
        """Measures time from now on."""
        self._since = self._timer.train_seconds

    def end(self) -> None:
        """Stops measuring time until the next :meth:`begin`."""
        self._state.totals.seconds = self._seconds()
        self._since = None

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches, and measures the time for which the device waits for them."""
        while True:
            asked = self._waits.begin()
            batch = next(batches, None)
            self._waits.end(asked)
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, images: int, macs: int) -> None:
        """Adds a step: its mean loss (0-D, on the device), images of the global batch, and their multiply-adds."""
        self._loss_sum += loss.to(self._loss_sum.dtype) * images
        self._state.totals.images += images
        self._state.totals.macs += macs

    @property
    def images_per_second(self) -> float:
        return self._state.totals.images / max(self._seconds(), 1e-9)

    def read(self, step: int) -> None:
        """Brings the totals up to date. Waits for the device. DataError if the loss is not finite."""
        totals = self._state.totals
        totals.loss, totals.seconds = check_loss(float(self._ranks.total(self._loss_sum)), step), self._seconds()
        totals.wait_seconds += self._waits.take()
        self.load()
        if self._since is not None:
            self.begin()

    def _seconds(self) -> float:
        open_for = 0.0 if self._since is None else self._timer.train_seconds - self._since
        return self._state.totals.seconds + open_for


def check_loss(loss: float, step: int) -> float:
    """``loss``, unless it is infinite or NaN, which raises DataError."""
    if loss - loss != 0:
        raise DataError(
            f"the loss is {loss} at step {step}: training has diverged. Lower train.lr, lengthen train.warmup or set "
            "train.clip_norm=1. The run's folder keeps the last checkpoint before this"
        )
    return loss
