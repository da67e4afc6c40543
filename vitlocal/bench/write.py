"""Writers side by side: python -m vitlocal.bench write [--source FOLDER] [--sides 64:raw,256:jpg] [--workers 1,2]

Each contestant writes all files of a split from the same original images, in a process with one core per worker. They
take turns, round by round. Without --source, the images are the built-in sample, as JPEG files.

    ours         all files in one pass
    ffcv         FFCV's own writer, once for each file
"""

import argparse
import functools
import multiprocessing
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vitlocal.bench.contestants import Turn, started, take_turns
from vitlocal.bench.measurement import progress_bar, text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser, names, numbers
from vitlocal.data.images import ImageSet, open_images
from vitlocal.data.images.classes import SelectedImages
from vitlocal.data.peers import has_extra, missing_extra
from vitlocal.data.writer.write import parse_files, write
from vitlocal.write_options import WriteOptions

SAMPLE_SOURCE, SAMPLE_SPEC = "data/bench/source", "sample:20"
QUALITY = 90
COLUMNS = {
    "writer": ("source", ""), "workers": ("workers", "d"), "images/s": ("images_per_second", ",.0f"),
    "per core": ("per_core", ",.0f"), "spread": ("spread", ".1%"), "MiB": ("rss_mib", "d"),
    "MB": ("megabytes", ",.1f"), "to ffcv": ("to_ffcv", ".2f"),
}  # fmt: skip


class ImageSubset(SelectedImages):
    """``count`` random images of a set, the same each time, in the order of the set."""

    def __init__(self, images: ImageSet, count: int):
        super().__init__(images, np.sort(np.random.default_rng(0).permutation(len(images))[:count]))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """A sample for FFCV's writer."""
        return self.load(index), int(self.labels[index])


def ours(images: ImageSubset, sides: str, workers: int, out: str) -> None:
    write(WriteOptions(out=out, sides=sides, quality=QUALITY, workers=workers), images, progress=False)


def ffcv(images: ImageSubset, sides: str, workers: int, out: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from ffcv import writer as ffcv_writer
            from ffcv.fields import IntField, RGBImageField
        except ImportError as error:
            raise missing_extra("ffcv", error) from error

        ffcv_writer.tqdm = functools.partial(tqdm, disable=True)  # its bars would hide ours

        for side, format in parse_files("train", sides):
            image = RGBImageField(format, max_resolution=side, jpeg_quality=QUALITY)
            fields = {"image": image, "label": IntField()}
            writer = ffcv_writer.DatasetWriter(f"{out}/{side}_{format}.beton", fields, num_workers=workers)
            writer.from_indexed_dataset(images)


WRITERS = {"ours": ours, "ffcv": ffcv}


def writer(name: str, source: str, count: int, sides: str, workers: int, out: str) -> Turn:
    """Opens the images. Returns the function that writes them, measures it, and removes the files."""
    images = ImageSubset(open_images(source, "train"), count)

    def turn() -> tuple[float, dict[str, Any]]:
        folder = tempfile.mkdtemp(dir=out)
        try:
            began = time.perf_counter()
            WRITERS[name](images, sides, workers, folder)
            seconds = time.perf_counter() - began
            written = sum(path.stat().st_size for path in Path(folder).glob("*.beton"))
            return len(images) / seconds, {"megabytes": round(written / 1e6, 1)}
        finally:
            shutil.rmtree(folder)
            for child in multiprocessing.active_children():  # FFCV's writer does not wait for its processes
                child.kill()

    return turn


def sample_source() -> str:
    """The built-in sample as a folder of JPEG files, made if it does not exist."""
    images = open_images(SAMPLE_SPEC, "train")
    for index in range(len(images)):
        path = Path(SAMPLE_SOURCE) / f"{images.entry(index)}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images.read(index))
    return SAMPLE_SOURCE


def compare(source: str, sides: str, names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the measurement, one for each contestant and number of workers."""
    rounds, images = options.rounds, min(options.images, len(open_images(source, "train")))
    rows = []
    turns_in_all = len(options.workers) * (rounds + 1)
    with tempfile.TemporaryDirectory(dir=options.out) as folder, progress_bar(turns_in_all) as bar:
        for threads in options.workers:
            bar.set_description_str(f"workers: {threads}")
            arguments = {name: (name, source, images, sides, threads, folder) for name in names}
            with started(writer, arguments, threads) as contestants:
                turns = dict(zip(names, take_turns(contestants, threads, rounds, (), (), bar), strict=True))
            if "ours" in turns:
                own, peer = (turns.get(name, {}).get("images_per_second") for name in ("ours", "ffcv"))
                turns["ours"]["to_ffcv"] = round(own / peer, 2) if peer else None
            rows += [{"source": name, "files": sides, "images": images, **row} for name, row in turns.items()]
    return rows


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("write", __doc__)
    parser.add_argument("--source", help="original images (default: the built-in sample as JPEG files)")
    parser.add_argument("--out", type=Path, default="data/bench", help="folder for the files, which are removed again")
    parser.add_argument("--sides", default="auto", help="files, in the form of write_dataset.py --sides")
    parser.add_argument("--workers", type=numbers, default="1", help="numbers of workers, such as 1,2 (default: 1)")
    installed = ",".join(name for name in WRITERS if name == "ours" or has_extra(name))
    parser.add_argument("--only", default=installed, help="contestants to run (default: %(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="measured rounds (default: 3)")
    parser.add_argument("--images", type=at_least(1), default=2000, help="maximal images of the source (default: 2000)")
    options = parser.parse_args(argv)
    chosen = names(options.only, list(WRITERS))
    sides = ",".join(f"{side}:{format}" for side, format in parse_files("train", options.sides))
    options.out.mkdir(parents=True, exist_ok=True)
    source = options.source or sample_source()
    rows = compare(source, sides, chosen, options)
    print(text_table(rows, COLUMNS))
    what = "images/s of the writers, all files of a split, each limited to as many cores as workers"
    write_json(options.json, what, rows, quality=QUALITY)
