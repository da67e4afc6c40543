"""Which device a process computes on, and how it is made ready."""

from __future__ import annotations

import torch

from vitlocal.config import Config
from vitlocal.errors import ConfigError
from vitlocal.machine import keep_freed_memory
from vitlocal.train.distributed import ALONE, Ranks


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device that ``run.device`` names; of several processes on a machine, each gets a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and ranks.local_world_size > 1:
        raise ConfigError(
            f"run.device: {ranks.local_world_size} processes cannot share {name}; use cuda, a GPU for each"
        )
    if name == "cuda" and ranks.world > 1:
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"run.device: '{name}' cannot be used here ({str(error).splitlines()[0]})"
            + (f"; {ranks.local_world_size} processes want a GPU each" if ranks.world > 1 else "")
        ) from error
    return device


def prepare_device(config: Config, ranks: Ranks = ALONE) -> torch.device:
    """The device of ``run.device``, made the current one; threads and memory of this process as training wants them."""
    device = choose_device(config.run.device, ranks)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)  # streams and events are made on the current device
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    return device
