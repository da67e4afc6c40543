"""Registers the families' models with timm, and builds them."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from vitlocal.errors import ConfigError
from vitlocal.models.vit import VisionTransformer

# Width, depth and heads of DeiT's models, which the local-FFN models share.
TINY: dict[str, Any] = dict(embed_dim=192, depth=12, num_heads=3)
SMALL: dict[str, Any] = dict(embed_dim=384, depth=12, num_heads=6)
BASE: dict[str, Any] = dict(embed_dim=768, depth=12, num_heads=12)
PATCH8_64: dict[str, Any] = dict(patch_size=8, img_size=64)
PATCH4_32: dict[str, Any] = dict(patch_size=4, img_size=32)

# timm passes these besides the model's options.
_TIMM_OPTIONS = frozenset({"pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir"})


def register_family(family: type[VisionTransformer], models: Mapping[str, Mapping[str, Any]]) -> None:
    """Registers ``models`` with timm: their names, each with its default options."""
    module = sys.modules[family.__module__]
    configs: dict[str, Any] = {
        name: dict(
            input_size=(3, defaults.get("img_size", 224), defaults.get("img_size", 224)), num_classes=1000,
            crop_pct=0.875, interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
            first_conv="patch_embed.proj", classifier="head",
        )
        for name, defaults in models.items()
    }  # fmt: skip
    vars(module)["default_cfgs"] = generate_default_cfgs(configs)  # register_model() looks here
    for name, defaults in models.items():
        vars(module)[name] = register_model(_entry_point(family, name, defaults))


def _entry_point(
    family: type[VisionTransformer], name: str, defaults: Mapping[str, Any]
) -> Callable[..., VisionTransformer]:
    def create(pretrained: bool = False, **options: Any) -> VisionTransformer:
        known = _options(family)
        unknown = [option for option in options if option not in known and option not in _TIMM_OPTIONS]
        if unknown:
            similar = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f" Did you mean {similar[0]}?" if similar else ""
            raise ConfigError(f"{name} has no option {', '.join(unknown)}.{hint} Its options are {', '.join(known)}.")
        return build_model_with_cfg(family, name, pretrained, **{**defaults, **options})

    create.__name__, create.__module__ = name, family.__module__
    return create


def _options(family: type[VisionTransformer]) -> list[str]:
    """Returns the names of the options that a family's models take."""
    signatures = [inspect.signature(cls.__init__) for cls in (VisionTransformer, family)]
    parameters = [parameter for signature in signatures for parameter in signature.parameters.values()]
    return list(dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY))
