"""The only code that changes which part of a model runs, and what newly running parts start as.

Parameters keep their identity and size: a shape selects slices and blocks of the full model, so that optimizer,
average and checkpoints keep their structure. What a step does not run has no effect on its outputs; slices that do not
run get gradients of exactly zero, blocks that do not run, or are frozen, none at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitlocal.errors import ConfigError
from vitlocal.models.deit import FeedForward
from vitlocal.models.lffn import LocalFeedForward
from vitlocal.models.token_selection import Selection
from vitlocal.models.vit import Attention, VisionTransformer
from vitlocal.plan import WHOLE_MODEL, Growth, Shape, StageEmbedding, growth_sources

SLICED = (FeedForward, LocalFeedForward)  # feed-forward parts of which a slice can run

Moments = Callable[[nn.Parameter], dict[str, Tensor]]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks; ConfigError where it has none."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise ConfigError(f"{type(model).__name__} has no blocks to take apart; use a Vision Transformer")
    return list(blocks)


def parts_of(model: nn.Module) -> dict[str, int] | None:
    """How many heads, hidden units, patches a side and blocks there are; None of a model that is not ours."""
    if not isinstance(model, VisionTransformer):
        return None
    first = model.blocks[0]
    return {
        "heads": first.attn.num_heads,
        "hidden": first.mlp.fc1.weight.shape[0],
        "grid": min(model.grid),
        "blocks": len(model.blocks),
        "passing": int(model.cls_token is not None),
    }


def check_shape(model: nn.Module, shape: Shape) -> None:
    """Raises ConfigError where the model has no such part."""
    if shape == WHOLE_MODEL:
        return
    count, ours = len(blocks_of(model)), isinstance(model, VisionTransformer)
    wished = [name for name in ("heads", "hidden", "grid", "block_order", "stage") if getattr(shape, name) is not None]
    wished += ["pruned_blocks"] if shape.pruned_blocks else []
    name = type(model).__name__
    if wished and not ours:
        raise ConfigError(f"{name} is timm's own: {', '.join(wished)} of a shape are for vitlocal_… models")
    for slot in (
        *(shape.block_order or ()),
        *shape.skipped_blocks,
        *(shape.trainable_blocks or ()),
        *shape.pruned_blocks,
    ):
        if not 0 <= slot < count:
            raise ConfigError(f"{name} has {count} blocks, and no block {slot}")
    if not ours:
        return
    if (shape.hidden is not None or shape.pruned_blocks) and not all(isinstance(b.mlp, SLICED) for b in model.blocks):
        raise ConfigError(
            f"{name}: a part of its hidden width or tokens cannot be run; use a vitlocal_deit_… or local-FFN model"
        )
    first = model.blocks[0]
    for wish, there in (("heads", first.attn.num_heads), ("hidden", getattr(first.mlp, "hidden", None)),
                        ("grid", min(model.grid))):  # fmt: skip
        value = getattr(shape, wish)
        if value is not None and not 1 <= value <= there:
            raise ConfigError(f"{name}: {wish} {value} of {there}")


def put(model: nn.Module, shape: Shape) -> None:
    """Has ``model`` run in ``shape`` from now on. Costs no wait for the device; weights are as they were."""
    if isinstance(model, VisionTransformer):
        slots = shape.block_order or tuple(range(len(model.blocks)))
        model.order = tuple(slot for slot in slots if slot not in shape.skipped_blocks)
        model.centre = None if shape.grid is None or shape.grid >= min(model.grid) else shape.grid
        model.crops_images = shape.crop_before_embedding
        model.selections = _selections(shape, len(model.order))
        for block in model.blocks:
            block.attn.active = shape.heads or block.attn.num_heads
            if isinstance(block.mlp, SLICED):
                block.mlp.active = shape.hidden or block.mlp.hidden
        model.stage = shape.stage
        trained = range(len(model.blocks)) if shape.trainable_blocks is None else shape.trainable_blocks
        frozen = tuple(slot for slot in range(len(model.blocks)) if slot not in trained)
        if frozen != model.frozen:
            model.frozen = frozen
            model.train(model.training)


def _selections(shape: Shape, count: int) -> dict[int, Selection]:
    how = Selection(shape.token_keep_rate, shape.attention_keep_rate, shape.per_head_masks)
    return {} if how.is_whole else {place: how for place in shape.pruned_blocks if place < count}


def add_stage_table(model: nn.Module, embedding: StageEmbedding) -> None:
    """Gives ``model`` a vector for each stage, and one for none; ``std`` of 0 leaves its outputs as they were."""
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"{type(model).__name__} is timm's own and cannot be told stages; set unfreeze.stage_embedding=no"
        )
    if embedding.tokens == "class" and model.cls_token is None:
        raise ConfigError("unfreeze.stage_tokens: this model has no class token (model.pool=avg); use all")
    table = torch.randn(embedding.rows, model.embed_dim) * embedding.std
    model.stage_table = nn.Parameter(table.to(model.pos_embed))
    model.stage_null, model.stage_tokens = embedding.null_prob, embedding.tokens


@contextmanager
def in_shape(model: nn.Module, shape: Shape, after: Shape) -> Iterator[None]:
    """``model`` runs in ``shape`` in here, and in ``after`` from then on."""
    put(model, shape)
    try:
        yield
    finally:
        put(model, after)


def set_trainable(model: nn.Module, shape: Shape) -> bool:
    """Freezes what the shape does not train, and frees the blocks that it does; returns whether any changed.

    Blocks outside of ``shape.block_order`` are frozen; skipped ones are not. Frozen parameters have no gradient. What
    ``shape.head_only`` freezes stays so.
    """
    if (
        shape.block_order is None
        and shape.trainable_blocks is None
        and not shape.head_only
        and not hasattr(model, "blocks")
    ):
        return False
    wished: dict[nn.Parameter, bool] = {}
    for slot, block in enumerate(blocks_of(model)):
        on = (shape.block_order is None or slot in shape.block_order) and (
            shape.trainable_blocks is None or slot in shape.trainable_blocks
        )
        wished |= dict.fromkeys(block.parameters(), on)
    if shape.head_only:
        above = {p for module in _above_blocks(model) for p in module.parameters()}
        above.add(getattr(model, "stage_table", None))
        wished |= dict.fromkeys((p for p in model.parameters() if p not in above and p not in wished), False)
    changed = [parameter for parameter, on in wished.items() if parameter.requires_grad != on]
    for parameter in changed:
        parameter.requires_grad_(wished[parameter])
        parameter.grad = None
    return bool(changed)


def _above_blocks(model: nn.Module) -> list[nn.Module]:
    """What a model runs after its blocks: timm's models, and ours, register their parts in that order."""
    names = list(dict(model.named_children()))
    return [getattr(model, name) for name in names[names.index("blocks") + 1 :]]


# --- growth ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """A parameter seen with its slots along one axis, from which other tensors of its size are seen alike."""

    parameter: nn.Parameter
    unit: str  # "heads" or "hidden"
    view: tuple[int, ...]
    axis: int
    outgoing: bool = False  # it carries what the slot gives to the rest of the model

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.view)


def slices(model: nn.Module) -> Iterator[Slice]:
    """All parameters that have a slot for each head, or for each hidden unit."""
    for module in model.modules():
        if isinstance(module, Attention):
            dim, heads = module.proj.weight.shape[0], module.num_heads
            yield Slice(module.qkv.weight, "heads", (3, heads, dim // heads, dim), 1)
            if module.qkv.bias is not None:
                yield Slice(module.qkv.bias, "heads", (3, heads, dim // heads), 1)
            yield Slice(module.proj.weight, "heads", (dim, heads, dim // heads), 1, outgoing=True)
        elif isinstance(module, SLICED):
            dim, hidden = module.fc2.weight.shape
            yield Slice(module.fc1.weight, "hidden", (hidden, dim), 0)
            if module.fc1.bias is not None:
                yield Slice(module.fc1.bias, "hidden", (hidden,), 0)
            if getattr(module, "conv", None) is not None:
                yield Slice(module.conv.weight, "hidden", tuple(module.conv.weight.shape), 0)
            yield Slice(module.fc2.weight, "hidden", (dim, hidden), 1, outgoing=True)


@torch.no_grad()
def grow(
    model: nn.Module, before: Shape, shape: Shape, growth: Growth, moments: Moments,
    copies: Sequence[nn.Module] = (), seed: int = 0,
) -> None:  # fmt: skip
    """Starts the heads and hidden units that ``shape`` has beyond ``before``, and ``growth.blocks``.

    ``moments`` gives the optimizer's state of a parameter. ``copies``, the model's averages, grow each from itself;
    where ``growth.average`` names one of them, the model first takes over its weights.
    """
    if growth.average is not None and not growth.new_only:
        model.load_state_dict(copies[growth.average].state_dict())
    ranges = _ranges(model, before, shape)
    if growth.weights == "copy":
        for one in (model, *copies):
            source = copies[growth.average] if growth.new_only and growth.average is not None else one
            _copy_slots(one, ranges, growth)
            _copy_blocks(one, growth.blocks, source if one is model else one)
        if growth.noise:
            _add_noise(model, ranges, growth, seed)
    elif ranges or growth.blocks:
        drawn = _drawn_anew(model, seed * 1000 + growth.number)
        for one in (model, *copies):
            _take_slots(one, ranges, drawn)
            _copy_blocks(one, [(slot, slot) for slot, _ in growth.blocks], drawn)
    _settle_moments(model, ranges, growth, moments)


def _ranges(model: nn.Module, before: Shape, shape: Shape) -> dict[str, tuple[int, int]]:
    """By unit, the first new slot and the end of the new ones; a unit that does not grow is left out."""
    found = {}
    for unit in ("heads", "hidden"):
        old, new = getattr(before, unit), getattr(shape, unit)
        if old is None:
            continue
        new = new or next(part.view[part.axis] for part in slices(model) if part.unit == unit)
        if new > old:
            found[unit] = (old, new)
    return found


def _copy_slots(model: nn.Module, ranges: Mapping[str, tuple[int, int]], growth: Growth) -> None:
    for part in slices(model):
        if part.unit not in ranges:
            continue
        old, new = ranges[part.unit]
        seen, sources = part.of(part.parameter), growth_sources(old, new, growth.sources)
        taken = seen.index_select(part.axis, torch.tensor(sources, device=seen.device))
        seen.narrow(part.axis, old, new - old).copy_(taken)
        if part.outgoing and growth.scale != 1:
            touched = torch.tensor(sorted({*sources, *range(old, new)}), device=seen.device)
            seen.index_copy_(part.axis, touched, seen.index_select(part.axis, touched) * growth.scale)


def _drawn_anew(model: nn.Module, seed: int) -> nn.Module:
    """``model`` as at a start: weights that do not run have none but decay, and are not what was drawn any more."""
    with torch.random.fork_rng([]):  # on the host: every process draws the same
        torch.manual_seed(seed)
        drawn = copy.deepcopy(model).cpu()
        for module in drawn.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        drawn.init_weights()
    return drawn


def _take_slots(model: nn.Module, ranges: Mapping[str, tuple[int, int]], drawn: nn.Module) -> None:
    for part, fresh in zip(slices(model), slices(drawn), strict=True):
        if part.unit in ranges:
            old, new = ranges[part.unit]
            theirs = fresh.of(fresh.parameter).narrow(part.axis, old, new - old)
            part.of(part.parameter).narrow(part.axis, old, new - old).copy_(theirs)


def _copy_blocks(model: nn.Module, pairs: Sequence[tuple[int, int]], source: nn.Module) -> None:
    for new, old in pairs:
        model.blocks[new].load_state_dict(source.blocks[old].state_dict())


def _add_noise(model: nn.Module, ranges: Mapping[str, tuple[int, int]], growth: Growth, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed * 1000 + growth.number)  # on the host: every process draws the same
    for part in slices(model):
        if part.unit in ranges:
            old, new = ranges[part.unit]
            fresh = part.of(part.parameter).narrow(part.axis, old, new - old)
            fresh += (torch.randn(fresh.shape, generator=generator) * growth.noise).to(fresh) * fresh.std()
    for slot, _ in growth.blocks:
        for parameter in model.blocks[slot].parameters():
            spread = parameter.std() if parameter.numel() > 1 else 0.0
            parameter += (torch.randn(parameter.shape, generator=generator) * growth.noise).to(parameter) * spread


def _settle_moments(model: nn.Module, ranges: Mapping[str, tuple[int, int]], growth: Growth, moments: Moments) -> None:
    def tensors(parameter: nn.Parameter) -> list[Tensor]:
        return [value for value in moments(parameter).values() if value.shape == parameter.shape]

    if growth.moments == "reset":
        for parameter in model.parameters():
            for value in moments(parameter).values():
                value.zero_()  # the count of steps, too: bias correction begins anew
        return
    for part in slices(model):
        if part.unit not in ranges:
            continue
        old, new = ranges[part.unit]
        for value in tensors(part.parameter):
            seen = part.of(value)
            fresh = seen.narrow(part.axis, old, new - old)
            if growth.moments == "copy":
                sources = torch.tensor(growth_sources(old, new, growth.sources), device=seen.device)
                fresh.copy_(seen.index_select(part.axis, sources))
            else:
                fresh.zero_()
    for slot, source in growth.blocks:
        for mine, theirs in zip(model.blocks[slot].parameters(), model.blocks[source].parameters(), strict=True):
            moments(mine).clear()  # as before a first step
            if growth.moments == "copy":
                moments(mine).update({name: value.clone() for name, value in moments(theirs).items()})


def _active(model: VisionTransformer, part: Slice) -> int:
    """How many of the part's slots run."""
    first = model.blocks[0]
    return first.attn.active if part.unit == "heads" else first.mlp.active


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the plain model that computes what ``model`` does in its present shape.

    Blocks stand in the order in which they run, heads and hidden units that do not run give nothing, and the present
    stage's vector is added to the position table. (A crop of the grid is no part of it.)
    """
    state = dict(model.state_dict())
    if not isinstance(model, VisionTransformer):
        return state
    places = {slot: place for place, slot in enumerate(model.order)}
    outgoing = {part.parameter: part for part in slices(model) if part.outgoing}
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "stage_table":
            continue
        plain = name
        if name.startswith("blocks."):
            _, slot, rest = name.split(".", 2)
            if int(slot) not in places:
                continue
            plain = f"blocks.{places[int(slot)]}.{rest}"
        part = outgoing.get(parameters.get(name))
        if part is not None and (active := _active(model, part)) < (count := part.view[part.axis]):
            tensor = tensor.clone()  # what does not run gives nothing to the rest
            part.of(tensor).narrow(part.axis, active, count - active).zero_()
        found[plain] = tensor
    if model.stage_table is not None:
        row = model.stage_table[-1 if model.stage is None else model.stage].detach()
        table = found["pos_embed"].clone()
        table[:, : 1 if model.stage_tokens == "class" else None] += row  # resampling keeps a constant as it is
        found["pos_embed"] = table
    return found
