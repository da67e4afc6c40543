"""The device of a process, and how a step runs there: number formats, kernels, eagerly, compiled or as a CUDA graph."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitlocal.errors import ConfigError, first_line
from vitlocal.plan import Feed, Shape
from vitlocal.train.distributed import ALONE, Ranks

# A step of fewer multiply-adds runs as a CUDA graph. At half of an H200's peak it takes under 10 ms, about as long as
# launching its several hundred kernels one by one. (An estimate; not measured yet.)
GRAPH_MACS = 2e12
CACHE_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
# Blocks are compiled once (Block.forward_once_compiled). PyTorch 2.14 then may use a buffer again that is still needed,
# so that gradients are wrong.
COMPILE_OPTIONS: dict[str, Any] = {"allow_buffer_reuse": False}
RECOMPILE_LIMIT = 256  # PyTorch's limit of compilations per function: each size, batch and mode needs one


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of ``run.device``; "auto": this machine's accelerator, else the CPU.

    Each of several processes on a machine gets a GPU of its own. ROCm's GPUs are "cuda" too.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if found is None else found.type
    if name.partition(":")[0] not in ("cpu", "cuda") and ranks.world > 1:
        raise ConfigError(
            f"run.device: {ranks.world} processes train together on CUDA devices or on CPUs, not on {name}; use "
            "cpu, or one process"
        )
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
            f"run.device: '{name}' cannot be used here ({first_line(error)})"
            + (f"; {ranks.local_world_size} processes need a GPU each" if ranks.world > 1 else "")
        ) from error
    return device


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all its work. Costs nothing on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def new_event(device: torch.device) -> Any:
    """An event for the current stream of an accelerator, which keeps its time."""
    if device.type == "cuda":
        return torch.cuda.Event(enable_timing=True, blocking=True)  # who waits for it leaves its core to the decoders
    return torch.Event(device, enable_timing=True)


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
    """A context in which a CUDA device must use a fused attention kernel. ConfigError if there is none for the case.

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


def is_small(batch_size: int, macs: int) -> bool:
    """Whether a step runs as a CUDA graph by default. ``macs``: of a forward pass of one image."""
    return 3 * batch_size * macs < GRAPH_MACS


def compile_cache() -> Path:
    """The folder with what PyTorch has compiled, also in earlier runs. Environment variables of PyTorch may name it.

    PyTorch's own choice is in ``/tmp``, which does not last.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # slow to import

    with suppress(OSError, RuntimeError):  # there may be no home folder, or a read-only one; then PyTorch chooses
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitlocal"
        folder.mkdir(parents=True, exist_ok=True)
        for variable, name in CACHE_VARIABLES.items():
            os.environ.setdefault(variable, str(folder / name))
    return Path(cache_dir())


class StepCompiler:
    """Chooses the mode for each feed and shape, and keeps the compiled objectives.

    ``cuda_graphs``: "auto" (for small steps), "yes" or "no". ``can_capture``: whether a CUDA graph is possible at all.
    ``macs``: the multiply-adds of a forward pass of one image, by image size and shape.
    """

    def __init__(self, enabled: bool, cuda_graphs: str, can_capture: bool, macs: Callable[[int, Shape], int]):
        self.enabled, self._macs = enabled, macs
        self._cuda_graphs, self._can_capture = cuda_graphs, enabled and can_capture
        self._objectives: dict[bool, Callable[..., Any]] = {}  # by whether it runs as a CUDA graph
        self._captured: Callable[..., Any] | None = None  # the function that is compiled for CUDA graphs
        self._modes: dict[tuple[int, int, Shape], Mode] = {}
        if cuda_graphs == "yes" and not self._can_capture:
            raise ConfigError(
                "train.cuda_graphs: yes needs a CUDA device, train.compile, one process and train.grad_accum_steps=1; "
                "use auto"
            )
        if enabled:
            compile_cache()
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT

    def mode(self, feed: Feed, shape: Shape) -> Mode:
        """How full batches of ``feed`` run in ``shape``."""
        key = (feed.size, feed.batch_size, shape)
        if key not in self._modes:
            graphs = self._cuda_graphs == "yes"
            if self._can_capture and self._cuda_graphs == "auto":
                graphs = is_small(feed.batch_size, self._macs(feed.size, shape))
            self._modes[key] = Mode(self.enabled, graphs)
        return self._modes[key]

    def objective(self, eager: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
        """The objective that runs in ``mode``: ``eager`` itself, or ``eager`` compiled."""
        if not mode.compiled:
            return eager
        if mode.graphs not in self._objectives:
            how = COMPILE_OPTIONS
            if mode.graphs:
                how = how | {"triton.cudagraphs": True}
                eager = self._captured = _function_of(eager)
            # dynamic=False: one compilation for each size and batch, so that the compiler knows all shapes.
            self._objectives[mode.graphs] = torch.compile(eager, dynamic=False, options=how)
        return self._objectives[mode.graphs]

    @contextmanager
    def watched(self, feed: Feed, shape: Shape) -> Iterator[None]:
        """A context for the first runs of ``feed``. PyTorch skips CUDA graphs silently: then the mode is "compiled".

        Raises ConfigError if train.cuda_graphs=yes is skipped.
        """
        skips = torch._dynamo.utils.counters["inductor"]
        before = skips["cudagraph_skips"]
        yield
        if self.mode(feed, shape).graphs and skips["cudagraph_skips"] > before:
            self._modes[feed.size, feed.batch_size, shape] = Mode(compiled=True)
            if self._cuda_graphs == "yes":
                raise ConfigError(
                    f"train.cuda_graphs: PyTorch does not capture the step at {feed.size} px, batch {feed.batch_size} "
                    "(TORCH_LOGS=cudagraphs shows why); use auto"
                )

    def release_graphs(self) -> None:
        """Frees the memory of all CUDA graphs, which later sizes need. A step that needs them again compiles again."""
        if self._objectives.pop(True, None) is None:
            return
        from torch._dynamo.eval_frame import remove_from_cache
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees  # slow to import

        remove_from_cache(self._captured)
        self._captured = None
        reset_cudagraph_trees()
        torch.cuda.empty_cache()

    def reset(self) -> None:
        """Forgets the compiled objectives: they belong to an objective that is wrapped again."""
        self._objectives.clear()


def _function_of(objective: Callable[..., Any]) -> Callable[..., Any]:
    """``objective`` as a function of its own: PyTorch can forget what it compiled for one function."""

    def run(*operands: Any) -> Any:
        return objective(*operands)

    return run
