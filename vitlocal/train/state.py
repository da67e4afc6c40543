"""The state of a training run: everything that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from vitlocal.methods.method import Method
from vitlocal.plan import WHOLE_MODEL, Plan, Shape
from vitlocal.progress import Progress
from vitlocal.train.budget import Clock, FinalReserve
from vitlocal.train.ema import ModelEma
from vitlocal.train.optim import CombinedOptimizer
from vitlocal.train.search_log import SearchLog


class Phase(str, Enum):
    """What the loop does next."""

    TRAIN = "train"
    EVALUATE = "evaluate"  # close the pass: evaluate if it is due, log, save
    DONE = "done"


@dataclass
class PassTotals:
    """Sums over the open pass. A pass that is interrupted continues with them after the restart."""

    loss: float = 0.0  # summed over images
    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0  # for the loader
    macs: int = 0  # multiply-adds of forward passes


@dataclass
class TrainState:
    """The state of a run. A checkpoint is its :meth:`state_dict`, and nothing else.

    The first fields are the parts of the run that have a state of their own. The others are plain values.
    """

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

    def update_phase(self, plan: Plan) -> Phase:
        """Decides what the loop does next, where ``plan`` is the plan for the current progress.

        A pass ends when the budget is spent, at the end of an epoch, and when feed or shape change.
        """
        clock = self.clock
        if self.current_plan is None:
            evaluated = self.last_evaluation is not None and self.last_evaluation.step == clock.step
            self.phase = Phase.TRAIN if not clock.spent else Phase.DONE if evaluated else Phase.EVALUATE
        else:
            changed = plan.pass_key != self.current_plan.pass_key
            ended = clock.position.images == 0 or changed or clock.spent
            self.phase = Phase.EVALUATE if ended else Phase.TRAIN
        return self.phase

    def state_dict(self, local_states: Mapping[str, Mapping[str, torch.Tensor]] | None = None) -> dict[str, Any]:
        """Tensors and plain values. ``local_states``: the methods' local states, summed over all processes."""
        return {
            "data": dict(self.data),
            "model": self.model.state_dict(),
            "ema": self.ema and self.ema.model.state_dict(),
            "method_emas": [ema.model.state_dict() for ema in self.method_emas],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "clock": self.clock.state_dict(),
            "reserve": self.reserve.state_dict(),
            "search_log": self.search_log.state_dict(),
            "methods": {method.name: method.state_dict() for method in self.methods},
            "local_states": {name: dict(state) for name, state in (local_states or {}).items()},
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
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.model.load_state_dict(state["ema"])
        for ema, weights in zip(self.method_emas, state["method_emas"], strict=True):
            ema.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.clock.load_state_dict(state["clock"])
        self.reserve.load_state_dict(state["reserve"])
        self.search_log.load_state_dict(state["search_log"])
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
