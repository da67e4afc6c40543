"""Which files to write: measured on the source's own images, for a curriculum, a trainer's speed and a disk.

Some images are encoded at every side and format that could serve, and cut at every size: that gives each file's size
and speed. Of all sets of files, the one is taken that keeps the trainer waiting least; of those, the smallest on disk.

Letters: I stages of the curriculum, C candidates (files that could be written).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from vitlocal.config import PLAN_NAME
from vitlocal.data.beton import RAW, data_start, page_size_for
from vitlocal.data.costs import crop_seconds
from vitlocal.data.crops import Cropping
from vitlocal.data.encode import Job, encode_image
from vitlocal.data.images import ImageSet
from vitlocal.data.journal import byte_words
from vitlocal.data.manifest import PlannedFile
from vitlocal.data.native import ROW, Encoder, Threads
from vitlocal.errors import ConfigError, DataError
from vitlocal.machine import cores

MARGIN = 1.2  # the loader is to be this much faster than the trainer
LOWER_QUALITIES = (80, 70)  # tried, in this order, where the wished one is too slow or too large
SIDE_STEP = 16  # px, to which candidates' sides are rounded up
IMAGES, ENCODE_SECONDS = 256, 15.0  # as many images of the source, in at most that time
MEASURE_SECONDS = 0.1  # for a file and size
WAIT_STEP = 0.01  # of a stage's time: less waiting is no reason to store more


@dataclass(frozen=True)
class Stage:
    """What the trainer does at one image size."""

    size: int  # px
    images: float  # that are trained on
    rate: float  # images/s that the trainer takes


@dataclass(frozen=True)
class Limits:
    """What the files may cost; bytes."""

    cores: int
    disk: int
    memory: int  # for the page cache


@dataclass(frozen=True)
class Candidate:
    """A file that could be written, as measured."""

    side: int
    format: str  # "raw" | "jpg"
    bytes: int
    rates: dict[int, float]  # images/s on all cores, by crop size; of the sizes that it is good enough for

    def __str__(self) -> str:
        return f"{self.side}:{self.format}"


@dataclass(frozen=True)
class Choice:
    """A set of files, and what the loader gives from it."""

    stages: tuple[Stage, ...]
    files: tuple[Candidate, ...]
    serving: tuple[Candidate, ...]  # of each stage, one of the files
    quality: int
    sampling: int

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def waits(self) -> tuple[float, ...]:
        """The part of each stage's time that the trainer waits for the loader; 0 where that is fast enough."""
        return tuple(
            max(0.0, 1 - file.rates[stage.size] / stage.rate)
            for stage, file in zip(self.stages, self.serving, strict=True)
        )

    @property
    def keeps_up(self) -> bool:
        return all(
            file.rates[stage.size] >= MARGIN * stage.rate for stage, file in zip(self.stages, self.serving, strict=True)
        )


# --- what could be written ----------------------------------------------------------------------------------


def measured(
    images: ImageSet, sizes: Sequence[int], cropping: Cropping, side_ratio: float, cores_then: int, quality: int,
    sampling: int, formats: Sequence[str] = ("raw", "jpg"),
) -> tuple[Candidate, ...]:  # fmt: skip
    """The candidates for crops of ``sizes`` px, with their sizes and speeds measured on some of ``images``.

    A side is at least ``side_ratio`` x a crop's size, the rule that sources go by. Speeds are those of one core here,
    times ``cores_then`` and what is lost where all cores here work at once.
    """
    sides = sorted({-(-int(np.ceil(size * side_ratio)) // SIDE_STEP) * SIDE_STEP for size in sizes})
    files = tuple(
        PlannedFile("", side, format, quality, sampling, page_size_for(3 * side * side + (1 << 16)))
        for side in sides
        for format in formats
    )
    stored = _encoded(images, files)
    one, all_cores = Threads(1), Threads(cores())
    found = []
    for file, (data, rows) in zip(files, stored, strict=True):
        good = [size for size in sizes if file.side >= size * side_ratio - 1e-6]
        seconds = {size: crop_seconds(one, data, rows, size, cropping, MEASURE_SECONDS) for size in good}
        together = crop_seconds(all_cores, data, rows, good[-1], cropping, MEASURE_SECONDS)
        kept = min(1.0, seconds[good[-1]] / (together * cores()))  # of a core's speed, where all work
        size_on_disk = data_start(len(images)) + int(rows["bytes"].mean() * len(images)) + 24 * len(images)
        rates = {size: kept * cores_then / cost for size, cost in seconds.items()}
        found.append(Candidate(file.side, file.format, size_on_disk, rates))
    one.close()
    all_cores.close()
    return tuple(found)


def _encoded(images: ImageSet, files: Sequence[PlannedFile]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Some of the source's images as each file would hold them: (bytes,) uint8 and (n,) of ROW."""
    job, encoder = Job(tuple(files), 0, True), Encoder()
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:IMAGES])
    parts: list[list[bytes]] = [[] for _ in files]
    rows: list[list[tuple[int, ...]]] = [[] for _ in files]
    ends = [0] * len(files)
    deadline, problem = time.monotonic() + ENCODE_SECONDS, None
    for index in np.random.default_rng(1).permutation(chosen).tolist():
        try:
            forms = encode_image(images, index, job, encoder)
        except (DataError, OSError, ValueError, SyntaxError) as error:
            problem = error
            continue
        for place, ((mode, width, height), data) in enumerate(forms):
            rows[place].append((ends[place], len(data), width, height, mode == RAW, 0))
            parts[place].append(data)
            ends[place] += len(data)
        if time.monotonic() > deadline:
            break
    if not rows[0]:
        raise DataError(f"none of {len(chosen)} images of {images.spec} could be read; the last one: {problem}")
    return [
        (np.frombuffer(b"".join(part), np.uint8), np.array(row, ROW)) for part, row in zip(parts, rows, strict=True)
    ]


# --- which of them ------------------------------------------------------------------------------------------


def cheapest(stages: Sequence[Stage], candidates: Sequence[Candidate], limits: Limits) -> tuple[Candidate, ...] | None:
    """The set of files that lacks least of the wanted speed, over all stages; of such sets, the smallest on disk.

    A file that the page cache cannot hold serves only a stage for which there is no other. None where every set is
    larger than the disk. Exact: all sets are gone through, but for those that cannot be better than one that is known.
    """
    lacks = np.full((len(stages), len(candidates)), np.inf)  # (I, C) what is missing, as a part of what is wanted
    for i, stage in enumerate(stages):
        good = [c for c, file in enumerate(candidates) if stage.size in file.rates and file.bytes <= limits.disk]
        fits = [c for c in good if candidates[c].bytes <= limits.memory]
        for c in fits or sorted(good, key=lambda c: candidates[c].bytes)[:1]:
            lacks[i, c] = max(0.0, 1 - candidates[c].rates[stage.size] / (MARGIN * stage.rate))
    if np.isinf(lacks.min(axis=1)).any():
        return None
    order = np.argsort(np.isfinite(lacks).sum(axis=1), kind="stable")  # those with the least choice first
    least = np.append(np.cumsum(lacks[order].min(axis=1)[::-1])[::-1], 0.0)  # that the stages from a place on can lack
    best: tuple[tuple[int, int, int], frozenset[int]] | None = None
    seen: dict[tuple[int, frozenset[int]], float] = {}

    def go_on(place: int, chosen: frozenset[int], lacking: float) -> None:
        nonlocal best
        size = sum(candidates[c].bytes for c in chosen)
        value = (round((lacking + least[place]) / WAIT_STEP), size, len(chosen))
        if size > limits.disk or (best is not None and value >= best[0]):
            return
        if seen.get((place, chosen), np.inf) <= lacking:
            return
        seen[place, chosen] = lacking
        if place == len(stages):
            best = value, chosen
            return
        row = lacks[order[place]]
        for c in np.argsort(row, kind="stable").tolist():
            if np.isfinite(row[c]):
                go_on(place + 1, chosen | {c}, lacking + float(row[c]))

    go_on(0, frozenset(), 0.0)
    return None if best is None else tuple(candidates[c] for c in sorted(best[1]))


def serving(stage: Stage, files: Sequence[Candidate], limits: Limits) -> Candidate:
    """The file that a source would read at this stage: the fastest of those that are good enough."""
    good = [file for file in files if stage.size in file.rates]
    return max(good, key=lambda file: (file.bytes <= limits.memory, file.rates[stage.size]))


def propose(
    images: ImageSet, stages: Sequence[Stage], cropping: Cropping, side_ratio: float, limits: Limits, quality: int = 90,
    sampling: int = 420,
) -> Choice:  # fmt: skip
    """The files to write for the stages.

    JPEGs have the ``quality`` and ``sampling`` that are wished; where no set of files then keeps up, or fits, lower
    qualities are tried, and the first with the least waiting is taken. Raises ConfigError where nothing fits the disk.
    """
    sizes = sorted({stage.size for stage in stages})
    raw = measured(images, sizes, cropping, side_ratio, limits.cores, quality, sampling, ("raw",))
    choices, smallest = [], None
    for tried in (quality, *(lower for lower in LOWER_QUALITIES if lower < quality)):
        chroma = sampling if tried == quality else 420
        jpegs = measured(images, sizes, cropping, side_ratio, limits.cores, tried, chroma, ("jpg",))
        files = cheapest(stages, raw + jpegs, limits)
        smallest = jpegs[-1]
        if files is None:
            continue
        serves = tuple(serving(stage, files, limits) for stage in stages)
        choices.append(Choice(tuple(stages), files, serves, tried, chroma))
        if choices[-1].keeps_up:
            break
    if not choices:
        raise ConfigError(
            f"--disk-limit: {byte_words(limits.disk)} are too few; side {smallest.side}, which crops of {sizes[-1]} px "
            f"need, takes {byte_words(smallest.bytes)} as JPEG of quality {tried} alone. Raise the limit, or lower "
            "data.side_ratio in the recipe"
        )
    return min(choices, key=lambda choice: round(sum(choice.waits) / WAIT_STEP))  # the best quality of those


# --- what the user sees, and what is written next -------------------------------------------------------------


def described(choice: Choice, limits: Limits, count: int) -> list[str]:
    """The choice in lines, for a terminal and for the plan's head."""
    lines = [
        f"{count:,} images; {limits.cores} cores; the loader is to be {MARGIN} x as fast as the trainer",
        f"{'px':>5} {'epochs':>7} {'trainer':>11} {'loader':>11} {'':>8}  file",
    ]
    for stage, file, wait in zip(choice.stages, choice.serving, choice.waits, strict=True):
        rate = file.rates[stage.size]
        told = f"  waits {100 * wait:.0f} % of its time" if wait else "  little to spare" * (rate < MARGIN * stage.rate)
        told += f"  does not fit in memory ({byte_words(limits.memory)}): read from the disk" * (
            file.bytes > limits.memory
        )
        lines.append(
            f"{stage.size:5} {stage.images / count:7.1f} {stage.rate:9,.0f}/s {rate:9,.0f}/s "
            f"{rate / stage.rate:6.1f} x  {file}{told}"
        )
    jpeg = f", JPEG of quality {choice.quality} and chroma {choice.sampling}" * any(
        f.format == "jpg" for f in choice.files
    )
    largest = max(file.bytes for file in choice.serving)
    files = ", ".join(f"{file} ({byte_words(file.bytes)})" for file in choice.files)
    lines.append(f"{byte_words(choice.bytes)} on disk, of {byte_words(limits.disk)}: {files}{jpeg}")
    lines.append(f"at most {byte_words(largest)} of them at a time in the page cache, of {byte_words(limits.memory)}")
    if not choice.keeps_up:
        lines.append(
            "No set of files keeps the loader that fast: more cores (--cores), a larger --disk-limit or "
            "--memory-limit, or a smaller data.side_ratio in the recipe would."
        )
    return lines


def save_plan(out: str, choice: Choice, lines: Sequence[str], command: str) -> Path:
    """Keeps the choice in the data folder, as options for write_dataset.py, which takes them up by itself."""
    path = Path(out) / PLAN_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "sides": ",".join(str(file) for file in choice.files), "quality": choice.quality, "sampling": choice.sampling,
    }  # fmt: skip
    head = "".join(f"# {line}\n" for line in (f"Made by {command}", *lines))
    path.write_text(head + yaml.safe_dump({"write": options}, sort_keys=False), encoding="utf-8")
    return path
