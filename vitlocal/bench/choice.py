"""The best of several models for a budget, by a law of accuracy: the part of ``bench forecast`` for ``--models``."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch

from vitlocal.bench.law import SIZE_IN_NAME, Law, fit_law, named_right, published_runs, read_runs, recipe_of
from vitlocal.bench.measurement import text_table
from vitlocal.bench.published import IMAGENET
from vitlocal.config import Config
from vitlocal.errors import ConfigError
from vitlocal.models.vit import VisionTransformer
from vitlocal.stored_config import stated_options
from vitlocal.tasks.metrics import task_name
from vitlocal.train.build import make_model

SIZES = {"Ti": "tiny", "S": "small", "B": "base"}
HELD_OUT_COLUMNS = {
    "budget": ("budget", ">"), "model": ("model", ""), "epochs": ("epochs", ".2f"), "predicted": ("predicted", ".2f"),
    "measured": ("measured", ".2f"), "off": ("off", "+.2f"), "epochs by speed": ("epochs_by_speed", ".2f"),
    "predicted from these": ("predicted_by_speed", ".2f"),
}  # fmt: skip
CLOSE = 2.0  # points of top-1


def model_names(text: str) -> list[str]:
    """An argparse type: sizes of a model, such as Ti,S,B or 64x6,128x6."""
    found = [name.strip() for name in text.split(",")]
    for name in found:
        if name not in SIZES and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", name):
            expected = f"{', '.join(SIZES)} or WIDTHxDEPTH, such as 128x6"
            raise argparse.ArgumentTypeError(f"got {name!r}, expected {expected}")
    return list(dict.fromkeys(found))


def sized(config: Config, name: str) -> Config:
    """The recipe with another size of its model. WIDTHxDEPTH has heads as wide as the recipe's.

    ConfigError if the recipe's model has no such size.
    """
    own = config.model
    if task_name(own.name) != "classification":
        raise ConfigError(f"--models: {own.name} is no classifier, and the law predicts top-1; leave --models out")
    if name in SIZES:
        if not SIZE_IN_NAME.search(own.name):
            raise ConfigError(f"--models: {own.name} has no sizes {', '.join(SIZES)}; use WIDTHxDEPTH, such as 128x6")
        other = SIZE_IN_NAME.sub(f"_{SIZES[name]}_", own.name)
        model = replace(own, name=other, width=None, depth=None, heads=None)
    else:
        width, depth = map(int, name.split("x"))
        model = replace(own, width=width, depth=depth, heads=_heads(config, width))
    if not timm.is_model(model.name):
        raise ConfigError(f"--models: there is no {model.name}; use WIDTHxDEPTH, such as 128x6")
    return replace(config, model=model)


def _heads(config: Config, width: int) -> int:
    """The number of heads of a model of ``width``, with heads as wide as the recipe's."""
    model, _ = make_model(config, 10, torch.device("meta"))
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"--models: {config.model.name} has no width and depth that can be set; use a vitlocal_ model"
        )
    head = model.embed_dim // model.blocks[0].attn.num_heads
    if width % head:
        raise ConfigError(
            f"--models: got a width of {width}, expected a multiple of {head}, the width of the recipe's heads"
        )
    return width // head


def law_for(images: int, files: Sequence[str] | None) -> Law:
    """The law of the runs in ``files`` or, without any, of the published runs. ConfigError for other data."""
    if not files:
        if images != IMAGENET:
            raise ConfigError(
                f"--models: an epoch has {images:,} images, but the published runs are of ImageNet ({IMAGENET:,}); "
                "give runs of your own: --runs FILE, which --json of bench arms wrote"
            )
        return fit_law(published_runs(), "the published runs")
    law = fit_law(read_runs(files))
    if (has := law.runs[0].epoch_images) != images:
        raise ConfigError(
            f"--runs: the runs have epochs of {has:,} images, and this forecast {images:,}; give the data folder of "
            f"the runs (--data.root), or --images {has}"
        )
    return law


def rank(rows: Sequence[Mapping[str, Any]], law: Law, config: Config) -> list[dict[str, Any]]:
    """The rows of models (with ``gmacs`` and ``epochs``) with the predicted top-1 and its error, best first."""
    recipe, found = recipe_of(stated_options(config)), []
    for row in rows:
        at = 1e9 * row["gmacs"], row["epochs"]
        about = {"top1": law.predict(*at, recipe), "error": law.error(*at, recipe), "extrapolated": law.outside(*at)}
        found.append({**row, **about, "known_recipe": recipe in law.recipes})
    return sorted(found, key=lambda row: -row["top1"])


def verdict(ranked: Sequence[Mapping[str, Any]], law: Law) -> str:
    """The sentence that names the best model, and whether the law tells it from the second."""
    best, *others = ranked
    text = f"best: {best['model']}, predicted top-1 {best['top1']:.1f} % ± {best['error']:.1f}"
    if not others:
        return f"{text}; it is the only model"
    gap, error = best["top1"] - others[0]["top1"], max(law.left_out_rms, best["error"], others[0]["error"])
    says = "more" if gap > error else "less"
    end = "" if gap > error else ": the law does not tell them apart"
    return f"{text}; {others[0]['model']} is {gap:.1f} points behind, {says} than the error of {error:.1f}{end}"


def show_choice(ranked: Sequence[Mapping[str, Any]], law: Law, config: Config) -> None:
    """Prints the table, best first, the verdict, and the law."""
    rates = list(ranked[0]["rates"])
    columns = {"model": ("model", ""), "G multiply-adds": ("gmacs", ".3f")}
    columns |= {f"{size} px/s": (f"rate{size}", ",.0f") for size in rates}
    columns |= {"epochs": ("epochs", ".2f"), f"at {ranked[0]['last_size']} px only": ("epochs_at_last_size", ".2f")}
    columns |= {"top-1 %": ("top1", ".1f"), "±": ("error", ".1f"), "": ("note", "")}
    cells = [
        {**row, **{f"rate{size}": rate for size, rate in row["rates"].items()},
         "note": "outside the runs" if row["extrapolated"] else ""}
        for row in ranked
    ]  # fmt: skip
    print(f"{config.budget.length} of {config.model.name} in other sizes; images/s, epochs and predicted top-1:\n")
    print(text_table(cells, columns) + "\n")
    print(verdict(ranked, law))
    print(law.describe())
    if not ranked[0]["known_recipe"]:
        print("note: no run has exactly this recipe: the order of models may carry over to it, the accuracy need not")
    if len(rates) > 1:
        print("note: the law counts images of every size alike, and does not say whether other sizes would be better")


def show_hold_out(law: Law, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the held-out runs: predicted, measured, difference, and how often the better model was named."""
    print(law.describe() + "\n")
    print(text_table(rows, HELD_OUT_COLUMNS) + "\n")
    for field, source in (("predicted", "its epochs"), ("predicted_by_speed", "the epochs by speed")):
        known = [row for row in rows if row[field] is not None]
        near = sum(abs(row[field] - row["measured"]) <= CLOSE for row in known)
        right, pairs = named_right(known, field)
        named = f"; the better of two models is named in {right} of {pairs} pairs" if pairs else ""
        print(f"from {source}: within {CLOSE:g} points in {near} of {len(known)} runs{named}")
