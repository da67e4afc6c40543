"""Writers side by side: python -m vitlocal.bench write [--source FOLDER] [--sides 64:raw,256:jpg] [--workers 1,2]

Each contestant writes all files of a split from the same original images, in a process that is limited to as many
cores as it has workers. They take turns, round by round. Without --source: the built-in sample, as JPEG files.

    ours         all files in one pass
    ffcv         FFCV's own writer, once for each file
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitlocal.bench.contestants import Contestant, PeakMemory, TurnDisplay, closing_all, cores_for, rates_row
from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.parsing import names, numbers, plot_file
from vitlocal.data.images import ImageSet, open_images
from vitlocal.data.writer.write import DEFAULT_FILES, StoredFile, WriteConfig, parse_files, write
from vitlocal.errors import ConfigError
from vitlocal.report.figures import save

SAMPLE_SOURCE = "data/bench/source"
SAMPLE_PER_CLASS = 20
ROUNDS = 3
IMAGES = 2000  # maximal images of the source
QUALITY = 90


class ImageSubset:
    """``count`` random images of a set, the same each time, in the order of the set."""

    def __init__(self, images: ImageSet, count: int):
        import numpy as np

        self.images, self.order = images, np.sort(np.random.default_rng(0).permutation(len(images))[:count])
        self.spec, self.classes, self.holds_files = images.spec, images.classes, images.holds_files
        self.labels = np.asarray(images.labels)[self.order]

    def __len__(self) -> int:
        return len(self.order)

    def entry(self, index: int) -> str:
        return self.images.entry(int(self.order[index]))

    def read(self, index: int) -> bytes:
        return self.images.read(int(self.order[index]))

    def load(self, index: int) -> Any:
        return self.images.load(int(self.order[index]))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """A sample for FFCV's writer."""
        return self.load(index), int(self.labels[index])


# --- in the processes of the contestants ---


def ours(images: ImageSubset, files: Sequence[StoredFile], workers: int, out: str) -> None:
    write(WriteConfig("train", None, out, tuple(files), QUALITY, workers=workers), images, progress=False)


def ffcv(images: ImageSubset, files: Sequence[StoredFile], workers: int, out: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ffcv import writer as ffcv_writer
        from ffcv.fields import IntField, RGBImageField

        ffcv_writer.tqdm = functools.partial(tqdm, disable=True)  # its bars would hide ours

        for file in files:
            image = RGBImageField(file.format, max_resolution=file.side, jpeg_quality=QUALITY)
            fields = {"image": image, "label": IntField()}
            writer = ffcv_writer.DatasetWriter(f"{out}/{file.side}_{file.format}.beton", fields, num_workers=workers)
            writer.from_indexed_dataset(images)


WRITERS = {"ours": ours, "ffcv": ffcv}


def writer(name: str, source: str, count: int, files: Sequence[StoredFile], workers: int, out: str) -> Callable:
    images = ImageSubset(open_images(source, "train"), count)

    def turn() -> tuple[float, int]:
        """Images/s, and bytes written."""
        folder = tempfile.mkdtemp(dir=out)
        try:
            began = time.perf_counter()
            WRITERS[name](images, files, workers, folder)
            seconds = time.perf_counter() - began
            return len(images) / seconds, sum(path.stat().st_size for path in Path(folder).glob("*.beton"))
        finally:
            shutil.rmtree(folder)
            for child in multiprocessing.active_children():  # FFCV's writer does not wait for its processes
                child.kill()

    return turn


# --- in the process of the bench ---


def sample_source() -> str:
    """The built-in sample as a folder of JPEG files, made if it does not exist."""
    folder = Path(SAMPLE_SOURCE)
    images = open_images(f"sample:{SAMPLE_PER_CLASS}", "train")
    for index in range(len(images)):
        path = folder / f"{images.entry(index)}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images.read(index))
    return str(folder)


def compare(
    source: str, out: str, files: Sequence[StoredFile], workers: Sequence[int], names: Sequence[str], rounds: int,
    count: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the measurement, one for each contestant and number of workers."""
    images = min(count, len(open_images(source, "train")))
    rows, display = [], TurnDisplay(len(workers) * (rounds + 1))
    with tempfile.TemporaryDirectory(dir=out) as folder:
        for threads in workers:
            cores, contestants = cores_for(threads), list[Contestant]()
            with closing_all(contestants):
                for name in names:
                    arguments = (name, source, count, tuple(files), threads, folder)
                    contestants.append(Contestant(name, writer, arguments, cores))
                rates: dict[str, list[float]] = {name: [] for name in names}
                memory, written = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
                for number in range(rounds + 1):  # the first round warms up and does not count
                    for contestant in contestants:
                        name = contestant.name
                        with PeakMemory(contestant) as peak:
                            rate, written[name] = contestant.ask()
                        memory[name] = max(memory[name], peak.mib)
                        if number:
                            rates[contestant.name].append(rate)
                    display.step(f"{threads} worker{'s' * (threads > 1)}")
                for name in names:
                    rows.append({
                        "source": name, "files": ",".join(f"{file.side}:{file.format}" for file in files),
                        "images": images, **rates_row(rates[name], threads), "rss_mib": round(memory[name]),
                        "megabytes": round(written[name] / 1e6, 1),
                    })  # fmt: skip
    display.close()
    for row in rows:
        if row["source"] == "ours":
            other = [r["images_per_second"] for r in rows if (r["source"], r["workers"]) == ("ffcv", row["workers"])]
            row["to_ffcv"] = round(row["images_per_second"] / other[0], 2) if other else None
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'writer':8} {'workers':>7} {'images/s':>9} {'per core':>8} {'spread':>7} {'MiB':>6} {'MB':>8} {'to ffcv':>8}"
    ]
    for row in sorted(rows, key=lambda r: (r["workers"], r["source"] != "ours")):
        to = f"{row['to_ffcv']:.2f} x" if row.get("to_ffcv") else ""
        lines.append(
            f"{row['source']:8} {row['workers']:7} {row['images_per_second']:9,.0f} {row['per_core']:8,.0f} "
            f"{100 * row['spread']:5.1f} % {row['rss_mib']:6} {row['megabytes']:8,.1f} {to:>8}"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots images/s of the writers, with a group of bars for each number of workers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    workers, names = sorted({row["workers"] for row in rows}), list(dict.fromkeys(row["source"] for row in rows))
    for place, name in enumerate(names):
        rates = [
            next(r["images_per_second"] for r in rows if (r["source"], r["workers"]) == (name, w)) for w in workers
        ]
        bars = axes.bar([i + 0.8 * (place + 0.5) / len(names) - 0.4 for i in range(len(workers))], rates,
                        0.8 / len(names), label=name)  # fmt: skip
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=2)
    axes.set_xticks(range(len(workers)), [f"{count} worker{'s' * (count > 1)}" for count in workers])
    axes.set_ylabel(f"images/s, {rows[0]['files']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vitlocal.bench write", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--source", help="original images; default: the built-in sample as JPEG files")
    parser.add_argument("--out", default="data/bench", help="folder for the files, which are removed again")
    parser.add_argument("--sides", default="auto", help="files, in the form of write_dataset.py --sides")
    parser.add_argument("--workers", default="1", help="numbers of workers, for example 1,2")
    parser.add_argument("--only", default=",".join(WRITERS), help="contestants to run")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measured rounds")
    parser.add_argument("--images", type=int, default=IMAGES, help="maximal images of the source")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", type=plot_file, metavar="FILE")
    options = parser.parse_args(argv)
    if options.images < 1 or options.rounds < 1:
        raise ConfigError(f"--images {options.images} --rounds {options.rounds}: expected at least 1 of each")
    chosen = names(options.only, list(WRITERS))
    files = parse_files("" if options.sides == "auto" else options.sides) or DEFAULT_FILES["train"]
    source = options.source or sample_source()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    rows = compare(
        source, options.out, files, numbers(options.workers, "--workers"), chosen, options.rounds, options.images
    )
    print(table(rows))
    if options.json:
        what = "images/s of the writers, all files of a split, each limited to as many cores as workers"
        write_json(options.json, measurement(what, rows, quality=QUALITY))
    if options.plot:
        draw(rows, options.plot)
