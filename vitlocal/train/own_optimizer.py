"""The base of the optimizers that PyTorch does not have."""

from typing import Any

import torch
from torch import Tensor


class OwnOptimizer(torch.optim.Optimizer):
    """An optimizer that states what it keeps for a weight. A kind adds ``new_state`` and ``step``."""

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state of a weight before its first step."""
        raise NotImplementedError

    def active(self, group: dict[str, Any]) -> list[Any]:
        """The weights of a group that have a gradient. From now on, they have a state."""
        found = [p for p in group["params"] if p.grad is not None]
        for p in found:
            if not self.state[p]:
                self.state[p].update(self.new_state(p.detach()))
        return found
