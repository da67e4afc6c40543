"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of a model, AdamW for the rest.

Shape letters: M matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# A quintic whose iteration takes all singular values near 1, fast and roughly (between 0.7 and 1.2).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
UPDATE_RMS = 0.2  # of AdamW's updates, about (Liu et al. 2025, arXiv 2502.16982, section 2.2): one rate serves both


def orthogonalized(matrices: Tensor, precision: torch.dtype) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: (M, R, C) float32 → the same shape, in ``precision``."""
    first, second, third = COEFFICIENTS
    x = matrices.to(precision)
    turned = x.shape[1] > x.shape[2]
    if turned:  # the products below are of the shorter side
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return x.mT.contiguous() if turned else x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised before each update.

    Matrices of one shape are orthogonalised together, in one chain of batched products: a model of a dozen blocks
    has two or three shapes. ``parts`` says which parameters are several matrices stacked by rows (queries, keys and
    values), by the parameter's identity; ``precision`` is that of the products.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], parts: Mapping[int, int], lr: float, momentum: float,
        weight_decay: float, precision: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.parts, self.precision = parts, precision

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            momenta = []
            for p in active:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momenta.append(self.state[p]["momentum"])
            if not active:
                continue
            grads = [p.grad for p in active]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            looked_ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
            torch._foreach_mul_(active, 1 - group["lr"] * group["weight_decay"])
            self._update(active, looked_ahead, group["lr"])

    def _update(self, parameters: list[nn.Parameter], directions: list[Tensor], lr: float) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p, direction in zip(parameters, directions, strict=True):
            parts = self.parts.get(id(p), 1)
            for target, matrix in zip(p.chunk(parts), direction.chunk(parts), strict=True):
                by_shape.setdefault(tuple(matrix.shape), []).append((target, matrix))
        for shape, members in by_shape.items():
            stacked = torch.stack([matrix for _, matrix in members])  # (M, R, C)
            updates = orthogonalized(stacked, self.precision)
            scale = -lr * UPDATE_RMS * max(shape) ** 0.5
            torch._foreach_add_([target for target, _ in members], list(updates.to(stacked.dtype)), alpha=scale)


class CombinedOptimizer:
    """Several optimizers as one, for disjoint parameters; ``param_groups`` are all of theirs.

    With fp16, PyTorch's scaler reads from the device, once a step, whether gradients overflowed: a device sync that
    the fused AdamW alone spares.
    """

    def __init__(self, *members: torch.optim.Optimizer):
        self.members = members

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {str(number): member.state_dict() for number, member in enumerate(self.members)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for number, member in enumerate(self.members):
            member.load_state_dict(state[str(number)])
