"""Counts the bytes of activations that a training step keeps, from shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitlocal.models.flops import input_channels
from vitlocal.models.lffn import use_kernel

BATCH_SIZES = (2, 4)  # the difference gives the bytes per image


def activation_bytes(model: nn.Module, size: int, precision: torch.dtype = torch.float32, fused: bool = False) -> int:
    """Returns the bytes per image of ``size`` px that an eager forward pass keeps for the backward pass.

    Runs on shapes without data, and does not change the model. ``precision`` is autocast's. ``fused``: the local FFN
    uses the fused kernel. A compiled step keeps less, because it recomputes cheap operations.
    """
    training = model.training
    try:
        model.train()
        with FakeTensorMode(), use_kernel(model, "fused" if fused else "plain"):
            small, large = (_saved_bytes(model, size, batch, precision) for batch in BATCH_SIZES)
    finally:
        model.train(training)
    return (large - small) // (BATCH_SIZES[1] - BATCH_SIZES[0])


def _saved_bytes(model: nn.Module, size: int, batch: int, precision: torch.dtype) -> int:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    storages: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()  # several views of one storage keep it once
        return tensor

    shapes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    images = torch.empty(batch, input_channels(model), size, size)
    half = precision != torch.float32
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        with torch.autocast("cpu", precision if half else torch.bfloat16, enabled=half):
            torch.func.functional_call(model, shapes, (images,))
    return sum(storages.values())
