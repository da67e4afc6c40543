"""Loaders side by side: python -m vitlocal.bench loader [--data FOLDER] [--source FOLDER] [--sizes 32,96,224]

Each contestant has its own process, with one core per worker. They take turns, size by size and round by round, so that
other work on the machine affects all of them equally. All make random resized crops with flips.

    ours         each .beton file through the native loader; a * marks the file that the loader itself would choose
    labels       the same with the soft labels of the folder, of seed 0 and default crops; only if --only names it
    ffcv         the same files through FFCV's own loader, with its random crop and its flip
    torchvision  the original images through PyTorch's DataLoader and Pillow
    dali         the original images through NVIDIA DALI on the CPU, if it is installed

Of a folder of latents, our source is measured, at the sizes that the folder has.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vitlocal.bench.contestants import Turn, started, take_turns
from vitlocal.bench.measurement import PlottedLine, plot_lines, progress_bar, text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser, names, numbers, plot_file
from vitlocal.data.batch import Source
from vitlocal.data.beton_source import choose_file
from vitlocal.data.costs import DecodingCosts, ensure_costs
from vitlocal.data.crops import ROW_MASK, CropPolicy
from vitlocal.data.latents import LatentSource
from vitlocal.data.loader import Loader
from vitlocal.data.manifest import load_manifest
from vitlocal.data.peers import EXTRAS, has_extra
from vitlocal.data.peers.torchvision import TorchvisionSource
from vitlocal.data.reader import LoaderResources
from vitlocal.data.soft_labels import SoftLabels
from vitlocal.data.writer.write import write
from vitlocal.errors import ConfigError
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.write_options import WriteOptions

SAMPLE_FOLDER = "data/bench"
BATCH = 64
ORIGINAL = "original"  # the column `stored` of the loaders of original images
LATENTS = "latents"  # the column `stored` of latents
SIZES = (32, 64, 96, 128, 160, 192, 224)
NAMES, OF_ORIGINALS = ("ours", "ffcv", "torchvision", "dali", "labels"), ("torchvision", "dali")
COLUMNS = {
    "px": ("size", "d"), "workers": ("workers", "d"), "source": ("source", ""), "stored": ("stored", ""),
    "images/s": ("images_per_second", ",.0f"), "spread": ("spread", ".1%"), "MiB": ("rss_mib", "d"),
    **{f"to {name}": (f"to_{name}", ".2f") for name in NAMES[1:]},
}  # fmt: skip


def reader(name: str, data: str, source: str | None, stored: str, workers: int, images: int) -> Turn:
    """Opens a loader. Returns the function that measures it at a crop size, in passes of at most ``images``."""
    crops, device = CropPolicy(random=True), torch.device("cpu")
    opened: Source
    if name == "dali":
        from vitlocal.data.peers.dali import DALISource

        opened = DALISource(data, source, "train", crops, device, workers)
    elif name == "torchvision":
        opened = TorchvisionSource(data, source, "train", crops, device, workers)
    elif stored == LATENTS:
        opened = LatentSource(data, "train", crops, device, LoaderResources(workers))
    elif name in ("ours", "labels"):
        opened = Loader(data, "train", BATCH, file=stored, num_workers=workers, drop_last=False)
        if name == "labels":
            opened.use_soft_labels(SoftLabels(data, opened.manifest, opened.crops))
    else:  # FFCV's own iterator: our source around it would make it 5 % slower
        from vitlocal.data.peers.ffcv import FileLoader

        loader, count = FileLoader(Path(data) / stored, crops, device, workers), load_manifest(data, "train").count
        rows = crops.draws(count, 0, max(0, count - images)) & ROW_MASK

    def turn(size: int, seconds: float) -> tuple[float, dict[str, Any]]:
        read, spent, began = 0, 0.0, time.perf_counter()
        while not read or spent < seconds:  # complete passes only
            if name == "ffcv":
                read += sum(len(pixels) for pixels, _ in loader.start(rows, BATCH, size))
            elif isinstance(opened, Loader):
                opened.set_size(size)
                opened.position = Position(0, max(0, opened.count - images))
                read += sum(len(pixels) for pixels, _ in opened)
            else:
                with opened.open(Feed(size, BATCH), Position(0, max(0, opened.count - images))) as batches:
                    read += sum(map(len, batches))
            spent = time.perf_counter() - began
        return read / spent, {}

    return turn


def sample_folder() -> str:
    """The built-in sample in the default files of ImageNet, written if it does not exist."""
    if not (Path(SAMPLE_FOLDER) / "train.json").exists():
        ensure_costs(SAMPLE_FOLDER, write(WriteOptions(source="sample:20", out=SAMPLE_FOLDER)))
    return SAMPLE_FOLDER


def compare(data: str, names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the measurement, one for each contestant and size."""
    manifest, crops, rounds, rows = load_manifest(data, "train"), CropPolicy(random=True), options.rounds, []
    costs = DecodingCosts.load(data, manifest)
    files, sizes = [file.file for file in manifest.files], options.sizes or SIZES
    if manifest.latents is not None:
        files, sizes = [LATENTS], options.sizes or [file.side for file in manifest.files]
    entries = [(name, stored) for name in names for stored in ([ORIGINAL] if name in OF_ORIGINALS else files)]
    with progress_bar(len(options.workers) * len(sizes) * (rounds + 1)) as bar:
        for threads in options.workers:
            arguments = {
                f"{name}, {stored}": (name, data, options.source, stored, threads, options.images)
                for name, stored in entries
            }
            with started(reader, arguments, threads) as contestants:
                for size in sizes:
                    bar.set_description_str(f"{size} px, workers: {threads}")
                    photos = manifest.latents is None
                    chosen = "ours", choose_file(manifest, costs, crops, 1.5, size).file if photos else LATENTS
                    turns = take_turns(contestants, threads, rounds, (size, 0), (size, options.seconds), bar)
                    rows += [
                        {"source": entry[0], "stored": entry[1], "size": size, **measured, "chosen": entry == chosen}
                        for entry, measured in zip(entries, turns, strict=True)
                    ]
    return with_ratios(rows)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the ratios to other contestants that were measured to our rows: of the same file, or of the originals."""
    rate = {(r["source"], r["stored"], r["size"], r["workers"]): r["images_per_second"] for r in rows}
    for row in rows:
        for name in NAMES[1:] if row["source"] == "ours" else ():
            stored = ORIGINAL if name in OF_ORIGINALS else row["stored"]
            other = rate.get((name, stored, row["size"], row["workers"]))
            if other:
                row[f"to_{name}"] = round(row["images_per_second"] / other, 2)
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots images/s per core against the size, with a line for each contestant."""
    rows = [row for row in rows if row["workers"] == min(r["workers"] for r in rows)]
    stored = sorted({row["stored"] for row in rows})
    styles = {"ours": "-", "labels": (0, (5, 1)), "ffcv": "--", "dali": "-.", "torchvision": ":"}
    lines: list[PlottedLine] = []
    for name, (number, file) in product(styles, enumerate(stored)):
        points = [(r["size"], r["per_core"]) for r in rows if (r["source"], r["stored"]) == (name, file)]
        label = f"{name}, {file.removesuffix('.beton').removeprefix('train_')}"
        lines.append((label, points, {"linestyle": styles[name], "color": f"C{number}", "marker": "."}))
    circles = {"linestyle": "none", "color": "black", "marker": "o", "fillstyle": "none", "markersize": 9}
    chosen = ("chosen file", [(row["size"], row["per_core"]) for row in rows if row["chosen"]], circles)
    plot_lines({"images/s per core": [*lines, chosen]}, "crop size, px", path, (8.5, 4.6), log=True)


def main(argv: Sequence[str]) -> None:
    installed = [name for name in NAMES if name != "labels" and (name not in EXTRAS or has_extra(name))]
    parser = bench_parser("loader", __doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder of .beton files (default: the built-in sample)")
    add("--source", help="original images (default: the source that the manifest names)")
    add("--sizes", type=numbers, help="crop sizes in px (default: 32 to 224; those of latents)")
    add("--workers", type=numbers, default="1", help="numbers of workers, such as 1,2 (default: 1)")
    add("--only", metavar="LIST", help=f"contestants to run (default: {','.join(installed)}; of latents: ours)")
    add("--rounds", type=at_least(1), default=3, help="measured rounds (default: 3)")
    add("--seconds", type=at_least(0, float), default=0.5, help="minimal length of a turn (default: 0.5)")
    # A pass has the same random images each time, so that they come from memory.
    add("--images", type=at_least(1), default=2048, help="maximal images of a pass (default: 2048)")
    add("--plot", type=plot_file, metavar="FILE", help="plot images/s per core against the crop size")
    options = parser.parse_args(argv)
    data = options.data or sample_folder()
    has_latents = load_manifest(data, "train").latents is not None
    chosen = names(options.only, NAMES) if options.only else ["ours"] if has_latents else installed
    if has_latents and chosen != ["ours"]:
        raise ConfigError(f"--only: got {options.only}, but {data} holds latents, which only ours reads; leave it out")
    rows = compare(data, chosen, options)
    ordered = sorted(rows, key=lambda row: (row["workers"], row["size"], row["stored"], row["source"]))
    columns = {title: column for title, column in COLUMNS.items() if any(column[0] in row for row in rows)}
    print(text_table([r | {"source": ("*" if r["chosen"] else " ") + r["source"]} for r in ordered], columns))
    what = "images/s of the loaders, random resized crops with flips, each limited to as many cores as workers"
    images = min(load_manifest(data, "train").count, options.images)
    write_json(options.json, what, rows, batch_size=BATCH, images=images)
    if options.plot:
        draw(rows, options.plot)
