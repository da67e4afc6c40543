"""Reads a written split from end to end: are the files those of the manifest, and does every image decode?"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vitlocal.data.loader import MappedFile
from vitlocal.data.manifest import BetonFile, Manifest, checksum
from vitlocal.data.native import FULL, DecoderThreads, whole_policy
from vitlocal.errors import DataError

BATCH = 256
SIDE = 8  # px to which the decoded images are brought: their pixels are not looked at
SHOWN = 10


def verify(out: str, split: str, workers: int = 0, progress: bool = True) -> Manifest:
    """Decodes every image of every file of the split in the folder ``out`` and compares the files with the manifest.

    Compared are rows, bytes, CRC-32, largest width and height, and the labels of all files with each other.
    Raises ConfigError where there is no manifest, else DataError that lists what is wrong with all files.
    """
    manifest = Manifest.load(Path(out) / f"{split}.json")
    problems: list[str] = []
    threads, labels = DecoderThreads(workers), None
    total = manifest.count * len(manifest.files)
    with tqdm(total=total, unit=" images", disable=not (progress and sys.stderr.isatty()), leave=False) as bar:
        for stored in manifest.files:
            bar.set_description(stored.file)
            path = Path(out) / stored.file
            try:
                file = MappedFile(path, len(manifest.classes))
            except DataError as error:
                problems.append(str(error))
                continue
            if labels is not None and not np.array_equal(labels, file.labels):
                problems.append(f"{path}: its labels are not those of {manifest.files[0].file}")
            labels = file.labels if labels is None else labels
            problems += _differences(path, file, stored, manifest) + _damaged(path, file, manifest, threads, bar)
    threads.close()
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(
            f"{out}: split {split!r} is damaged:\n  " + "\n  ".join(problems[:SHOWN]) + more
            + f"\nRemove {Path(out) / f'{split}.json'} and those files, and write the split again"
        )  # fmt: skip
    if progress:
        files = f"{len(manifest.files)} file{'s' * (len(manifest.files) > 1)}"
        print(f"{Path(out) / f'{split}.json'}: {total:,} images in {files}, all sound")
    return manifest


def _differences(path: Path, file: MappedFile, stored: BetonFile, manifest: Manifest) -> list[str]:
    found = {
        "rows": (len(file.rows), manifest.count),
        "bytes": (file.bytes.size, stored.bytes),
        "largest width": (int(file.rows["width"].max()), stored.max_width),
        "largest height": (int(file.rows["height"].max()), stored.max_height),
        "checksum": (checksum(path), stored.checksum),
    }
    return [
        f"{path}: {name} {is_there}, the manifest says {said}"
        for name, (is_there, said) in found.items()
        if is_there != said
    ]


def _damaged(path: Path, file: MappedFile, manifest: Manifest, threads: DecoderThreads, bar: tqdm) -> list[str]:
    problems = []
    crops, policy = np.empty((BATCH, SIDE, SIDE, 3), np.uint8), whole_policy()
    for start in range(0, len(file.rows), BATCH):
        draws = np.arange(start, min(start + BATCH, len(file.rows)))
        found = threads.decode(file.bytes, file.rows, draws, policy, crops[: len(draws)], FULL)
        for place, problem in found.items():
            row = start + place
            entry = f" ({manifest.entries[row]})" if row < manifest.count else ""
            problems.append(f"{path}: row {row}{entry} {problem}")
        bar.update(len(draws))
    return problems
