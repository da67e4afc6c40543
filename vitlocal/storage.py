"""The command ``write_dataset.py --plan``: chooses the files to write for a recipe, a source and a machine."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from vitlocal.config import Config, read_config
from vitlocal.data.crops import CropPolicy
from vitlocal.data.images import open_images
from vitlocal.data.manifest import LATENT_FLAGS, source_flags, work_name
from vitlocal.data.writer import layout
from vitlocal.data.writer.write import source_choice
from vitlocal.errors import ConfigError
from vitlocal.machine import cores, memory
from vitlocal.methods import METHODS
from vitlocal.models.dit import reads_latents
from vitlocal.paths import WRITE
from vitlocal.plan import Feed
from vitlocal.progress import TRAINING_FLOPS, Stage
from vitlocal.train.build import build_step, device_of, make_model
from vitlocal.train.build_checks import macs_at, stated_sizes
from vitlocal.train.simulate import Speed, spend
from vitlocal.train.timing import Timing, fill_zeros, noise_batch, noise_step
from vitlocal.write_options import WriteOptions

RECIPE = "rcfg/ours.yaml"
RESERVED = 8 * 10**9  # bytes of memory that the page cache does not get
MEASURE_SECONDS = 1.0  # of training at each size
CPU_BATCH = 4  # images of a measured step on a CPU, on which a full batch would take a minute
CLASSES = 1000


def plan_files(options: WriteOptions) -> None:
    """Measures, prints the chosen files and stores them in the data folder, for the next write of the split.

    Raises ConfigError for a wrong option, for a missing recipe, and if no choice fits the disk.
    """
    out = Path(options.out)
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    _check_out(out, nearest)
    recipe = options.recipe or RECIPE
    config, stated = read_config(["--config-file", recipe], {}), parse_rates(options.rates)
    _check_photos(config, recipe)
    images = open_images(options.source, "train", source_choice(options))
    demands = size_demands(config, len(images), speeds_for(config, stated))
    augment = config.augment
    crops = CropPolicy(random=True, scale=augment.crop_scale, ratio=augment.crop_ratio, flip=augment.flip)
    limits = layout.StorageLimits(
        cores=options.cores or cores(),
        disk=options.disk_limit or shutil.disk_usage(nearest).free,
        memory=options.memory_limit or max(memory() - RESERVED, memory() // 2),
    )
    print(f"encoding and cropping some of {len(images):,} images ...", file=sys.stderr)
    choice = layout.propose_layout(images, demands, crops, config.data.side_ratio, limits, options.jpeg)
    lines = layout.layout_lines(choice, limits, len(images))
    print("\n".join(lines))
    source = source_flags(
        options.source, image=options.image, label=options.label, subset=options.subset, classes=options.classes
    )
    command = f"{WRITE} --split train{source} --out {shlex.quote(options.out)}"
    path = layout.save_layout(options.out, choice, lines, f"--plan, for {recipe}")
    print(f"{path} stores this choice. Write the files with: {command}")


def _check_out(out: Path, nearest: Path) -> None:
    """Raises ConfigError if the choice cannot be stored in ``out``, or if the split is already written there.

    ``nearest`` is ``out`` or the nearest folder above it that exists.
    """
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--out: {nearest} is not a folder that can be written to; name another")
    for existing in (out / "train.json", out / work_name("train")):
        if existing.exists():
            raise ConfigError(
                f"--out: {existing} exists: the training split is already written, perhaps with other sides. "
                "Name another folder with --out, or remove the split first"
            )


def _check_photos(config: Config, recipe: str) -> None:
    """Raises ConfigError if the recipe reads latents: each size needs its own file, so there is nothing to choose."""
    if reads_latents(config.model.name):
        sides = ",".join(str(size) for size in sorted({size for _, size in stated_sizes(config)}))
        raise ConfigError(
            f"--recipe: {recipe} trains {config.model.name} on latents, each of whose sizes has a file of its own, so "
            f"there is nothing to plan; use {WRITE} --sides {sides} {LATENT_FLAGS}"
        )


# --- the training speed of a recipe ---------------------------------------------------------------------------------


def recipe_stages(config: Config) -> tuple[Stage, ...]:
    """The recipe's curriculum, if it is known before a run. Without one: a single stage at the model's size."""
    curricula = (tuple(METHODS[name].image_sizes(config.recipe)) for name in config.methods)
    return next((stages for stages in curricula if stages), (Stage(config.model.size),))


def methods_writing(config: Config, prefix: str) -> list[str]:
    """The names of the recipe's methods that set a field of the plan whose name starts with ``prefix``."""
    claims = config.recipe.claims
    return [claim.name for claim in claims if any(field.startswith(prefix) for field in claim.writes)]


def size_demands(config: Config, images: int, speeds: Mapping[int, Speed]) -> tuple[layout.SizeDemand, ...]:
    """The images that the recipe's budget needs at each size, for a training set of ``images`` and given speeds.

    A size that the budget does not reach gets one image. Its file is still wanted, in case training is faster.
    """
    trained: dict[int, int] = {}
    for stage in spend(recipe_stages(config), config.budget.length, images, speeds):
        trained[stage.size] = trained.get(stage.size, 0) + stage.images
    return tuple(
        layout.SizeDemand(size, max(count, 1.0), speeds[size].images_per_second) for size, count in trained.items()
    )


def parse_rates(text: str | None) -> dict[int, float]:
    """Images/s by size, from "224:2500" or "32:20000,224:2500". Raises ConfigError for anything else."""
    stated: dict[int, float] = {}
    for item in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+(?:\.\d+)?)\s*", item)
        if match is None or not int(match[1]) or not float(match[2]):
            raise ConfigError(f"--rates: got {item.strip()!r}, expected SIZE:IMAGES_A_SECOND, as in 32:20000,224:2500")
        if int(match[1]) in stated:
            raise ConfigError(f"--rates: {match[1]} px is given twice; leave one out")
        stated[int(match[1])] = float(match[2])
    return stated


def speeds_for(config: Config, stated: Mapping[int, float]) -> dict[int, Speed]:
    """The speed at each size of the recipe, from the ``stated`` images/s. Without any, measured on this machine.

    The rate of another size follows from that of the next larger stated size (or the largest) by FLOPs. It is at most
    the rate of a smaller stated size, because a GPU is slower at small sizes than FLOPs suggest.
    """
    model, _ = make_model(config, CLASSES, torch.device("meta"))
    sizes = list(dict.fromkeys(stage.size for stage in recipe_stages(config)))
    macs = {size: macs_at(model, size, f"--rates: {config.model.name}") for size in {*sizes, *stated}}

    def rate_at(size: int) -> float:
        base = min((other for other in stated if other >= size), default=max(stated))
        smaller = [rate for other, rate in stated.items() if other < size]
        return min([stated[base] * macs[base] / macs[size], *smaller])

    rates = {size: rate_at(size) for size in sizes} if stated else measured_rates(config, sizes)
    return {
        size: Speed(rate, config.train.batch_size, float(TRAINING_FLOPS * macs[size])) for size, rate in rates.items()
    }


def measured_rates(config: Config, sizes: Sequence[int]) -> dict[int, float]:
    """Images/s of the recipe's training step on this machine, on random pixels that are on the device."""
    device = device_of(config)
    step = build_step(config, CLASSES, device)
    fill_zeros(step.model)
    count = config.train.batch_size if device.type == "cuda" else min(CPU_BATCH, config.train.batch_size)
    rates = {}
    for size in tqdm(sizes, "measuring the trainer", disable=not sys.stderr.isatty(), leave=False, unit=" sizes"):
        feed, timing = Feed(size, count), Timing()
        step.warm_up(feed, CLASSES)
        train = noise_step(step, noise_batch(feed, CLASSES, device, step.task), step.mode(feed))
        train()  # the first step is slow: it loads kernels and allocates memory
        rates[size] = count / timing.measure(train, device, seconds=MEASURE_SECONDS)
    print(f"trainer measured on {device}, batches of {count}", file=sys.stderr)
    return rates
