"""The state of a training run, which is everything that a checkpoint holds, and the meter of its open pass."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from vitlocal.data.batch import Batch, Source
from vitlocal.errors import DataError, Diverged
from vitlocal.methods.method import Method
from vitlocal.plan import WHOLE_MODEL, Plan, Shape
from vitlocal.progress import Progress
from vitlocal.tasks.metrics import Metric
from vitlocal.tasks.task import Scores, sum_type
from vitlocal.train.budget import Clock, FinalReserve
from vitlocal.train.distributed import Ranks
from vitlocal.train.optim import CombinedOptimizer, ModelEma, check_moments, moments
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
class RunFacts:
    """What a checkpoint keeps about the run, besides the state of its training."""

    data: dict[str, Any] = field(default_factory=dict)  # the fingerprint of the training data
    options: dict[str, Any] = field(default_factory=dict)  # the configuration, by dotted name
    rewinds: int = 0  # how often the run has diverged and gone back to a checkpoint
    logged: tuple[int, int] = (0, 0)  # the step of the last record in the log, and the number of records of this step
    damaged_rows: Collection[int] = ()  # of the training split, that were skipped


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
    facts: RunFacts = field(default_factory=RunFacts)

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
            **vars(self.facts),
            "damaged_rows": sorted(self.facts.damaged_rows),
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
        """Restores :meth:`state_dict`. Only the ``first`` process gets the summed local states of the methods.

        Raises DataError if a part is missing, unknown, or of another shape or type.
        """
        own = self.state_dict(lambda value: value)
        if odd := state.keys() ^ own.keys():
            raise DataError(f"it has or lacks {', '.join(sorted(map(str, odd)))}")
        if not (state["scaler"] and own["scaler"]):  # one of the devices does not train in fp16
            state = {**state, "scaler": own["scaler"]}
        if problem := next(filter(None, (difference(state[name], own[name], name) for name in FIXED)), ""):
            raise DataError(problem)
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        check_moments(self.optimizer)
        if self.ema is not None:
            self.ema.model.load_state_dict(state["ema"])
        for ema, weights in zip(self.method_emas, state["method_emas"], strict=True):
            ema.model.load_state_dict(weights)
        self.reserve = FinalReserve(**state["reserve"])
        for method in self.methods:
            local = state["local_states"].get(method.name) if first else None
            method.load_state_dict(state["methods"][method.name], local or None)
        self.phase = Phase(state["phase"])
        step, count = state["logged"]
        facts = replace(self.facts, logged=(step, count), damaged_rows=set(map(int, state["damaged_rows"])))
        self.facts = replace(facts, rewinds=max(facts.rewinds, state["rewinds"]))
        self.current_plan = state["current_plan"] and Plan.from_state(state["current_plan"])
        self.logged_plan = state["logged_plan"] and Plan.from_state(state["logged_plan"])
        self.totals = PassTotals(**state["totals"])
        self.last_evaluation = state["last_evaluation"] and Progress(**state["last_evaluation"])
        self.growth_number = state["growth_number"]
        self.initialized_shape = Shape.from_state(state["initialized_shape"])


def state_tensors(state: TrainState) -> Iterator[Tensor]:
    """The weights, averages and moments: all that must stay finite."""
    for model in (state.model, *(ema.model for ema in (state.ema, *state.method_emas) if ema is not None)):
        yield from model.state_dict().values()
    yield from (moment for _, moment in moments(state.optimizer))


@torch.no_grad()
def is_finite(state: TrainState) -> Tensor:
    """Whether no weight, average or moment is infinite or NaN: 0-D bool, on the device."""
    ranges = [value.aminmax() for value in state_tensors(state) if value.is_floating_point() and value.numel()]
    return torch.stack([low.isfinite() & high.isfinite() for low, high in ranges]).all()


# The parts of a checkpoint whose names, shapes and types do not depend on what the run has come to.
FIXED = (
    "model",
    "scaler",
    "clock",
    "search_log",
    "ema",
    "method_emas",
    "reserve",
    "totals",
    "growth_number",
    "rewinds",
)


def difference(found: Any, own: Any, name: str = "") -> str:
    """Says in what the content ``found`` of a checkpoint is not of the kind of ``own``; empty if it is."""
    if isinstance(own, Tensor):
        if not isinstance(found, Tensor):
            return f"{name} is no tensor"
        same = found.shape == own.shape and found.is_floating_point() == own.is_floating_point()
        return "" if same else f"{name} has shape {tuple(found.shape)} ({found.dtype}), expected {tuple(own.shape)}"
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping):
            return f"{name} is a {type(found).__name__}"
        if odd := found.keys() ^ own.keys():
            return f"{name} has or lacks {', '.join(map(str, odd))}"
        return next(filter(None, (difference(found[key], own[key], f"{name}.{key}") for key in own)), "")
    if isinstance(own, list):
        if not isinstance(found, list) or (any(isinstance(part, Mapping) for part in own) and len(found) != len(own)):
            return f"{name} is not the expected list"
        pairs = zip(found, own if len(own) == len(found) else [0.0] * len(found), strict=True)
        return next(filter(None, (difference(part, kind, f"{name}.{n}") for n, (part, kind) in enumerate(pairs))), "")
    right = isinstance(found, (int, float)) or (own is None and found is None)
    return "" if right else f"{name} is a {type(found).__name__}"


def check_finite(state: TrainState, ranks: Ranks) -> None:
    """Raises Diverged on all ranks if a weight, an average or a moment of any rank is infinite or NaN."""
    wrong = (~is_finite(state)).float()
    if float(ranks.total(wrong) if ranks.world > 1 else wrong):  # device sync, once per save
        raise diverged("weights or the optimizer's moments are infinite or not a number", state.clock.step)


def damaged_rows(source: Source, ranks: Ranks, device: torch.device) -> Collection[int]:
    """The rows of ``source`` that any process has skipped so far."""
    if ranks.world == 1 or not int(ranks.total(torch.tensor(len(source.damaged), device=device))):
        return source.damaged
    marks = torch.zeros(source.count, device=device)
    marks[list(source.damaged)] = 1.0
    return set(ranks.total(marks).nonzero().flatten().tolist())


def trained_plan(state: TrainState) -> Plan:
    """The plan under which the weights were trained last."""
    plan = state.current_plan or state.logged_plan
    assert plan is not None, "no step was taken"
    return plan


def pass_record(
    state: TrainState, plan: Plan, scores: Scores | None, metrics: Sequence[Metric], processes: int, rate: float,
    mode: str,
) -> dict[str, Any]:  # fmt: skip
    """A pass's line in ``log.jsonl``. ``rate``: images/s. ``mode``: how its steps ran."""
    clock, totals, now = state.clock, state.totals, state.clock.progress
    return {
        "epoch": round(now.epoch, 9),
        "step": now.step,
        "images_seen": now.images_seen,
        "image_size": plan.feed.size,
        **({"grid": plan.shape.grid} if plan.shape.grid is not None else {}),
        "batch_size": plan.feed.batch_size,
        "processes": processes,
        "loss": totals.loss / totals.images if totals.images else None,  # None: evaluated without a further step
        **{metric.name: _rounded(scores, metric) for metric in metrics},
        "fraction": round(now.fraction, 9),
        "flops": now.flops,
        "lr": state.optimizer.param_groups[0]["lr"],
        "train_seconds": round(clock.timer.train_seconds, 3),
        "wall_seconds": round(clock.timer.wall_seconds, 3),
        "images_per_second": round(rate, 2),
        "data_wait_fraction": round(min(1.0, totals.wait_seconds / max(totals.seconds, 1e-9)), 5),
        "step_mode": mode,
        "macs_per_image": round(totals.macs / totals.images) if totals.images else None,
        **({"probe_seconds": round(state.search_log.seconds, 3)} if state.search_log.seconds else {}),
        **({"damaged_images": len(state.facts.damaged_rows)} if state.facts.damaged_rows else {}),
        **({"rewinds": state.facts.rewinds} if state.facts.rewinds else {}),
        **({} if scores is None else scores.notes),
        **plan.changed(state.logged_plan),
    }


def _rounded(scores: Scores | None, metric: Metric) -> float | None:
    """The value of a metric for the log; None if it was not measured."""
    value = None if scores is None else scores.values.get(metric.name)
    return None if value is None else round(value, metric.digits + 2)


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
        """Brings the totals up to date. Waits for the device. Raises Diverged if the loss is not finite."""
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
    """``loss``, unless it is infinite or NaN, which raises Diverged."""
    if loss - loss != 0:
        raise diverged(f"the loss is {loss}", step)
    return loss


def diverged(what: str, step: int) -> Diverged:
    return Diverged(
        f"{what} at step {step}: training has diverged. Train in another folder with a lower train.lr, a longer "
        "train.warmup or train.clip_norm=1. If it diverged by chance, the same command with --run.on_nan=rewind, or a "
        "larger --run.rewinds, goes back to the last checkpoint with other random numbers"
    )
