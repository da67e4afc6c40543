"""Trains many short passes in one process: memory, threads and open files must stay flat: make soak [PASSES=2000]"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from kinds import Bench

from vitlocal.config import read_config
from vitlocal.train.command import train
from vitlocal.train.trainer import Trainer

MOST_GROWTH = 16 * 2**20  # bytes of memory while the images have their last size; caches of allocators vary


@dataclass(frozen=True)
class Usage:
    """What this process uses."""

    memory: int  # bytes
    threads: int
    files: int

    @classmethod
    def now(cls) -> Usage:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), threading.active_count(), len(os.listdir("/proc/self/fd")))


def main(passes: int) -> int:
    found: list[Usage] = []
    close_pass = Trainer.close_pass

    def measured(trainer: Trainer) -> None:
        close_pass(trainer)
        found.append(Usage.now())
        if len(found) % max(1, passes // 20) == 0:
            print(f"{len(found)} passes: {found[-1]}", flush=True)

    Trainer.close_pass = measured  # type: ignore[method-assign]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), 0)
        third = f"until {passes // 3}ep"
        options = {
            "budget.length": f"{passes}ep", "train.batch_size": 120, "evaluate.every": 1, "run.save_every": "1ep",
            "methods": "image_size", "image_size.stages": f"16px {third},32px until {2 * passes // 3}ep,48px",
            "run.progress": "no",
        }  # fmt: skip
        train(read_config(bench.training(bench.fresh("run"), **options), {}))
    first, last = found[7 * len(found) // 10], found[-1]
    grown = last.memory - first.memory
    print(f"{len(found)} passes: {grown / 2**20:+.1f} MiB, {last.threads - first.threads:+d} threads, "
          f"{last.files - first.files:+d} open files in the last third")  # fmt: skip
    return int(grown > MOST_GROWTH or last.threads > first.threads or last.files > first.files)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
