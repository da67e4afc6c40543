"""TEMPORARY: the interface of the coming train/build.py, on top of today's Run and Step."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from vitlocal.config import Config
from vitlocal.data.batch import Sources
from vitlocal.models.factory import build_model
from vitlocal.train.distributed import ALONE, Ranks
from vitlocal.train.ema import build_ema
from vitlocal.train.optim import build_optimizer
from vitlocal.train.run import Run, open_run
from vitlocal.train.step import Step, choose_precision

_Step: Any = Step
_Step.ema = property(lambda self: self.average)
_Step.warm_up, _Step.set_shape, _Step.set_dials, _Step.forward_backward = Step.warm, Step.put, Step.turn, Step.rehearse
_Step.phase_hook = property(lambda self: self.mark, lambda self, hook: setattr(self, "mark", hook))
_Run: Any = Run
_Run.upcoming_plans = Run.plans_ahead
Trainer = Run
open_trainer = open_run


def build_step(config: Config, num_classes: int, device: torch.device, ranks: Ranks = ALONE) -> Any:
    torch.manual_seed(config.run.seed)
    model, _ = build_model(config.model, num_classes)
    model = model.to(device, memory_format=torch.channels_last).train()
    average = build_ema(model, config.train)
    optimizer = build_optimizer(model, config.train, choose_precision(config.train.precision, device))
    return Step(model, optimizer, average, config, device, ranks)


def build_trainer(config: Config, sources: Sources, device: torch.device) -> Any:
    return Run(config, Path(tempfile.mkdtemp()), sources, device)
