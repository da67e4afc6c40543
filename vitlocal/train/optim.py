"""The optimizer: which parameters decay, and which optimizer updates them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from vitlocal.errors import ConfigError
from vitlocal.train.muon import CombinedOptimizer, Muon


def build_optimizer(
    model: Any,
    name: str = "adamw",
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    muon_momentum: float = 0.95,
    precision: torch.dtype = torch.float32,
) -> torch.optim.AdamW | CombinedOptimizer:
    """Fused AdamW without weight decay on norms, biases, position embeddings and class tokens.

    With ``name="muon"``, Muon updates the matrices of the blocks and AdamW the rest. Muon computes in bfloat16 if
    ``precision`` is bfloat16.
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    matrices = block_matrices(model) if name == "muon" else {}
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=(*exempt, *matrices))
    if name == "muon" and not matrices:
        raise ConfigError(f"train.optimizer: {type(model).__name__} has no blocks with matrices; use adamw")
    taken = {id(p) for p in matrices.values()}
    for group in groups if matrices else ():
        group["params"] = [p for p in group["params"] if id(p) not in taken]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if not matrices:
        return adamw
    parts = {id(p): 3 for name, p in matrices.items() if name.endswith("qkv.weight")}
    products = torch.bfloat16 if precision == torch.bfloat16 else torch.float32
    return CombinedOptimizer(adamw, Muon(matrices.values(), parts, lr, muon_momentum, weight_decay, products))


def block_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the linear layers in the model's blocks, by name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if "blocks." in name and isinstance(module, nn.Linear) and module.weight.requires_grad:
            found[f"{name}.weight"] = module.weight
    return found


def optimizer_state(optimizer: torch.optim.Optimizer | CombinedOptimizer) -> Callable[[nn.Parameter], dict[str, Any]]:
    """A function from a parameter to its optimizer state, which may be changed; empty before the first step."""
    members = optimizer.members if isinstance(optimizer, CombinedOptimizer) else (optimizer,)
    owners = {id(p): member for member in members for group in member.param_groups for p in group["params"]}
    return lambda parameter: owners[id(parameter)].state[parameter] if id(parameter) in owners else {}
