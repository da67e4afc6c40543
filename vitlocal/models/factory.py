"""From a configuration to a model, and from a trained model to files that timm loads."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from vitlocal.config import EvaluateConfig, ModelConfig
from vitlocal.errors import ConfigError

OURS = "vitlocal_"


def build_model(config: ModelConfig, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model that ``model.name`` and its options describe, and the arguments it was made with.

    Ours take every option. Of timm's own models, the Vision Transformers get ``img_size`` with sizes that may
    change, the others (convolutional, say) run at any size by themselves. Raises ConfigError for an unknown
    name or an option that the model does not have.
    """
    if not timm.is_model(config.name):
        near = timm.list_models(f"*{config.name.split('_')[0]}*")[:3]
        raise ConfigError(
            f"model.name: timm knows no model '{config.name}'"
            + (
                f"; did you mean {', '.join(near)}?"
                if near
                else f"; ours are {', '.join(timm.list_models(OURS + '*'))}"
            )
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
) -> None:
    """Writes ``model.safetensors`` and ``config.json``: ``timm.create_model("local-dir:<folder>", pretrained=True)``."""  # noqa: E501
    described = {
        "architecture": config.name,
        "num_classes": len(classes),
        "num_features": getattr(model, "num_features", None),
        "model_args": {name: value for name, value in arguments.items() if name != "drop_path_rate"},
        "label_names": list(classes),
        "pretrained_cfg": {
            "input_size": [3, evaluate.size, evaluate.size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": evaluate.crop_ratio,
            "mean": list(IMAGENET_DEFAULT_MEAN),
            "std": list(IMAGENET_DEFAULT_STD),
            "num_classes": len(classes),
        },
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = folder / ".model.safetensors.writing"
    try:
        save_file(weights, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / "model.safetensors")
    finally:
        temporary.unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
