"""Counts a model's multiply-accumulates and the activations that a training step keeps, from shapes alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vitlocal.models.lffn import LocalFeedForward


def count_macs(model: nn.Module, size: int) -> int:
    """Returns the multiply-accumulates of a forward pass of one RGB image of ``size`` px.

    Counts linear layers, convolutions and the two products of attention, as published figures do. Skips norms,
    activations and the resampling of positions. Runs on shapes without data, and does not change the model.
    """
    with _shapes_only(model, "plain", training=False), torch.no_grad():
        # PyTorch's counter knows the products in attention that is not fused.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _forward(model, 1, size)
    return counter.get_total_flops() // 2


def activation_bytes(model: nn.Module, size: int, precision: torch.dtype = torch.float32, fused: bool = False) -> int:
    """Returns the bytes per image of ``size`` px that an eager forward pass keeps for the backward pass.

    Runs on shapes without data, and does not change the model. ``precision`` is autocast's. ``fused``: the local FFN
    uses the fused kernel. A compiled step keeps less, because it recomputes cheap operations.
    """
    found = []
    for batch in (2, 4):
        storages: dict[int, int] = {}

        def save(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()  # several views of one storage keep it once
            return tensor

        with (
            _shapes_only(model, "fused" if fused else "plain", training=True),
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            torch.autocast("cpu", precision, enabled=precision != torch.float32),
        ):
            _forward(model, batch, size)
        found.append(sum(storages.values()))
    return (found[1] - found[0]) // 2  # without what does not depend on the batch size


class GpuAutocast(TorchFunctionMode):
    """A context in which autocast on a CPU runs layer norms in float32, as on a GPU. There, eager steps keep a copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def _shapes_only(model: nn.Module, kernel: str, training: bool) -> Iterator[None]:
    """Within the context, new tensors have no data, and all local FFNs of ``model`` use ``kernel``."""
    local = [module for module in model.modules() if isinstance(module, LocalFeedForward)]
    before = model.training, [module.kernel for module in local]
    try:
        model.train(training)
        for module in local:
            module.kernel = kernel
        with FakeTensorMode():
            yield
    finally:
        model.train(before[0])
        for module, old in zip(local, before[1], strict=True):
            module.kernel = old


def _forward(model: nn.Module, batch: int, size: int) -> None:
    trains = torch.is_grad_enabled()  # else PyTorch's counter looks for gradients that no tensor has
    shapes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad and trains)
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    }
    images = torch.empty(batch, 3, size, size, dtype=next(model.parameters()).dtype)
    torch.func.functional_call(model, shapes, (images,))
