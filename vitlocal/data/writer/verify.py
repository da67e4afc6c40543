"""Checks a written split: do the files match the manifest, and does every image decode?"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vitlocal.data.beton import MappedFile
from vitlocal.data.crops import CropPolicy
from vitlocal.data.manifest import Manifest, checksum
from vitlocal.data.native import FULL, WHOLE, DecoderThreads, native_policy
from vitlocal.data.writer.verify_latents import SAMPLE, EncodedSample, damaged_latents
from vitlocal.errors import DataError

BATCH = 256
SIDE = 8  # px of the decoded images, whose pixels are not used
MAX_REPORTED = 10


def verify(
    out: str, split: str, workers: int = 0, progress: bool = True, vae: str | None = None, source: str | None = None
) -> Manifest:
    """Decodes every image of the split in the folder ``out``, and compares the checksums of the files.

    With ``vae``, some latents are compared with those of the photos in ``source``: see EncodedSample.
    Raises ConfigError if there is no manifest, and DataError that lists the problems of all files.
    """
    manifest_path = Path(out) / f"{split}.json"
    manifest = Manifest.load(manifest_path)
    sample = None if vae is None else EncodedSample(vae, source, manifest, out)
    problems: list[str] = []
    threads = DecoderThreads(workers)
    total = manifest.count * len(manifest.files)
    with tqdm(total=total, unit=" images", disable=not (progress and sys.stderr.isatty()), leave=False) as bar:
        for stored in manifest.files:
            bar.set_description(stored.file)
            path = Path(out) / stored.file
            try:
                file, found = MappedFile(path, len(manifest.classes)), checksum(path)
            except (DataError, OSError) as error:
                problems.append(str(error))
                continue
            if found != stored.checksum:
                problems.append(f"{path}: checksum {found}, the manifest says {stored.checksum}")
            if manifest.latents is None:
                problems += _damaged(path, file, manifest, threads, bar)
                continue
            damage = damaged_latents(path, file, stored.side, manifest, bar)
            if sample is not None and not damage:
                damage = sample.differences(path, file, stored.side)
            problems += damage
    threads.close()
    if problems:
        more = f"\n  and {len(problems) - MAX_REPORTED} more" if len(problems) > MAX_REPORTED else ""
        raise DataError(
            f"{out}: split {split!r} is damaged:\n  " + "\n  ".join(problems[:MAX_REPORTED]) + more
            + f"\nRemove {manifest_path} and those files, and write the split again"
        )  # fmt: skip
    if progress:
        files = f"{len(manifest.files)} file{'s' * (len(manifest.files) > 1)}"
        again = f"; {SAMPLE} rows of each encoded again" if sample else ""
        print(f"{manifest_path}: {total:,} images in {files}, no damage found{again}")
    return manifest


def _damaged(path: Path, file: MappedFile, manifest: Manifest, threads: DecoderThreads, bar: tqdm) -> list[str]:
    problems = []
    crops, policy = np.empty((BATCH, SIDE, SIDE, 3), np.uint8), native_policy(CropPolicy(random=False), 0, WHOLE)
    for start in range(0, len(file.rows), BATCH):
        draws = np.arange(start, min(start + BATCH, len(file.rows)))
        found = threads.decode(file.bytes, file.rows, draws, policy, crops[: len(draws)], FULL)
        for place, problem in found.items():
            row = start + place
            entry = f" ({manifest.entries[row]})" if row < manifest.count else ""
            problems.append(f"{path}: row {row}{entry} {problem}")
        bar.update(len(draws))
    return problems
