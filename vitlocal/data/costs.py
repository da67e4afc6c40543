"""What a crop costs from each stored file: measured on this machine, kept beside the files, and what a source picks by.

``{split}.costs.json`` holds, for every file of a split, microseconds on one core by crop size. It is of a machine, not
of the data: remove it and the next ``write_dataset.py`` of the split measures anew.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitlocal.data.beton import read_beton
from vitlocal.data.crops import Cropping
from vitlocal.data.manifest import BetonFile, Manifest
from vitlocal.data.native import Threads, policy_of

SIZES = (16, 32, 48, 64, 96, 128, 160, 192, 224, 288)  # px; between them the cost is interpolated
IMAGES = 256  # of a file, that are read
SECONDS = 0.1  # for each file and size
BATCH = 64


@dataclass(frozen=True)
class Costs:
    """Microseconds for a crop on one core, by file name and crop size (px)."""

    microseconds: dict[str, dict[int, float]]

    def of(self, file: BetonFile, size: int) -> float | None:
        """The cost of a crop of ``size`` px from the file, None where it was not measured."""
        known = sorted(self.microseconds.get(file.file, {}).items())
        return float(np.interp(size, *zip(*known, strict=True))) if known else None

    @classmethod
    def load(cls, folder: str | Path, manifest: Manifest) -> Costs:
        """The costs that are kept for the manifest's files; none of files that have changed since, or of a file that
        is damaged."""
        try:
            kept = json.loads(costs_path(folder, manifest.split).read_text(encoding="utf-8"))["files"]
            found = {
                (one["file"], one["checksum"]): {int(size): float(cost) for size, cost in one["microseconds"].items()}
                for one in kept
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found = {}
        return cls({file.file: found[key] for file in manifest.files if (key := (file.file, file.checksum)) in found})

    def save(self, folder: str | Path, manifest: Manifest) -> None:
        files = [
            {"file": file.file, "checksum": file.checksum, "microseconds": self.microseconds[file.file]}
            for file in manifest.files
        ]
        content = {"what": "microseconds for a random resized crop on one core, by its size in px", "files": files}
        costs_path(folder, manifest.split).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def costs_path(folder: str | Path, split: str) -> Path:
    return Path(folder) / f"{split}.costs.json"


def crop_seconds(
    threads: Threads, file: np.ndarray, rows: np.ndarray, size: int, cropping: Cropping, seconds: float = SECONDS
) -> float:
    """Seconds for a crop of ``size`` px of the images ``rows`` (n,) of ROW in ``file`` (bytes,) uint8.

    The lower quartile over batches of at least ``seconds``, after one that is not counted: what else the machine does
    only ever takes time away.
    """
    order = np.random.default_rng(0).permutation(len(rows))
    batch = max(BATCH, 8 * threads.count)  # enough for all threads to be busy to its end
    crops, policy = np.empty((batch, size, size, 3), np.uint8), policy_of(cropping, 0)
    took: list[float] = []
    while len(took) < 2 or sum(took[1:]) < seconds:
        draws = np.resize(np.roll(order, -batch * len(took)), batch)
        began = time.perf_counter()
        threads.decode(file, rows, draws, policy, crops)
        took.append(time.perf_counter() - began)
    return sorted(took[1:])[(len(took) - 1) // 4] / batch


def measure_costs(folder: str | Path, manifest: Manifest) -> Costs:
    """Measures all files of a split on one core. Raises DataError for a damaged one."""
    threads, cropping = Threads(1), Cropping(random=True)
    found = {}
    for stored in manifest.files:
        path = Path(folder) / stored.file
        _, rows, _ = read_beton(path, len(manifest.classes))
        some = rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:IMAGES])]
        file = np.memmap(path, np.uint8, mode="r")
        for row in some:  # later on they come from memory, not from the disk
            file[row["offset"] : row["offset"] + row["bytes"] : 4096].sum()
        found[stored.file] = {
            size: round(1e6 * crop_seconds(threads, file, some, size, cropping), 2)
            for size in SIZES
            if size <= max(stored.side, min(SIZES))
        }
    threads.close()
    return Costs(found)


def keep_costs(folder: str | Path, manifest: Manifest) -> None:
    """Measures and keeps the costs of a split from which there is something to choose, unless that is done."""
    if len(manifest.files) > 1 and len(Costs.load(folder, manifest).microseconds) < len(manifest.files):
        measure_costs(folder, manifest).save(folder, manifest)
