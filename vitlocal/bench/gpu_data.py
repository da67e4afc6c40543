"""The photos of `bench gpu`, and the data that it trains on. `make gpu` calls the first command, the bench the second.

python -m vitlocal.bench.gpu_data photos FOLDER [SOURCE]          some photos, as small JPEGs
python -m vitlocal.bench.gpu_data files FOLDER PHOTOS TRAIN VAL SIDES   the data, each photo many times
"""

if __name__ == "__main__":  # first, so that signals are handled while PyTorch is imported
    from vitlocal.launch import launch

    launch("bench.gpu_data")

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from vitlocal.bench.gpu import ABOUT
from vitlocal.data.images.pixels import open_image
from vitlocal.data.images.sample import SampleImages
from vitlocal.data.writer.write import write
from vitlocal.errors import ConfigError
from vitlocal.machine import cores
from vitlocal.write_options import WriteOptions

COUNT, LONG_EDGE, MOST_BYTES = 400, 500, 8 * 2**20
QUALITIES = (90, 75, 60, 45, 30)  # tried until the photos fit
CLASSES = 20


def some(paths: Sequence[str]) -> list[str]:
    """COUNT of the photos among ``paths``, from all over the list."""
    photos = sorted(path for path in paths if path.lower().endswith((".jpg", ".jpeg")))
    if not photos:
        raise ConfigError("PHOTOS: expected a folder or a tar with .jpg files, and found none")
    return [photos[number * len(photos) // COUNT] for number in range(COUNT)] if len(photos) > COUNT else photos


def originals(source: str | None) -> Iterator[bytes]:
    """The files of COUNT photos of a folder or a tar; without one, of the built-in sample."""
    if source is None:
        sample = SampleImages("train")
        yield from (sample.read(index) for index in range(COUNT))
    elif Path(source).is_dir():
        for path in some([str(path) for path in Path(source).rglob("*")]):
            yield Path(path).read_bytes()
    else:
        try:
            with tarfile.open(source) as archive:
                for name in some(archive.getnames()):
                    if (file := archive.extractfile(name)) is not None:
                        yield file.read()
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"PHOTOS: '{source}' is neither a folder nor a tar of photos ({error})") from error


def encoded(content: bytes, quality: int, enlarges: bool) -> bytes:
    """A photo with a long edge of LONG_EDGE, or less if it is smaller and not enlarged."""
    image = open_image(content).convert("RGB")
    scale = LONG_EDGE / max(image.size)
    if scale < 1 or enlarges:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def save_photos(folder: Path, source: str | None) -> dict[str, object]:
    """Writes COUNT photos of at most MOST_BYTES in all. Returns what they are, which is also in ABOUT."""
    found, quality = list(originals(source)), None
    photos = found
    for quality in (None, *QUALITIES):  # None: as they are
        if quality is not None or source is None:
            photos = [encoded(photo, quality or QUALITIES[0], enlarges=source is None) for photo in found]
        if sum(map(len, photos)) <= MOST_BYTES:
            break
    else:
        raise ConfigError(f"PHOTOS: {len(photos)} photos take more than {MOST_BYTES >> 20} MiB at quality {quality}")
    folder.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(photos):
        (folder / f"{number:04}.jpg").write_bytes(photo)
    kind = "the user's photos" if source else f"the built-in sample, enlarged to {LONG_EDGE} px"
    about = {"photos": kind, "count": len(photos), "quality": quality, "bytes": sum(map(len, photos))}
    (folder / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")
    return about


def link_photos(photos: Sequence[Path], split: Path, count: int) -> None:
    """Fills a split's class folders with ``count`` links to the photos; symbolic ones on another file system."""
    for number in range(CLASSES):
        (split / f"class_{number:02}").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        name, photo = split / f"class_{number % CLASSES:02}" / f"{number:06}.jpg", photos[number % len(photos)]
        try:
            os.link(photo, name)
        except OSError:
            name.symlink_to(photo)


def write_files(folder: Path, photos: Path, counts: dict[str, int], sides: str) -> None:
    """Writes both splits to ``folder/data``, with fewer threads than cores: other parts run meanwhile."""
    if not photos.exists():
        save_photos(photos, None)
    found = sorted(path.absolute() for path in photos.glob("*.jpg"))
    for split, count in counts.items():
        link_photos(found, folder / "photos" / split, count)
        options = WriteOptions(split, str(folder / "photos"), str(folder / "data"), sides, workers=max(1, cores() // 2))
        write(options, progress=False)


def main(argv: Sequence[str]) -> None:
    match argv:
        case ["photos", folder, *source] if len(source) < 2:
            print(save_photos(Path(folder), source[0] if source and source[0] else None))
        case ["files", folder, photos, train, val, sides]:
            write_files(Path(folder), Path(photos), {"train": int(train), "val": int(val)}, sides)
        case _:
            raise ConfigError(f"got {' '.join(argv) or 'nothing'}, expected:\n{__doc__}")
