"""Narrow versions of the registered models, for tests that need a real model but no quality."""

from __future__ import annotations

import timm

import vitlocal.models  # noqa: F401 (registers the models)

NARROW = dict(embed_dim=32, depth=2, num_heads=2, num_classes=7)


def narrow(name="vitlocal_tiny_patch16_224", **options):
    """Builds a registered model with width 32 and 2 blocks."""
    return timm.create_model(name, **(NARROW | options))
