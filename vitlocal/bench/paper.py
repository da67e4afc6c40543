"""The paper's table and figures: python -m vitlocal.bench paper --data DIR --budget 24h [--only LIST] [--scale 64]

Trains the arms of Irandoust et al. 2022 (arXiv 2211.05187) with one budget each. It writes table.md, architectures.png
and curricula.png (figure 2) into --folder. The same command continues an interrupted bench.

--scale 64 makes a smaller benchmark for photos of 64 px, with rcfg/paper_64px.yaml. It trains a small model in patches
of 8 px, or of 4 px with --patch 4. Curricula start at a quarter of the final size; those of the paper start at a
seventh. By FLOPs, each size gets the same fraction of the budget as in the paper.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import yaml

from vitlocal.bench.arms import RunResult, arms_parser, compete, publish
from vitlocal.bench.parsing import budget, names
from vitlocal.bench.runner import Arm, read_arms
from vitlocal.config import Config, read_config
from vitlocal.errors import ConfigError
from vitlocal.models.counts import count_macs
from vitlocal.paths import RECIPES
from vitlocal.progress import Length, Stage
from vitlocal.storage import recipe_stages
from vitlocal.train.build import make_model
from vitlocal.train.simulate import Speed, spend

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


def scaled_stages(config: Config, final: int, patch: int) -> tuple[Stage, ...]:
    """An arm's curriculum by fractions of the budget: each size gets its fraction in the paper, by FLOPs."""
    model, _ = make_model(config, 1000, torch.device("meta"))
    stages = recipe_stages(config)
    speeds = {size: Speed(1.0, 1, count_macs(model, size)) for size in {224, *(stage.size for stage in stages)}}
    spent = spend(stages, Length(PAPER_EPOCHS * speeds[224].flops, "flops", ""), 1, speeds)
    ends = {scaled_size(stage.size, final, patch): stage.end.fraction for stage in spent if stage.epochs > 1e-6}
    *first, last = ends
    return (*(Stage.parse(f"{size}px until {100 * ends[size]:.4g}%") for size in first), Stage(last))


def scaled(arm: Arm, final: int, patch: int) -> Arm:
    """The arm at ``final`` px in patches of ``patch`` px, with the recipe ``rcfg/paper_<final>px.yaml``."""
    recipe = RECIPES / f"paper_{final}px.yaml"
    if not recipe.exists():
        raise ConfigError(f"--scale: there is no {recipe}; write one, or use --scale 64")
    if patch < 1 or final % patch:
        raise ConfigError(f"--patch: {patch} px do not divide {final} px")
    family = f"{arm.name}_" if arm.name in ("deit", "localvit") else ""
    options = {"model.name": f"vitlocal_{family}tiny_patch16_224", "model.patch_size": patch, **arm.options}
    config = read_config(arm.command_line(), {})
    if "image_size" in config.methods:
        options["image_size.stages"] = scaled_stages(config, final, patch)
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
    add("--only", metavar="LIST", help=f"some of {', '.join([*GROUPS, *ARMS])}, separated by commas (default: all)")
    add("--scale", type=int, metavar="PX", help="final image size of a smaller benchmark: 64")
    add("--patch", type=int, metavar="PX", help=f"patch size with --scale (default: {SCALED_PATCH})")
    options, trainer = parser.parse_known_args(argv)
    arms = chosen(options.only)
    if options.scale is not None:
        arms = [scaled(arm, options.scale, SCALED_PATCH if options.patch is None else options.patch) for arm in arms]
    elif options.patch is not None:
        raise ConfigError("--patch: it applies to a smaller benchmark only; give --scale 64 too")
    length = options.budget or read_config(arms[0].command_line(), {}).budget.length
    write = partial(write_paper, arms=arms, folder=options.folder, json=options.json, budget=str(length))
    compete(arms, length, options, trainer, write)
