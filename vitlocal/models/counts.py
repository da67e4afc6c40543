"""Counts a model's multiply-accumulates and the activations that a training step keeps, from shapes alone."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vitlocal.models.lffn import LocalFeedForward

STEP_BATCHES = 256, 512  # so large that activations, and not gradients, make the peak


def count_macs(model: nn.Module, size: int) -> int:
    """Returns the multiply-accumulates of a forward pass of one image of ``size`` px, see :func:`example_inputs`.

    Counts linear layers, convolutions and the two products of attention, as published figures do. Skips norms,
    activations and the resampling of positions. If training drops patches, the pass is one in training. Runs on shapes
    without data, and does not change the model.
    """
    drops_patches = getattr(model, "_patch_drop_rate", 0) > 0
    with _shapes_only(model, "plain", training=drops_patches), torch.no_grad():
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


def step_bytes(model: nn.Module, size: int, precision: torch.dtype, fused: bool, compiled: bool) -> tuple[int, int]:
    """Returns the most bytes that the forward and backward pass of a GPU hold at once: a constant, and per image.

    That is beside weights and gradients: what :func:`activation_bytes` counts, temporary results, inputs in float32,
    outputs, and weights in half precision. Runs on shapes without data, and does not change the model. A compiled step
    is counted as an eager one that keeps no float32 copy of the residual stream; a real one keeps slightly less.
    """
    twin, peaks = copy.deepcopy(model), []
    for batch in STEP_BATCHES:
        with _shapes_only(twin, "fused" if fused else "plain", training=True):
            for module in twin.modules():
                for name, p in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
            inputs = example_inputs(twin, batch, size)
            labels = torch.empty(batch, dtype=torch.int64)
            with LiveBytes() as live, nullcontext() if compiled else gpu_norms():
                with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                    outputs = twin(*inputs)
                if outputs.ndim == 2:
                    F.cross_entropy(outputs.float(), labels).backward()
                else:  # a prediction of the input's size
                    F.mse_loss(outputs.float(), torch.empty(outputs.shape)).backward()
        peaks.append(live.peak)
    per_image = (peaks[1] - peaks[0]) // (STEP_BATCHES[1] - STEP_BATCHES[0])
    return max(0, peaks[0] - STEP_BATCHES[0] * per_image), per_image


def example_inputs(model: nn.Module, batch: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Returns arguments for a forward pass of ``batch`` images of ``size`` px: the model's own, or RGB images."""
    make = getattr(model, "example_inputs", None)
    return make(batch, size, dtype) if make else (torch.empty(batch, 3, size, size, dtype=dtype),)


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of tensors that operators make: ``now`` those in use, ``peak`` the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count


@contextmanager
def gpu_norms() -> Iterator[None]:
    """A context in which layer norms run in float32 under autocast, as on a GPU. An eager step keeps such inputs."""
    plain = F.layer_norm
    try:
        F.layer_norm = lambda tokens, *arguments, **options: plain(tokens.float(), *arguments, **options)
        yield
    finally:
        F.layer_norm = plain


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
    fakes: dict[int, Tensor] = {}  # by the id of the tensor, which may have several names
    shapes: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():  # a shared module once, or functional_call() would not restore it
        own = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
        for name, tensor in chain(module.named_parameters(**own), module.named_buffers(**own)):
            if id(tensor) not in fakes:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                fakes[id(tensor)] = fake.requires_grad_(tensor.requires_grad and trains)
            shapes[name] = fakes[id(tensor)]
    inputs = example_inputs(model, batch, size, next(model.parameters()).dtype)
    torch.func.functional_call(model, shapes, inputs, tie_weights=False)
