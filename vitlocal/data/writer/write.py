"""Writes the .beton files of a split and its manifest, in one pass over the source.

Threads decode each image once and encode it for every file. The main thread writes the rows in the order of the source
to files in a hidden folder, with a journal of what they safely hold. After an interruption, the same command continues
from the journal. The files get their final names when all are complete.
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vitlocal.data.autoencoder import Autoencoder
from vitlocal.data.beton import LATENT, MappedFile, page_size_for
from vitlocal.data.costs import ensure_costs
from vitlocal.data.fields import LatentForm
from vitlocal.data.images import ImageSet, SourceChoice, open_images
from vitlocal.data.images.classes import read_classes
from vitlocal.data.images.image_set import listed
from vitlocal.data.manifest import CLASSES_NAME, BetonFile, Manifest, Skipped, SourceInfo, work_name
from vitlocal.data.native import Encoder
from vitlocal.data.writer.encode import Chunk, EncodeJob, encode_chunks, encode_image
from vitlocal.data.writer.journal import FIELDS, NO_FIELDS, SourceState, SplitFiles, byte_words, difference
from vitlocal.data.writer.latents import encode_latents
from vitlocal.errors import ConfigError, DataError, UndecodableImage, interrupts, shown
from vitlocal.jsonl import replacing
from vitlocal.machine import cores
from vitlocal.write_options import PLAN_NAME, WriteOptions, read_plan

DEFAULT_SIDES = {"train": "64:raw,160:raw,256:jpg,400:jpg", "val": "256:jpg"}
LATENT_SIDES = "64,128,192,256"  # of both splits
LARGEST_RAW = 160  # the largest side that `auto` stores raw
LARGEST_SIDE = 16384
SHORT_EDGES = {"train": 0, "val": 256}  # px: photos are not shrunk below; val is evaluated at 224 of 256
LONGEST_RUN, LARGEST_SKIPPED = 100, 0.01  # a longer run of skipped images stops, if more than this fraction is skipped
FORECAST_IMAGES = 256  # images before the space for the rest is estimated
REPORT_SECONDS = 10.0  # between lines if there is no terminal
REPORT = "{desc}: {n_fmt} of {total_fmt} images, {rate_fmt}, {remaining} left{postfix}\n"


def parse_files(split: str, sides: str, format: str = "auto") -> tuple[tuple[int, str], ...]:
    """The (side, format) of each file that ``--sides`` ("64,160,256" or "64:raw,256:jpg") and ``--format`` select.

    The format of a side without one is ``format``; ``auto`` is raw up to a side of 160, else jpg. If ``sides`` is
    ``auto``, returns the default files of the split, or those of latents.
    """
    if (sides, format) == ("auto", "latent"):
        sides = LATENT_SIDES
    if sides == "auto" and format != "auto":
        raise ConfigError(f"--format {format} needs --sides, because the default files have their own formats")
    files = []
    for item in (DEFAULT_SIDES[split] if sides == "auto" else sides).split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})\s*(?::\s*(raw|jpg|latent)\s*)?", item)
        if match is None or not 1 <= int(match[1]) <= LARGEST_SIDE:
            raise ConfigError(
                f"--sides {sides!r}: got {item.strip()!r}, expected numbers from 1 to {LARGEST_SIDE} separated by "
                "commas, with an optional :raw, :jpg or :latent: 64:raw,256:jpg"
            )
        usual = "raw" if int(match[1]) <= LARGEST_RAW else "jpg"
        files.append((int(match[1]), match[2] or (usual if format == "auto" else format)))
    if format != "auto" and sides.count(":") == len(files):
        raise ConfigError(
            f"--format {format} has no effect, because --sides {sides!r} gives every side a format; remove it"
        )
    if len(set(files)) < len(files):
        raise ConfigError(f"--sides {sides!r} names a file twice; remove one")
    if len({kind == "latent" for _, kind in files}) > 1:
        raise ConfigError(f"--sides {sides!r} names photos and latents; write them into two folders, with two --out")
    return tuple(sorted(files))


def write(options: WriteOptions, images: ImageSet | None = None, progress: bool = True) -> Manifest:
    """Writes the .beton files and the manifest of a split to ``options.out``, or continues an interrupted write.

    Returns the manifest. A finished split of the same configuration stays as it is. The bytes do not depend on the
    number of workers or on interruptions. Raises ConfigError for wrong sides, or if ``out`` holds something else.
    Raises DataError for a file that cannot be read, an image that does not decode (unless ``on_error`` is "skip") or a
    full disk; the same command then continues where it stopped. Skipped images are tried again each time.
    """
    stored = parse_files(options.split, options.sides, options.format)
    autoencoder = _open_autoencoder(options, stored)
    out = Path(options.out)
    work, manifest_path = out / work_name(options.split), out / f"{options.split}.json"
    with interrupts():  # what is written remains valid at any point, as after a kill
        if images is None:
            images = open_images(options.source, options.split, source_choice(options))
        if progress:
            _describe(images, options.split)
        state = SourceState(images.spec, images.stamps())
        planned = _planned_manifest(options, stored, images, state, autoencoder)
        _require_same_kind(out, planned)
        job = EncodeJob(planned.files, SHORT_EDGES[options.split], options.on_error == "skip")
        decodes = partial(_decodes, images, job)
        replaces = manifest_path.exists()
        unfinished = (work / "journal").exists()  # also of a split that is written again
        manifest = finished = None if unfinished else _finished_manifest(manifest_path, planned, decodes, state)
        if manifest is None:
            identity = _identity(planned)
            with SplitFiles(
                work, planned.files, planned.count, identity, state, decodes, replaces, images.fields, planned.latents
            ) as files:
                if not files.sealed:
                    chunks = encode_chunks(images, job, files.next, options.workers or cores())
                    if autoencoder is not None:
                        chunks = encode_latents(chunks, planned.files, autoencoder, planned.entries)
                    _fill(files, chunks, planned, images, progress)
                    files.seal(np.asarray(images.labels, np.int64))
                skipped = files.skipped
                sizes, times = files.digests
                manifest = replace(
                    planned,
                    source=replace(planned.source, sizes=sizes, times=times),
                    count=files.count,
                    files=files.sealed,
                    skipped=tuple(Skipped(planned.entries[row], reason) for row, reason in skipped.items()),
                    entries=tuple(entry for row, entry in enumerate(planned.entries) if row not in skipped),
                )
                _require_same_kind(out, planned)  # both splits may be written at the same time
                _save_class_names(out, manifest)
                files.publish(manifest, manifest_path)
        elif not (out / CLASSES_NAME).exists():
            _save_class_names(out, manifest)
        shutil.rmtree(work, ignore_errors=True)  # also the remains of a finished write that was killed
    if progress:
        print(_summary(manifest_path, manifest) + (" (already finished)" if finished else ""))
    return manifest


def write_from_options(options: WriteOptions) -> None:
    """``write_dataset.py``: writes the split, with the files that ``--plan`` chose, and measures their costs."""
    layout = Path(options.out) / PLAN_NAME
    if options.split == "train" and (options.sides, options.format) == ("auto", "auto") and layout.exists():
        options = read_plan(layout, options)
        print(f"files as {layout} says (remove it for the default files): {options.sides}")
    ensure_costs(options.out, write(options))


def source_choice(options: WriteOptions) -> SourceChoice:
    """The part of the source that the options select. ConfigError if the file of classes cannot be read."""
    classes = read_classes(options.classes) if options.classes else None
    return SourceChoice(options.image, options.label, options.subset, classes)


def _describe(images: ImageSet, split: str) -> None:
    """Prints what is read and what is not."""
    if images.reads:
        print(f"{split}: reads {shown('; '.join(images.reads))}")
    if images.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in images.left_out.items())
        total = sum(images.left_out.values())
        print(f"{split}: left out {total:,} file{'s' * (total > 1)}: {shown(reasons)}")
    for note in images.notes:
        print(f"{split}: {shown(note)}")


def _open_autoencoder(options: WriteOptions, stored: Sequence[tuple[int, str]]) -> Autoencoder | None:
    """The autoencoder if latents are written. ConfigError if --vae is missing or of no use, or for a wrong side."""
    if stored[0][1] != "latent":
        if options.vae is not None:
            raise ConfigError(f"--vae {options.vae} has no effect on photos; remove it, or add --format latent")
        return None
    if options.vae is None:
        raise ConfigError("--format latent needs the folder of an autoencoder: --vae FOLDER")
    autoencoder = Autoencoder.load(options.vae)
    if wrong := [side for side, _ in stored if side % autoencoder.stride]:
        raise ConfigError(
            f"--sides: latents need multiples of {autoencoder.stride} px, the stride of {options.vae}; got {wrong}"
        )
    return autoencoder


def _require_same_kind(out: Path, planned: Manifest) -> None:
    """Raises ConfigError if the other split in the folder has other classes or latents. A run could not use both."""
    path = out / ("val.json" if planned.split == "train" else "train.json")
    if not path.exists():
        return
    other = Manifest.load(path)
    if other.latents != planned.latents:
        raise ConfigError(
            f"a data folder holds either photos or latents of one autoencoder: {path} is of {_kind(other)}, and this "
            f"split of {_kind(planned)}. Use another --out"
        )
    if (classes := other.classes) != planned.classes:
        raise ConfigError(
            f"{path} and this split must have the same classes in the same order, got {len(classes)} ("
            f"{listed(classes, 3)}) and {len(planned.classes)} ({listed(planned.classes, 3)}). Write both from one "
            f"source with the same --label, --subset and --classes (such as {out / CLASSES_NAME}). If the source has "
            f"other classes now, remove {path} and its files, or use another --out"
        )


def _kind(manifest: Manifest) -> str:
    return "photos" if manifest.latents is None else f"latents of the autoencoder {manifest.latents.autoencoder}"


def _save_class_names(out: Path, manifest: Manifest) -> None:
    with replacing(out / CLASSES_NAME, "wb") as file:  # the name of a folder need not be UTF-8
        file.writelines(f"{name}\n".encode("utf-8", "surrogateescape") for name in manifest.classes)


def _decodes(images: ImageSet, job: EncodeJob, row: int) -> bool:
    """Whether an image that was skipped decodes now. DataError if its file cannot be read."""
    images.release(row)
    try:
        encode_image(images, row, job, Encoder())
    except UndecodableImage:
        return False
    return True


def _fill(
    files: SplitFiles, encoded: Generator[Chunk, None, None], planned: Manifest, images: ImageSet, progress: bool
) -> None:
    """Appends all rows that the files lack, as they are ``encoded``."""
    forecast_at = files.next + FORECAST_IMAGES
    form, seconds = (None, 0.1) if sys.stderr.isatty() else (REPORT, REPORT_SECONDS)
    bar = tqdm(
        total=files.length, initial=files.next, desc=planned.split, unit=" images", smoothing=0.05, bar_format=form,
        mininterval=seconds, disable=not progress,
    )  # fmt: skip
    run = 0  # of skipped rows
    with bar, closing(encoded) as chunks:
        for chunk in chunks:
            for row in range(chunk.start, chunk.next):
                run = run + 1 if row in chunk.skipped else 0
            files.append(chunk)
            if run > LONGEST_RUN and len(files.skipped) > LARGEST_SKIPPED * files.next:
                raise DataError(
                    f"{run} images in a row do not decode, up to {planned.entries[chunk.next - 1]}: "
                    f"{chunk.skipped[chunk.next - 1]}. That is rarely chance. Check the source, and "
                    "remove images that are damaged; the same command tries them again and continues"
                )
            bar.set_postfix_str(byte_words(files.data_bytes), refresh=False)
            bar.update(chunk.next - chunk.start)
            if chunk.start < forecast_at <= chunk.next < files.length:
                free = shutil.disk_usage(files.out).free
                if files.needed > free:
                    tqdm.write(
                        f"warning: about {byte_words(files.needed)} more are needed in {files.out}, {byte_words(free)} "
                        "are free; free some space while this runs, or stop it and use another --out",
                        file=sys.stderr,
                    )
    if not files.count:
        raise DataError(
            f"none of the {files.length} images of {images.spec} could be read; the first: "
            f"{planned.entries[0]}: {files.skipped[0]}. Check --source, and remove {files.work}."
        )


def _planned_manifest(
    options: WriteOptions, stored: Sequence[tuple[int, str]], images: ImageSet, state: SourceState,
    autoencoder: Autoencoder | None,
) -> Manifest:  # fmt: skip
    """The manifest of a write that skips no image. Its files lack what only their bytes tell."""
    labels = np.asarray(images.labels, np.int64)
    entries = tuple(images.entry(index) for index in range(len(images)))
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(images.classes):
        found = f"{labels.min()} to {labels.max()}"
        raise DataError(f"{images.spec} has labels from {found}, expected 0 to {len(images.classes) - 1}")
    latents = None
    if autoencoder is not None:
        facts = autoencoder.channels, autoencoder.stride, autoencoder.scaling_factor, autoencoder.digest
        latents = LatentForm(*facts)
        if LATENT in images.fields:
            raise ConfigError(f"fields: {LATENT!r} is the name of the latents themselves; use another name")
    files = []
    for side, format in stored:
        # A JPEG of noise at full quality can be slightly larger than its pixels, so 64 KiB are added.
        page_size = page_size_for(3 * max(side, SHORT_EDGES[options.split]) ** 2 + (1 << 16))
        quality, sampling, keep = options.jpeg if format == "jpg" else (None, None, None)
        name = f"{options.split}_{side}_{format}.beton"
        files.append(BetonFile(name, side, format, quality, sampling, keep, page_size))
    sizes, times = state.digests()
    source = SourceInfo(
        spec=images.spec,
        length=len(entries),
        fingerprint=_digest(entries, 32, b"\n" + labels.tobytes()),
        sizes=sizes,
        times=times,
        image=options.image,
        label=options.label,
        subset=options.subset,
        classes_chosen=options.classes is not None,
        reads=images.reads,
        left_out=dict(images.left_out),
        fields={name: str(kind) for name, kind in images.fields.items()},
    )
    return Manifest(options.split, len(entries), tuple(images.classes), tuple(files), source, (), entries, latents)


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
        "images in the source": str(manifest.source.length),
        "classes": f"{len(manifest.classes)} (digest {_digest(manifest.classes, 8)})",
        "names and labels of the source's images (digest)": manifest.source.fingerprint,
        FIELDS: ", ".join(f"{name} ({kind})" for name, kind in manifest.source.fields.items()) or NO_FIELDS,
        **({} if manifest.latents is None else {"autoencoder": manifest.latents.autoencoder}),
    }


def _finished_manifest(
    manifest_path: Path, planned: Manifest, decodes: Callable[[int], bool], state: SourceState
) -> Manifest | None:
    """The manifest of a finished split of the same configuration.

    None if it must be written again: a skipped image ``decodes`` now, or a file of the source changed.
    """
    if not manifest_path.exists():
        return None
    manifest = Manifest.load(manifest_path)
    paths = [manifest_path.parent / file.file for file in manifest.files]
    names = " ".join(map(str, (manifest_path, *paths)))
    remedy = f"Remove {names} to write it again, or use another --out."
    was, now = manifest.source, planned.source
    what = difference(_identity(manifest), _identity(planned))
    moved = was.spec != now.spec
    if not what and moved and not was.sizes == now.sizes != "":
        sizes = ", with files of other sizes" if was.sizes and now.sizes else ""
        what = f"source: {was.spec!r} there, {now.spec!r} wanted{sizes}"
    if what:
        raise ConfigError(f"{manifest_path} is a finished split of another configuration ({what}). {remedy}")
    for file, path in zip(manifest.files, paths, strict=True):
        found = MappedFile(path, len(manifest.classes))
        if (len(found.bytes), len(found.rows)) != (file.bytes, manifest.count):
            raise DataError(
                f"{path} has {len(found.bytes)} bytes and {len(found.rows)} images; {manifest_path} says {file.bytes} "
                f"and {manifest.count}. {remedy}"
            )
    skipped = {image.entry for image in manifest.skipped}
    rows = [row for row, entry in enumerate(planned.entries) if entry in skipped and decodes(row)]
    if rows:
        print(
            f"{shown(planned.entries[rows[0]])} was skipped and decodes now ({len(rows)} in all): the split is written "
            "again"
        )
        return None
    if not moved and was.sizes and (was.sizes, was.times) != (now.sizes, now.times):
        newest = "none" if state.stamps is None else planned.entries[int(state.stamps[:, 1].argmax())]
        print(
            f"files of {now.spec} changed since {manifest_path} was written (the newest: {shown(newest)}): "
            "the split is written again"
        )
        return None
    if moved:  # the source is the same, but elsewhere
        manifest = replace(manifest, source=now)
        manifest.save(manifest_path)
    return manifest


def _summary(path: Path, manifest: Manifest) -> str:
    files, skipped, classes = len(manifest.files), len(manifest.skipped), len(manifest.classes)
    damaged = f"; skipped {skipped:,} damaged image{'s' * (skipped > 1)}, which it lists" if skipped else ""
    return (
        f"{path}: {manifest.count:,} images of {classes:,} class{'es' * (classes > 1)} in {files} "
        f"file{'s' * (files > 1)}, {byte_words(sum(file.bytes for file in manifest.files))}{damaged}"
    )
