"""The processes that train together, and what they exchange besides gradients.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. A process that was started alone is rank 0 of 1; every
call here then costs nothing.
"""

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitlocal.data.shares import Share
from vitlocal.errors import ConfigError, DataError, DeviceMemoryError, first_line
from vitlocal.train.heartbeat import Heartbeats, join_store, make_store, own_place

LOST = re.compile(  # in errors of gloo and NCCL about a peer
    r"connect(ion| to)|broken pipe|socket|timed out|timeout|nccl(Remote|System)Error|NCCL communicator was aborted",
    re.IGNORECASE,
)


class Ranks:
    """The rank of this process, and its connection to the others: by the device's backend, and gloo for decisions."""

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, local_world_size: int = 1):
        self.rank, self.world = rank, world
        self.local_rank, self.local_world_size = local_rank, local_world_size  # on this machine
        self.device = torch.device("cpu")
        self._decisions: Any = None  # a gloo process group
        self._heartbeats: Heartbeats | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, writes and prints."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        return Share(self.rank, self.world)

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """A context in which the processes are connected. Waits for all of them. DataError if one is lost."""
        self.device = device
        if self.world == 1:
            yield
            return
        with self.named_losses():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
            )
            self._decisions = dist.new_group(backend="gloo")  # on the CPU, so that no decision waits for the device
            store = make_store(self.world) if self.first else None
            port = self.broadcast(store and store.port)
            places: list[Any] = [None] * self.world
            dist.all_gather_object(places, own_place(), group=self._decisions)
            self._heartbeats = Heartbeats(store or join_store(port), self.rank, places)
            yield

    @contextmanager
    def named_losses(self) -> Iterator[None]:
        """A context in which a lost connection is a DataError that names the process; it ends the connections."""
        failed = True
        try:
            yield
            failed = False
        except RuntimeError as error:
            if isinstance(error, (DataError, DeviceMemoryError)) or not LOST.search(str(error)):
                raise
            if self._heartbeats is None:
                raise DataError(f"rank {self.rank} has lost the other processes ({first_line(error)})") from error
            raise DataError(self._heartbeats.explain(error)) from error
        finally:
            if failed and self._heartbeats is not None:
                self._heartbeats.fail()  # NCCL may wait for the others while it is destroyed
            if dist.is_initialized():
                dist.destroy_process_group()
            if self._heartbeats is not None:
                self._heartbeats.close(failed)
            self._decisions = self._heartbeats = None

    def saving(self) -> AbstractContextManager[object]:
        """A context in which a checkpoint is written: it may end before a lost process ends this one."""
        return nullcontext() if self._heartbeats is None else self._heartbeats.saving

    def any_signal(self, mine: int | None) -> int:
        """A stop signal that any process has received; 0: none. It is known on all of them within seconds."""
        return (mine or 0) if self._heartbeats is None else self._heartbeats.any_signal(mine or 0)

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
        dist.broadcast(sent, 0, group=self._decisions)
        return sent.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, any plain object or tensors on the CPU, on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, 0, group=self._decisions)
        return box[0]

    def total(self, values: Tensor) -> Tensor:
        """Sums over all ranks, in place. The host waits for the device only when the caller reads the result."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    @torch.no_grad()
    def share_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Copies rank 0's buffers (BatchNorm's running statistics) to all ranks."""
        for buffer in buffers if self.world > 1 else ():
            dist.broadcast(buffer, 0)


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
