"""How fast a recipe's trainer takes images, size by size: given, told by its FLOPs, or measured on this machine."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping

import numpy as np
import torch

from vitlocal.config import Config
from vitlocal.data.batch import Batch
from vitlocal.data.writer.layout import SizeDemand
from vitlocal.errors import ConfigError
from vitlocal.models.factory import build_model
from vitlocal.models.flops import count_macs
from vitlocal.plan import Feed
from vitlocal.progress import TRAINING_FLOPS
from vitlocal.train.checks import check_sizes
from vitlocal.train.devices import prepare_device
from vitlocal.train.ema import build_ema
from vitlocal.train.optim import build_optimizer
from vitlocal.train.simulate import Speed, curriculum, spend
from vitlocal.train.step import Step, choose_precision
from vitlocal.train.watch import wait

MEASURE_SECONDS = 1.0  # of steps, a size
CPU_BATCH = 4  # images a measured step on a CPU, where a full batch would take a minute
CLASSES = 1000


def sizes_of(config: Config) -> list[int]:
    """The image sizes that the recipe trains at, each once, in order."""
    return list(dict.fromkeys(stage.size for stage in curriculum(config)))


def stages_of(config: Config, images: int, rates: Mapping[int, float]) -> tuple[SizeDemand, ...]:
    """What the recipe's budget is spent on, for a training set of ``images`` and ``rates`` (images/s) by size.

    Stages that the budget does not reach are left in with one image: their files are wanted all the same, should the
    trainer be quicker than thought.
    """
    speeds = {
        size: Speed(rate, config.train.batch_size, flops_of(config, size)) for size, rate in rates.items()
    }  # fmt: skip
    trained: dict[int, int] = {}
    for part in spend(curriculum(config), config.budget.length, images, speeds):
        trained[part.size] = trained.get(part.size, 0) + part.images
    return tuple(SizeDemand(size, max(count, 1.0), rates[size]) for size, count in trained.items())


def flops_of(config: Config, size: int) -> float:
    """Of an image of ``size`` px, forward and backward, by the recipe's full model; 0 where that cannot be told."""
    try:
        with torch.device("meta"):  # its shapes are all that counts
            model, _ = build_model(config.model.name, config.model.arguments(), CLASSES)
        return float(TRAINING_FLOPS * count_macs(model, size))
    except (ValueError, RuntimeError, AssertionError):
        return 0.0


def parse_rates(text: str | None) -> dict[int, float]:
    """Images/s by size from "224:2500" or "32:20000,224:2500". Raises ConfigError for what is no such list."""
    stated: dict[int, float] = {}
    for item in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+(?:\.\d+)?)\s*", item)
        if match is None or not int(match[1]) or not float(match[2]):
            raise ConfigError(f"--rates: got {item.strip()!r}, expected SIZE:IMAGES_A_SECOND, as in 32:20000,224:2500")
        if int(match[1]) in stated:
            raise ConfigError(f"--rates: {match[1]} px is given twice; leave one out")
        stated[int(match[1])] = float(match[2])
    return stated


def rates_for(config: Config, stated: Mapping[int, float]) -> dict[int, float]:
    """Images/s by size of the recipe: as ``stated``; where nothing is, measured on this machine.

    A size that is not stated follows from the next larger one that is (or the largest), by the FLOPs of the model, and
    is no faster than a smaller one that is stated: at small sizes FLOPs promise more than a GPU reaches.
    """
    sizes = sizes_of(config)
    if not stated:
        return measured_rates(config, sizes)
    model, _ = build_model(config.model.name, config.model.arguments(), CLASSES)
    check_sizes(config, model)
    macs = {}
    for size in {*sizes, *stated}:
        try:
            macs[size] = count_macs(model, size)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"--rates: {config.model.name} takes no images of {size} px ({error})") from error
    rates = {}
    for size in sizes:
        base = min((one for one in stated if one >= size), default=max(stated))
        by_flops = stated[base] * macs[base] / macs[size]
        rates[size] = min(by_flops, *(rate for one, rate in stated.items() if one < size), by_flops)
    return rates


def measured_rates(config: Config, sizes: list[int]) -> dict[int, float]:
    """Images/s of the recipe's training step on this machine, on pixels of noise that lie on the device."""
    device = prepare_device(config)
    model, _ = build_model(config.model.name, config.model.arguments(), CLASSES)
    check_sizes(config, model)
    model = model.to(device, memory_format=torch.channels_last).train()
    average = build_ema(model, config.train)
    step = Step(
        model,
        build_optimizer(model, config.train, choose_precision(config.train.precision, device)),
        average,
        config,
        device,
    )
    count = config.train.batch_size if device.type == "cuda" else min(CPU_BATCH, config.train.batch_size)
    rates = {}
    for size in sizes:
        print(f"\rmeasuring the trainer: {size} px ", end="", file=sys.stderr, flush=True)
        noise = np.random.default_rng(size).integers(0, 256, (count, 3, size, size), np.uint8)
        images = torch.from_numpy(noise).to(device).contiguous(memory_format=torch.channels_last)
        batch = Batch.whole(images, torch.arange(count, device=device) % CLASSES, torch.arange(count))
        feed = Feed(size, count)
        step.warm(feed, CLASSES)
        mode = step.mode(feed)
        step(batch, 0, 1e-6, mode)  # the first is slow: kernels are loaded, memory is taken
        wait(device)
        done, began = 0, time.perf_counter()
        while not done or time.perf_counter() - began < MEASURE_SECONDS:
            done += 1
            step(batch, done, 1e-6, mode)
        wait(device)
        rates[size] = done * count / (time.perf_counter() - began)
    print(f"\rtrainer measured on {device}, batches of {count}", file=sys.stderr)
    return rates
