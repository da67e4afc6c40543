"""``write_dataset.py --plan``: a recipe, a source and a machine -> the files to write."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from vitlocal.config import WriteOptions, read_config
from vitlocal.data.crops import CropPolicy
from vitlocal.data.images import open_images
from vitlocal.data.manifest import work_name
from vitlocal.data.writer.journal import free_bytes
from vitlocal.data.writer.layout import StorageLayout, StorageLimits, layout_lines, propose_layout, save_layout
from vitlocal.data.writer.write import QUALITY, SAMPLING
from vitlocal.errors import ConfigError
from vitlocal.machine import cores, memory
from vitlocal.train.rates import parse_rates, rates_for, stages_of

RECIPE = "rcfg/ours.yaml"
RESERVED = 8 * 10**9  # bytes of memory that are not for the page cache


def plan_files(options: WriteOptions) -> StorageLayout:
    """Measures, prints the choice and keeps it in the data folder, where the next write of the split takes it up.

    Raises ConfigError for a wrong option, a recipe that is not there, and where nothing fits the disk.
    """
    _check_out(Path(options.out))
    recipe = options.recipe or RECIPE
    if not Path(recipe).exists():
        raise ConfigError(f"--recipe: {recipe} is not there; name the recipe that the files are for")
    config, stated = read_config(["--config-file", recipe], {}), parse_rates(options.rates)
    images = open_images(options.source, "train")
    stages = stages_of(config, len(images), rates_for(config, stated))
    augment = config.augment
    cropping = CropPolicy(random=True, scale=augment.crop_scale, ratio=augment.crop_ratio, flip=augment.flip)
    limits = StorageLimits(
        cores=options.cores or cores(),
        disk=options.disk_limit or free_bytes(_nearest(Path(options.out))),
        memory=options.memory_limit or max(memory() - RESERVED, memory() // 2),
    )
    print(f"encoding and cutting some of {len(images):,} images ...", file=sys.stderr)
    choice = propose_layout(
        images, stages, cropping, config.data.side_ratio, limits, options.quality or QUALITY,
        int(options.sampling or SAMPLING), options.keep_jpegs is not False,
    )  # fmt: skip
    lines = layout_lines(choice, limits, len(images))
    print("\n".join(lines))
    source = f" --source {shlex.quote(options.source)}" if options.source else ""
    command = f"python write_dataset.py --split train{source} --out {shlex.quote(options.out)}"
    path = save_layout(options.out, choice, lines, f"--plan, for {recipe}")
    print(f"{path} keeps this. Write these files: {command}")
    return choice


def _nearest(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _check_out(out: Path) -> None:
    """Raises ConfigError where the plan could not be kept, or nothing can be written by it."""
    nearest = _nearest(out)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--out: {nearest} is not a folder that can be written to; name another one")
    for there in (out / "train.json", out / work_name("train")):
        if there.exists():
            raise ConfigError(
                f"--out: {there} is there: this folder's training split is written already, in other files perhaps. "
                "Plan for another folder, or remove the split first"
            )
