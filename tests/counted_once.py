"""Counts of a model's costs, made once in a process for models of one structure: they take longer than small runs.

``tests/test_model_costs.py`` tests the counting itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import nn

from vitlocal.models import counts
from vitlocal.plan import Shape, StageEmbedding

PLAIN = bool, int, float, str, tuple, list, type(None), Shape, StageEmbedding
USERS = {
    "train.build": ("count_macs", "activation_bytes"),
    "bench.forecast": ("count_macs", "activation_bytes"),
    "bench.memory": ("count_macs", "activation_bytes", "step_bytes"),
    "bench.paper": ("count_macs",),
    "train.build_checks": ("count_macs",),
}


def structure(model: nn.Module) -> str:
    """Everything of ``model`` that a count depends on: its modules, their plain attributes, and its tensors' shapes."""
    modules = [
        (name, type(module), {key: value for key, value in vars(module).items() if isinstance(value, PLAIN)})
        for name, module in model.named_modules()
    ]
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    ]
    return str((modules, tensors))


def once(count: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    def counted(model: nn.Module, *arguments: object, **named: object) -> Any:
        key = str((structure(model), arguments, named))
        if key not in known:
            known[key] = count(model, *arguments, **named)
        return known[key]

    return counted


def count_once(setattr: Callable[[str, object], None]) -> None:
    """Makes runs, forecasts, the paper's bench and plans of storage use such counts."""
    remembered = {name: once(getattr(counts, name)) for name in ("count_macs", "activation_bytes", "step_bytes")}
    for module, names in USERS.items():
        for name in names:
            setattr(f"vitlocal.{module}.{name}", remembered[name])
