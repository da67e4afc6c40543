"""The processes that train together: who they are, and what they tell each other apart from gradients.

Started by torchrun, which sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; a process started by itself is rank 0
of one, and every call here is then free.
"""

from __future__ import annotations

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
from vitlocal.errors import ConfigError, DataError

LOST = re.compile(r"connection|broken pipe|socket|timed out|timeout", re.IGNORECASE)  # what gloo says of a peer


class Ranks:
    """This process among its peers. Gradients and sums go through the device's backend, decisions through gloo."""

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, local_world_size: int = 1):
        self.rank, self.world = rank, world
        self.local_rank, self.local_world_size = local_rank, local_world_size  # on this machine
        self.device = torch.device("cpu")
        self._decisions: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, writes and speaks."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        return Share(self.rank, self.world)

    def connect(self, device: torch.device) -> None:
        """Finds the peers; waits for all of them."""
        self.device = device
        if self.world > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
            self._decisions = dist.new_group(backend="gloo")  # on the CPU, so that no decision waits for the device

    def wrap(self, module: nn.Module, whole: bool = True) -> nn.Module:
        """``module`` with gradients averaged over all processes while its backward still runs.

        ``whole``: each trained parameter has a part in each backward. Wrapped again where what is trained changes.
        """
        if self.world == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.15 renames broadcast_buffers
            return DistributedDataParallel(
                module, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=not whole,
                # BatchNorm's statistics are each process's own while it trains; share_buffers evens them out.
                broadcast_buffers=False,
            )  # fmt: skip

    def decided(self, values: list[float]) -> list[float]:
        """Rank 0's ``values``, on every rank: float64."""
        if self.world == 1:
            return values
        told = torch.tensor(values, dtype=torch.float64)
        with self._peers():
            dist.broadcast(told, 0, group=self._decisions)
        return told.tolist()

    def broadcast(self, thing: Any) -> Any:
        """Rank 0's ``thing``, any plain object or tensors on the CPU, on every rank."""
        box = [thing]
        if self.world > 1:
            with self._peers():
                dist.broadcast_object_list(box, 0, group=self._decisions)
        return box[0]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place. Device sync only where the caller reads it."""
        if self.world > 1:
            with self._peers():
                dist.all_reduce(values)
        return values

    @torch.no_grad()
    def share_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Rank 0's buffers for everyone: BatchNorm's running statistics."""
        for buffer in buffers if self.world > 1 else ():
            with self._peers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            with self._peers():
                dist.barrier(group=self._decisions)

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """Turns what gloo says where another process has left, by an error of its own or killed, into a DataError."""
        try:
            yield
        except RuntimeError as error:
            if not LOST.search(str(error)):
                raise
            raise DataError(
                f"rank {self.rank} has lost the others ({str(error).splitlines()[0]}); what stopped them stands in "
                "their output. Once that is mended, the same command goes on from the last checkpoint"
            ) from error

    def close(self) -> None:
        if self._decisions is not None:
            dist.destroy_process_group()
            self._decisions = None


ALONE = Ranks()


def find_ranks(environment: dict[str, str] | os._Environ[str] = os.environ) -> Ranks:
    """This process's place, from torchrun's variables; ConfigError where some of them are missing."""
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


@contextmanager
def connected(ranks: Ranks, device: torch.device) -> Iterator[Ranks]:
    """:meth:`Ranks.connect`, undone at the end."""
    ranks.connect(device)
    try:
        yield ranks
    finally:
        ranks.close()
