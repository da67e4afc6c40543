"""Checks of a run before it trains: whether its parts fit each other, the data and the processes."""

import logging
from typing import Any

import torch
from torch import nn

from vitlocal.config import IMMATERIAL, Config
from vitlocal.data.batch import Sources
from vitlocal.errors import ConfigError, first_line
from vitlocal.machine import memory
from vitlocal.methods import METHODS
from vitlocal.methods.method import Claims
from vitlocal.models.counts import count_macs
from vitlocal.models.dit import DiT
from vitlocal.models.factory import build_model, patch_side, size_multiple
from vitlocal.models.local_mix import MAX_WIDTH
from vitlocal.models.shape import check_shape
from vitlocal.models.swin import Swin
from vitlocal.models.vit import VisionTransformer
from vitlocal.train.distributed import Ranks
from vitlocal.train.trainer import Trainer

# Models with larger values are checked before they are built.
USUAL_SIZES = {"size": 1024, "patch_size": 64, "width": 2048, "depth": 64}
# What timm's models raise at sizes that they cannot take. They check sizes in various ways, or not.
SIZE_ERRORS = (ValueError, RuntimeError, AssertionError, IndexError, TypeError, ArithmeticError)


def stated_sizes(config: Config) -> list[tuple[str, int]]:
    """The sizes that the run will come to, perhaps hours later, with the option or method that states each."""
    fed = [(name, stage.size) for name in config.methods for stage in METHODS[name].image_sizes(config.recipe)]
    stated = [("model.size", config.model.size), ("evaluate.size", config.evaluate.size)]
    return [(name, size) for name, size in (*stated, *fed) if size is not None]


def check_image_sizes(config: Config, model: nn.Module) -> None:
    """Raises ConfigError if the model cannot take a size that the run will come to."""
    multiple, largest, sizes = size_multiple(model), config.model.size, stated_sizes(config)
    if config.train.kernel == "fused":
        for name, size in sizes:
            if size // patch_side(model) > MAX_WIDTH:
                raise ConfigError(
                    f"train.kernel: fused is for grids of up to {MAX_WIDTH} columns, and {name} {size} makes "
                    f"{size // patch_side(model)}; use auto"
                )
    if odd := [f"{name} {size}" for name, size in sizes if size % multiple]:
        near = sorted({max(multiple, size // multiple * multiple) for _, size in sizes if size % multiple})
        raise ConfigError(
            f"{', '.join(odd)}: expected multiples of {multiple}, as {config.model.name} needs, such as "
            f"{', '.join(map(str, near))}"
        )
    is_limited = isinstance(model, Swin)  # its tables have no biases for larger windows
    if above := [f"{name} {size}" for name, size in sizes if size > largest and (is_limited or name in config.methods)]:
        raise ConfigError(f"{', '.join(above)}: expected at most model.size ({largest})")
    if isinstance(model, (VisionTransformer, DiT, Swin)):
        return  # they take all sizes that are left
    first: dict[int, str] = {}
    for name, size in sizes:
        first.setdefault(size, name)
    for size, name in first.items():
        remedy = f"; {size_remedy(config, model, name)}, or use a model that takes this size"
        macs_at(model, size, f"{name} {size}: {config.model.name}", remedy)


def size_remedy(config: Config, model: Any, name: str) -> str:
    """Says how to avoid the size that ``name`` states, because timm's ``model`` cannot take it."""
    if name in config.methods:
        return f"state other sizes in the options of {name}, or remove it from methods"
    if name != "model.size":
        return f"use {name}={config.model.size}"
    own = (getattr(model, "default_cfg", None) or {}).get("input_size", (0,))[-1]
    return "use another model.size" + (f", such as its own {own}" if own not in (0, config.model.size) else "")


def macs_at(model: nn.Module, size: int, name: str, remedy: str = "") -> int:
    """Returns :func:`count_macs` of the model. Raises ConfigError if its forward pass takes no images of ``size`` px.

    The error begins with ``name`` and ends with ``remedy``.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints the traceback of each operator that fails
    before, log.disabled = log.disabled, True
    try:
        return count_macs(model, size)
    except SIZE_ERRORS as error:
        raise ConfigError(f"{name} takes no images of {size} px ({first_line(error)}){remedy}") from error
    finally:
        log.disabled = before


def check_memory(config: Config, arguments: dict[str, Any], num_classes: int, device: torch.device) -> None:
    """Raises ConfigError if the weights of an unusually large model cannot be trained in the device's memory."""
    stated = {name: getattr(config.model, name) or 0 for name in USUAL_SIZES}
    if device.type == "meta" or all(stated[name] <= most for name, most in USUAL_SIZES.items()):
        return
    with torch.device("meta"):  # allocates nothing
        model, _ = build_model(config.model.name, arguments, num_classes)
    weights = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    needed = 16 * weights  # bytes of float32 weights, gradients and two moments
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory()
    if needed > there:
        options = ", ".join(f"model.{name}={value}" for name, value in stated.items() if value)
        raise ConfigError(
            f"{options}: {weights / 1e6:,.0f} M weights need {needed / 2**30:,.0f} GiB with their gradients and "
            f"moments, and {device} has {there / 2**30:,.0f} GiB; use smaller ones"
        )


def check_latents(config: Config, sources: Sources) -> None:
    """Raises ConfigError or DataError if a size that the run will come to has no latents, or a damaged file."""
    for name, size in stated_sizes(config):
        source = sources.val if name == "evaluate.size" else sources.train
        source.check_size(size)
    sources.val.check_size(config.evaluate.size or config.model.size)


def check_plans(trainer: Trainer, world: int) -> None:
    """Raises ConfigError if a batch is too small for all processes, or the model lacks a part that a method needs."""
    plans = trainer.upcoming_plans()
    smallest = min(plan.feed.batch_size for plan in plans)
    if smallest < 2 * world:
        raise ConfigError(
            f"train.batch_size: {smallest} is too small for {world} processes, which take pairs of images; use at "
            f"least {2 * world}"
        )
    for plan in plans:
        check_shape(trainer.state.model, plan.shape)


def check_fields(model_name: str, model: nn.Module, claims: Claims) -> None:
    """Raises ConfigError if a method sets a field of the shape that the model cannot change."""
    fixed = {f"shape.{name}": reason for name, reason in getattr(model, "fixed_fields", {}).items()}
    if wrong := sorted(claims.writes & fixed.keys()):
        spared = [name for name in wrong if name in claims.spared_by]
        name = (spared or wrong)[-1]
        remedy = f"set {claims.spared_by[name]}" if spared else f"remove {claims.name}"
        raise ConfigError(
            f"methods: {claims.name} changes {', '.join(wrong)}, and {model_name} cannot: {fixed[name]}; {remedy}"
        )


def check_ranks(config: Config, ranks: Ranks) -> None:
    """Raises ConfigError if the processes were started with different options."""
    mine, first = config.flat(), ranks.broadcast(config.flat())
    different = [name for name, value in mine.items() if name not in IMMATERIAL and first[name] != value]
    if different:
        raise ConfigError(f"{', '.join(different)}: rank {ranks.rank} and rank 0 were started with different values")


def check_data(found: dict[str, Any], before: dict[str, Any], config: Config) -> None:
    """Raises ConfigError if the training data are not those of the checkpoint."""
    files = found.get("files", {})  # the record of a run's origin has none
    others = [name for name, digest in before.get("files", {}).items() if files.get(name, digest) != digest]
    if others:
        raise ConfigError(
            f"data.root: {', '.join(others)} in {config.data.root}: the content is not that of the files on which the "
            f"run in {config.run.folder} was started. Use those files, or another --run.folder"
        )
    if found | {"files": None} != before | {"files": None}:
        raise ConfigError(
            f"data.root: {config.data.root} has {found['images']} training images of {found['classes']} classes, and "
            f"the run in {config.run.folder} was started on {before['images']} of {before['classes']}, perhaps with "
            "other names. Use those data, or another --run.folder"
        )
