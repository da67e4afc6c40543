"""Scores of how well a part of a network would train, without training it.

- The condition number of the neural tangent kernel (Chen et al. 2021, arXiv 2102.11535): small is good.
- ZiCo (Li et al. 2023, arXiv 2301.11300): the log of mean over deviation of gradients, summed over layers; large is
  good.

As AutoProg-Zero (Li et al. 2024, arXiv 2410.00350) uses them. Shapes: n samples, P weights that are trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vitlocal.data.batch import Batch
    from vitlocal.train.step import Step

FLAT = 1e-12  # an eigenvalue of less than this part of the largest is none: the kernel has no inverse


def tangent_kernel(model: nn.Module, outputs: Tensor) -> Tensor:
    """Θ = G·Gᵀ (n, n), where row i of G is the gradient of the sum of sample i's outputs by the trained weights.

    G is kept in the weights' precision, n times their number; products are added up in float64, weight by weight.
    """
    weights = [p for name, p in model.named_parameters() if "weight" in name and p.requires_grad]
    rows = [torch.autograd.grad(sample.sum(), weights, retain_graph=True, allow_unused=True) for sample in outputs]
    kernel = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=outputs.device)
    for grads in zip(*rows, strict=True):
        if grads[0] is not None:
            stacked = torch.stack([grad.flatten() for grad in grads]).double()  # (n, p)
            kernel += stacked @ stacked.T
    return (kernel + kernel.T) / 2  # to the last bit, which not every machine's matrix product is


def kernel_condition(kernel: Tensor) -> float:
    """λ_max / λ_min of a symmetric positive semi-definite matrix; infinite where λ_min is none."""
    if len(kernel) < 2:
        raise ValueError(f"the kernel of {len(kernel)} sample has one eigenvalue; give two samples or more")
    values = torch.linalg.eigvalsh(kernel)
    if not bool(values.isfinite().all()) or values[-1] <= 0 or values[0] <= FLAT * values[-1]:
        return math.inf
    return float(values[-1] / values[0])


def condition_number(step: Step, batch: Batch, number: int) -> float:
    """Of the model in its present shape, on a batch augmented as in step ``number``, in float32."""
    with torch.enable_grad():
        logits = step.logits_of(step.model, batch, number, torch.float32)
        return kernel_condition(tangent_kernel(step.model, logits))


def zico(gradients: Sequence[Mapping[str, Tensor]]) -> float:
    """Over two or more batches' gradients by layer: Σ over layers of log Σ_p mean|g_p| / std(g_p).

    Entries that do not vary over the batches are left out; so are layers of which nothing is left.
    """
    if len(gradients) < 2:
        raise ValueError(f"ZiCo compares the gradients of batches: got {len(gradients)}, expected two or more")
    total = 0.0
    for name in gradients[0]:
        stacked = torch.stack([one[name].flatten().double() for one in gradients])  # (batches, p)
        deviation = stacked.std(dim=0, unbiased=False)
        varied = deviation > 0
        if bool(varied.any()):
            total += math.log(float((stacked.abs().mean(dim=0)[varied] / deviation[varied]).sum()))
    return total
