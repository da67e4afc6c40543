"""Sets which part of a model runs, and initializes the parts that start to run.

Parameters keep their identity and size: a shape selects slices and blocks of the full model. Slices that do not run get
zero gradients. Blocks that do not run, or are frozen, get no gradients.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitlocal.errors import ConfigError
from vitlocal.models.block import BlockModel
from vitlocal.models.deit import FeedForward
from vitlocal.models.dit import DiT, fold_stage
from vitlocal.models.lffn import LocalFeedForward
from vitlocal.models.pyramid import PvtMlp, PyramidModel
from vitlocal.models.swin import SwinMlp
from vitlocal.plan import WHOLE_MODEL, Growth, ModelParts, Shape, StageEmbedding, growth_sources

# Feed-forward parts that can run a slice of their hidden units.
SLICED = (FeedForward, LocalFeedForward, PvtMlp, SwinMlp)
# Layers whose rows belong to heads, and how many of queries, keys and values each of them gives.
PROJECTIONS = {"qkv": 3, "q": 1, "kv": 2}

Moments = Callable[[nn.Parameter], dict[str, Tensor]]


def model_blocks(model: nn.Module) -> list[Any]:
    """Returns the model's blocks; :class:`ConfigError` if it has none."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential, list)):
        raise ConfigError(f"{type(model).__name__} has no blocks to select; use a Vision Transformer")
    return list(blocks)


def model_parts(model: nn.Module) -> ModelParts | None:
    """Returns the sizes of the whole model; None if it is not ours."""
    if not isinstance(model, BlockModel):
        return None
    levels = model.levels
    heads = tuple(blocks[0].attn.num_heads for blocks in levels)
    hidden = tuple(len(blocks[0].mlp.fc1.weight) for blocks in levels)
    return ModelParts(heads, hidden, min(model.patch_embed.grid_size), tuple(map(len, levels)), model.grid_multiple)


def check_shape(model: nn.Module, shape: Shape) -> None:
    """Raises :class:`ConfigError` if the model lacks a part that ``shape`` selects."""
    if shape == WHOLE_MODEL:
        return
    for field, reason in getattr(model, "fixed_fields", {}).items():
        if (value := getattr(shape, field)) != getattr(WHOLE_MODEL, field):
            raise ConfigError(f"{type(model).__name__} cannot change {field} to {value}: {reason}; leave it out")
    name, blocks, parts = type(model).__name__, model_blocks(model), model_parts(model)
    names = ("heads", "hidden", "grid", "block_order", "stage", "pruned_blocks")
    fields = ", ".join(field for field in names if getattr(shape, field) not in (None, ()))
    if fields and parts is None:
        raise ConfigError(f"{name} is timm's own model: only vitlocal_… models can change {fields}; use one of them")
    selected = (shape.block_order, shape.skipped_blocks, shape.trainable_blocks, shape.pruned_blocks)
    if wrong := sorted({index for indices in selected for index in indices or ()} - set(range(len(blocks)))):
        raise ConfigError(f"{name} has no block {wrong[0]}: its {len(blocks)} blocks count from 0")
    if (shape.hidden is not None or shape.pruned_blocks) and not all(isinstance(b.mlp, SLICED) for b in blocks):
        raise ConfigError(f"{name} cannot run a part of its hidden width or tokens; use a DeiT or local-FFN model")
    if parts is None:
        return
    for unit in ("heads", "hidden"):
        numbers, most = getattr(shape, unit), getattr(parts, unit)
        if numbers is not None and (
            len(numbers) != len(most)
            or not all(1 <= number <= limit for number, limit in zip(numbers, most, strict=True))
        ):
            of_levels = f", a number for each of {len(most)} levels" if len(most) > 1 else ""
            raise ConfigError(f"{name}: got {unit} {_listed(numbers)}, expected 1 to {_listed(most)}{of_levels}")
    if shape.grid is not None and (not 1 <= shape.grid <= parts.grid or shape.grid % parts.grid_multiple):
        multiple = f", a multiple of {parts.grid_multiple}" if parts.grid_multiple > 1 else ""
        raise ConfigError(f"{name}: got grid {shape.grid}, expected 1 to {parts.grid}{multiple}")


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def set_shape(model: nn.Module, shape: Shape) -> None:
    """Makes ``model`` run in ``shape`` from now on, without a device sync. Models that are not ours stay whole."""
    if not isinstance(model, BlockModel):
        return
    trained = model.active.trainable_blocks
    order = tuple(index for index in shape.block_order or range(len(model.blocks)) if index not in shape.skipped_blocks)
    prunes = shape.token_keep_rate < 1 or shape.attention_keep_rate < 1
    pruned = tuple(place for place in shape.pruned_blocks if prunes and place < len(order))
    grid = None if shape.grid is None or shape.grid >= min(model.patch_embed.grid_size) else shape.grid
    model.active = replace(shape, block_order=order, pruned_blocks=pruned, grid=grid)
    for level, blocks in enumerate(model.levels):
        for block in blocks:
            block.attn.active_heads = block.attn.num_heads if shape.heads is None else shape.heads[level]
            if isinstance(block.mlp, SLICED):
                block.mlp.active_hidden = block.mlp.hidden if shape.hidden is None else shape.hidden[level]
    if shape.trainable_blocks != trained:
        model.train(model.training)


@contextmanager
def temporary_shape(model: nn.Module, shape: Shape, after: Shape) -> Iterator[None]:
    """Within the context, ``model`` runs in ``shape``; from then on in ``after``."""
    set_shape(model, shape)
    try:
        yield
    finally:
        set_shape(model, after)


def add_stage_table(model: nn.Module, embedding: StageEmbedding) -> None:
    """Adds a vector for each stage, and one for no stage. A ``std`` of 0 does not change the model's outputs."""
    name = type(model).__name__
    if not isinstance(model, BlockModel) or "stage" in model.fixed_fields:
        raise ConfigError(f"{name} cannot have a stage embedding; use a vitlocal_… model, or leave the embedding out")
    if embedding.tokens == "class" and getattr(model, "cls_token", None) is None:
        raise ConfigError(
            f"{name} has no class token for a stage embedding; use stage_tokens=all, or a model that has one"
        )
    table = torch.randn(embedding.rows, model.embed_dim) * embedding.std
    model.stage_table = nn.Parameter(table.to(next(model.parameters())))
    model.stage_embedding = embedding


def set_trainable(model: nn.Module, shape: Shape) -> bool:
    """Freezes the parameters that the shape does not train; returns whether any parameter changed.

    Blocks outside ``shape.block_order`` are frozen, skipped blocks are not. Blocks are unfrozen again; what
    ``shape.head_only`` freezes stays frozen. Frozen parameters have no gradient.
    """
    trains: dict[nn.Parameter, bool] = {}
    for index, block in enumerate(getattr(model, "blocks", ())):
        on = all(indices is None or index in indices for indices in (shape.block_order, shape.trainable_blocks))
        trains |= dict.fromkeys(block.parameters(), on)
    if shape.head_only:
        # timm's models, and ours, register what runs before blocks before them: the stem, and layers between levels.
        parameters = list(model.parameters())
        last = max(place for place, parameter in enumerate(parameters) if parameter in trains)
        others = {*trains, getattr(model, "stage_table", None)}
        trains |= {parameter: False for parameter in parameters[:last] if parameter not in others}
    changed = [parameter for parameter, on in trains.items() if parameter.requires_grad != on]
    for parameter in changed:
        parameter.requires_grad_(trains[parameter])
        parameter.grad = None
    return bool(changed)


@dataclass(frozen=True)
class ParameterSlices:
    """A parameter that has a slice for each head, or for each hidden unit."""

    parameter: Any  # nn.Parameter
    level: int
    unit: str  # "heads" or "hidden"
    view: tuple[int, ...]  # the shape whose dimension 1 counts the slices
    outgoing: bool = False  # whether the parameter carries the slices' outputs to the rest of the model

    def of(self, tensor: Tensor) -> Tensor:
        """Returns a view of ``tensor``, which has the parameter's size, whose dimension 1 counts the slices."""
        return tensor.view(self.view)


def parameter_slices(model: nn.Module) -> Iterator[ParameterSlices]:
    """Yields all parameters that have a slice for each head, or for each hidden unit."""
    for level, blocks in enumerate(model.levels if isinstance(model, BlockModel) else ()):
        for block in blocks:
            yield from _head_slices(block.attn, level)
            if isinstance(block.mlp, SLICED):
                yield from _hidden_slices(block.mlp, level)


def _head_slices(attention: Any, level: int) -> Iterator[ParameterSlices]:
    (dim, joined), heads = attention.proj.weight.shape, attention.num_heads
    for name, kinds in PROJECTIONS.items():
        layer = getattr(attention, name, None)
        for parameter in () if layer is None else layer.parameters():
            yield ParameterSlices(parameter, level, "heads", (kinds, heads, joined // heads, *parameter.shape[1:]))
    yield ParameterSlices(attention.proj.weight, level, "heads", (dim, heads, joined // heads), outgoing=True)
    if (freqs := getattr(attention, "freqs", None)) is not None:
        yield ParameterSlices(freqs, level, "heads", (1, *freqs.shape))
    if (table := getattr(attention, "relative_position_bias_table", None)) is not None:
        yield ParameterSlices(table, level, "heads", tuple(table.shape))


def _hidden_slices(mlp: Any, level: int) -> Iterator[ParameterSlices]:
    for name, parameter in mlp.named_parameters():
        if name.startswith(("fc1.", "conv.", "dwconv.")):
            yield ParameterSlices(parameter, level, "hidden", (1, *parameter.shape))
    yield ParameterSlices(mlp.fc2.weight, level, "hidden", tuple(mlp.fc2.weight.shape), outgoing=True)


@torch.no_grad()
def grow(
    model: nn.Module, before: Shape, shape: Shape, growth: Growth, moments: Moments,
    copies: Sequence[nn.Module] = (), seed: int = 0,
) -> None:  # fmt: skip
    """Initializes the heads and hidden units that ``shape`` has and ``before`` lacks, and ``growth.blocks``.

    ``moments`` returns the optimizer's state of a parameter. ``copies`` are weight averages of the model. Each grows
    from itself. If ``growth.average`` is the index of one, the model first takes its weights.
    """
    if growth.average is not None and not growth.new_only:
        model.load_state_dict(copies[growth.average].state_dict())
    new = _new_slices(model, before, shape)
    draws = growth.weights == "random" and (new or growth.blocks)
    redrawn = _redrawn(model, seed * 1000 + growth.number) if draws else None
    for grown in (model, *copies):
        sources = _new_slices(redrawn or grown, before, shape)
        for (part, start, end), (source, _, _) in zip(_new_slices(grown, before, shape), sources, strict=True):
            copied = list(range(start, end)) if redrawn else growth_sources(start, end, growth.sources)
            slices = part.of(part.parameter)
            slices[:, start:end] = source.of(source.parameter)[:, copied]
            if part.outgoing and growth.scale != 1 and not redrawn:
                slices[:, sorted({*copied, *range(start, end)})] *= growth.scale
        donor = redrawn or grown
        if grown is model and growth.new_only and growth.average is not None and not redrawn:
            donor = copies[growth.average]
        for index, old in growth.blocks:
            state = model_blocks(donor)[index if redrawn else old].state_dict()
            model_blocks(grown)[index].load_state_dict(state)
    if growth.noise and not redrawn:
        generator = torch.Generator().manual_seed(seed * 1000 + growth.number)  # on the host, the same in all processes
        tensors = [part.of(part.parameter)[:, start:end] for part, start, end in new]
        tensors += [parameter for index, _ in growth.blocks for parameter in model_blocks(model)[index].parameters()]
        for tensor in tensors:
            spread = tensor.std() if tensor.numel() > 1 else 0.0
            tensor += (torch.randn(tensor.shape, generator=generator) * growth.noise).to(tensor) * spread
    _set_moments(model, new, growth, moments)


def _new_slices(model: nn.Module, before: Shape, shape: Shape) -> list[tuple[ParameterSlices, int, int]]:
    """Returns each parameter that grows, with the indices of its first new slice and after its last."""
    found = []
    for part in parameter_slices(model):
        old, new = getattr(before, part.unit), getattr(shape, part.unit)
        if old is not None:
            end = part.view[1] if new is None else new[part.level]
            found.append((part, old[part.level], end))
    return [(part, old, new) for part, old, new in found if new > old]


def _redrawn(model: nn.Module, seed: int) -> nn.Module:
    """Returns a copy of ``model`` with new initial weights: decay has shrunk the weights of parts that did not run."""
    with torch.random.fork_rng([]):  # on the host, so that every process draws the same
        torch.manual_seed(seed)
        fresh: Any = copy.deepcopy(model).cpu()
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        fresh.init_weights()
    return fresh


def _set_moments(
    model: nn.Module, new: Sequence[tuple[ParameterSlices, int, int]], growth: Growth, moments: Moments
) -> None:
    if growth.moments == "reset":
        for parameter in model.parameters():
            for value in moments(parameter).values():
                value.zero_()  # also the step count, so that bias correction starts again
        return
    for part, start, end in new:
        for value in moments(part.parameter).values():
            if value.shape == part.parameter.shape:
                slices, copied = part.of(value), growth_sources(start, end, growth.sources)
                slices[:, start:end] = slices[:, copied] if growth.moments == "copy" else 0
    for index, source in growth.blocks:
        blocks = model_blocks(model)
        for mine, theirs in zip(blocks[index].parameters(), blocks[source].parameters(), strict=True):
            moments(mine).clear()  # as before the first step
            if growth.moments == "copy":
                moments(mine).update({name: value.clone() for name, value in moments(theirs).items()})


def exported_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a model without a shape that computes the same as ``model`` in its current shape.

    Blocks are in the order in which they run. The outgoing weights of heads and hidden units that do not run are zero.
    A model in levels keeps timm's names. The current stage's vector is added to the position table, or as
    :func:`fold_stage` does. (A crop of the grid is not part of the state dict.) A DiT's has ``pos_embed``, as published
    files do, so that the original code loads it.
    """
    state = dict(model.state_dict())
    if not isinstance(model, BlockModel):
        return state
    names = {parameter: name for name, parameter in model.named_parameters()}
    for part in parameter_slices(model):
        active = getattr(model.active, part.unit)
        if part.outgoing and active is not None:
            name = names[part.parameter]
            state[name] = state[name].clone()
            part.of(state[name])[:, active[part.level] :] = 0
    if isinstance(model, PyramidModel):
        return state
    table = state.pop("stage_table", None)
    if isinstance(model, DiT):
        state["pos_embed"] = model.position_table()
    if table is not None and model.stage_embedding is not None:
        row = table[-1 if model.active.stage is None else model.active.stage]
        if isinstance(model, DiT):
            fold_stage(state, row, table[-1])
        else:
            first = 1 if model.stage_embedding.tokens == "class" else None  # resampling keeps a constant
            changed = {"cls_token"} if first else {"cls_token", "patch_embed.proj.bias"}
            for name in {"pos_embed"} if "pos_embed" in state else changed & state.keys():
                state[name] = state[name].clone()
                (state[name][:, :first] if name == "pos_embed" else state[name]).add_(row)
    found = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for place, index in enumerate(model.active.block_order):
        for name in model.blocks[index].state_dict():
            found[f"blocks.{place}.{name}"] = state[f"blocks.{index}.{name}"]
    return found
