"""The optimizer and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from vitlocal.config import TrainConfig
from vitlocal.errors import ConfigError
from vitlocal.progress import Progress
from vitlocal.train.muon import CombinedOptimizer, Muon


def build_optimizer(
    model: nn.Module, config: TrainConfig, precision: torch.dtype = torch.float32
) -> torch.optim.AdamW | CombinedOptimizer:
    """AdamW, fused; no weight decay on norms, biases, position embeddings and class tokens.

    With ``train.optimizer=muon`` the matrices of the blocks go to Muon, and the rest stays with AdamW. Where the model
    runs in bfloat16 (``precision``), Muon's products do.
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    matrices = block_matrices(model) if config.optimizer == "muon" else {}
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=(*exempt, *matrices))
    if not matrices:
        if config.optimizer == "muon":
            raise ConfigError(f"train.optimizer: {type(model).__name__} has no blocks with matrices; use adamw")
        return _adamw(groups, config)
    taken = {id(p) for p in matrices.values()}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
    parts = {id(p): 3 for name, p in matrices.items() if name.endswith("qkv.weight")}
    products = torch.bfloat16 if precision == torch.bfloat16 else torch.float32
    muon = Muon(matrices.values(), parts, config.lr, config.muon_momentum, config.weight_decay, products)
    return CombinedOptimizer(_adamw(groups, config), muon)


def block_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of linear layers within the model's blocks, by name: not those of embeddings and heads."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if "blocks." in name and isinstance(module, nn.Linear) and module.weight.requires_grad
    }


def _adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)


class Schedule:
    """The learning rate of a step by where it ends: warm-up, then cosine, linear or constant, down to ``end_lr``."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.peak = config.lr * (config.batch_size / config.lr_batch if config.lr_batch else 1.0)

    def __call__(self, at: Progress) -> float:
        config = self.config
        if config.schedule_by == "epoch":
            # As timm's scheduler in the paper's code: moved after an epoch, with the number of that epoch. A step that
            # ends with an epoch still belongs to it.
            at = replace(at, epoch=max(0.0, math.ceil(at.epoch - 1e-9) - 2.0))
        part = at.fraction if config.schedule_length is None else min(1.0, config.schedule_length.fraction_done(at))
        left = {"cosine": (1 + math.cos(math.pi * part)) / 2, "linear": 1 - part, "constant": 1.0}[config.schedule]
        end = min(config.end_lr, self.peak)
        rate = end + (self.peak - end) * left
        if config.warmup.value:
            rate *= min(1.0, max(config.warmup.fraction_done(at), 1e-3))
        return rate


def moments_of(optimizer: torch.optim.Optimizer | CombinedOptimizer) -> Callable[[nn.Parameter], dict[str, Any]]:
    """What the optimizer keeps for a parameter, as a dict that may be written to; empty before its first step."""
    members = optimizer.members if isinstance(optimizer, CombinedOptimizer) else (optimizer,)
    owners = {id(p): member for member in members for group in member.param_groups for p in group["params"]}
    return lambda parameter: owners[id(parameter)].state[parameter] if id(parameter) in owners else {}
