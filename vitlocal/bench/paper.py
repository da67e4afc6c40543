"""The paper's table and figures: python -m vitlocal.bench paper --data DIR --budget 24h [--only LIST] [--scale 64]

Trains the arms of Irandoust et al. 2022 (arXiv 2211.05187) with one budget each. It writes table.md, architectures.png
and curricula.png (figure 2) into --folder. The same command continues an interrupted bench. The groups of arms are:

    table1     deit, localvit, ours, ours_no_curriculum
    ablations  ours, ours_no_curriculum, ours_gelu, ours_batchnorm, ours_no_convolution
    curricula  the five of figure 2 (the one from 32 px is ours), and ours_no_curriculum

--scale 64 makes a smaller benchmark for photos of 64 px, with rcfg/paper_64px.yaml. It trains a small model in patches
of 8 px, or of 4 px with --patch 4. Curricula start at a quarter of the final size; those of the paper start at a
seventh. By FLOPs, each size gets the same fraction of the budget as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from vitlocal.bench.arms import RunResult, arms_parser, compete, publish
from vitlocal.bench.parsing import budget, names
from vitlocal.bench.runner import RECIPES, Arm, read_arms
from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.models.counts import count_macs
from vitlocal.progress import Stage
from vitlocal.storage import recipe_stages
from vitlocal.train.build import make_model

FILE = RECIPES / "arms" / "paper.yaml"
ARMS = {arm.name: arm for arm in read_arms(str(FILE))}
GROUPS, PLOTS = map(yaml.safe_load(FILE.read_text(encoding="utf-8")).get, ("groups", "plots"))  # names of arms
# What 24 hours buy the paper at 224 px: 6 epochs of LocalViT took 21.5 hours, and each took 2.4 times as long as ours.
PAPER_EPOCHS = 16
SCALED_PATCH = 8


def scaled_size(size: int, final: int, patch: int) -> int:
    """Maps the paper's 32 to 224 px to a quarter of ``final`` to all of it, in whole patches."""
    exact = final / 4 + (size - 32) / (224 - 32) * (final - final / 4)
    return max(patch, int(exact / patch + 0.5) * patch)


def scaled_stages(arm: Arm, final: int, patch: int) -> tuple[Stage, ...]:
    """The arm's curriculum by fractions of the budget: each size gets its fraction in the paper, by FLOPs."""
    config = read_config(arm.command_line(), {})
    with torch.device("meta"):  # only the shapes are needed
        model, _ = make_model(config, 1000, torch.device("meta"))
    whole, spent, start = count_macs(model, 224), 0.0, 0.0
    stages: list[Stage] = []
    for stage in recipe_stages(config):
        size = scaled_size(stage.size, final, patch)
        if stage.until is not None:
            spent += (stage.until.value - start) / PAPER_EPOCHS * count_macs(model, stage.size) / whole
            start = stage.until.value
        is_last = stage.until is None or spent >= 1  # the paper's runs did not reach later stages either
        if stages and stages[-1].size == size:
            stages.pop()
        stages.append(Stage.parse(f"{size}px" if is_last else f"{size}px until {100 * spent:.4g}%"))
        if is_last:
            break
    return tuple(stages)


def scaled(arm: Arm, final: int, patch: int) -> Arm:
    """The arm at ``final`` px in patches of ``patch`` px, with the recipe ``rcfg/paper_<final>px.yaml``."""
    recipe = RECIPES / f"paper_{final}px.yaml"
    if not recipe.exists():
        known = ", ".join(path.stem[6:-2] for path in sorted(RECIPES.glob("paper_*px.yaml")))
        raise ConfigError(f"--scale: there is no {recipe}; write one, or use {known}")
    if patch < 1 or final % patch:
        raise ConfigError(f"--patch: {patch} px do not divide {final} px")
    family = f"{arm.name}_" if arm.name in ("deit", "localvit") else ""
    options = {"model.name": f"vitlocal_{family}tiny_patch16_224", "model.patch_size": patch, **arm.options}
    if "image_size" in read_config(arm.command_line(), {}).methods:
        options["image_size.stages"] = scaled_stages(arm, final, patch)
    about = arm.about.replace("32 → 224", f"{final // 4} → {final}").replace("224 px", f"{final} px")
    return replace(arm, recipes=(*arm.recipes, recipe), options=options, about=about.replace("-S", ""))


def chosen(text: str | None) -> list[Arm]:
    """The arms of ``--only``, which names arms and groups. Without it: all arms."""
    if text is None:
        return list(ARMS.values())
    found = [arm for name in names(text, (*GROUPS, *ARMS)) for arm in GROUPS.get(name, (name,))]
    return [ARMS[name] for name in dict.fromkeys(found)]


def write_paper(results: Sequence[RunResult], arms: Sequence[Arm], folder: Path, json: str | None, budget: str) -> None:
    """Writes the table and the plots of the finished runs into ``folder``. A plot needs two arms."""
    finished = {result.row["arm"] for result in results}
    plots = {folder / name: members for name, members in PLOTS.items() if len(finished.intersection(members)) > 1}
    table = publish(results, arms, budget, "the arms of arXiv 2211.05187", json, plots)
    if results:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(table + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    parser = arms_parser("paper", __doc__)
    add = parser.add_argument
    add("--budget", type=budget, metavar="LENGTH", help="budget of each run (default: 24h, or 15m with --scale 64)")
    add("--only", metavar="LIST", help="arms and groups, separated by commas (default: all)")
    add("--scale", type=int, metavar="PX", help="final image size of a smaller benchmark: 64")
    add("--patch", type=int, metavar="PX", help=f"patch size with --scale (default: {SCALED_PATCH})")
    options, trainer = parser.parse_known_args(argv)
    arms = chosen(options.only)
    if options.scale is not None:
        arms = [scaled(arm, options.scale, SCALED_PATCH if options.patch is None else options.patch) for arm in arms]
    elif options.patch is not None:
        raise ConfigError("--patch: it applies to a smaller benchmark only; give --scale 64 too")
    length = options.budget or read_config(arms[0].command_line(), {}).budget.length

    def write(results: Sequence[RunResult]) -> None:
        write_paper(results, arms, options.folder, options.json, str(length))

    compete(arms, length, options, trainer, write)
