"""Writes the .beton files of a split and its manifest, in one pass over the source.

Threads decode each image once and encode it for every file. The main thread writes the rows in the order of the source
to files in a hidden folder, with a journal of what they safely hold. After an interruption, the same command continues
from the journal. The files get their final names when all are complete.
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
from vitlocal.data.costs import ensure_costs
from vitlocal.data.images import ImageSet, open_images
from vitlocal.data.manifest import BetonFile, Manifest, Skipped, SourceInfo, work_name
from vitlocal.data.writer.encode import EncodeJob, Interrupts, encode_chunks
from vitlocal.data.writer.journal import SplitFiles, byte_words, difference, free_bytes
from vitlocal.errors import ConfigError, DataError
from vitlocal.machine import cores
from vitlocal.write_options import PLAN_NAME, WriteOptions, read_plan

LARGEST_RAW = 160  # the largest side that `auto` stores raw
LARGEST_SIDE = 16384
QUALITY, SAMPLING = 90, 420  # of JPEG
SHORT_EDGES = {"train": 0, "val": 256}  # px: photos are not shrunk below; val is evaluated at 224 of 256
FORECAST_IMAGES = 256  # images before the space for the rest is estimated
REPORT_SECONDS = 10.0  # between lines if there is no terminal


@dataclass(frozen=True, order=True)
class StoredFile:
    """A .beton file to write. The long edge of its images is at most ``side`` px."""

    side: int
    format: str  # "raw" | "jpg"


DEFAULT_FILES = {
    "train": (StoredFile(64, "raw"), StoredFile(160, "raw"), StoredFile(256, "jpg"), StoredFile(400, "jpg")),
    "val": (StoredFile(256, "jpg"),),
}


@dataclass(frozen=True)
class WriteConfig:
    """The options of ``write``."""

    split: str  # "train" | "val"
    source: str | None = None  # spec for open_images
    out: str = "data/imagenet"  # data folder
    files: tuple[StoredFile, ...] = ()  # empty: DEFAULT_FILES of the split
    quality: int = QUALITY  # JPEG quality, 1 to 100
    sampling: int = SAMPLING  # JPEG chroma sampling: 420 (a quarter of the pixels) or 444 (all)
    workers: int = 0  # threads; 0: one for each core
    on_error: str = "stop"  # "stop" | "skip"
    keep_jpegs: bool = True  # JPEGs that need not shrink are stored unchanged


def parse_files(sides: str, format: str = "auto") -> tuple[StoredFile, ...]:
    """The files that ``--sides`` ("64,160,256" or "64:raw,256:jpg") and ``--format`` (raw, jpg, auto) select.

    ``auto`` is raw up to a side of 160, else jpg. Without sides, returns () for the default files of the split.
    """
    if format not in (*MODES, "auto"):
        raise ConfigError(f"--format is {format!r}, expected raw, jpg or auto")
    if not sides.strip():
        if format != "auto":
            raise ConfigError(f"--format {format} needs --sides, because the default files have their own formats")
        return ()
    files, used = [], format == "auto"
    for item in sides.split(","):
        side, colon, own = (part.strip() for part in item.partition(":"))
        if not (side.isascii() and side.isdigit() and 1 <= int(side) <= LARGEST_SIDE):
            raise ConfigError(
                f"--sides {sides!r}: {item.strip()!r} is not a side; expected numbers from 1 to "
                f"{LARGEST_SIDE} separated by commas, with an optional :raw or :jpg: 64:raw,256:jpg"
            )
        if colon and own not in MODES:
            raise ConfigError(f"--sides {sides!r}: {own!r} is not a format; expected {side}:raw or {side}:jpg")
        used |= not colon
        auto = "raw" if int(side) <= LARGEST_RAW else "jpg"
        files.append(StoredFile(int(side), own or (auto if format == "auto" else format)))
    if not used:
        raise ConfigError(
            f"--format {format} has no effect, because --sides {sides!r} gives every side a format; remove it"
        )
    if len(set(files)) < len(files):
        raise ConfigError(f"--sides {sides!r} names a file twice; remove one")
    return tuple(sorted(files))


def write(config: WriteConfig, images: ImageSet | None = None, progress: bool = True) -> Manifest:
    """Writes the .beton files and the manifest of a split to ``config.out``, or continues an interrupted write.

    Returns the manifest. A finished split of the same configuration stays as it is. The bytes do not depend on the
    number of workers or on interruptions. Raises ConfigError for a wrong option, or if ``out`` holds something else.
    Raises DataError for an unreadable image (unless ``on_error`` is "skip") or a full disk; the same command then
    continues where it stopped.
    """
    config = _checked(config)
    out = Path(config.out)
    work, manifest_path = out / work_name(config.split), out / f"{config.split}.json"
    with Interrupts() as interrupts:
        images = images if images is not None else open_images(config.source, config.split)
        planned = _planned_manifest(config, images)
        manifest = finished = _finished_manifest(manifest_path, planned)
        if manifest is None:
            job = EncodeJob(planned.files, SHORT_EDGES[config.split], config.on_error == "skip")
            with SplitFiles(work, planned.files, planned.count, _identity(planned)) as files:
                if not files.sealed:
                    _fill(files, job, planned, images, config.workers or cores(), interrupts, progress)
                    files.seal(np.asarray(images.labels, np.int64))
                manifest = replace(
                    planned,
                    count=files.count,
                    files=files.sealed,
                    skipped=tuple(Skipped(planned.entries[row], reason) for row, reason in files.skipped.items()),
                    entries=tuple(entry for row, entry in enumerate(planned.entries) if row not in files.skipped),
                )
                files.publish(manifest, manifest_path)
        shutil.rmtree(work, ignore_errors=True)  # also the remains of a finished write that was killed
    if progress:
        print(_summary(manifest_path, manifest) + (" (already finished)" if finished else ""))
    return manifest


def write_from_options(options: WriteOptions) -> Manifest:
    """``write_dataset.py``: writes the split, with the files that ``--plan`` chose, and measures their costs."""
    layout = Path(options.out) / PLAN_NAME
    if options.split == "train" and (options.sides, options.format) == ("auto", "auto") and layout.exists():
        options = read_plan(layout, options)
        print(f"files as {layout} says (remove it for the default files): {options.sides}")
    sides = "" if options.sides == "auto" else options.sides
    manifest = write(
        WriteConfig(
            options.split, options.source, options.out, parse_files(sides, options.format),
            options.quality or QUALITY, int(options.sampling or SAMPLING), options.workers, options.on_error,
            options.keep_jpegs is not False,
        )
    )  # fmt: skip
    ensure_costs(options.out, manifest)
    return manifest


def _fill(
    files: SplitFiles, job: EncodeJob, planned: Manifest, images: ImageSet, workers: int, interrupts: Interrupts,
    progress: bool,
) -> None:  # fmt: skip
    """Encodes and appends all rows that the files lack."""
    forecast_at = files.mark.next + FORECAST_IMAGES
    display = _ProgressDisplay(planned.split, files, progress)
    with display.bar, closing(encode_chunks(images, job, files.mark.next, workers, interrupts)) as chunks:
        for chunk in chunks:
            files.append(chunk)
            display.update()
            if chunk.start < forecast_at <= chunk.next < files.length:
                free, needed = free_bytes(files.out), files.needed or 0
                if needed > free:
                    tqdm.write(
                        f"warning: about {byte_words(needed)} more are needed in {files.out}, {byte_words(free)} "
                        "are free; free some space while this runs, or stop it and use another --out",
                        file=sys.stderr,
                    )
    if not files.count:
        raise DataError(
            f"none of the {files.length} images of {images.spec} could be read; the first: "
            f"{planned.entries[0]}: {files.skipped[0]}. Check --source, and remove {files.work}."
        )


def _planned_manifest(config: WriteConfig, images: ImageSet) -> Manifest:
    """The manifest of a write that skips no image. Its files lack what only their bytes tell."""
    labels = np.asarray(images.labels, np.int64)
    entries = tuple(images.entry(index) for index in range(len(images)))
    classes = tuple(images.classes)
    if not entries:
        raise DataError(f"the source {images.spec} has no images for the split {config.split}; check --source")
    if labels.shape != (len(entries),) or labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(
            f"the source {images.spec} has {labels.size} labels from {labels.min()} to {labels.max()}, "
            f"expected {len(entries)} from 0 to {len(classes) - 1}"
        )
    files = []
    for file in config.files:
        # A JPEG of noise at full quality can be slightly larger than its pixels, so 64 KiB are added.
        page_size = page_size_for(3 * max(file.side, SHORT_EDGES[config.split]) ** 2 + (1 << 16))
        jpeg = file.format == "jpg"
        quality, sampling = (config.quality, config.sampling) if jpeg else (None, None)
        keep = int(config.keep_jpegs) if jpeg else None
        name = f"{config.split}_{file.side}_{file.format}.beton"
        files.append(BetonFile(name, file.side, file.format, quality, sampling, keep, page_size))
    source = SourceInfo(images.spec, len(entries), _digest(entries, 32, b"\n" + labels.tobytes()))
    return Manifest(config.split, len(entries), classes, tuple(files), source, (), entries)


def _checked(config: WriteConfig) -> WriteConfig:
    if config.split not in DEFAULT_FILES:
        raise ConfigError(f"--split is {config.split!r}, expected train or val")
    if not 1 <= config.quality <= 100:
        raise ConfigError(f"the JPEG quality is {config.quality}, expected 1 to 100")
    if config.sampling not in (420, 444):
        raise ConfigError(f"the JPEG sampling is {config.sampling}, expected 420 or 444")
    if config.workers < 0:
        raise ConfigError(f"--workers is {config.workers}, expected 0 (one for each core) or more")
    if config.on_error not in ("stop", "skip"):
        raise ConfigError(f"--on-error is {config.on_error!r}, expected stop or skip")
    files = tuple(sorted(config.files or DEFAULT_FILES[config.split]))
    if len(set(files)) < len(files):
        raise ConfigError(f"the files {files} contain a duplicate; remove it")
    for file in files:
        if file.format not in MODES or not 1 <= file.side <= LARGEST_SIDE:
            raise ConfigError(f"{file}: expected a format raw or jpg and a side from 1 to {LARGEST_SIDE}")
    return replace(config, files=files)


def _digest(names: Sequence[str], length: int, more: bytes = b"") -> str:
    text = "\n".join(names).encode("utf-8", "surrogateescape")  # a file name need not be UTF-8
    return hashlib.sha256(text + more).hexdigest()[:length]


def _identity(manifest: Manifest) -> dict[str, str]:
    """The properties that two writes with equal files share, in words."""
    return {
        "files": ", ".join(
            f"{file.side} {file.format}"
            + (f" of quality {file.quality}" if file.quality else "")
            + (" and sampling 444" if file.sampling == 444 else "")
            + (", all encoded again" if file.keep == 0 else "")
            for file in manifest.files
        ),
        "source": manifest.source.spec,
        "images in the source": str(manifest.source.length),
        "classes": f"{len(manifest.classes)} (digest {_digest(manifest.classes, 8)})",
        "names and labels of the source's images (digest)": manifest.source.fingerprint,
    }


def _finished_manifest(manifest_path: Path, planned: Manifest) -> Manifest | None:
    """The manifest of a finished split of the same configuration, if there is one."""
    if not manifest_path.exists():
        return None
    manifest = Manifest.load(manifest_path)
    paths = [manifest_path.parent / file.file for file in manifest.files]
    names = " ".join(map(str, (manifest_path, *paths)))
    remedy = f"Remove {names} to write it again, or use another --out."
    if what := difference(_identity(manifest), _identity(planned)):
        raise ConfigError(f"{manifest_path} is a finished split of another configuration ({what}). {remedy}")
    for file, path in zip(manifest.files, paths, strict=True):
        try:
            info = check_beton(path, len(manifest.classes))
        except DataError as error:
            raise DataError(f"{error}. They are {names}") from None
        if (info.bytes, info.count) != (file.bytes, manifest.count):
            raise DataError(
                f"{path} has {info.bytes} bytes and {info.count} images; {manifest_path} says {file.bytes} "
                f"and {manifest.count}. {remedy}"
            )
    return manifest


# --- the display ---


class _ProgressDisplay:
    """Shows the progress of a write: a bar on a terminal, else a line now and then."""

    def __init__(self, name: str, files: SplitFiles, shown: bool) -> None:
        self.name, self.files, self.first = name, files, files.mark.next
        bar = shown and sys.stderr.isatty()
        self.lines = shown and not bar
        self.bar = tqdm(
            total=files.length, initial=self.first, desc=name, unit=" images", smoothing=0.05, disable=not bar
        )
        self.began = self.reported = time.monotonic()

    def update(self) -> None:
        done, total, size = self.files.mark.next, self.files.length, byte_words(self.files.data_bytes)
        self.bar.set_postfix_str(size, refresh=False)
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if self.lines and (now - self.reported >= REPORT_SECONDS or done == total):
            self.reported = now
            rate = (done - self.first) / max(now - self.began, 1e-3)
            left = tqdm.format_interval((total - done) / rate).removeprefix("0")
            text = f"{self.name}: {done:,} of {total:,} images, {rate:,.0f} images/s, {left} left, {size}"
            print(text, file=sys.stderr, flush=True)


def _summary(path: Path, manifest: Manifest) -> str:
    files, skipped = len(manifest.files), len(manifest.skipped)
    return (
        f"{path}: {manifest.count:,} images of {len(manifest.classes):,} classes in {files} file{'s' * (files > 1)}, "
        f"{byte_words(sum(file.bytes for file in manifest.files))}"
        + (f"; skipped {skipped:,} unreadable images, which it lists" if skipped else "")
    )
