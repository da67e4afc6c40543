"""The device of a process, and how a step runs there: number formats, kernels, eagerly, compiled or as a CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitlocal.errors import ConfigError
from vitlocal.models.counts import count_macs
from vitlocal.plan import Feed, Shape
from vitlocal.train.distributed import ALONE, Ranks

# A step of fewer multiply-adds runs as a CUDA graph. At half of an H200's peak it takes under 10 ms, about as long as
# launching its several hundred kernels one by one. (An estimate; not measured yet.)
GRAPH_MACS = 2e12
RECOMPILE_LIMIT = 256  # PyTorch's limit of compilations per function: each size, batch and mode needs one


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of ``run.device``. Each of several processes on a machine gets a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and ranks.local_world_size > 1:
        count = ranks.local_world_size
        raise ConfigError(f"run.device: {count} processes cannot share {name}; use cuda, a GPU for each")
    if name == "cuda" and ranks.world > 1:
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"run.device: '{name}' cannot be used here ({str(error).splitlines()[0]})"
            + (f"; {ranks.local_world_size} processes need a GPU each" if ranks.world > 1 else "")
        ) from error
    return device


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all its work. Costs nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    # FlashAttention if it supports the case; the memory-efficient kernel for float32 and masks. Not cuDNN's, which
    # PyTorch 2.11 prefers on an H100: NaN gradients have been reported for it (pytorch#196678).
    fused = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
    with fused if device.type == "cuda" else nullcontext():
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


# --- compiling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """How a step runs for one feed."""

    compiled: bool = False
    graphs: bool = False

    def __str__(self) -> str:
        return "eager" if not self.compiled else "compiled, as a CUDA graph" if self.graphs else "compiled"


EAGER = Mode()


class StepCompiler:
    """Chooses the mode for each feed and shape, and keeps the compiled objectives.

    ``cuda_graphs``: "auto" (for small steps), "yes" or "no". ``can_capture``: whether a CUDA graph is possible at all.
    """

    def __init__(self, model: nn.Module, enabled: bool, cuda_graphs: str, can_capture: bool):
        self._model, self.enabled = model, enabled
        self._cuda_graphs, self._can_capture = cuda_graphs, enabled and can_capture
        self._objectives: dict[bool, Callable[..., Any]] = {}  # by whether it runs as a CUDA graph
        self._modes: dict[tuple[int, int, Shape], Mode] = {}
        if cuda_graphs == "yes" and not self._can_capture:
            raise ConfigError(
                "train.cuda_graphs: yes needs a GPU, train.compile, one process and train.grad_accum_steps=1; use auto"
            )
        if enabled:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT

    def mode(self, feed: Feed, shape: Shape) -> Mode:
        """How full batches of ``feed`` run in ``shape``, which must be the model's current shape."""
        key = (feed.size, feed.batch_size, shape)
        if key not in self._modes:
            graphs = self._cuda_graphs == "yes"
            if self._can_capture and self._cuda_graphs == "auto":
                graphs = 3 * feed.batch_size * count_macs(self._model, shape.input_size or feed.size) < GRAPH_MACS
            self._modes[key] = Mode(self.enabled, graphs)
        return self._modes[key]

    def objective(self, eager: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
        """The objective that runs in ``mode``: ``eager`` itself, or ``eager`` compiled."""
        if not mode.compiled:
            return eager
        if mode.graphs not in self._objectives:
            # dynamic=False: one compilation for each size and batch, so that the compiler knows all shapes.
            how: dict[str, Any] = {"mode": "reduce-overhead"} if mode.graphs else {}
            self._objectives[mode.graphs] = torch.compile(eager, dynamic=False, **how)
        return self._objectives[mode.graphs]

    def reset(self) -> None:
        """Forgets the compiled objectives: they belong to an objective that is wrapped again."""
        self._objectives.clear()
