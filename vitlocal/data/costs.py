"""The cost of a crop from each stored file, measured on this machine and kept next to the files.

If ``{split}.costs.json`` is removed, the next ``write_dataset.py`` of the split measures again.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitlocal.data.beton import MappedFile
from vitlocal.data.crops import CropPolicy
from vitlocal.data.manifest import BetonFile, Manifest
from vitlocal.data.native import DecoderThreads, native_policy

SIZES = (16, 32, 48, 64, 96, 128, 160, 192, 224, 288)  # px; costs between them are interpolated
IMAGES = 256  # of each file
SECONDS = 0.1  # for each file and size
BATCH = 64


@dataclass(frozen=True)
class DecodingCosts:
    """Microseconds for a crop on one core, by file name and crop size (px)."""

    microseconds: dict[str, dict[int, float]]

    def microseconds_for(self, file: BetonFile, size: int) -> float | None:
        """The cost of a crop of ``size`` px from the file; None if it was not measured."""
        known = sorted(self.microseconds.get(file.file, {}).items())
        return float(np.interp(size, *np.transpose(known))) if known else None

    @classmethod
    def load(cls, folder: str | Path, manifest: Manifest) -> DecodingCosts:
        """The saved costs of the manifest's files. Files that changed since, or a damaged record, have no costs."""
        try:
            records = json.loads(costs_path(folder, manifest.split).read_text(encoding="utf-8"))["files"]
            found = {}
            for record in records:
                costs = {int(size): float(cost) for size, cost in record["microseconds"].items()}
                found[record["file"], record["checksum"]] = costs
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found = {}
        return cls({file.file: found[key] for file in manifest.files if (key := (file.file, file.checksum)) in found})


def costs_path(folder: str | Path, split: str) -> Path:
    return Path(folder) / f"{split}.costs.json"


def crop_seconds(
    threads: DecoderThreads, file: np.ndarray, rows: np.ndarray, size: int, crops: CropPolicy, seconds: float = SECONDS
) -> float:
    """Seconds for a crop of ``size`` px from the images ``rows`` (n,) of native.ROW in ``file`` (bytes,) uint8.

    The lower quartile over batches of at least ``seconds``, after one batch that does not count. Other work on the
    machine can only add time.
    """
    order = np.random.default_rng(0).permutation(len(rows))
    batch = max(BATCH, 8 * threads.count)  # keeps all threads busy until its end
    buffer, policy = np.empty((batch, size, size, 3), np.uint8), native_policy(crops, 0)
    took: list[float] = []
    while len(took) < 2 or sum(took[1:]) < seconds:
        draws = np.resize(np.roll(order, -batch * len(took)), batch)
        began = time.perf_counter()
        threads.decode(file, rows, draws, policy, buffer)
        took.append(time.perf_counter() - began)
    return sorted(took[1:])[(len(took) - 1) // 4] / batch


def ensure_costs(folder: str | Path, manifest: Manifest, progress: bool = True) -> None:
    """Measures and saves the costs of a split with several files of photos, unless they are known, on one core.

    Raises DataError for a damaged file.
    """
    if manifest.latents is not None or len(manifest.files) == 1:
        return
    if len(DecodingCosts.load(folder, manifest).microseconds) == len(manifest.files):
        return
    if progress:
        text = f"{manifest.split}: complete; measuring which file is the fastest for each crop size ..."
        print(text, file=sys.stderr)
    threads, crops = DecoderThreads(1), CropPolicy(random=True)
    records = []
    for stored in manifest.files:
        file = MappedFile(Path(folder) / stored.file, len(manifest.classes))
        rows = file.rows[np.sort(np.random.default_rng(0).permutation(len(file.rows))[:IMAGES])]
        file.read(rows["offset"], rows["bytes"])  # brings them into memory, so that the disk is not measured
        costs = {
            size: round(1e6 * crop_seconds(threads, file.bytes, rows, size, crops), 2)
            for size in SIZES
            if size <= max(stored.side, min(SIZES))
        }
        records.append({"file": stored.file, "checksum": stored.checksum, "microseconds": costs})
    threads.close()
    content = {"what": "microseconds for a random resized crop on one core, by its size in px", "files": records}
    costs_path(folder, manifest.split).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
