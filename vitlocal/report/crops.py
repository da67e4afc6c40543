"""Draws again the first training crops of each image size, as the model saw them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from vitlocal.data.augment import Augment
from vitlocal.data.batch import Sources
from vitlocal.data.sources import open_sources
from vitlocal.methods import METHODS
from vitlocal.methods.method import Method, MethodContext, Recipe
from vitlocal.plan import Dials, Feed, Plan, fold
from vitlocal.progress import Position, Progress
from vitlocal.report.run_folder import RunRecord

CROPS = 6  # of each size
AUGMENTATION_DIALS = ("strength", "randaugment_strength")


def stage_crops(run: RunRecord) -> list[tuple[int, list[np.ndarray]]]:
    """The first training crops (S, S, 3) of each image size, with their augmentation.

    Crops and augmentation have keys, so they can be made again. If a method fed a subset of the rows, the crops are
    from all rows, because the log does not hold the subset. Raises ConfigError or DataError if the data cannot be read.
    """
    config, methods = run.config, dial_methods(run.config.recipe)
    augment = Augment(**config.augment.arguments())
    found: dict[int, list[np.ndarray]] = {}
    dials = Dials()
    sources = open_sources(**config.source_arguments(), device=torch.device("cpu"))
    try:
        start = {"epoch": 0.0, "step": 0, "images_seen": 0, "fraction": 0.0}
        for before, record in pairwise([start, *run.records]):
            logged = {name: record[f"dials.{name}"] for name in AUGMENTATION_DIALS if f"dials.{name}" in record}
            dials = replace(dials, **logged)
            if record["image_size"] not in found and record["step"] > before["step"]:
                plan = Plan(Feed(record["image_size"], record["batch_size"]), dials)
                # The log has the dials at the end of a pass. For its start, ask the methods that set only dials.
                plan = fold(methods, plan, Progress(fraction=before["fraction"]))
                found[plan.feed.size] = first_crops(sources, augment, plan, config.run.seed, before)
    finally:
        sources.close()
    return list(found.items())


def dial_methods(recipe: Recipe) -> list[Method]:
    """The recipe's methods that set only dials."""
    context = MethodContext(recipe)
    return [
        METHODS[claims.name](context)
        for claims in recipe.claims
        if claims.writes and all(field.startswith("dials.") for field in claims.writes)
    ]


def first_crops(sources: Sources, augment: Augment, plan: Plan, seed: int, start: dict[str, Any]) -> list[np.ndarray]:
    """Up to CROPS crops (S, S, 3), uint8, of the first batch of a pass that starts at the record ``start``."""
    # If the run trained on a subset of the rows, this position is approximate.
    done = round(start["epoch"] % 1 * sources.train.count)
    with sources.train.open(plan.feed, Position(int(start["epoch"]), done)) as batches:
        batch = next(batches)
        key = seed, start["step"]
        images = augment.prepare(batch.images, *key, batch.places, plan.dials.randaugment)
        params = augment.draw(*key, batch.places, batch.total, plan.feed.size, plan.dials.strength)
        pixels = augment(images, params)[:CROPS]  # (B, 3, S, S)
    levels = (pixels - augment.normalize.shift) / augment.normalize.scale
    return list(levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())  # (B, S, S, 3)
