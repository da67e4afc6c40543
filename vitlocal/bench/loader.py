"""Loaders side by side: python -m vitlocal.bench loader [--data FOLDER] [--source FOLDER] [--sizes 32,96,224]

Each contestant lives in a process of its own, held to as many cores as it has workers; they take turns, size by
size and round by round, so that what else the machine does falls on all alike. Random resized crops with flips.

    ours         each .beton file through our source; a * marks the file that the source itself would pick
    ffcv         the same files through FFCV's own loader, its random crop and its flip
    torchvision  the original images through PyTorch's DataLoader and Pillow
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vitlocal.bench.measurement import measurement, write_json
from vitlocal.data.manifest import Manifest
from vitlocal.data.source import load_manifest
from vitlocal.errors import ConfigError, DataError

SAMPLE_FOLDER = "data/bench"
BATCH = 64
ROUNDS, SECONDS = 5, 1.0


@dataclass(frozen=True)
class Contestant:
    name: str  # of READERS
    stored: str  # the file's name, or "original"
    workers: int


# --- in the contestant's process --------------------------------------------------------------------------


def ours(data: str, source: str | None, stored: str, workers: int) -> Any:
    import torch

    from vitlocal.data.ffcv import Decoder, FFCVSource
    from vitlocal.data.source import Cropping
    from vitlocal.plan import Feed, Position

    manifest = load_manifest(data, "train")
    manifest = replace(manifest, files=tuple(file for file in manifest.files if file.file == stored))
    reader = FFCVSource(data, manifest, Cropping(random=True), 1.5, torch.device("cpu"), Decoder(workers))

    def images(size: int, epoch: int) -> Iterator[int]:
        with reader.open(Feed(size, BATCH), Position(epoch)) as batches:
            for batch in batches:
                yield len(batch)

    return images


def ffcv(data: str, source: str | None, stored: str, workers: int) -> Any:
    from vitlocal.data.decode import torch_threads_kept  # imports ffcv quietly

    with torch_threads_kept():
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor

        decoder = RandomResizedCropRGBImageDecoder((32, 32))
        loader = Loader(
            str(Path(data) / stored), batch_size=BATCH, num_workers=workers, os_cache=True, order=OrderOption.RANDOM,
            seed=0, drop_last=False,
            pipelines={"image": [decoder, RandomHorizontalFlip(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
        )  # fmt: skip

    def images(size: int, epoch: int) -> Iterator[int]:
        decoder.output_size = (size, size)
        for batch, _ in loader:
            yield len(batch)

    return images


def torchvision(data: str, source: str | None, stored: str, workers: int) -> Any:
    import torch

    from vitlocal.data.source import Cropping
    from vitlocal.data.torchvision import TorchvisionSource
    from vitlocal.plan import Feed, Position

    reader = TorchvisionSource(data, source, "train", Cropping(random=True), torch.device("cpu"), workers)

    def images(size: int, epoch: int) -> Iterator[int]:
        with reader.open(Feed(size, BATCH), Position(epoch)) as batches:
            for batch in batches:
                yield len(batch)

    return images


READERS = {"ours": ours, "ffcv": ffcv, "torchvision": torchvision}


def measure(images: Any, size: int, seconds: float, epoch: int) -> tuple[float, int]:
    """Images a second over whole passes until ``seconds`` have gone, and the next epoch."""
    count, began = 0, time.perf_counter()
    while True:
        for some in images(size, epoch):
            count += some
        epoch += 1
        spent = time.perf_counter() - began
        if spent >= seconds:
            return count / spent, epoch


def resident_mib() -> float:
    """Memory of this process and its children."""
    mine, total = os.getpid(), 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if int(entry.name) == mine or parent == mine:
                total += int((entry / "statm").read_text().split()[1])
        except (OSError, ValueError):
            continue  # it has ended meanwhile
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


def serve(contestant: Contestant, data: str, source: str | None, cores: Sequence[int], pipe: Connection) -> None:
    os.sched_setaffinity(0, cores)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        images, epoch = READERS[contestant.name](data, source, contestant.stored, contestant.workers), 0
        while (asked := pipe.recv()) is not None:
            rate, epoch = measure(images, *asked, epoch)
            pipe.send((rate, resident_mib()))
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")


# --- in the bench's ---------------------------------------------------------------------------------------


class Process:
    """A contestant's process, asked one thing at a time."""

    def __init__(self, contestant: Contestant, data: str, source: str | None, cores: Sequence[int]):
        context = multiprocessing.get_context("spawn")
        self.contestant, (self.pipe, theirs) = contestant, context.Pipe()
        # Not a daemon: torchvision's has children of its own.
        self.process = context.Process(target=serve, args=(contestant, data, source, cores, theirs))
        self.process.start()
        theirs.close()

    def rate(self, size: int, seconds: float) -> tuple[float, float]:
        try:
            self.pipe.send((size, seconds))
            answer = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise DataError(f"{self.contestant}: its process died; see above") from None
        if isinstance(answer, str):
            raise DataError(f"{self.contestant}: {answer}")
        return answer

    def close(self) -> None:
        try:
            self.pipe.send(None)
        except OSError:
            pass
        self.process.join(10)
        self.process.kill()


def chosen_file(data: str, manifest: Manifest, size: int) -> str:
    from vitlocal.data.costs import Costs
    from vitlocal.data.crops import Cropping
    from vitlocal.data.ffcv import choose_file

    return choose_file(manifest, Costs.load(data, manifest), Cropping(random=True), 1.5, size).file


def sample_folder() -> str:
    """The built-in sample in the default files of ImageNet, written where it is not there yet."""
    from vitlocal.data.write import WriteConfig, write

    if not (Path(SAMPLE_FOLDER) / "train.json").exists():
        write(WriteConfig("train", "sample:20", SAMPLE_FOLDER))
    return SAMPLE_FOLDER


def compare(
    data: str, source: str | None, sizes: Sequence[int], workers: Sequence[int], names: Sequence[str], rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the measurement: a contestant at a size, each."""
    manifest = load_manifest(data, "train")
    available = sorted(os.sched_getaffinity(0))
    rows = []
    for count in workers:
        if count > len(available):
            raise ConfigError(f"--workers: got {count}, expected at most the {len(available)} cores of this machine")
        contestants = [
            Contestant(name, stored, count)
            for name in names
            for stored in (["original"] if name == "torchvision" else [file.file for file in manifest.files])
        ]
        processes = []
        try:
            processes = [Process(contestant, data, source, available[:count]) for contestant in contestants]
            for size in sizes:
                rates: dict[Contestant, list[float]] = {contestant: [] for contestant in contestants}
                memory: dict[Contestant, float] = {}
                for number in range(rounds + 1):  # the first is not counted: compiling, first touches
                    for process in processes:
                        rate, memory[process.contestant] = process.rate(size, seconds if number else 0)
                        if number:
                            rates[process.contestant].append(rate)
                    print(f"\r{size} px, {count} workers: round {number} of {rounds}", end="", file=sys.stderr)
                for contestant in contestants:
                    measured = rates[contestant]
                    rows.append({
                        "source": contestant.name, "stored": contestant.stored, "size": size, "workers": count,
                        "images_per_second": round(statistics.median(measured), 1),
                        "per_core": round(statistics.median(measured) / count, 1),
                        "spread": round((max(measured) - min(measured)) / statistics.median(measured), 3),
                        "n": len(measured), "rss_mib": round(memory[contestant]),
                        "chosen": contestant.name == "ours" and contestant.stored == chosen_file(data, manifest, size),
                    })  # fmt: skip
        finally:
            for process in processes:
                process.close()
            print(file=sys.stderr)
    return with_ratios(rows)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to our rows the ratios to stock FFCV on the same file and to torchvision."""
    rate = {(r["source"], r["stored"], r["size"], r["workers"]): r["images_per_second"] for r in rows}
    for row in rows:
        if row["source"] == "ours":
            for name, stored in (("ffcv", row["stored"]), ("torchvision", "original")):
                other = rate.get((name, stored, row["size"], row["workers"]))
                row[f"to_{name}"] = round(row["images_per_second"] / other, 2) if other else None
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'px':>4} {'workers':>7}  {'source':12} {'stored':24} {'images/s':>10} {'spread':>7} {'MiB':>6} "
             f"{'to ffcv':>8} {'to torchvision':>15}"]  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["workers"], r["size"], r["stored"], r["source"])):
        to = [f"{row[k]:.2f} x" if row.get(k) else "" for k in ("to_ffcv", "to_torchvision")]
        mark = "*" if row["chosen"] else " "
        lines.append(
            f"{row['size']:4} {row['workers']:7} {mark}{row['source']:12} {row['stored']:24} "
            f"{row['images_per_second']:10,.0f} {100 * row['spread']:5.1f} % {row['rss_mib']:6} {to[0]:>8} {to[1]:>15}"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Images a second and core against size, on a logarithmic axis, a line a contestant."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["workers"] == min(r["workers"] for r in rows)]
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    stored = sorted({row["stored"] for row in rows})
    colours = {name: f"C{number}" for number, name in enumerate(stored)}
    styles = {"ours": "-", "ffcv": "--", "torchvision": ":"}
    for name in styles:
        for file in stored:
            line = sorted((r["size"], r["per_core"]) for r in rows if (r["source"], r["stored"]) == (name, file))
            if line:
                axes.plot(*zip(*line, strict=True), styles[name], color=colours[file], marker=".",
                          label=f"{name}, {file.removesuffix('.beton').removeprefix('train_')}")  # fmt: skip
    picked = sorted((r["size"], r["per_core"]) for r in rows if r["chosen"])
    axes.plot(*zip(*picked, strict=True), "o", color="black", fillstyle="none", markersize=9, label="what is picked")
    axes.set_yscale("log")
    axes.set_xlabel("crop size, px")
    axes.set_ylabel("images/s and core")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)


def numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise ConfigError(f"got '{text}', expected whole numbers such as 32,96,224")
    return values


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vitlocal.bench loader", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="folder of .beton files; none: the built-in sample")
    parser.add_argument("--source", help="original images; none: what the manifest says")
    parser.add_argument("--sizes", default="32,64,96,128,160,192,224")
    parser.add_argument("--workers", default="1", help="worker counts")
    parser.add_argument("--only", default=",".join(READERS), help="contestants")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="least length of a turn")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args(argv)
    names = options.only.split(",")
    if unknown := [name for name in names if name not in READERS]:
        raise ConfigError(f"--only: got {', '.join(unknown)}, expected some of {', '.join(READERS)}")
    data = options.data or sample_folder()
    rows = compare(
        data, options.source, numbers(options.sizes), numbers(options.workers), names, options.rounds, options.seconds
    )
    print(table(rows))
    if options.json:
        what = "images a second of the loaders, random resized crops with flips, each held to as many cores as workers"
        write_json(options.json, measurement(what, rows, batch_size=BATCH, images=load_manifest(data, "train").count))
    if options.plot:
        draw(rows, options.plot)
