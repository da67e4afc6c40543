"""Loaders side by side: python -m vitlocal.bench loader [--data FOLDER] [--source FOLDER] [--sizes 32,96,224]

Each contestant has its own process, limited to as many cores as it has workers. They take turns, size by size and
round by round, so that other work on the machine affects all of them equally. Random resized crops with flips.

    ours         each .beton file through the native loader; a * marks the file that the loader itself would choose
    ffcv         the same files through FFCV's own loader, with its random crop and its flip
    torchvision  the original images through PyTorch's DataLoader and Pillow
    dali         the original images through NVIDIA DALI on the CPU, if it is installed
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitlocal.bench.contestants import Contestant, TurnDisplay, closing_all, cores_for, rates_row, resident_mib
from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.parsing import names, numbers, plot_file
from vitlocal.data.batch import Source
from vitlocal.data.manifest import Manifest, load_manifest
from vitlocal.errors import ConfigError
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.report.figures import save

SAMPLE_FOLDER = "data/bench"
BATCH = 64
ROUNDS, SECONDS = 3, 0.5
IMAGES = 2048  # images of a pass, the same random ones each time, so that they come from memory
ORIGINAL = "original"  # the column `stored` of the loaders of original images
NAMES, OF_ORIGINALS = ("ours", "ffcv", "torchvision", "dali"), ("torchvision", "dali")

Turn = Callable[[int, float], float]  # crop size and seconds -> images/s


# --- in the processes of the contestants ---


def open_source(name: str, data: str, source: str | None, stored: str, workers: int) -> Source:
    """The training split of the folder ``data``, read by the loader ``name`` (from the file ``stored``, if any)."""
    import torch

    from vitlocal.data.crops import CropPolicy

    crops, device = CropPolicy(random=True), torch.device("cpu")
    if name in OF_ORIGINALS:
        if name == "dali":
            from vitlocal.data.peers.dali import DALISource

            return DALISource(data, source, "train", crops, device, workers)
        from vitlocal.data.peers.torchvision import TorchvisionSource

        return TorchvisionSource(data, source, "train", crops, device, workers)
    manifest = load_manifest(data, "train")
    manifest = replace(manifest, files=tuple(file for file in manifest.files if file.file == stored))
    if name == "ffcv":
        from vitlocal.data.peers.ffcv import FFCVSource

        return FFCVSource(data, manifest, crops, device, workers)
    from vitlocal.data.loader import LoaderResources, NativeSource

    return NativeSource(data, manifest, crops, device, LoaderResources(workers))


def reader(name: str, data: str, source: str | None, stored: str, workers: int, images: int) -> Turn:
    """Opens the source of a contestant. Returns the function that measures it at a crop size."""
    opened = open_source(name, data, source, stored, workers)
    start = Position(0, max(0, opened.count - images))

    def turn(size: int, seconds: float) -> float:
        """Images/s over complete passes of at least ``seconds``."""
        count, began = 0, time.perf_counter()
        while True:
            with opened.open(Feed(size, BATCH), start) as batches:
                count += sum(len(batch) for batch in batches)
            spent = time.perf_counter() - began
            if spent >= seconds:
                return count / spent

    return turn


# --- in the process of the bench ---


def chosen_file(data: str, manifest: Manifest, size: int) -> str:
    from vitlocal.data.costs import DecodingCosts
    from vitlocal.data.crops import CropPolicy
    from vitlocal.data.loader import choose_file

    return choose_file(manifest, DecodingCosts.load(data, manifest), CropPolicy(random=True), 1.5, size).file


def sample_folder() -> str:
    """The built-in sample in the default files of ImageNet, written if it does not exist."""
    from vitlocal.data.costs import ensure_costs
    from vitlocal.data.writer.write import WriteConfig, write

    if not (Path(SAMPLE_FOLDER) / "train.json").exists():
        ensure_costs(SAMPLE_FOLDER, write(WriteConfig("train", "sample:20", SAMPLE_FOLDER)))
    return SAMPLE_FOLDER


def installed() -> list[str]:
    """The contestants that can run here."""
    has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return [name for name in NAMES if name != "dali" or has_dali]


def compare(
    data: str, source: str | None, sizes: Sequence[int], workers: Sequence[int], names: Sequence[str], rounds: int,
    seconds: float, count: int = IMAGES,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the measurement, one for each contestant and size."""
    manifest = load_manifest(data, "train")
    rows, display = [], TurnDisplay(len(workers) * len(sizes) * (rounds + 1))
    for threads in workers:
        cores, contestants, entries = cores_for(threads), list[Contestant](), []
        with closing_all(contestants):
            for name in names:
                for stored in [ORIGINAL] if name in OF_ORIGINALS else [file.file for file in manifest.files]:
                    arguments = (name, data, source, stored, threads, count)
                    contestants.append(Contestant(f"{name}, {stored}", reader, arguments, cores))
                    entries.append({"source": name, "stored": stored})
            for size in sizes:
                rates: list[list[float]] = [[] for _ in contestants]
                memory = [0.0] * len(contestants)
                for number in range(rounds + 1):  # the first round warms up and does not count
                    for place, contestant in enumerate(contestants):
                        rate = contestant.ask(size, seconds if number else 0)
                        memory[place] = resident_mib(contestant.process.pid or 0)
                        if number:
                            rates[place].append(rate)
                    display.step(f"{size} px, {threads} worker{'s' * (threads > 1)}")
                chosen = {"source": "ours", "stored": chosen_file(data, manifest, size)}
                rows += [
                    {
                        **entry, "size": size, **rates_row(measured, threads), "rss_mib": round(mib),
                        "chosen": entry == chosen,
                    }
                    for entry, measured, mib in zip(entries, rates, memory, strict=True)
                ]  # fmt: skip
    display.close()
    return with_ratios(rows)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the ratios to FFCV on the same file, and to the loaders of original images, to our rows."""
    rate = {(r["source"], r["stored"], r["size"], r["workers"]): r["images_per_second"] for r in rows}
    for row in rows:
        if row["source"] == "ours":
            for name in ("ffcv", *OF_ORIGINALS):
                stored = ORIGINAL if name in OF_ORIGINALS else row["stored"]
                other = rate.get((name, stored, row["size"], row["workers"]))
                row[f"to_{name}"] = round(row["images_per_second"] / other, 2) if other else None
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'px':>4} {'workers':>7}  {'source':12} {'stored':24} {'images/s':>10} {'spread':>7} {'MiB':>6} "
             f"{'to ffcv':>8} {'to torchvision':>15} {'to dali':>8}"]  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["workers"], r["size"], r["stored"], r["source"])):
        to = [f"{row[k]:.2f} x" if row.get(k) else "" for k in ("to_ffcv", "to_torchvision", "to_dali")]
        mark = "*" if row["chosen"] else " "
        lines.append(
            f"{row['size']:4} {row['workers']:7} {mark}{row['source']:12} {row['stored']:24} "
            f"{row['images_per_second']:10,.0f} {100 * row['spread']:5.1f} % {row['rss_mib']:6} {to[0]:>8} {to[1]:>15} "
            f"{to[2]:>8}"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots images/s per core against the size, on a logarithmic axis, with a line for each contestant."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["workers"] == min(r["workers"] for r in rows)]
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    stored = sorted({row["stored"] for row in rows})
    colours = {name: f"C{number}" for number, name in enumerate(stored)}
    styles = {"ours": "-", "ffcv": "--", "dali": "-.", "torchvision": ":"}
    for name in styles:
        for file in stored:
            line = sorted((r["size"], r["per_core"]) for r in rows if (r["source"], r["stored"]) == (name, file))
            if line:
                axes.plot(*zip(*line, strict=True), styles[name], color=colours[file], marker=".",
                          label=f"{name}, {file.removesuffix('.beton').removeprefix('train_')}")  # fmt: skip
    chosen = sorted((r["size"], r["per_core"]) for r in rows if r["chosen"])
    if chosen:
        axes.plot(*zip(*chosen, strict=True), "o", color="black", fillstyle="none", markersize=9, label="chosen file")
    axes.set_yscale("log")
    axes.set_xlabel("crop size, px")
    axes.set_ylabel("images/s per core")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vitlocal.bench loader", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="folder of .beton files; default: the built-in sample")
    parser.add_argument("--source", help="original images; default: the source that the manifest names")
    parser.add_argument("--sizes", default="32,64,96,128,160,192,224", help="crop sizes, px")
    parser.add_argument("--workers", default="1", help="numbers of workers, for example 1,2")
    parser.add_argument("--only", default=",".join(installed()), help="contestants to run")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measured rounds")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="minimal length of a turn")
    parser.add_argument("--images", type=int, default=IMAGES, help="maximal images of a pass")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", type=plot_file, metavar="FILE")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.images < 1 or options.seconds < 0:
        raise ConfigError(
            f"--rounds {options.rounds} --images {options.images} --seconds {options.seconds:g}: expected at least "
            "1, 1 and 0"
        )
    chosen = names(options.only, list(NAMES))
    data = options.data or sample_folder()
    sizes, workers = numbers(options.sizes, "--sizes"), numbers(options.workers, "--workers")
    rows = compare(
        data, options.source, sizes, workers, chosen, options.rounds, options.seconds, options.images
    )  # fmt: skip
    print(table(rows))
    if options.json:
        what = "images/s of the loaders, random resized crops with flips, each limited to as many cores as workers"
        images = min(load_manifest(data, "train").count, options.images)
        write_json(options.json, measurement(what, rows, batch_size=BATCH, images=images))
    if options.plot:
        draw(rows, options.plot)
