"""Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682): an average of the weights in place of a falling rate.

The paper has three points. Steps move z, x is the average of z, and gradients are taken at y = (1 - beta1) z + beta1 x.
The model's weights are y. The state has z - y, which a growth of the model may set to zero or copy like a moment.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitlocal.train.own_optimizer import OwnOptimizer


class ScheduleFreeAdamW(OwnOptimizer):
    """Schedule-Free AdamW of the weights y. In the average x, a step counts by the square of its learning rate.

    :class:`~vitlocal.train.optim.ScheduleFreeAverage` computes x. ``betas``: the first one must be above 0.
    """

    def __init__(
        self, params: Iterable[nn.Parameter] | list[dict[str, Any]], lr: float, betas: tuple[float, float],
        eps: float, weight_decay: float = 0.0,
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state before the first step: on the host the steps and the sum of squared rates, z - y, second moment."""
        # One tensor, because PyTorch loads "step" as it is, and moves all else to the weight's device and type.
        counts = torch.zeros(2, dtype=torch.float64)
        return {"step": counts, "offset": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # it takes no closure
        for group in self.param_groups:
            alike: dict[tuple[float, ...], list[Any]] = {}
            for p in self.active(group):
                self.state[p]["step"] += torch.tensor([1.0, group["lr"] ** 2], dtype=torch.float64)
                alike.setdefault(tuple(self.state[p]["step"].tolist()), []).append(p)
            for (count, total), members in alike.items():
                share = group["lr"] ** 2 / total if total else 0.0
                self._update(members, count, share, **{k: v for k, v in group.items() if k in self.defaults})

    def _update(
        self, members: list[Any], count: float, share: float, lr: float, betas: tuple[float, float],
        eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        """Updates weights whose average so far has ``count`` terms, the last of them with weight ``share`` of 1."""
        offsets, seconds = ([self.state[p][name] for p in members] for name in ("offset", "exp_avg_sq"))
        grads = [p.grad for p in members]
        torch._foreach_mul_(seconds, betas[1])
        torch._foreach_addcmul_(seconds, grads, grads, 1 - betas[1])
        scales = torch._foreach_div(seconds, 1 - betas[1] ** count)
        torch._foreach_sqrt_(scales)
        torch._foreach_add_(scales, eps)
        moves = torch._foreach_div(grads, scales)
        torch._foreach_add_(moves, members, alpha=weight_decay)
        torch._foreach_add_(members, offsets, alpha=share)
        torch._foreach_add_(members, moves, alpha=lr * (betas[0] * (1 - share) - 1))
        torch._foreach_add_(offsets, moves, alpha=-lr * betas[0])
        torch._foreach_mul_(offsets, 1 - share)
