"""The memory that training by a recipe needs on one GPU, counted from shapes. The forecast prints it.

Nothing runs on a device. Counted is the full model; evaluations, which keep no activations, are not.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from vitlocal.bench.measurement import text_table
from vitlocal.config import Config
from vitlocal.data.augment import NOISE
from vitlocal.data.reader import PREFETCH
from vitlocal.methods import build_methods
from vitlocal.methods.method import MethodContext
from vitlocal.models.counts import activation_bytes, count_macs, step_bytes
from vitlocal.models.dit import DiT
from vitlocal.models.factory import patch_side
from vitlocal.models.local_mix import MAX_WIDTH
from vitlocal.models.shape import model_parts
from vitlocal.storage import recipe_stages
from vitlocal.train.build import mac_counter, make_model, make_optimizer, use_grad_checkpointing
from vitlocal.train.devices import is_small
from vitlocal.train.optim import CombinedOptimizer, new_state
from vitlocal.train.probes import batch_size_at
from vitlocal.train.step import RUN_AHEAD, has_batch_norm

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "auto": torch.bfloat16}
# An estimate of what cannot be counted: the CUDA context, workspaces of cuBLAS, and fragmentation.
ALLOWANCE = 1_500_000_000
PARTS = ("state", "step", "inputs", "graphs", "allowance", "total")
COLUMNS = {
    "px": ("size", "d"), "batch": ("batch_size", "d"), "at once": ("images_at_once", "d"), "how": ("mode", ""),
    **{f"{name}, GB": (f"{name} gb", ".2f") for name in PARTS},
}  # fmt: skip


@dataclass(frozen=True)
class SizeMemory:
    """The bytes at one image size.

    - ``state``: weights, gradients, moments of the optimizer, weight averages, and the noise for random erasing.
    - ``step``: forward and backward pass of the images that run at once, see :func:`step_bytes`. Beside a CUDA graph,
      an epoch's last batch needs memory of its own.
    - ``inputs``: batches of uint8 pixels, or latents, that the loader has sent, and the augmented one.
    - ``graphs``: what the CUDA graphs of other sizes hold beyond the step's own part, until the last of them has run.
    """

    size: int
    batch_size: int
    images_at_once: int
    mode: str
    state: int
    step: int
    inputs: int
    graphs: int = 0
    allowance: int = ALLOWANCE

    @property
    def total(self) -> int:
        return self.state + self.step + self.inputs + self.graphs + self.allowance

    def row(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


def moment_bytes(optimizer: torch.optim.Optimizer | CombinedOptimizer) -> int:
    """The bytes of an optimizer's state after its first step, without single numbers, which count steps."""
    members = optimizer.members if isinstance(optimizer, CombinedOptimizer) else (optimizer,)
    return sum(
        value.nbytes
        for member in members
        for group in member.param_groups
        for weight in group["params"]
        for value in new_state(member, weight.detach().to("meta")).values()
        if value.ndim
    )


def state_bytes(model: nn.Module, config: Config, averages: int) -> int:
    """The bytes that stay for the whole run, with ``averages`` weight averages."""
    weights = sum(value.nbytes for value in model.parameters())
    copies = (weights + sum(value.nbytes for value in model.buffers())) * (1 + averages)
    moments = moment_bytes(make_optimizer(config, model, torch.float32))
    return copies + weights + moments + (4 * NOISE if config.augment.random_erasing else 0)


def input_bytes(model: nn.Module, size: int) -> int:
    """The bytes of an image as the loader sends it: uint8 pixels, or means and deviations of latents in float16."""
    if isinstance(model, DiT) and model.stride > 1:
        return 2 * 2 * model.in_chans * (size // model.stride) ** 2
    return 3 * size**2


def count_memory(
    config: Config, images: int, counted: dict[tuple[int, bool], tuple[int, int]] | None = None
) -> list[SizeMemory]:
    """The memory at each image size of the recipe, on one GPU, for an epoch of ``images`` images.

    Options that are "auto" are those of a recent GPU: bf16, compiled, with the fused kernel. ``counted`` keeps the
    bytes of steps, by size and whether compiled, for calls that differ in ``train.grad_accum_steps`` alone.
    """
    counted = {} if counted is None else counted
    train, augment = config.train, config.augment
    model, _ = make_model(config, 1000, torch.device("meta"))
    if train.grad_checkpointing:
        use_grad_checkpointing(model)
    precision, compiled, patch = PRECISIONS[train.precision], train.compile != "no", patch_side(model)

    def fused(size: int) -> bool:
        return train.kernel != "plain" and size // patch <= MAX_WIDTH

    def bytes_of(size: int, compiled: bool) -> tuple[int, int]:
        if (size, compiled) not in counted:
            counted[size, compiled] = step_bytes(model, size, precision, fused(size), compiled)
        return counted[size, compiled]

    context = MethodContext(
        config.recipe, images, lambda size: activation_bytes(model, size, precision, fused(size)), mac_counter(model),
        model_parts(model), len(getattr(model, "blocks", ())),
    )  # fmt: skip
    methods = build_methods(context)
    averages = sum(len(method.needs.ema_decays) for method in methods)
    averages += train.ema_decay is not None or train.ema_length is not None
    state, found, captured = state_bytes(model, config, averages), list[SizeMemory](), dict[int, int]()
    for size in dict.fromkeys(stage.size for stage in recipe_stages(config)):
        batch = batch_size_at(methods, size, train.batch_size)
        at_once = -(-batch // train.grad_accum_steps)
        captures = train.cuda_graphs == "yes" or is_small(batch, count_macs(model, size))
        graphs = compiled and captures and train.cuda_graphs != "no" and train.grad_accum_steps == 1
        fixed, each = bytes_of(size, compiled)
        step = fixed + at_once * each
        if compiled:  # an epoch's last batch runs eagerly, in parts of half the size (TrainStep._parts)
            fixed, each = bytes_of(size, compiled=False)
            eager = fixed + (at_once if has_batch_norm(model) else -(-at_once // 2)) * each
            if graphs:  # whose memory no other work can use
                captured[size] = step
            step = step + eager if graphs else max(step, eager)
        # The loader has sent the next batches, and the last ones are in use until their steps have ended.
        batches = PREFETCH + 2 + RUN_AHEAD + bool(augment.randaugment or augment.three_augment)
        mode = "eager" if not compiled else "CUDA graph" if graphs else "compiled"
        found.append(SizeMemory(size, batch, at_once, mode, state, step, batches * batch * input_bytes(model, size)))
    order, pool = [stage.size for stage in recipe_stages(config)], max(captured.values(), default=0)
    last = max((place for place, size in enumerate(order) if size in captured), default=-1)
    return [
        replace(memory, graphs=pool - captured.get(memory.size, 0)) if order.index(memory.size) <= last else memory
        for memory in found
    ]


def fitting_parts(config: Config, images: int, limit: int) -> int | None:
    """The smallest power of two, times ``train.grad_accum_steps``, of parts of a batch that fit; None if none do."""
    parts, known = config.train.grad_accum_steps, dict[tuple[int, bool], tuple[int, int]]()
    while 2 * parts <= config.train.batch_size:
        counted = count_memory(replace(config, train=replace(config.train, grad_accum_steps=parts)), images, known)
        if max(memory.total for memory in counted) <= limit:
            return parts
        parts *= 2
    return None


def show_memory(config: Config, images: int, counted: Sequence[SizeMemory], limit: int | None) -> None:
    """Prints the table and, with a ``limit`` in bytes, whether the recipe fits and which option would make it fit."""
    rows = [row | {f"{name} gb": row[name] / 1e9 for name in PARTS} for row in (memory.row() for memory in counted)]
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    print(f"\nmemory on one GPU ({precision}), counted, not measured:\n")
    print(text_table(rows, COLUMNS))
    if limit is None:
        return
    most = max(counted, key=lambda memory: memory.total)
    needs = f"{most.size} px needs {most.total / 1e9:.1f} GB of {limit / 1e9:.1f}"
    if most.total <= limit:
        print(f"it fits: {needs}")
    elif parts := fitting_parts(config, images, limit):
        print(f"it does not fit: {needs}; --train.grad_accum_steps={parts} fits")
    else:
        print(
            f"it does not fit: {needs}, in any number of parts; use a smaller model, or --train.grad_checkpointing=yes"
        )
