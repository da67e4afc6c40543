"""Narrow versions of the registered models, for tests that need a real model but no quality."""

from __future__ import annotations

import timm
from timm.models import pvt_v2, register_model, swin_transformer

import vitlocal.models  # noqa: F401 (registers the models)

NARROW = dict(embed_dim=32, depth=2, num_heads=2, num_classes=7)


def narrow(name="vitlocal_tiny_patch16_224", **options):
    """Builds a registered model with width 32 and 2 blocks."""
    return timm.create_model(name, **(NARROW | options))


def narrow_pvt(pretrained=False, **options):
    """PVTv2 with one block a level, 8 to 64 wide."""
    return pvt_v2.pvt_v2_b0(pretrained, **dict(depths=(1, 1, 1, 1), embed_dims=(8, 16, 40, 64)) | options)


def narrow_swin(pretrained=False, **options):
    """Swin with five blocks, 24 to 192 wide; one of them shifts its windows."""
    return swin_transformer.swin_tiny_patch4_window7_224(
        pretrained, **dict(depths=(1, 1, 2, 1), embed_dim=24) | options
    )


for create, module in ((narrow_pvt, pvt_v2), (narrow_swin, swin_transformer)):
    create.__module__ = module.__name__  # of the family
    register_model(create)
IN_LEVELS = ["--model.width=none", "--model.heads=none", "--model.depth=none"]
NARROW_PVT = [*IN_LEVELS, "--model.name=narrow_pvt"]
NARROW_SWIN = [*IN_LEVELS, "--model.name=narrow_swin", "--model.patch_size=2"]  # multiples of 16 px
