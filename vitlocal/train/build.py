"""TEMPORARY: the interface of the coming train/build.py, on top of today's Run and Step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vitlocal.config import Config
from vitlocal.data.batch import Sources, open_sources
from vitlocal.models.factory import build_model
from vitlocal.train.checks import check_sizes
from vitlocal.train.clock import Clock
from vitlocal.train.devices import prepare_device
from vitlocal.train.distributed import ALONE, Ranks
from vitlocal.train.ema import build_ema
from vitlocal.train.optim import Schedule, build_optimizer
from vitlocal.train.room import rehearse_evaluation
from vitlocal.train.run import Run, open_run
from vitlocal.train.step import Step, choose_precision

_Step: Any = Step
_Step.ema = property(lambda self: self.average)
_Step.warm_up, _Step.set_shape, _Step.set_dials, _Step.forward_backward = Step.warm, Step.put, Step.turn, Step.rehearse
_Step.phase_hook = property(lambda self: self.mark, lambda self, hook: setattr(self, "mark", hook))
_Clock: Any = Clock
_Clock.timer = property(lambda self: self)
_Clock.length = property(lambda self: self.budget.length)
device_of = prepare_device
sources_of = open_sources


class Trainer:
    def __init__(self, run: Run):
        self.step: Any = run.step
        self.sources, self.plan, self.upcoming_plans = run.sources, run.plan, run.plans_ahead
        self.compile_for, self.train_step = run.warm, run.train_on
        self.state: Any = SimpleNamespace(model=run.model, methods=run.methods, clock=run.clock)
        self.evaluator = SimpleNamespace(estimate_seconds=lambda plan: rehearse_evaluation(run))


def make_model(config: Config, num_classes: int, device: torch.device) -> tuple[Any, Any]:
    torch.manual_seed(config.run.seed)
    model, arguments = build_model(config.model, num_classes)
    check_sizes(config, model)
    return model.to(device, memory_format=torch.channels_last).train(), arguments


def build_step(config: Config, num_classes: int, device: torch.device, ranks: Ranks = ALONE) -> Any:
    model, _ = make_model(config, num_classes, device)
    average = build_ema(model, config.train)
    optimizer = build_optimizer(model, config.train, choose_precision(config.train.precision, device))
    return Step(model, optimizer, average, config, device, ranks)


def build_trainer(config: Config, sources: Sources, device: torch.device) -> Trainer:
    return Trainer(Run(config, Path(tempfile.mkdtemp()), sources, device))


@contextmanager
def open_trainer(config: Config) -> Iterator[Trainer]:
    with open_run(config) as run:
        yield Trainer(run)


def schedule_of(config: Config) -> Any:
    schedule = Schedule(config.train)
    return SimpleNamespace(peak=schedule.peak, end=schedule.config.end_lr)
