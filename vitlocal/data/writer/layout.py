"""The storage layout: which files to write for a curriculum, the trainer's speed, and a disk.

Some of the source's images are encoded at every useful side and format, and cropped at every size. That measures the
bytes and the speed of each candidate file. The best set of files lets the trainer wait the least; among equals, it is
the smallest on disk.
"""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from vitlocal.data.beton import ALLOCATION, RAW, data_start, page_size_for
from vitlocal.data.costs import crop_seconds
from vitlocal.data.crops import CropPolicy
from vitlocal.data.images import ImageSet
from vitlocal.data.manifest import BetonFile
from vitlocal.data.native import ROW, DecoderThreads, Encoder
from vitlocal.data.writer.encode import EncodeJob, encode_image
from vitlocal.data.writer.journal import byte_words
from vitlocal.errors import ConfigError, DataError, UndecodableImage
from vitlocal.write_options import PLAN_NAME, JpegForm

MARGIN = 1.2  # the loader should be this much faster than the trainer
LOWER_QUALITIES = (80, 70)  # tried in this order if the wanted quality is too slow or too large
SIDE_STEP = 16  # px; sides of candidates are rounded up to a multiple
IMAGES, ENCODE_SECONDS = 256, 10.0  # images of the source to encode, within this time
MEASURE_SECONDS = 12.0  # for all files and sizes
TIME_STEP = 1e-4  # as a fraction of the training time: smaller differences in waiting do not count


@dataclass(frozen=True)
class SizeDemand:
    """The images that the trainer needs at one image size."""

    size: int  # px
    images: float  # in the whole run
    rate: float  # images/s of the trainer


@dataclass(frozen=True)
class StorageLimits:
    """What the files may use; bytes."""

    cores: int
    disk: int
    memory: int  # for the page cache


@dataclass(frozen=True)
class CandidateFile:
    """A measured file that could be written."""

    side: int
    format: str  # "raw" | "jpg"
    bytes: int
    rates: dict[int, float]  # images/s on all cores, by the crop sizes that the file is large enough for

    def __str__(self) -> str:
        return f"{self.side}:{self.format}"


@dataclass(frozen=True)
class StorageLayout:
    """A set of files, and the speed of the loader with it."""

    demands: tuple[SizeDemand, ...]
    files: tuple[CandidateFile, ...]
    jpeg: JpegForm

    @property
    def serving(self) -> tuple[CandidateFile, ...]:
        """The file for each demand."""
        return tuple(file for demand in self.demands if (file := fastest_file(demand, self.files)))

    @property
    def waits(self) -> tuple[float, ...]:
        """For each demand, the fraction of the time that the trainer waits for the loader."""
        return tuple(
            max(0.0, 1 - file.rates[demand.size] / demand.rate)
            for demand, file in zip(self.demands, self.serving, strict=True)
        )

    @property
    def missing_seconds(self) -> float:
        return sum(map(missing_seconds, self.demands, self.serving))


def missing_seconds(demand: SizeDemand, file: CandidateFile) -> float:
    """The seconds by which reading takes longer than wanted, with :data:`MARGIN`."""
    return demand.images * max(0.0, 1 / file.rates[demand.size] - 1 / (MARGIN * demand.rate))


def fastest_file(demand: SizeDemand, files: Sequence[CandidateFile]) -> CandidateFile | None:
    """The file that a source would read: the fastest that is large enough, if any."""
    return max(
        (file for file in files if demand.size in file.rates), key=lambda file: file.rates[demand.size], default=None
    )


# --- candidates ---


def measure_candidates(
    images: ImageSet, sizes: Sequence[int], crops: CropPolicy, side_ratio: float, target_cores: int, jpeg: JpegForm,
    formats: Sequence[str] = ("raw", "jpg"),
) -> tuple[CandidateFile, ...]:  # fmt: skip
    """The candidates for crops of ``sizes`` px, measured on some of ``images``.

    A side is at least ``side_ratio`` x the size of a crop, as for sources. The rates are those of all cores here,
    scaled to ``target_cores``.
    """
    sides = sorted({-(-int(np.ceil(size * side_ratio)) // SIDE_STEP) * SIDE_STEP for size in sizes})
    files = [
        BetonFile("", side, format, *jpeg, page_size_for(3 * side * side + (1 << 16)))
        for side, format in itertools.product(sides, formats)
    ]
    served = [[size for size in sizes if file.side >= size * side_ratio - 1e-6] for file in files]
    seconds = MEASURE_SECONDS / sum(map(len, served))
    threads = DecoderThreads()
    candidates = []
    for file, its_sizes, (data, rows) in zip(files, served, _encode_some(images, files), strict=True):
        bytes_in_all = data_start(len(images)) + int((rows["bytes"].mean() + ALLOCATION.itemsize) * len(images))
        scale = target_cores / threads.count
        rates = {size: scale / crop_seconds(threads, data, rows, size, crops, seconds) for size in its_sizes}
        candidates.append(CandidateFile(file.side, file.format, bytes_in_all, rates))
    threads.close()
    return tuple(candidates)


def _encode_some(images: ImageSet, files: Sequence[BetonFile]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Some of the images as each file would store them: (bytes,) uint8 and (n,) of native.ROW."""
    job, encoder = EncodeJob(tuple(files), 0, True), Encoder()
    parts: list[list[bytes]] = [[] for _ in files]
    rows: list[list[tuple[int, ...]]] = [[] for _ in files]
    ends = [0] * len(files)
    deadline, problem = time.monotonic() + ENCODE_SECONDS, None
    for index in np.random.default_rng(0).permutation(len(images))[:IMAGES].tolist():
        try:
            forms = encode_image(images, index, job, encoder)
        except UndecodableImage as error:
            problem = error
            continue
        for place, ((mode, width, height), data) in enumerate(forms):
            rows[place].append((ends[place], len(data), width, height, mode == RAW, 0))
            parts[place].append(data)
            ends[place] += len(data)
        if time.monotonic() > deadline:
            break
    if not rows[0]:
        raise DataError(f"the images of {images.spec} cannot be read; the last error: {problem}")
    return [
        (np.frombuffer(b"".join(part), np.uint8), np.array(row, ROW)) for part, row in zip(parts, rows, strict=True)
    ]


# --- the choice ---


def best_files(
    demands: Sequence[SizeDemand], candidates: Sequence[CandidateFile], limits: StorageLimits
) -> tuple[CandidateFile, ...] | None:
    """The best set of files that fits the disk; None if no set does.

    It has, in this order: the fewest demands read from files that the page cache cannot hold, the least missing time,
    the fewest bytes. The search is exact; it skips sets that cannot be better than the best one so far.
    """
    tick = TIME_STEP * sum(demand.images / demand.rate for demand in demands)
    worst = 2.0 * len(demands) * sum(  # a demand that is read from the disk is worse than any waiting
        max((missing_seconds(demand, file) for file in candidates if demand.size in file.rates), default=0.0)
        for demand in demands
    ) + 1.0  # fmt: skip

    def cost_of(demand: SizeDemand, file: CandidateFile) -> float:
        return missing_seconds(demand, file) + worst * (file.bytes > limits.memory)

    options = [[c for c, file in enumerate(candidates) if demand.size in file.rates] for demand in demands]
    if not all(options):
        return None
    order = sorted(range(len(demands)), key=lambda i: len(options[i]))  # demands with few options first
    least = [min(cost_of(demands[i], candidates[c]) for c in options[i]) for i in order]
    rest = [sum(least[place:]) for place in range(len(order) + 1)]  # lower bound for the demands from a place on
    best: tuple[tuple[int, int, int], frozenset[int]] | None = None
    seen: dict[tuple[int, frozenset[int]], float] = {}

    def value(cost: float, chosen: frozenset[int]) -> tuple[int, int, int]:
        return math.ceil(cost / tick - 1e-9), sum(candidates[c].bytes for c in chosen), len(chosen)

    def extend(place: int, chosen: frozenset[int], cost: float) -> None:
        nonlocal best
        bound = value(cost + rest[place], chosen)
        known = seen.get((place, chosen), math.inf)
        if bound[1] > limits.disk or (best is not None and bound >= best[0]) or known <= cost:
            return
        seen[place, chosen] = cost
        if place == len(demands):
            files = [candidates[c] for c in chosen]
            read = [(demand, file) for demand in demands if (file := fastest_file(demand, files))]  # as a source does
            found = value(sum(cost_of(demand, file) for demand, file in read), chosen)
            if best is None or found < best[0]:
                best = found, chosen
            return
        demand = demands[order[place]]
        for c in sorted(options[order[place]], key=lambda c: cost_of(demand, candidates[c])):
            extend(place + 1, chosen | {c}, cost + cost_of(demand, candidates[c]))

    extend(0, frozenset(), 0.0)
    return None if best is None else tuple(candidates[c] for c in sorted(best[1]))


def propose_layout(
    images: ImageSet, demands: Sequence[SizeDemand], crops: CropPolicy, side_ratio: float, limits: StorageLimits,
    jpeg: JpegForm,
) -> StorageLayout:  # fmt: skip
    """The files to write for ``demands``.

    If no set of files is fast enough or fits the disk with JPEGs as in ``jpeg``, smaller ones are tried, and the first
    layout with the least missing time is returned. Raises ConfigError if nothing fits the disk.
    """
    sizes = sorted({demand.size for demand in demands})
    lower = [quality for quality in LOWER_QUALITIES if quality < jpeg.quality]
    tries = [jpeg, *(jpeg._replace(quality=quality, sampling=420) for quality in (jpeg.quality, *lower))]
    layouts: list[StorageLayout] = []
    raw: tuple[CandidateFile, ...] = ()
    for form in dict.fromkeys(tries):
        formats = ("jpg",) if raw else ("raw", "jpg")
        found = measure_candidates(images, sizes, crops, side_ratio, limits.cores, form, formats)
        raw = raw or tuple(file for file in found if file.format == "raw")
        jpegs = tuple(file for file in found if file.format == "jpg")
        files = best_files(demands, raw + jpegs, limits)
        if files is not None:
            layouts.append(StorageLayout(tuple(demands), files, form))
            if not layouts[-1].missing_seconds:
                return layouts[-1]
    if not layouts:
        smallest = min((file for file in raw + jpegs if sizes[-1] in file.rates), key=lambda file: file.bytes)
        raise ConfigError(
            f"--disk-limit: {byte_words(limits.disk)} are too few: the smallest file that serves all sizes, {smallest} "
            f"of quality {form.quality}, takes {byte_words(smallest.bytes)}. Raise the limit, or lower data.side_ratio "
            "in the recipe"
        )
    tick = TIME_STEP * sum(demand.images / demand.rate for demand in demands)
    return min(layouts, key=lambda layout: round(layout.missing_seconds / tick))


# --- the report, and the options for the next write ---


def layout_lines(layout: StorageLayout, limits: StorageLimits, count: int) -> list[str]:
    """The layout in lines of text, for a terminal and for the head of the file that keeps it."""
    lines = [
        f"{count:,} images; {limits.cores} core{'s' * (limits.cores > 1)}; the loader should be {MARGIN} x as fast as "
        "the trainer",
        f"{'px':>5} {'epochs':>7} {'trainer':>11} {'loader':>11} {'':>8}  file",
    ]
    for demand, file, wait in zip(layout.demands, layout.serving, layout.waits, strict=True):
        rate, note = file.rates[demand.size], "  little to spare" if missing_seconds(demand, file) > 0 else ""
        if wait:
            note = f"  waits {100 * wait:.0f} % of its time"
        if file.bytes > limits.memory:
            note += f"  does not fit in memory ({byte_words(limits.memory)}), so the disk limits its rate"
        lines.append(
            f"{demand.size:5} {demand.images / count:7.1f} {demand.rate:9,.0f}/s {rate:9,.0f}/s "
            f"{rate / demand.rate:6.1f} x  {file}{note}"
        )
    jpeg = f", JPEG of quality {layout.jpeg.quality} and chroma {layout.jpeg.sampling}"
    jpeg *= any(file.format == "jpg" for file in layout.files)
    files = ", ".join(f"{file} ({byte_words(file.bytes)})" for file in layout.files)
    largest = max(file.bytes for file in layout.serving)
    lines.append(
        f"{byte_words(sum(file.bytes for file in layout.files))} on disk, of {byte_words(limits.disk)}: {files}{jpeg}"
    )
    lines.append(f"at most {byte_words(largest)} of them at a time in the page cache, of {byte_words(limits.memory)}")
    if layout.missing_seconds:
        lines.append(
            "No set of files is fast enough for the trainer. These may help: more cores (--cores), room for raw files "
            "(--disk-limit, --memory-limit), or a smaller data.side_ratio in the recipe."
        )
    return lines


def save_layout(out: str, layout: StorageLayout, lines: Sequence[str], command: str) -> Path:
    """Saves the layout in the data folder, as options that the next write of the split reads."""
    path = Path(out) / PLAN_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    sides, (quality, sampling, keep) = ",".join(map(str, layout.files)), layout.jpeg
    options = {"sides": sides, "quality": quality, "sampling": sampling, "keep_jpegs": bool(keep)}
    head = "".join(f"# {line}\n" for line in (f"Made by {command}", *lines))
    path.write_text(head + yaml.safe_dump({"write": options}, sort_keys=False), encoding="utf-8")
    return path
