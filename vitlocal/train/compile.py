"""Compiles the objective of a step: which image sizes run eagerly, compiled, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitlocal.errors import ConfigError
from vitlocal.models.counts import count_macs
from vitlocal.plan import Feed, Shape

# A step of fewer multiply-adds runs as a CUDA graph. At half of an H200's peak it takes under 10 ms, about as long as
# launching its several hundred kernels one by one. (An estimate; not measured yet.)
GRAPH_MACS = 2e12
RECOMPILE_LIMIT = 256  # PyTorch's limit of compilations per function: each size, batch and mode needs one


@dataclass(frozen=True)
class Mode:
    """How a step runs for one feed."""

    compiled: bool = False
    graphs: bool = False

    def __str__(self) -> str:
        return "eager" if not self.compiled else "compiled, as a CUDA graph" if self.graphs else "compiled"


EAGER = Mode()


class StepCompiler:
    """Chooses the mode for each feed and shape, and keeps the compiled objectives.

    ``cuda_graphs``: "auto" (for small steps), "yes" or "no". ``can_capture``: whether a CUDA graph is possible at all.
    """

    def __init__(self, model: nn.Module, enabled: bool, cuda_graphs: str, can_capture: bool):
        self._model, self.enabled = model, enabled
        self._cuda_graphs, self._can_capture = cuda_graphs, enabled and can_capture
        self._objectives: dict[bool, Callable[..., Any]] = {}  # by whether it runs as a CUDA graph
        self._modes: dict[tuple[int, int, Shape], Mode] = {}
        if cuda_graphs == "yes" and not self._can_capture:
            raise ConfigError(
                "train.cuda_graphs: yes needs a GPU, train.compile, one process and train.grad_accum_steps=1; use auto"
            )
        if enabled:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT

    def mode(self, feed: Feed, shape: Shape) -> Mode:
        """How full batches of ``feed`` run in ``shape``, which must be the model's current shape."""
        key = (feed.size, feed.batch_size, shape)
        if key not in self._modes:
            self._modes[key] = Mode(self.enabled, self.enabled and self._captures(feed, shape))
        return self._modes[key]

    def _captures(self, feed: Feed, shape: Shape) -> bool:
        if not self._can_capture or self._cuda_graphs != "auto":
            return self._cuda_graphs == "yes"
        return 3 * feed.batch_size * count_macs(self._model, shape.input_size or feed.size) < GRAPH_MACS

    def objective(self, eager: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
        """The objective that runs in ``mode``: ``eager`` itself, or ``eager`` compiled."""
        if not mode.compiled:
            return eager
        if mode.graphs not in self._objectives:
            # dynamic=False: one compilation for each size and batch, so that the compiler knows all shapes.
            how: dict[str, Any] = {"mode": "reduce-overhead"} if mode.graphs else {}
            self._objectives[mode.graphs] = torch.compile(eager, dynamic=False, **how)
        return self._objectives[mode.graphs]

    def reset(self) -> None:
        """Forgets the compiled objectives: they belong to an objective that is wrapped again."""
        self._objectives.clear()
