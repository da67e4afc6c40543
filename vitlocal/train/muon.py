"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), and several optimizers combined into one.

Shape letters: M matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# A quintic. Its iteration brings all singular values quickly into the range from 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# About the root mean square of AdamW's updates, so that one learning rate serves both optimizers
# (Liu et al. 2025, arXiv 2502.16982, section 2.2).
UPDATE_RMS = 0.2


def orthogonalized(matrices: Tensor, precision: torch.dtype) -> Tensor:
    """Approximates the nearest (semi-)orthogonal matrices: (M, R, C) float32 -> the same shape, in ``precision``."""
    first, second, third = COEFFICIENTS
    x = matrices.to(precision)
    transposed = x.shape[1] > x.shape[2]
    if transposed:  # so that the Gram matrix has the shorter side
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return x.mT.contiguous() if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov) whose matrices are orthogonalized before each update, with decoupled weight decay.

    Matrices of one shape are orthogonalized together in batched products. ``parts`` maps the identity of a parameter to
    the number of matrices that it stacks by rows (3 for queries, keys and values). ``precision`` is the type of the
    products.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], parts: Mapping[int, int], lr: float, momentum: float,
        weight_decay: float, precision: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.parts, self.precision = parts, precision

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it takes no closure
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
            directions = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
            torch._foreach_mul_(active, 1 - group["lr"] * group["weight_decay"])
            self._update(active, directions, group["lr"])

    def _update(self, parameters: list[nn.Parameter], directions: Sequence[Tensor], lr: float) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
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
    """Several optimizers for disjoint parameters, used as one.

    With fp16, PyTorch's GradScaler reads once per step whether gradients overflowed. This is a device sync, which fused
    AdamW alone avoids.
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
