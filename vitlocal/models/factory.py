"""Builds models, loads weights into them, and exports trained models as files that timm loads."""

import difflib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from vitlocal.errors import ConfigError
from vitlocal.jsonl import replace_text
from vitlocal.models.deit import DeiT
from vitlocal.models.dit import DiT
from vitlocal.models.dit_weights import dit_sizes, load_dit_weights
from vitlocal.models.positions import resample_positions
from vitlocal.models.pyramid import Pvt, PyramidModel
from vitlocal.models.shape import exported_state_dict
from vitlocal.models.swin import Swin, fit_table, swin_options
from vitlocal.models.timm_twin import own_names, timm_twin
from vitlocal.models.vit import VisionTransformer
from vitlocal.models.weight_files import options_of_run, read_description, read_weights, write_weights
from vitlocal.options import TIMM_NAMES

PREFIX = "vitlocal_"  # of the names of our models
# timm's hierarchical models, and the classes that make them able to run in part.
HIERARCHICAL: dict[type[nn.Module], type[PyramidModel]] = {PyramidVisionTransformerV2: Pvt, SwinTransformer: Swin}
BIAS_TABLE = "relative_position_bias_table"  # the end of the names of a Swin's tables
# What to set if a model of timm's has no such option.
REMEDIES = {"drop_path_rate": "model.drop_path=0", "patch_size": "model.patch_size=none"}


def build_model(name: str, arguments: Mapping[str, Any], num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """Returns timm's model ``name`` with random weights, and the arguments that it was built with.

    Our models take every option. timm's own Vision Transformers take ``img_size``, and can change sizes. Its other
    models take it, or run at any size by themselves. Some have no drop path, and are built if its rate is 0. PVTv2 and
    Swin are adopted, see :mod:`vitlocal.models.pyramid`. Raises :class:`ConfigError` for an unknown name, or for an
    option that the model does not have.
    """
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3))
        known = f"Our models are {', '.join(timm.list_models(PREFIX + '*'))}"
        hint = f"; did you mean {near}?" if near else "."
        raise ConfigError(f"model.name: timm knows no model '{name}'{hint} {known}")
    attempts = [dict(arguments)]
    if not name.startswith(PREFIX):
        windows = swin_options(name, arguments.get("img_size", 224), arguments.get("patch_size"))
        allowed = {"img_size", "drop_path_rate", "patch_size", *(["embed_dim"] if windows else [])}
        if ours := sorted(set(arguments) - allowed):
            options = {argument: option for option, argument in TIMM_NAMES.items()}
            remedy = " ".join(f"--model.{options.get(argument, argument)}=none" for argument in ours)
            raise ConfigError(f"{name} is timm's own model, and these options are for {PREFIX}… models: add {remedy}")
        attempts = [{**arguments, "dynamic_img_size": True}, dict(arguments), _without(arguments, "img_size")]
        attempts = [{**arguments, **windows}] if windows else attempts
        if arguments.get("drop_path_rate") == 0:  # models without drop path have no such option
            attempts += [_without(attempt, "drop_path_rate") for attempt in attempts]
    problem: TypeError | None = None
    for attempt in attempts:
        try:
            model = timm.create_model(name, pretrained=False, num_classes=num_classes, **attempt)
            return adopt(model, arguments.get("img_size", 224)), attempt
        except TypeError as error:
            problem = error
    for option, remedy in REMEDIES.items():
        if "unexpected keyword" in str(problem) and f"'{option}'" in str(problem):
            raise ConfigError(f"model.name: {name} has no option {option}: set {remedy}") from problem
    raise ConfigError(f"model.name: {name} cannot be built with {attempt}: {problem}") from problem


def adopt(model: nn.Module, size: int) -> nn.Module:
    """Makes timm's PVTv2 or Swin able to run in part, in place. Returns other models as they are.

    ``size``: px of the images that have the full grid.
    """
    family = HIERARCHICAL.get(type(model))
    if family is not None:
        model.__class__ = family
        assert isinstance(model, PyramidModel)
        model.adopt_parts(size)
    return model


def _without(arguments: Mapping[str, Any], option: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != option}


def export_model(
    folder: Path, model: nn.Module, name: str, arguments: Mapping[str, Any], classes: Sequence[str], *,
    size: int, crop_pct: float, notes: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes ``model.safetensors`` and ``config.json``, which ``timm.create_model("local-dir:FOLDER")`` loads.

    ``name`` and ``arguments`` are :func:`build_model`'s. ``size`` (px) and ``crop_pct`` are the evaluation's. A DiT's
    weights have the published names, and its description has no ``crop_pct``. A DeiT is described as timm's own model
    if that computes the same, so it loads without vitlocal. ``notes`` are added to the description.
    """
    model_args = _without(arguments, "drop_path_rate")
    state = exported_state_dict(model)
    known: Mapping[str, Any] = getattr(model, "default_cfg", None) or {}
    if isinstance(model, VisionTransformer):
        shape = model.active
        if len(shape.block_order) < len(model.blocks):
            model_args["depth"] = len(shape.block_order)
        if shape.grid is not None:
            model_args["center_grid"] = shape.grid
        if shape.pruned_blocks:
            for option in ("token_keep_rate", "attention_keep_rate", "per_head_masks", "pruned_blocks"):
                model_args[option] = getattr(shape, option)
    if twin := timm_twin(model, name, model_args):
        name, model_args, state = twin
    if isinstance(model, Swin):
        model_args, state = model_args | model.options_at(size), model.state_at(state, size)
    if isinstance(model, DiT):
        model_args |= dit_sizes(model)
        side = size // model.stride
        pretrained_cfg: dict[str, Any] = {"input_size": [model.in_chans, side, side], "num_classes": len(classes)}
    else:
        pretrained_cfg = {
            "input_size": [3, size, size],
            "fixed_input_size": bool(known.get("fixed_input_size")) and not arguments.get("dynamic_img_size"),
            "interpolation": "bilinear",
            "crop_pct": crop_pct,
            "mean": list(IMAGENET_DEFAULT_MEAN),
            "std": list(IMAGENET_DEFAULT_STD),
            "num_classes": len(classes),
            "first_conv": known.get("first_conv"),  # timm fits these parts to other in_chans and num_classes
            "classifier": known.get("classifier"),
        }
    description = {
        "architecture": name,
        "num_classes": len(classes),
        "num_features": getattr(model, "num_features", None),
        "model_args": model_args,
        "label_names": list(classes),
        "pretrained_cfg": pretrained_cfg,
        **(notes or {}),
    }
    replace_text(folder / "config.json", json.dumps(description, indent=2) + "\n")
    # The weights come last: if they are there, the export is complete.
    write_weights(folder / "model.safetensors", state)


def load_weights(model: nn.Module, path: str, classes: Sequence[str] = (), labels: str = "keep") -> list[str]:
    """Loads the weights in ``path`` into ``model``; returns the names of the parameters that keep their initial values.

    ``path`` is a folder that holds ``model.safetensors`` (a run, or what ``timm`` saves), or a file of weights. The
    head keeps its initial values if its classes are others: by number or, if the folder names them, by ``classes``. A
    position table of another grid is resampled, and :func:`fit_table` fits a Swin's tables to its windows. timm's names
    of a DeiT with rotary positions become ours. Files of the authors of timm's models are renamed as timm does. Raises
    :class:`ConfigError` if the file is missing, cannot be read, or belongs to another model. ``labels`` is for a DiT,
    whose weights :func:`load_dit_weights` loads.
    """
    if isinstance(model, DiT):
        return load_dit_weights(model, path, classes, labels)
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    loaded = read_weights(file, partial(load_state_dict, use_ema=False))
    state, kept = model.state_dict(), []
    if isinstance(model, DeiT):
        loaded = own_names(loaded)
    elif not state.keys() <= loaded.keys():
        loaded = _with_timms_names(model, loaded)
    classifier = (getattr(model, "default_cfg", None) or {}).get("classifier") or "head"
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    names = read_description(file.parent).get("label_names")
    same_classes = not names or not classes or names == list(classes)
    for name, tensor in state.items():
        other = loaded.get(name)
        if name == "stage_table" or name.startswith(heads):
            if other is None or other.shape != tensor.shape or not same_classes:
                loaded[name] = tensor
                kept.append(name)
        elif isinstance(model, Swin) and name.endswith(BIAS_TABLE) and other is not None:
            loaded[name] = fit_table(other, len(tensor))
        elif name == "pos_embed" and other is not None and other.shape != tensor.shape:
            if other.shape[2] == tensor.shape[2]:
                loaded[name] = _resampled_positions(model, other)
    hint = options_of_run(file.parent)
    if missing := sorted(set(state) - set(loaded)):
        some = ", ".join(missing[:3])
        raise ConfigError(f"model.weights: {file} lacks {some} (of {len(missing)}): it belongs to another model{hint}")
    if isinstance(model, VisionTransformer):
        unused = {name: tensor for name, tensor in loaded.items() if name not in state}
        if wrong := _other_model(model, unused, file.parent):
            raise ConfigError(f"model.weights: {file} has {wrong}: it belongs to another model{hint}")
    for name, tensor in state.items():
        if loaded[name].shape != tensor.shape:
            raise ConfigError(
                f"model.weights: in {file}, {name} has shape {tuple(loaded[name].shape)}, but in this model "
                f"{tuple(tensor.shape)}; use the options that the weights were trained with{hint}"
            )
    model.load_state_dict({name: loaded[name] for name in state})
    return kept


def _other_model(model: VisionTransformer, unused: Mapping[str, Tensor], folder: Path) -> str:
    """What of a file of weights in ``folder`` the model would leave out or read differently; "" if nothing.

    ``unused``: the weights that the model lacks. Heads, class tokens and decoders may be left out, and so may factors
    of 1, which timm's models with rotary positions always have.
    """
    parts = "blocks.", "pos_embed", "patch_embed."
    if of_model := sorted(name for name in unused if name.startswith(parts) and not (unused[name] == 1).all()):
        return f"{', '.join(of_model[:3])} (of {len(of_model)} weights), which the model lacks"
    arguments, heads = read_description(folder).get("model_args") or {}, model.blocks[0].attn.num_heads
    rope = arguments.get("rope", arguments.get("rope_type"))  # the latter is timm's
    rope = "axial" if rope == "cat" else rope
    found = {"heads": arguments.get("num_heads", heads), "rope": rope if arguments else model.rope}
    mine = {"heads": heads, "rope": model.rope}
    return ", ".join(f"{name} {found[name]} instead of {mine[name]}" for name in mine if found[name] != mine[name])


def _with_timms_names(model: Any, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns an authors' file of weights with the names of timm's ``model``; other files as they are.

    timm has a function for that beside most of its models.
    """
    name = (getattr(model, "default_cfg", None) or {}).get("architecture")
    module = sys.modules.get(timm.model_entrypoint(name).__module__) if name and timm.is_model(name) else None
    rename = getattr(module, "checkpoint_filter_fn", None)
    if rename is None:
        return loaded
    # timm would resample a Swin's tables of other windows, and load_weights() takes the middles of larger ones.
    tables = {key: value for key, value in loaded.items() if isinstance(model, Swin) and key.endswith(BIAS_TABLE)}
    try:
        return rename({key: value for key, value in loaded.items() if key not in tables}, model) | tables
    except Exception:  # of many types, if the file belongs to another model
        return loaded


def _resampled_positions(model: Any, table: Tensor) -> Tensor:
    """Resamples a table (1, T', D) of a square grid to the model's grid; both have the same prefix tokens."""
    grid = tuple(model.patch_embed.grid_size)
    count = table.shape[1] - (model.pos_embed.shape[1] - grid[0] * grid[1])  # without prefix tokens
    side = math.isqrt(count)
    return resample_positions(table, (side, side), grid) if side * side == count else table


def size_multiple(model: nn.Module) -> int:
    """Returns the number by which the model's image sizes must be divisible, px: mostly :func:`patch_side`."""
    return model.size_multiple if isinstance(model, PyramidModel) else patch_side(model)


def patch_side(model: nn.Module) -> int:
    """Returns the side of the model's patches, px, or the stride of patches that overlap; 1 if it has none."""
    if isinstance(model, DiT):
        return model.patch_side
    if isinstance(model, Pvt):
        return model.patch_embed.proj.stride[0]
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return max(patch) if isinstance(patch, (tuple, list)) else patch
