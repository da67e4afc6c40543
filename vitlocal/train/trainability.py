"""Scores that predict how well a part of a network will train, without training it.

- The condition number of the neural tangent kernel (Chen et al. 2021, arXiv 2102.11535); small is good.
- ZiCo (Li et al. 2023, arXiv 2301.11300): log of mean over deviation of gradients, summed over layers; large is good.

Both are used as in Li et al. 2024 (arXiv 2410.00350). Shape letters: n samples, p weights of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

SINGULAR = 1e-12  # if the smallest eigenvalue is less than this fraction of the largest, the kernel has no inverse


def tangent_kernel(model: nn.Module, outputs: Tensor) -> Tensor:
    """G @ G.T (n, n), where row i of G is the gradient of the sum of sample i's outputs by the trained weights.

    G has the weights' precision; products are summed in float64, weight by weight.
    """
    weights = [p for name, p in model.named_parameters() if "weight" in name and p.requires_grad]
    rows = [torch.autograd.grad(sample.sum(), weights, retain_graph=True, allow_unused=True) for sample in outputs]
    kernel = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=outputs.device)
    for grads in zip(*rows, strict=True):
        if grads[0] is not None:
            stacked = torch.stack([grad.flatten() for grad in grads]).double()  # (n, p)
            kernel += stacked @ stacked.T
    return (kernel + kernel.T) / 2  # symmetric to the last bit, which not every matrix product is


def condition_number(kernel: Tensor) -> float:
    """The largest over the smallest eigenvalue of a symmetric kernel; infinite if the smallest is zero or NaN."""
    values = torch.linalg.eigvalsh(kernel)
    if not bool(values.isfinite().all()) or values[0] <= SINGULAR * values[-1]:
        return math.inf
    return float(values[-1] / values[0])


def zico(gradients: Sequence[Mapping[str, Tensor]]) -> float:
    """ZiCo of two or more batches' gradients by layer: the sum over layers of log sum(mean|g| / std(g)).

    Entries that do not vary over the batches are left out, and so are layers with no other entries.
    """
    total = 0.0
    for name in gradients[0]:
        stacked = torch.stack([batch[name].flatten().double() for batch in gradients])  # (batches, p)
        deviation = stacked.std(dim=0, unbiased=False)
        varies = deviation > 0
        if bool(varies.any()):
            total += math.log(float((stacked.abs().mean(dim=0)[varies] / deviation[varies]).sum()))
    return total
