"""The processes that train together, and what they exchange besides gradients.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. A process that was started alone is rank 0 of 1; every
call here then costs nothing.
"""

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitlocal.data.shares import Share
from vitlocal.errors import ConfigError, DataError, first_line

LOST = re.compile(r"connection|broken pipe|socket|timed out|timeout", re.IGNORECASE)  # in gloo's errors about a peer


class Ranks:
    """The rank of this process, and its connection to the others: by the device's backend, and gloo for decisions."""

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, local_world_size: int = 1):
        self.rank, self.world = rank, world
        self.local_rank, self.local_world_size = local_rank, local_world_size  # on this machine
        self.device = torch.device("cpu")
        self._decisions: Any = None  # a gloo process group

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        return Share(self.rank, self.world)

    def connect(self, device: torch.device) -> None:
        """Connects to the other processes, and waits for all of them."""
        self.device = device
        if self.world > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
            self._decisions = dist.new_group(backend="gloo")  # on the CPU, so that no decision waits for the device

    def wrap(self, module: nn.Module, uses_all: bool = True) -> nn.Module:
        """``module`` in DistributedDataParallel, which averages gradients during the backward pass.

        ``uses_all``: every trained parameter takes part in every backward pass. Wrap again if the set of trained
        parameters changes.
        """
        if self.world == 1:
            return module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.15 renames broadcast_buffers
            return DistributedDataParallel(
                module, gradient_as_bucket_view=True, find_unused_parameters=not uses_all,
                # Each process has its own BatchNorm statistics while it trains; share_buffers makes them equal.
                broadcast_buffers=False,
            )  # fmt: skip

    def broadcast_floats(self, values: list[float]) -> list[float]:
        """Rank 0's ``values`` (float64) on every rank."""
        if self.world == 1:
            return values
        sent = torch.tensor(values, dtype=torch.float64)
        with self._peers():
            dist.broadcast(sent, 0, group=self._decisions)
        return sent.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, any plain object or tensors on the CPU, on every rank."""
        box = [value]
        if self.world > 1:
            with self._peers():
                dist.broadcast_object_list(box, 0, group=self._decisions)
        return box[0]

    def total(self, values: Tensor) -> Tensor:
        """Sums over all ranks, in place. The host waits for the device only when the caller reads the result."""
        if self.world > 1:
            with self._peers():
                dist.all_reduce(values)
        return values

    @torch.no_grad()
    def share_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Copies rank 0's buffers (BatchNorm's running statistics) to all ranks."""
        with self._peers():
            for buffer in buffers if self.world > 1 else ():
                dist.broadcast(buffer, 0)

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """A context that turns gloo's error about a process that has ended into a DataError."""
        try:
            yield
        except RuntimeError as error:
            if not LOST.search(str(error)):
                raise
            raise DataError(
                f"rank {self.rank} has lost the other processes ({first_line(error)}). Their output says what "
                "stopped them. After that is fixed, the same command continues from the last checkpoint"
            ) from error

    def close(self) -> None:
        if self._decisions is not None:
            dist.destroy_process_group()
            self._decisions = None


ALONE = Ranks()


def find_ranks(environment: dict[str, str] | os._Environ[str] = os.environ) -> Ranks:
    """This process's rank, from torchrun's variables. Raises ConfigError if some of them are missing."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    missing = [name for name in names if name not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} is not set; start several processes "
            "with torchrun --nproc-per-node=N train_imagenet.py …"
        )
    return Ranks(*(int(environment[name]) for name in names))
