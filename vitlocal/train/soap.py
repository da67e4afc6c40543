"""SOAP: Adam in the eigenbasis of a matrix's gradients (Vyas et al. 2024, arXiv 2409.11321).

Each matrix has one basis, on one side, which the paper calls one-sided SOAP. In our blocks this is the side of the
model's width, for every matrix. So heads and hidden units lie on the other side, and methods may slice, grow and reset
their moments like those of AdamW.

Shape letters: M matrices of one shape, R rows, C columns, K the side that has the basis (R or C).
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitlocal.train.own_optimizer import OwnOptimizer

FIRST_ITERATIONS = 8  # of the power method for the first basis, which starts from the axes


class Soap(OwnOptimizer):
    """Adam whose second moment is kept in the eigenbasis of the averaged Gram matrix, with decoupled weight decay.

    ``columns``: the identities of the matrices whose basis is on the side of their columns. That is never the longer
    side. After each ``every`` steps, one power iteration and a QR decomposition move the basis towards the
    eigenvectors. Matrices of one shape are updated together in batched products. A 1×1 convolution is a matrix. All
    products have the weights' type.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], columns: Collection[int], lr: float, betas: tuple[float, float],
        eps: float, weight_decay: float, every: int = 10,
    ):  # fmt: skip
        super().__init__(matrices, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.columns, self.every = columns, every

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state before the first step: the count on the host, moments, Gram matrix and basis (1, K, K)."""
        square = (1, min(weight.shape[:2]), min(weight.shape[:2]))
        moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        return {"step": torch.zeros(()), **moments, "gram": weight.new_zeros(square), "basis": weight.new_zeros(square)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # it takes no closure
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, bool, int], list[Any]] = {}
            for p in self.active(group):
                self.state[p]["step"] += 1
                kind = p.shape[:2], id(p) in self.columns, int(self.state[p]["step"])
                alike.setdefault(kind, []).append(p)
            for (_, right, count), members in alike.items():
                self._update(members, right, count, **{k: v for k, v in group.items() if k in self.defaults})

    def _update(
        self, members: list[Any], right: bool, count: int, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        """Updates weights of one shape and step ``count``; ``right``: their bases are on the side of the columns."""
        states = [self.state[p] for p in members]
        grams, bases = ([state[name] for state in states] for name in ("gram", "basis"))
        firsts, seconds = ([state[name].flatten(1) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        grads = [p.grad.flatten(1) for p in members]
        stacked = torch.stack(grads)  # (M, R, C)
        products = stacked.mT @ stacked if right else stacked @ stacked.mT
        torch._foreach_lerp_(grams, list(products.split(1)), 1 - betas[1])
        torch._foreach_lerp_(firsts, grads, 1 - betas[0])
        second = torch.stack(seconds)
        if (count - 1) % self.every == 0:
            basis, order = next_basis(torch.cat(grams), torch.cat(bases), first=count == 1)
            torch._foreach_copy_(bases, list(basis.split(1)))
            places = order[:, None] if right else order[:, :, None]
            second = second.gather(2 if right else 1, places.expand_as(second))
        basis = torch.cat(bases)

        def rotated(matrices: Tensor, basis: Tensor) -> Tensor:
            return matrices @ basis if right else basis.mT @ matrices

        second = second.lerp(rotated(stacked, basis).square(), 1 - betas[1])
        torch._foreach_copy_(seconds, list(second.unbind()))
        first = rotated(torch.stack(firsts), basis) / (1 - betas[0] ** count)
        updates = rotated(first / ((second / (1 - betas[1] ** count)).sqrt() + eps), basis.mT)
        torch._foreach_mul_(members, 1 - lr * weight_decay)
        changes = [update.view_as(p) for update, p in zip(updates, members, strict=True)]
        torch._foreach_add_(members, changes, alpha=-lr)


def next_basis(grams: Tensor, bases: Tensor, first: bool) -> tuple[Tensor, Tensor]:
    """Brings bases nearer to the eigenvectors of Gram matrices (M, K, K), those of large eigenvalues first.

    Returns the new bases (M, K, K), and the places (M, K) of the same vectors in the old ones. No decomposition here
    fails if a gradient is infinite: the weights become NaN, which the trainer reports.
    """
    if first:
        bases = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device).expand_as(grams)
    order = (bases * (grams @ bases)).sum(1).argsort(dim=1, descending=True)
    bases = bases.gather(2, order[:, None].expand_as(bases))
    for _ in range(FIRST_ITERATIONS if first else 1):
        bases = torch.linalg.qr(grams @ bases)[0]
    return bases, order
