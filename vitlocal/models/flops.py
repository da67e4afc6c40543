"""Counts a model's multiply-accumulates per image, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitlocal.models.lffn import kernel_set


class _MacCounter(TorchFunctionMode):
    """Sums the multiply-accumulates of the layers and attentions called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
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
            # Attention written out. A product of two matrices, as the position table's, serves a whole batch.
            self.macs += result.numel() * args[0].shape[-1]
        return result


def count_macs(model: nn.Module, size: int | tuple[int, int]) -> int:
    """Multiply-accumulates of one forward pass of one image of ``size`` pixels (square, or height and width).

    Counts linear layers, convolutions and attention's two products, as published figures do; not norms,
    activations or the resampling of positions. Runs on shapes without data, and leaves the model as it was.
    """
    height, width = (size, size) if isinstance(size, int) else size
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    first = next(model.parameters())
    image = torch.empty(1, getattr(model, "in_chans", 3), height, width, device="meta", dtype=first.dtype)
    was_training = [module for module in model.modules() if module.training]
    try:
        model.eval()  # BatchNorm refuses to train on a single value
        with torch.no_grad(), kernel_set(model, "plain"), _MacCounter() as counter:
            torch.func.functional_call(model, shapes, (image,))
    finally:
        for module in was_training:
            module.training = True
    return counter.macs
