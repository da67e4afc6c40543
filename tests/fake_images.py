"""Made-up images, and settings of the writer, that tests share."""

from __future__ import annotations

import dataclasses
import gzip
import io
import multiprocessing.pool
import os
import pickle
import signal
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitlocal.data import beton
from vitlocal.data.images import ImageSet, decode_rgb
from vitlocal.data.writer import encode, journal
from vitlocal.data.writer import write as write_module
from vitlocal.errors import DataError, UndecodableImage
from vitlocal.write_options import WriteOptions

SLOW_SECONDS = 60.0  # that a slow image takes
no_longer_slow = threading.Event()  # that ends it
SIDES = "64:raw,96:jpg"


@dataclasses.dataclass
class FakeImages(ImageSet):
    """Smooth noise of varying sizes. ``acts`` maps rows to what happens when they are loaded.

    ``files`` (n, 2) are the bytes and times of its files.
    """

    count: int
    size: tuple[int, int] | None = None  # width, height; None: vary
    acts: dict[int, str] = dataclasses.field(default_factory=dict)
    spec: str = "fake"
    holds_files: bool = False
    classes: tuple[str, ...] = ("ant", "bee", "cow")
    files: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.labels = np.arange(self.count) % 3

    def __len__(self) -> int:
        return self.count

    def stamps(self) -> np.ndarray | None:
        return self.files

    def entry(self, index: int) -> str:
        return f"{self.classes[index % 3]}/{index}.png"

    def load(self, index: int) -> Image.Image:
        act = self.acts.get(index)
        if act == "unreadable":
            raise UndecodableImage(f"{self.entry(index)}: cut off after 12 bytes; restore it")
        if act == "cut off":
            raise OSError("image file is truncated")
        if act == "absent":
            raise DataError(f"{self.entry(index)} cannot be read: Stale file handle")
        if act == "bug":
            raise TypeError("an error of ours")
        if act in ("SIGKILL", "SIGINT", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, act))
        if act == "slow":
            no_longer_slow.wait(SLOW_SECONDS)
        rng = np.random.default_rng(index)
        width, height = self.size or rng.integers(40, 140, 2).tolist()
        noise = rng.integers(0, 256, (8, 8, 3), np.uint8)
        return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def write_config(out: Path, **changes: object) -> WriteOptions:
    return WriteOptions(**{"out": str(out), "sides": SIDES, "quality": 90, "workers": 1, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def finished_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".beton", ".json"))


def commit_often(setattr=setattr) -> None:
    """Commits after every chunk, of a few rows, on pages of 2 MiB."""
    setattr(journal, "COMMIT_SECONDS", 0.0)
    setattr(encode, "CHUNK_BYTES", 60_000)
    setattr(write_module, "page_size_for", lambda largest: beton.page_size_for(largest, 1 << 21))


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rows_of(path: Path) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """The metadata of the images, the labels and the encoded images of a file whose fields are image and label."""
    data = path.read_bytes()
    header = np.frombuffer(data, beton.HEADER, 1)[0]
    count, start = int(header["num_samples"]), beton.HEADER.itemsize + 2 * beton.FIELD.itemsize
    metadata = np.frombuffer(data, beton.metadata_type(), count, start)
    table = np.frombuffer(data, beton.ALLOCATION, count, int(header["alloc_table_ptr"]))
    sizes = dict(zip(table["ptr"].tolist(), table["size"].tolist(), strict=True))
    return metadata["f0"], metadata["f1"], [data[p : p + sizes[p]] for p in metadata["f0"]["data_ptr"].tolist()]


def area_mean(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``pixels`` (rows, columns, 3) shrunk to ``size`` (width, height): the mean of the area under each pixel, int."""
    for axis, length in ((0, size[1]), (1, size[0])):
        count, edges = pixels.shape[axis], np.linspace(0, pixels.shape[axis], length + 1)
        ends = np.minimum(edges[1:, None], np.arange(count) + 1)
        covered = np.clip(ends - np.maximum(edges[:-1, None], np.arange(count)), 0, None) * (length / count)
        pixels = np.moveaxis(np.tensordot(covered, pixels, (1, axis)), 0, axis)
    return np.rint(pixels).astype(int)


def make_photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (9, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode_jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()


def encode_colour(
    colour: object = (200, 30, 60), mode: str = "RGB", format: str = "PNG", size=(12, 8), **options
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format, **options)
    return buffer.getvalue()


def colour_of(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((0, 0))


def check_set(source: ImageSet, spec: str) -> None:
    """Checks what every image set guarantees."""
    assert isinstance(source, ImageSet)
    assert source.spec == spec
    assert source.labels.dtype == np.int64 and source.labels.shape == (len(source),)
    assert 0 <= source.labels.min() and source.labels.max() < len(source.classes)
    assert len({source.entry(i) for i in range(len(source))}) == len(source)
    for i in (0, len(source) - 1):
        loaded = source.load(i)
        assert loaded.mode == "RGB"
        assert np.array_equal(loaded, decode_rgb(source.read(i), source.entry(i)))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(1) == source.read(1) and copy.entry(1) == source.entry(1)
    with pytest.raises(IndexError):
        source.read(len(source))


WNIDS = ("n01440764", "n01443537", "n02084071")


def photo(k: int) -> bytes:
    """A JPEG whose colour identifies its row."""
    return encode_colour((k * 7 % 256, k * 31 % 256, k * 3 % 256), format="JPEG", quality=95)


def read_in_child(source: ImageSet, index: int) -> bytes:
    return source.read(index)


def make_folder(root: Path, split: str = "train", per_class: int = 3, classes=WNIDS) -> None:
    for label, wnid in enumerate(classes):
        folder = root / split / wnid
        folder.mkdir(parents=True)
        for k in range(per_class):
            (folder / f"{wnid}_{k}.JPEG").write_bytes(photo(label * per_class + k))


def fork_pool() -> multiprocessing.pool.Pool:
    with warnings.catch_warnings():  # Python 3.12 warns of forks in a process with threads
        warnings.simplefilter("ignore", DeprecationWarning)
        return multiprocessing.get_context("fork").Pool(2)


def tar_of(files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def make_tars(root: Path, per_class: int = 3, val: int = 6) -> list[str]:
    """Writes both tars and the devkit as image-net.org gives them, small; returns the val images' wnids."""
    root.mkdir(exist_ok=True)
    inner = {
        # neither classes nor images in order, as in the real one
        f"{wnid}.tar": tar_of({f"{wnid}_{k}.JPEG": photo(label * per_class + k) for k in reversed(range(per_class))})
        for label, wnid in reversed(list(enumerate(WNIDS)))
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    names = [f"ILSVRC2012_val_{k + 1:08}.JPEG" for k in range(val)]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of({name: photo(100 + k) for k, name in enumerate(names)}))
    return make_devkit(root, val)


def make_devkit(root: Path, val: int = 6) -> list[str]:
    """Writes the devkit of ``val`` validation images; returns their wnids."""
    scipy_io = pytest.importorskip("scipy.io")
    identities = {1: WNIDS[2], 2: WNIDS[0], 3: WNIDS[1]}  # the devkit's numbers are not in the order of wnids
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, f"word {number}", "gloss", 0) for number, wnid in identities.items()]
    rows.append((4, "n00001740", "entity", "gloss", 3))  # an inner node
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": np.array(rows, kind).reshape(-1, 1)})
    truth = [1 + k % 3 for k in range(val)]
    devkit = {
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{k}\n" for k in truth).encode(),
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/readme.txt": b"read me",
    }
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_of(devkit)))
    return [identities[number] for number in truth]
