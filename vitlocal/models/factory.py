"""From a configuration to a model, and from a trained model to files that timm loads."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import save
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict
from torch import Tensor, nn

from vitlocal.config import EvaluateConfig, ModelConfig
from vitlocal.errors import ConfigError
from vitlocal.models.shape import plain_state
from vitlocal.models.vit import VisionTransformer, position_matrix
from vitlocal.options import as_argument
from vitlocal.plan import WHOLE_MODEL, Shape

OURS = "vitlocal_"


def build_model(config: ModelConfig, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model that ``model.name`` and its options describe, and the arguments it was made with.

    Ours take every option. Of timm's own models, the Vision Transformers get ``img_size`` with sizes that may
    change, the others (convolutional, say) run at any size by themselves. Raises ConfigError for an unknown
    name or an option that the model does not have.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), 3)
        raise ConfigError(
            f"model.name: timm knows no model '{config.name}'"
            + (f"; did you mean {', '.join(near)}?" if near else ".")
            + f" Ours are {', '.join(timm.list_models(OURS + '*'))}"
        )
    arguments = config.arguments()
    if config.name.startswith(OURS):
        attempts = [arguments]
    else:
        stated = sorted(set(arguments) - {"img_size", "drop_path_rate", "patch_size"})
        if stated:
            raise ConfigError(f"model options {', '.join(stated)} are for {OURS}… models; {config.name} is timm's own")
        plain = {name: value for name, value in arguments.items() if name != "img_size"}
        attempts = [arguments | {"dynamic_img_size": True}, arguments, plain]
    for place, attempt in enumerate(attempts):
        try:
            return timm.create_model(config.name, pretrained=False, num_classes=classes, **attempt), attempt
        except TypeError as error:
            if place == len(attempts) - 1:
                raise ConfigError(f"model.name: {config.name} cannot be built with {attempt}: {error}") from error
    raise AssertionError("unreachable")


def export_model(
    folder: Path,
    model: nn.Module,
    config: ModelConfig,
    arguments: dict[str, Any],
    classes: Sequence[str],
    evaluate: EvaluateConfig,
    shape: Shape = WHOLE_MODEL,
) -> None:
    """Writes ``model.safetensors`` and ``config.json``: ``timm.create_model("local-dir:<folder>", pretrained=True)``."""  # noqa: E501
    built = {name: value for name, value in arguments.items() if name != "drop_path_rate"}
    if isinstance(model, VisionTransformer) and len(model.order) < len(model.blocks):
        built["depth"] = len(model.order)
    if shape.pruned_blocks and not (
        shape.token_keep_rate == 1 and shape.attention_keep_rate == 1
    ):  # as it was evaluated
        built |= {
            "kept": shape.token_keep_rate,
            "attended": shape.attention_keep_rate,
            "pruned_blocks": list(shape.pruned_blocks),
        }
        built |= {"own_masks": True} if shape.per_head_masks else {}
    if getattr(model, "centre", None) is not None:
        built["centre"] = model.centre
    described = {
        "architecture": config.name,
        "num_classes": len(classes),
        "num_features": getattr(model, "num_features", None),
        "model_args": built,
        "label_names": list(classes),
        "pretrained_cfg": {
            "input_size": [3, evaluate.size, evaluate.size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": evaluate.crop_pct,
            "mean": list(IMAGENET_DEFAULT_MEAN),
            "std": list(IMAGENET_DEFAULT_STD),
            "num_classes": len(classes),
        },
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    # The weights come last: who finds them finds all.
    write_weights(folder / "model.safetensors", plain_state(model))


def write_weights(path: Path, state: Mapping[str, Tensor], **about: str) -> None:
    """Writes a model's weights, and what is said ``about`` them, for safetensors to read; whole, or not at all."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_bytes(save(weights, {"format": "pt", **about}))  # save_file would let nobody else read it
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(model: nn.Module, path: str, classes: Sequence[str] = ()) -> list[str]:
    """Starts ``model`` from the weights in ``path``; returns the names of what starts anew.

    ``path`` is a folder that holds ``model.safetensors`` (a run, or what ``timm`` saves), or a file of weights. A head
    of other classes (than ``classes``: by number or, where the folder names them, by name) starts anew; a position
    table of another grid is resampled. Raises ConfigError where the file is not there, cannot be read, or is of another
    model.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"model.weights: {file} is not there; name a run's folder, or a file of a model's weights")
    try:
        given = load_state_dict(str(file), use_ema=False)
    except Exception as error:  # of pickle, zip and safetensors, many kinds
        raise ConfigError(
            f"model.weights: {file} cannot be read as weights ({str(error).splitlines()[0]}); name a run's folder, or "
            "a file that safetensors or PyTorch wrote"
        ) from error
    mine, anew = model.state_dict(), []
    head = (getattr(model, "default_cfg", None) or {}).get("classifier") or "head"
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    named = _label_names(file.parent / "config.json")
    other_classes = bool(named and classes and named != list(classes))
    for name, tensor in mine.items():
        other = given.get(name)
        starts_anew = name == "stage_table" or name.startswith(heads)
        if other is not None and other.shape == tensor.shape and not (starts_anew and other_classes):
            continue
        if starts_anew:
            given[name] = tensor
            anew.append(name)
        elif name == "pos_embed" and other is not None and other.shape[2] == tensor.shape[2]:
            given[name] = _resampled_positions(model, other)
    if missing := sorted(set(mine) - set(given)):
        raise ConfigError(
            f"model.weights: {file} lacks {', '.join(missing[:3])} (of {len(missing)}): it is another model's"
            + _as_it_was(file.parent)
        )
    odd = [name for name, tensor in mine.items() if given[name].shape != tensor.shape]
    if odd:
        raise ConfigError(
            f"model.weights: in {file}, {odd[0]} is {tuple(given[odd[0]].shape)}, and this model's is "
            f"{tuple(mine[odd[0]].shape)}; set the model's options as they were" + _as_it_was(file.parent)
        )
    model.load_state_dict({name: given[name] for name in mine})
    return anew


def _as_it_was(run: Path) -> str:
    """The options that describe the model of the run in that folder; nothing where it holds none."""
    try:
        stated = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"].items()
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return ""
    default = vars(ModelConfig())
    given = [
        f"--model.{name}={as_argument(value)}"
        for name, value in stated
        if name not in ("weights", "drop_path") and (name == "name" or value != default.get(name))
    ]
    return f". That run was given {' '.join(given)}"


def _label_names(path: Path) -> list[str] | None:
    """The classes of an exported model, from its ``config.json``; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("label_names")
    except (OSError, ValueError):
        return None


def _resampled_positions(model: nn.Module, table: Tensor) -> Tensor:
    """A position table (1, T', D) of a square grid, with rows for as many other tokens as the model's, at its grid."""
    grid = getattr(model, "grid", None) or model.patch_embed.grid_size
    num_prefix_tokens = model.pos_embed.shape[1] - grid[0] * grid[1]  # of a class token, registers and the like
    side = math.isqrt(table.shape[1] - num_prefix_tokens)
    if side * side != table.shape[1] - num_prefix_tokens:
        raise ConfigError(
            f"model.weights: a position table of {table.shape[1]} rows, {num_prefix_tokens} of them of no patch as in "
            f"{type(model).__name__}, is of no square grid; use weights of the same model"
        )
    matrix = position_matrix((side, side), tuple(grid), table.device, table.dtype)
    return torch.cat([table[:, :num_prefix_tokens], (matrix @ table[0, num_prefix_tokens:])[None]], dim=1)


def patch_side(model: nn.Module) -> int:
    """What must divide the model's image sizes: the side of its patches, 1 where it has none."""
    patch = getattr(model, "patch_size", None) or getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return max(patch) if isinstance(patch, (tuple, list)) else patch
