"""Counts the activations that a training step keeps, from shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitlocal.models.lffn import kernel_set

COUNTED = (2, 4)  # images: what two more of them add is what an image takes


def activation_bytes(model: nn.Module, size: int, precision: torch.dtype = torch.float32, fused: bool = False) -> int:
    """Bytes an image of ``size`` px that an eager forward pass keeps for the backward.

    Runs on shapes without data, and leaves the model as it was. ``precision`` is autocast's; with ``fused`` the local
    FFN is the fused kernel's. A compiled step keeps less: it computes again what is cheap.
    """
    training = model.training
    matrices = getattr(model, "_position_matrices", None)  # shapes without data must not get in there
    try:
        if matrices is not None:
            model._position_matrices = {}
        model.train()
        with FakeTensorMode(), kernel_set(model, "fused" if fused else "plain"):
            few, more = (_kept(model, size, count, precision) for count in COUNTED)
    finally:
        model.train(training)
        if matrices is not None:
            model._position_matrices = matrices
    return (more - few) // (COUNTED[1] - COUNTED[0])


def _kept(model: nn.Module, size: int, count: int, precision: torch.dtype) -> int:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()  # views of one storage are kept once
        return tensor

    shapes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    image = torch.empty(count, getattr(model, "in_chans", 3), size, size)
    half = precision != torch.float32
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", precision if half else torch.bfloat16, enabled=half):
            torch.func.functional_call(model, shapes, (image,))
    return sum(storages.values())
