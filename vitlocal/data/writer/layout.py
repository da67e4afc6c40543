"""Which files to write: measured on the source's own images, for a curriculum, a trainer's speed and a disk.

Some images are encoded at every side and format that could serve, and cut at every size: that gives each file's size
and speed. Of all sets of files, the one is taken that keeps the trainer waiting least; of those, the smallest on disk.

Letters: I stages of the curriculum, C candidates (files that could be written).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from vitlocal.data.beton import ALLOCATION, RAW, data_start, page_size_for
from vitlocal.data.costs import crop_seconds
from vitlocal.data.crops import Cropping
from vitlocal.data.images import ImageSet
from vitlocal.data.manifest import PlannedFile
from vitlocal.data.native import ROW, Encoder, Threads
from vitlocal.data.writer.encode import Job, encode_image
from vitlocal.data.writer.journal import byte_words
from vitlocal.errors import ConfigError, DataError
from vitlocal.machine import cores
from vitlocal.write_options import PLAN_NAME

MARGIN = 1.2  # the loader is to be this much faster than the trainer
LOWER_QUALITIES = (80, 70)  # tried, in this order, where the wished one is too slow or too large
SIDE_STEP = 16  # px, to which candidates' sides are rounded up
IMAGES, ENCODE_SECONDS = 256, 10.0  # as many images of the source, in at most that time
MEASURE_SECONDS = 12.0  # for all files and sizes, in two rounds
TIME_STEP = 1e-4  # of the training time: what counts as a difference in waiting


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
    keep: bool  # JPEGs that need not shrink, as they came

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
        return not any(map(lacking, self.stages, self.serving))


def lacking(stage: Stage, file: Candidate) -> float:
    """Seconds by which reading the stage from the file takes longer than is wanted."""
    return stage.images * max(0.0, 1 / file.rates[stage.size] - 1 / (MARGIN * stage.rate))


# --- what could be written ----------------------------------------------------------------------------------


def measured(
    images: ImageSet, sizes: Sequence[int], cropping: Cropping, side_ratio: float, cores_then: int, quality: int,
    sampling: int, keep: bool = True, formats: Sequence[str] = ("raw", "jpg"),
) -> tuple[Candidate, ...]:  # fmt: skip
    """The candidates for crops of ``sizes`` px, with their sizes and speeds measured on some of ``images``.

    A side is at least ``side_ratio`` x a crop's size, the rule that sources go by. Speeds are those of one core here,
    times ``cores_then`` and what is lost where all cores here work at once.
    """
    sides = sorted({-(-int(np.ceil(size * side_ratio)) // SIDE_STEP) * SIDE_STEP for size in sizes})
    files = tuple(
        PlannedFile("", side, format, quality, sampling, int(keep), page_size_for(3 * side * side + (1 << 16)))
        for side in sides
        for format in formats
    )
    stored = _encoded(images, files)
    good = [[size for size in sizes if file.side >= size * side_ratio - 1e-6] for file in files]
    seconds = MEASURE_SECONDS / 2 / (sum(map(len, good)) + len(files))
    one, all_cores = Threads(1), Threads(cores())
    took: list[dict[int, float]] = [{} for _ in files]
    kept = []  # of a core's speed where all work
    for _ in range(2):  # what disturbs the one round may not be there in the other
        for place, (data, rows) in enumerate(stored):
            for size in good[place]:
                spent = crop_seconds(one, data, rows, size, cropping, seconds)
                took[place][size] = min(spent, took[place].get(size, spent))
            if all_cores.count > 1:
                together = crop_seconds(all_cores, data, rows, good[place][-1], cropping, seconds)
                kept.append(min(1.0, took[place][good[place][-1]] / (together * all_cores.count)))
    one.close()
    all_cores.close()
    cores_worth = cores_then * (float(np.median(kept)) if kept and cores_then > 1 else 1.0)
    return tuple(
        Candidate(
            file.side,
            file.format,
            data_start(len(images)) + int((rows["bytes"].mean() + ALLOCATION.itemsize) * len(images)),
            {size: cores_worth / spent for size, spent in by_size.items()},
        )
        for file, (_, rows), by_size in zip(files, stored, took, strict=True)
    )


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


def serving(stage: Stage, files: Sequence[Candidate]) -> Candidate | None:
    """The file that a source would read at this stage: of those that are good enough, the fastest."""
    return max(
        (file for file in files if stage.size in file.rates), key=lambda file: file.rates[stage.size], default=None
    )


def cheapest(stages: Sequence[Stage], candidates: Sequence[Candidate], limits: Limits) -> tuple[Candidate, ...] | None:
    """The set of files, of those that the disk holds, that is best in this order: the fewest stages read from files
    that the page cache cannot hold; the least time lacking to the wanted speed; the smallest on disk.

    None where every set is larger than the disk. Exact: all sets are gone through, but for those that cannot be better
    than one that is known.
    """
    tick = TIME_STEP * sum(stage.images / stage.rate for stage in stages)
    worst = 2.0 * len(stages) * sum(  # one stage that is read from the disk is worse than all waiting
        max((lacking(stage, file) for file in candidates if stage.size in file.rates), default=0.0) for stage in stages
    ) + 1.0  # fmt: skip

    def costs(stage: Stage, file: Candidate) -> float:
        return lacking(stage, file) + worst * (file.bytes > limits.memory)

    options = [[c for c, file in enumerate(candidates) if stage.size in file.rates] for stage in stages]
    if not all(options):
        return None
    order = sorted(range(len(stages)), key=lambda i: len(options[i]))  # those with the least choice first
    least = [min(costs(stages[i], candidates[c]) for c in options[i]) for i in order]
    rest = [sum(least[place:]) for place in range(len(order) + 1)]  # what the stages from a place on cost at least
    best: tuple[tuple[int, int, int], frozenset[int]] | None = None
    seen: dict[tuple[int, frozenset[int]], float] = {}

    def value(cost: float, chosen: frozenset[int]) -> tuple[int, int, int]:
        return math.ceil(cost / tick - 1e-9), sum(candidates[c].bytes for c in chosen), len(chosen)

    def go_on(place: int, chosen: frozenset[int], cost: float) -> None:
        nonlocal best
        bound = value(cost + rest[place], chosen)
        if (
            bound[1] > limits.disk
            or (best is not None and bound >= best[0])
            or seen.get((place, chosen), math.inf) <= cost
        ):
            return
        seen[place, chosen] = cost
        if place == len(stages):
            files = [candidates[c] for c in chosen]
            read = value(sum(costs(stage, serving(stage, files)) for stage in stages), chosen)  # as a source will
            if best is None or read < best[0]:
                best = read, chosen
            return
        stage = stages[order[place]]
        for c in sorted(options[order[place]], key=lambda c: costs(stage, candidates[c])):
            go_on(place + 1, chosen | {c}, cost + costs(stage, candidates[c]))

    go_on(0, frozenset(), 0.0)
    return None if best is None else tuple(candidates[c] for c in sorted(best[1]))


def propose(
    images: ImageSet, stages: Sequence[Stage], cropping: Cropping, side_ratio: float, limits: Limits, quality: int = 90,
    sampling: int = 420, keep: bool = True,
) -> Choice:  # fmt: skip
    """The files to write for the stages.

    JPEGs have the ``quality`` and ``sampling`` that are wished; where no set of files then keeps up, or fits, lower
    ones are tried, and the first that lacks least is taken. Raises ConfigError where nothing fits the disk.
    """
    sizes = sorted({stage.size for stage in stages})
    tries = [(quality, sampling), *([(quality, 420)] if sampling != 420 else [])]
    tries += [(lower, 420) for lower in LOWER_QUALITIES if lower < quality]
    choices: list[Choice] = []
    raw: tuple[Candidate, ...] = ()
    for number, tried in enumerate(tries):
        formats = ("jpg",) if number else ("raw", "jpg")
        found = measured(images, sizes, cropping, side_ratio, limits.cores, *tried, keep, formats)
        raw = raw or tuple(file for file in found if file.format == "raw")
        jpegs = tuple(file for file in found if file.format == "jpg")
        files = cheapest(stages, raw + jpegs, limits)
        if files is not None:
            serves = tuple(serving(stage, files) for stage in stages)
            choices.append(Choice(tuple(stages), files, serves, *tried, keep))
            if choices[-1].keeps_up:
                return choices[-1]
    if not choices:
        smallest = min((file for file in raw + jpegs if sizes[-1] in file.rates), key=lambda file: file.bytes)
        raise ConfigError(
            f"--disk-limit: {byte_words(limits.disk)} are too few: the smallest file that serves all sizes, {smallest} "
            f"of quality {tried[0]}, takes {byte_words(smallest.bytes)}. Raise the limit, or lower data.side_ratio in "
            "the recipe"
        )
    tick = TIME_STEP * sum(stage.images / stage.rate for stage in stages)
    return min(choices, key=lambda choice: round(sum(map(lacking, choice.stages, choice.serving)) / tick))


# --- what the user sees, and what is written next -------------------------------------------------------------


def described(choice: Choice, limits: Limits, count: int) -> list[str]:
    """The choice in lines, for a terminal and for the plan's head."""
    cores = f"{limits.cores} core{'s' * (limits.cores > 1)}"
    lines = [
        f"{count:,} images; {cores}; the loader is to be {MARGIN} x as fast as the trainer",
        f"{'px':>5} {'epochs':>7} {'trainer':>11} {'loader':>11} {'':>8}  file",
    ]
    for stage, file, wait in zip(choice.stages, choice.serving, choice.waits, strict=True):
        rate = file.rates[stage.size]
        told = f"  waits {100 * wait:.0f} % of its time" if wait else "  little to spare" * (lacking(stage, file) > 0)
        told += f"  does not fit in memory ({byte_words(limits.memory)}): its rate is the disk's" * (
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
            "No set of files keeps the loader that fast. What may help: more cores (--cores), room for raw files "
            "(--disk-limit, --memory-limit), or a smaller data.side_ratio in the recipe."
        )
    return lines


def save_plan(out: str, choice: Choice, lines: Sequence[str], command: str) -> Path:
    """Keeps the choice in the data folder, as options for write_dataset.py, which takes them up by itself."""
    path = Path(out) / PLAN_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "sides": ",".join(str(file) for file in choice.files), "quality": choice.quality, "sampling": choice.sampling,
        "keep_jpegs": choice.keep,
    }  # fmt: skip
    head = "".join(f"# {line}\n" for line in (f"Made by {command}", *lines))
    path.write_text(head + yaml.safe_dump({"write": options}, sort_keys=False), encoding="utf-8")
    return path
