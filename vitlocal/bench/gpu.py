"""The first ten minutes on a GPU: python -m vitlocal.bench gpu [--minutes 10] [--out runs/gpu] [--cpu]

Answers what only a GPU can: whether the compiled step is right, how fast it is, whether the loader keeps up, and
whether a run continues. The parts run in order of worth. Each has processes of its own and a time limit; a part that
fails, hangs or crashes does not stop the others, and time that it leaves is for the later ones.

    card        the GPU, versions of libraries, imports, the compiler
    compiled    bench compiled: the compiled step against the eager one; meanwhile the compile caches are filled, and
                the data are written
    kernel      bench kernel: the fused local FFN against PyTorch's compiler; OUT/kernel.json is the table by which
                train.kernel=auto chooses
    step_*      bench step: images/s of the step alone, compiled and eager, and of timm's model
    profile     bench profile: a step of rcfg/ours.yaml with its data, by phase
    train       the trainer on two image sizes: images/s, and how long the GPU waits for data
    resume      a run that SIGTERM stops, and that continues
    tests       the tests that need a GPU

OUT/PART.json is written when a part ends, OUT/PART.txt is what its processes print, and OUT/summary.json has all parts.
The exit status is 0 if all of them passed. OUT/work has the data and the caches, about 3 GB; remove it afterwards.

The photos are those in .gpu/photos, else the built-in sample. `make gpu` fills the folder .gpu with everything that a
machine without a network needs besides PyTorch and timm, and prints the command. --cpu runs every part on a CPU, at toy
size: a rehearsal.
"""

import argparse
import importlib.util
import json
import re
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vitlocal.bench.measurement import text_table
from vitlocal.bench.parsing import BenchParser, at_least
from vitlocal.bench.parts import Part, PartRunner, PlannedPart, TimedOut
from vitlocal.errors import ConfigError, DataError
from vitlocal.jsonl import read_lines
from vitlocal.paths import IN_CHECKOUT
from vitlocal.train.budget import read_spent

CARRIED = Path(".gpu")
ABOUT = "photos.json"  # in the folder of the photos: where they are from
ROOM_GIB = 120  # of free memory: with less, the parts compile one after the other
MOST_WAIT = 1.0  # percent of the training time in which the GPU may wait for data
FINDINGS = {
    "part": ("part", ""), "what": ("what", ""), "measured": ("measured", ",.2f"), "estimate": ("estimate", ",.2f"),
}  # fmt: skip
STATES = {
    "part": ("part", ""), "status": ("status", ""), "s": ("seconds", ".0f"), "limit": ("limit_seconds", ".0f"),
    "peak MiB": ("gpu_peak_mib", ",d"), "reason": ("reason", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The sizes of everything. ``estimates``: images/s of a step at the two image sizes, stated before measuring."""

    device: str
    sizes: tuple[int, int]
    batch: int
    images: tuple[int, int]  # train and val
    sides: str
    seconds: tuple[int, int]  # of the training run, and of the run that is stopped in its middle
    estimates: tuple[float | None, float | None]
    arms: str
    options: tuple[str, ...] = ()  # of the trainer

    @property
    def recipe(self) -> list[str]:
        return ["--config-file=rcfg/ours.yaml", f"--run.device={self.device}", *self.options]


GPU = Scale(
    "cuda", (32, 224), 1024, (100_000, 2_000), "64:raw,400:jpg", (50, 20), (80_000.0, 8_000.0),
    "local-compiled,local-eager,timm-compiled",
)  # fmt: skip
TOY = Scale(
    "cpu", (16, 32), 8, (200, 40), "32:raw,64:jpg", (4, 8), (None, None), "local-compiled,local-eager,timm-eager",
    ("--model.name=vitlocal_tiny_patch8_64", "--model.size=32", "--model.width=32", "--model.depth=1",
     "--model.heads=2", "--image_size.init=16", "--image_size.step_pixels=16", "--image_size.final=32"),
)  # fmt: skip


class GpuParts:
    """The parts, and what they know of each other."""

    def __init__(self, scale: Scale):
        self.scale = scale
        self.has_gpu: bool | None = None  # None: not known, because the card was not described in time
        self._free_gib, self._made = 0.0, dict[str, Any]()  # the machine and the versions, as benches write them
        self._writer: subprocess.Popen[bytes] | None = None

    def plan(self) -> list[PlannedPart]:
        """The parts in order of worth, and their seconds of ten minutes."""
        small, large = self.scale.sizes
        parts: list[PlannedPart] = [
            ("card", 50.0, self.card), ("compiled", 110.0, self.compiled), ("kernel", 35.0, self.kernel),
            (f"step_{large}", 70.0, partial(self.step, large)), (f"step_{small}", 35.0, partial(self.step, small)),
            ("profile", 65.0, self.profile), ("train", 105.0, self.train), ("resume", 75.0, self.resume),
        ]  # fmt: skip
        return [*parts, ("tests", 55.0, self.tests)] if IN_CHECKOUT else parts  # an installed package has none

    def card(self, part: Part) -> None:
        scale, photos = self.scale, CARRIED / "photos" if (CARRIED / "photos").exists() else part.work / "sample"
        words = ["files", part.work, photos, *scale.images, scale.sides]
        self._writer = part.start("-m", "vitlocal.bench.gpu_data", *words, beside="data", stays=True)
        for row in part.bench("card", f"--device={scale.device}"):
            self._free_gib, self.has_gpu = row.get("free_gib", 0.0), "gpu" in row
            self._made = {name: part.record[name] for name in ("machine", "versions")}
            part.find("free memory, GiB", self._free_gib)
        if self.has_gpu is False and scale.device == "cuda":
            raise DataError("no GPU was found; --cpu rehearses without one")

    def compiled(self, part: Part) -> None:
        scale, benches = self.scale, []
        # The graphs of the parts to come, so that these find them in the caches. All at a time need memory.
        if self._free_gib >= ROOM_GIB:
            arms = ("local-compiled", "timm-compiled")
            benches = [self._step_words(size, arm, short=True) for size in scale.sizes for arm in arms]
            benches.append(self._kernel_words())
        elif scale.device == "cpu":  # for which PyTorch cannot compile in two processes with one cache
            benches = [self._step_words(scale.sizes[0], "local-eager", short=True)]
        warm = [part.start("-m", "vitlocal.bench", *words, beside="caches") for words in benches]
        sizes, batch = ",".join(map(str, scale.sizes[: 1 if scale.device == "cpu" else 2])), min(64, scale.batch)
        for row in part.bench("compiled", *scale.recipe, f"--sizes={sizes}", f"--train.batch_size={batch}"):
            for how in ("compiled", "eager"):
                part.find(f"{row['size']} px, error of the {how} gradient, %", 1e2 * row[f"{how}_gradient_error"])
            part.find(f"{row['size']} px, graphs that were not captured", row["cudagraph_skips"], 0)
        with suppress(TimedOut):  # the parts to come then compile themselves
            while any(process.poll() is None for process in warm):
                part.poll()
        part.record["caches"] = [process.poll() for process in warm]  # exit statuses

    def kernel(self, part: Part) -> None:
        for row in part.bench(*self._kernel_words()):
            part.find(f"grid {row['side']}: fused, ms forward and backward", row["fused_ms"])
            part.find(f"grid {row['side']}: plain compiled, ms", row["plain_ms"])

    def step(self, size: int, part: Part) -> None:
        absent = {*self.scale.arms.split(",")}
        for row in part.bench(*self._step_words(size, self.scale.arms)):
            absent.remove(row["arm"])
            estimate = self._estimate(size) if row["arm"] == "local-compiled" else None
            part.find(f"{size} px, {row['arm']}, images/s", row["images_per_second"], estimate)
        if absent:
            raise DataError(f"{', '.join(sorted(absent))}: not measured, probably for lack of memory; see {part.log}")

    def profile(self, part: Part) -> None:
        sizes = ",".join(map(str, self.scale.sizes))
        for row in part.bench("profile", *self._recipe_with_data(part), f"--sizes={sizes}"):
            part.find(f"{row['size']} px, images/s with data", row["images_per_second"], self._estimate(row["size"]))
            part.find(f"{row['size']} px, waiting for data, %", row["data_percent"])

    def train(self, part: Part) -> None:
        part.wait(part.start(*self._trainer_words(part, self.scale.seconds[0])))
        records = read_lines(part.work / "train" / "log.jsonl")
        part.record |= {"what": "training with two image sizes", "rows": stages(records), "log": records}
        for row in part.record["rows"]:
            size, rate = row["size"], row["images_per_second"]
            part.find(f"{size} px, {row['mode']}, images/s", rate, self._estimate(size))
            part.find(f"{size} px, waiting for data, %", row["data_wait_percent"], MOST_WAIT)

    def resume(self, part: Part) -> None:
        seconds, folder = self.scale.seconds[1], part.work / "resume"
        words = self._trainer_words(part, seconds)
        process = part.start(*words)
        while read_spent(folder / "spent.json")[0] < seconds / 2 and process.poll() is None:
            part.poll()
        process.send_signal(signal.SIGTERM)
        part.wait(process, status=128 + signal.SIGTERM)
        part.wait(part.start(*words))
        stopped, continued = (
            re.findall(rf"{how} .*?step (\d+)", part.printed()) for how in ("stopped by SIGTERM", "continuing at")
        )
        last = read_lines(folder / "log.jsonl")[-1]
        part.record |= {"stopped_at_step": stopped, "continued_at_step": continued, "last": last}
        if len(stopped) != 1 or stopped != continued or last["step"] <= int(stopped[0]):
            raise DataError(f"stopped at step {stopped}, continued at {continued}, ended at {last['step']}")
        part.find("step at which the run was stopped, and continued", float(stopped[0]))
        part.find("training time over its budget, s", last["train_seconds"] - seconds, 0)

    def tests(self, part: Part) -> None:
        words = ["-m", "gpu and not slow", "tests"]
        if self.scale.device == "cpu":
            words = ["tests/test_gpu.py", "tests/test_local_mix.py"]
        workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
        options = ["-o", "addopts=-q --strict-markers", "-p", "no:cacheprovider", *workers]
        try:
            part.wait(part.start("-m", "pytest", *options, *words))
        finally:
            for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", part.printed()[-300:]):
                part.find(f"tests {what}", float(count))

    def _estimate(self, size: int) -> float | None:
        return self.scale.estimates[self.scale.sizes.index(size)]

    def _kernel_words(self) -> list[str]:
        return ["kernel", f"--device={self.scale.device}", *(["--sides=2"] if self.scale.device == "cpu" else [])]

    def _step_words(self, size: int, arms: str, short: bool = False) -> list[str]:
        scale = self.scale
        own = [f"--sizes={size}", f"--batch={scale.batch}", f"--arms={arms}", f"--run.device={scale.device}"]
        return ["step", *own, *scale.options, *(["--rounds=1", "--seconds=0"] if short else [])]

    def _recipe_with_data(self, part: Part) -> list[str]:
        """The recipe with the data, as options of the trainer, once they are written."""
        while self._writer is not None and self._writer.poll() is None:
            part.poll()
        if self._writer is None or self._writer.returncode:
            raise DataError(f"the data were not written; see {part.out / 'data.txt'}")
        about = [folder / ABOUT for folder in (CARRIED / "photos", part.work / "sample") if (folder / ABOUT).exists()]
        part.record["photos"] = json.loads(about[0].read_text(encoding="utf-8")) if about else "of the user"
        part.record |= self._made
        return [*self.scale.recipe, f"--data.root={part.work / 'data'}", f"--train.batch_size={self.scale.batch}"]

    def _trainer_words(self, part: Part, seconds: int) -> list[str]:
        small, large = self.scale.sizes
        return [
            "-m", "vitlocal.train", *self._recipe_with_data(part), f"--budget.length={seconds}s", "--evaluate.every=0",
            f"--image_size.stages={small}px until 30%, {large}px", "--run.save_every=1h", "--run.progress=no",
            f"--run.folder={part.work / part.name}", "--train.lr=1e-4",  # which cannot diverge
        ]  # fmt: skip


def stages(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each image size of a run's log."""
    from vitlocal.report.figures import Line, by_size  # needs matplotlib: "card" says if it is missing

    modes = {record["image_size"]: record["step_mode"] for record in records}  # of each size's last pass
    return [
        {"size": size, "mode": modes[size], "train_seconds": round(row["seconds"], 3), "images": row["images"],
         "images_per_second": round(row["images_per_second"], 1),
         "data_wait_percent": round(100 * row["data_wait_fraction"], 3)}
        for size, row in by_size(Line("", records)).items()
    ]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    form, program = argparse.RawDescriptionHelpFormatter, "python -m vitlocal.bench gpu"
    parser = BenchParser(prog=program, description=__doc__, allow_abbrev=False, formatter_class=form)
    add = parser.add_argument
    add("--minutes", type=at_least(0, float), default=10.0, help="time limit of all parts together (default: 10)")
    add("--out", type=Path, default=Path("runs/gpu"), help="folder for the results (default: runs/gpu)")
    add("--cpu", action="store_true", help="run every part on a CPU, at toy size")
    options = parser.parse_args(argv)
    if any(options.out.glob("*.json")) or any(options.out.glob("*.txt")):
        raise ConfigError(f"--out: {options.out} has results; use another folder, or remove it")
    parts = GpuParts(TOY if options.cpu else GPU)
    commit = (CARRIED / "commit").read_text(encoding="utf-8").strip() if (CARRIED / "commit").exists() else None
    runner, planned = PartRunner(options.out, options.minutes, not options.cpu, commit), parts.plan()
    try:
        runner.run(planned, goes_on=lambda: options.cpu or parts.has_gpu is not False)
    finally:
        findings = [finding for record in runner.records for finding in record["findings"]]
        print("", text_table(findings, FINDINGS), "", text_table(runner.records, STATES), sep="\n", flush=True)
    return int(len(runner.records) < len(planned) or any(record["status"] != "passed" for record in runner.records))
