"""Counts a model's multiply-accumulates per image, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitlocal.models.lffn import use_kernel


class _MacCounter(TorchFunctionMode):
    """Sums the multiply-accumulates of the layers and attentions that are called in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.macs += result.numel() * args[0].shape[-1]
        elif func in (F.conv2d, torch.conv2d):
            weight = args[1]  # (out, in / groups, k, k)
            self.macs += result.numel() * weight[0].numel()
        elif func is F.scaled_dot_product_attention:
            query, key, value = args[:3]  # (B, M, T, d)
            pairs = query.shape[:-1].numel() * key.shape[-2]
            self.macs += pairs * (query.shape[-1] + value.shape[-1])
        elif func in (torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__) and args[0].ndim > 2:
            # Attention that is not fused. A product of two matrices resamples the position table, once for a batch.
            self.macs += result.numel() * args[0].shape[-1]
        return result


def count_macs(model: nn.Module, size: int | tuple[int, int]) -> int:
    """Returns the multiply-accumulates of a forward pass of one image of ``size`` px (a number, or height and width).

    Counts linear layers, convolutions and the two products of attention, as published figures do. Skips norms,
    activations and the resampling of positions. Runs on shapes without data, and does not change the model.
    """
    height, width = (size, size) if isinstance(size, int) else size
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    dtype = next(model.parameters()).dtype
    image = torch.empty(1, input_channels(model), height, width, device="meta", dtype=dtype)
    was_training = [module for module in model.modules() if module.training]
    try:
        model.eval()  # BatchNorm cannot train on a single value
        with torch.no_grad(), use_kernel(model, "plain"), _MacCounter() as counter:
            torch.func.functional_call(model, shapes, (image,))
    finally:
        for module in was_training:
            module.training = True
    return counter.macs


def input_channels(model: nn.Module) -> int:
    """Returns the channels of the model's first convolution, 3 if it has none."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
