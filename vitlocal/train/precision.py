"""Number formats and kernels of a step: autocast's precision, fused attention, denormal numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitlocal.errors import ConfigError


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products for ``train.precision``. Raises ConfigError if the device does not have it."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "fp16" and device.type != "cuda":
        raise ConfigError("train.precision: fp16 needs a CUDA device; use fp32, or bf16 if the CPU has it")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which matrix products run in ``precision``."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """A context in which a GPU must use a fused attention kernel. ConfigError if there is none for the case.

    Without it PyTorch would silently write the whole attention matrix to memory.
    """
    if device.type != "cuda":
        yield
        return
    # FlashAttention if it supports the case; the memory-efficient kernel for float32 and masks. Not cuDNN's, which
    # PyTorch 2.11 prefers on an H100: NaN gradients have been reported for it (pytorch#196678).
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise ConfigError(
                f"attention has no fused kernel on {torch.cuda.get_device_name(device)} for this model in this "
                "precision; use train.precision=bf16 or fp16, and heads whose width is a multiple of 8 and at most 128"
            ) from error


@contextmanager
def denormals_flushed(device: torch.device) -> Iterator[None]:
    """A context in which a CPU treats numbers below 1e-38 as zero.

    Arithmetic on them is slow: vanishing gradients slowed a 6-block, 128-wide DeiT (learning rate 4e-3, one core) from
    127 to 93 images/s. The mode is not set permanently, because numpy warns about it.
    """
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if device.type == "cpu":
            torch.set_flush_denormal(False)
