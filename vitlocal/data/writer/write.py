"""Images -> the .beton files of a split, in one pass over the source, with a manifest.

Each image is decoded once, by one of several threads, and encoded for every file. The main thread lays the
rows out in the order of the source in files of a hidden folder, beside a journal of what is safely there,
from which the same command goes on after whatever stopped it. A file gets its final name when all are whole.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vitlocal.data.beton import MODES, check_beton, page_size_for
from vitlocal.data.costs import keep_costs
from vitlocal.data.images import ImageSet, open_images
from vitlocal.data.manifest import Manifest, PlannedFile, Skipped, SourceInfo, work_name
from vitlocal.data.writer.encode import Interrupts, Job, encoded, stored_size
from vitlocal.data.writer.journal import Store, byte_words, difference, free_bytes
from vitlocal.errors import ConfigError, DataError
from vitlocal.machine import cores
from vitlocal.write_options import PLAN_NAME, WriteOptions, read_plan

__all__ = ["DEFAULT_FILES", "StoredFile", "WriteConfig", "parse_files", "stored_size", "write", "write_as_asked"]

LARGEST_RAW = 160  # the largest side that `auto` stores raw
LARGEST_SIDE = 16384
QUALITY, SAMPLING = 90, 420  # of JPEG
VAL_SHORT_EDGE = 256  # an evaluation at 224 of 256 needs that many pixels of every photo
FORECAST_IMAGES = 256  # tell how much room the rest will take
REPORT_SECONDS = 10.0  # between lines where there is no terminal


@dataclass(frozen=True, order=True)
class StoredFile:
    """One .beton file to write: its images' long edge is at most ``side``."""

    side: int
    format: str  # "raw" | "jpg"


DEFAULT_FILES = {
    "train": (StoredFile(64, "raw"), StoredFile(160, "raw"), StoredFile(256, "jpg"), StoredFile(400, "jpg")),
    "val": (StoredFile(256, "jpg"),),
}


@dataclass(frozen=True)
class WriteConfig:
    """What ``write`` is asked for."""

    split: str  # "train" | "val"
    source: str | None = None  # spec for open_images
    out: str = "data/imagenet"  # data folder
    files: tuple[StoredFile, ...] = ()  # empty: DEFAULT_FILES of the split
    quality: int = QUALITY  # of JPEG, 1 to 100
    sampling: int = SAMPLING  # of JPEG's chroma: 420 (a quarter of the pixels) or 444 (all)
    workers: int = 0  # threads, 0: one per core
    on_error: str = "stop"  # "stop" | "skip"
    keep_jpegs: bool = True  # those that need not shrink stay as they came


def parse_files(sides: str, format: str = "auto") -> tuple[StoredFile, ...]:
    """The files that ``--sides`` ("64,160,256" or "64:raw,256:jpg") and ``--format`` (raw, jpg, auto) name.

    ``auto`` is raw up to a side of 160, else jpg. No sides at all mean the split's default files: ``()``.
    """
    if format not in (*MODES, "auto"):
        raise ConfigError(f"--format is {format!r}, expected raw, jpg or auto")
    if not sides.strip():
        if format != "auto":
            raise ConfigError(f"--format {format} needs --sides: the default files have formats of their own")
        return ()
    files, used = [], format == "auto"
    for item in sides.split(","):
        side, colon, own = (part.strip() for part in item.partition(":"))
        if not (side.isascii() and side.isdigit() and 1 <= int(side) <= LARGEST_SIDE):
            raise ConfigError(
                f"--sides {sides!r}: {item.strip()!r} is not a side; expected numbers from 1 to "
                f"{LARGEST_SIDE} separated by commas, each with :raw or :jpg if wanted: 64:raw,256:jpg"
            )
        if colon and own not in MODES:
            raise ConfigError(f"--sides {sides!r}: {own!r} is not a format; expected {side}:raw or {side}:jpg")
        used |= not colon
        auto = "raw" if int(side) <= LARGEST_RAW else "jpg"
        files.append(StoredFile(int(side), own or (auto if format == "auto" else format)))
    if not used:
        raise ConfigError(f"--format {format} has no effect: --sides {sides!r} gives every side a format; leave it out")
    if len(set(files)) < len(files):
        raise ConfigError(f"--sides {sides!r} names a file twice; leave one out")
    return tuple(sorted(files))


def write(config: WriteConfig, images: ImageSet | None = None, progress: bool = True) -> Manifest:
    """Writes the split's .beton files and manifest into ``config.out``, or goes on with an interrupted write.

    Returns the manifest; a finished split of the same configuration is left as it is. The bytes written do
    not depend on the number of workers, nor on interruptions. Raises ConfigError for a wrong option or an
    ``out`` that holds something else, DataError for an unreadable image (unless ``on_error`` is "skip"), a
    full disk; after a DataError the same command goes on where it stopped.
    """
    config = _checked(config)
    with Interrupts() as interrupts:
        if images is None:
            images = open_images(config.source, config.split)
        plan = _Plan.of(config, images)
        manifest = finished = _finished(plan)
        if manifest is None:
            with Store(plan.work, plan.files, len(plan.entries), plan.identity) as store:
                if not store.sealed:
                    _fill(store, plan, images, interrupts, progress)
                    store.seal(plan.labels)
                manifest = plan.manifest_of(store)
                store.publish(manifest, plan.manifest_path)
        shutil.rmtree(plan.work, ignore_errors=True)  # also what a kill left of a finished write
    if progress:
        print(_summary(plan.manifest_path, manifest) + (" (already finished)" if finished else ""))
    return manifest


def write_as_asked(options: WriteOptions) -> Manifest:
    """``write_dataset.py``: writes the split by its options, or those that ``--plan`` left in the data folder, and
    measures what the files cost to read."""
    planned = Path(options.out) / PLAN_NAME
    if options.split == "train" and (options.sides, options.format) == ("auto", "auto") and planned.exists():
        options = read_plan(planned, options)
        print(f"as {planned} says (remove it for the default files): {options.sides}")
    sides = "" if options.sides == "auto" else options.sides
    manifest = write(
        WriteConfig(
            options.split, options.source, options.out, parse_files(sides, options.format),
            options.quality or QUALITY, int(options.sampling or SAMPLING), options.workers, options.on_error,
            options.keep_jpegs is not False,
        )
    )  # fmt: skip
    keep_costs(options.out, manifest)
    return manifest


def _fill(store: Store, plan: _Plan, images: ImageSet, interrupts: Interrupts, progress: bool) -> None:
    """Encodes and appends all rows that the store lacks."""
    workers = plan.config.workers or cores()
    forecast_at = store.mark.next + FORECAST_IMAGES
    with (
        _Progress(plan.config.split, store, progress) as shown,
        closing(encoded(images, plan.job, store.mark.next, workers, interrupts)) as chunks,
    ):
        for chunk in chunks:
            store.append(chunk)
            shown.update()
            if chunk.start < forecast_at <= chunk.next < store.length:
                free, needed = free_bytes(plan.out), store.needed or 0
                if needed > free:
                    tqdm.write(
                        f"warning: about {byte_words(needed)} more are needed in {plan.out}, {byte_words(free)} "
                        "are free; make room while this runs, or stop it and choose another --out",
                        file=sys.stderr,
                    )
    if not store.count:
        raise DataError(
            f"none of the {store.length} images of {plan.source.spec} could be read; the first: "
            f"{plan.entries[0]}: {store.skipped[0]}. Check --source, and remove {plan.work}."
        )


# --- what is to be written --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """A checked configuration and the source that it meets."""

    config: WriteConfig
    files: tuple[PlannedFile, ...]
    source: SourceInfo
    classes: tuple[str, ...]
    labels: np.ndarray  # (n,) int64
    entries: tuple[str, ...]

    @classmethod
    def of(cls, config: WriteConfig, images: ImageSet) -> _Plan:
        labels = np.asarray(images.labels, np.int64)
        entries = tuple(images.entry(index) for index in range(len(images)))
        classes = tuple(images.classes)
        if not entries:
            raise DataError(f"the source {images.spec} holds no images for the split {config.split}; check --source")
        if labels.shape != (len(entries),) or labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(
                f"the source {images.spec} has {labels.size} labels from {labels.min()} to {labels.max()}, "
                f"expected {len(entries)} from 0 to {len(classes) - 1}"
            )
        files = tuple(
            PlannedFile(
                file=f"{config.split}_{file.side}_{file.format}.beton",
                side=file.side,
                format=file.format,
                quality=config.quality if file.format == "jpg" else None,
                sampling=config.sampling if file.format == "jpg" else None,
                keep=int(config.keep_jpegs) if file.format == "jpg" else None,
                # A JPEG of noise at full quality can be a little larger than the pixels, hence the spare 64 KiB.
                page_size=page_size_for(3 * max(file.side, _short_edge(config.split)) ** 2 + (1 << 16)),
            )
            for file in config.files
        )
        fingerprint = _digest(entries, 32, b"\n" + labels.tobytes())
        return cls(config, files, SourceInfo(images.spec, len(entries), fingerprint), classes, labels, entries)

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def work(self) -> Path:
        return self.out / work_name(self.config.split)

    @property
    def manifest_path(self) -> Path:
        return self.out / f"{self.config.split}.json"

    @property
    def identity(self) -> dict[str, str]:
        return _identity(self.files, self.source, self.classes)

    @property
    def job(self) -> Job:
        return Job(self.files, _short_edge(self.config.split), self.config.on_error == "skip")

    def manifest_of(self, store: Store) -> Manifest:
        return Manifest(
            split=self.config.split,
            count=store.count,
            classes=self.classes,
            files=store.sealed,
            source=self.source,
            skipped=tuple(Skipped(self.entries[index], reason) for index, reason in store.skipped.items()),
            entries=tuple(entry for index, entry in enumerate(self.entries) if index not in store.skipped),
        )


def _checked(config: WriteConfig) -> WriteConfig:
    if config.split not in DEFAULT_FILES:
        raise ConfigError(f"--split is {config.split!r}, expected train or val")
    if not 1 <= config.quality <= 100:
        raise ConfigError(f"the JPEG quality is {config.quality}, expected 1 to 100")
    if config.sampling not in (420, 444):
        raise ConfigError(f"the JPEG sampling is {config.sampling}, expected 420 or 444")
    if config.workers < 0:
        raise ConfigError(f"--workers is {config.workers}, expected 0 (one per core) or more")
    if config.on_error not in ("stop", "skip"):
        raise ConfigError(f"--on-error is {config.on_error!r}, expected stop or skip")
    files = tuple(sorted(config.files or DEFAULT_FILES[config.split]))
    if len(set(files)) < len(files):
        raise ConfigError(f"the files {files} name one twice; leave it out")
    for file in files:
        if file.format not in MODES or not 1 <= file.side <= LARGEST_SIDE:
            raise ConfigError(f"{file}: expected a format raw or jpg and a side from 1 to {LARGEST_SIDE}")
    return replace(config, files=files)


def _short_edge(split: str) -> int:
    return VAL_SHORT_EDGE if split == "val" else 0


def _digest(names: Sequence[str], length: int, more: bytes = b"") -> str:
    text = "\n".join(names).encode("utf-8", "surrogateescape")  # a file name may be no UTF-8
    return hashlib.sha256(text + more).hexdigest()[:length]


def _identity(files: Sequence[PlannedFile], source: SourceInfo, classes: Sequence[str]) -> dict[str, str]:
    """What must be equal for two writes to give the same files, in words."""
    return {
        "files": ", ".join(
            f"{file.side} {file.format}"
            + (f" of quality {file.quality}" if file.quality else "")
            + (" and sampling 444" if file.sampling == 444 else "")
            + (", all encoded anew" if file.keep == 0 else "")
            for file in files
        ),
        "source": source.spec,
        "images in the source": str(source.length),
        "classes": f"{len(classes)} (digest {_digest(classes, 8)})",
        "names and labels of the source's images (digest)": source.fingerprint,
    }


def _finished(plan: _Plan) -> Manifest | None:
    """The manifest of a finished split of the same configuration; None where there is none yet."""
    if not plan.manifest_path.exists():
        return None
    manifest = Manifest.load(plan.manifest_path)
    paths = [plan.out / file.file for file in manifest.files]
    remedy = f"Remove {' '.join(map(str, (plan.manifest_path, *paths)))} to write it anew, or choose another --out."
    if what := difference(_identity(manifest.files, manifest.source, manifest.classes), plan.identity):
        raise ConfigError(f"{plan.manifest_path} is a finished split of another configuration ({what}). {remedy}")
    for file, path in zip(manifest.files, paths, strict=True):
        try:
            info = check_beton(path, len(manifest.classes))
        except DataError as error:
            raise DataError(f"{error}. They are {' '.join(map(str, (plan.manifest_path, *paths)))}") from None
        if (info.bytes, info.count) != (file.bytes, manifest.count):
            raise DataError(
                f"{path} has {info.bytes} bytes and {info.count} images; {plan.manifest_path} says {file.bytes} "
                f"and {manifest.count}. {remedy}"
            )
    return manifest


# --- what the user sees -----------------------------------------------------------------------------------------------


class _Progress:
    """Shows how far a store has come: by a bar on a terminal; elsewhere, as in a log, by a line now and then."""

    def __init__(self, name: str, store: Store, shown: bool) -> None:
        self.name, self.store, self.first = name, store, store.mark.next
        bar = shown and sys.stderr.isatty()
        self.lines = shown and not bar
        self.bar = tqdm(
            total=store.length, initial=self.first, desc=name, unit=" images", smoothing=0.05, disable=not bar
        )
        self.began = self.said = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self) -> None:
        done, total, size = self.store.mark.next, self.store.length, byte_words(self.store.data_bytes)
        self.bar.set_postfix_str(size, refresh=False)
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if self.lines and (now - self.said >= REPORT_SECONDS or done == total):
            self.said = now
            rate = (done - self.first) / max(now - self.began, 1e-3)
            left = tqdm.format_interval((total - done) / rate).removeprefix("0")
            text = f"{self.name}: {done:,} of {total:,} images, {rate:,.0f} images/s, {left} left, {size}"
            print(text, file=sys.stderr, flush=True)


def _summary(path: Path, manifest: Manifest) -> str:
    files, skipped = len(manifest.files), len(manifest.skipped)
    return (
        f"{path}: {manifest.count:,} images of {len(manifest.classes):,} classes in {files} file{'s' * (files > 1)}, "
        f"{byte_words(sum(file.bytes for file in manifest.files))}"
        + (f"; {skipped:,} could not be read and are skipped, see there" if skipped else "")
    )
