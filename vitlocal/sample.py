"""Draws images with a trained diffusion model: python -m vitlocal.sample --run runs/x --classes 3,goldfish --count 8"""

if __name__ == "__main__":  # first, so that signals are handled while PyTorch is imported
    from vitlocal.launch import sample

    sample()

import difflib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vitlocal.config_reader import OptionReader
from vitlocal.data.autoencoder import Autoencoder
from vitlocal.errors import ConfigError, Interrupted, StopSignals
from vitlocal.jsonl import naming
from vitlocal.models.exported import ExportedRun, file_digest
from vitlocal.options import COUNT, TEXT, Choice, Number, messages, option
from vitlocal.tasks.memory import explained_memory_errors
from vitlocal.tasks.metrics import task_name
from vitlocal.tasks.noise_schedule import NoiseSchedule
from vitlocal.tasks.sample_grid import draw_grid
from vitlocal.tasks.sampling import GUIDED_CHANNELS, SAMPLERS, SamplerOptions, sample_batches, sample_keys, to_images
from vitlocal.train.devices import choose_device, choose_precision

GRID_ROWS, GRID_COLUMNS = 50, 10  # the most
MOST_NAME = 40  # letters of a class name in a file name


@dataclass(frozen=True)
class SampleOptions:
    """The options of the command. Its flags are these names with dashes."""

    run: str | None = option(None, TEXT, "folder of a finished run of a diffusion model")
    classes: str = option("all", TEXT, "class names or numbers (from 0), with commas; all: each class")
    count: int = option(4, COUNT, "images of each class")
    sampler: str | None = option(None, Choice(*SAMPLERS), "ddim (no noise after the first), or ddpm; none: the run's")
    steps: int | None = option(
        None, COUNT, "steps for an image; DiT's published samples have 250 of ddpm; none: as the run's evaluations"
    )
    guidance: float | None = option(None, Number(0), "scale of classifier-free guidance; 1: none; none: the run's")
    guided_channels: str | None = option(
        None, Choice(*GUIDED_CHANNELS), "guided channels; 3: as DiT's published code; none: the run's"
    )
    seed: int = option(0, Number(0, 2**31 - 1, whole=True), "seed; an image depends on it, its class and its number")
    vae: str | None = option(None, TEXT, "folder of the autoencoder, for models of latents; none: the run's")
    out: str | None = option(None, TEXT, "new folder for the images; none: samples, in the run's folder")
    batch_size: int = option(16, COUNT, "images at a time")
    device: str = option("auto", TEXT, "cpu, cuda, cuda:1, mps, or auto for the accelerator, if there is one")
    precision: str = option("auto", Choice("auto", "bf16", "fp16", "fp32"), "number format of matrix products")


def read_sample_options(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> SampleOptions:
    """Reads the options. Each has a dotted name too (``--sample.run``), for yaml files. Raises :class:`ConfigError`."""
    named = {f"sample.{f.name}": f for f in fields(SampleOptions)}
    flags = {f"--{f.name.replace('_', '-')}": f"sample.{f.name}" for f in fields(SampleOptions)}
    reader = OptionReader(named, "Draws images with a trained diffusion model.", flags)
    values = reader.read(argv, os.environ if environment is None else environment)
    options = SampleOptions(**{name.partition(".")[2]: value for name, value in values.items()})
    reader.problems += messages({"--run: it is missing; expected the folder of a finished run": options.run is None})
    reader.check()
    return options


def chosen_classes(stated: str, names: Sequence[str]) -> list[int]:
    """The numbers of the classes that ``--classes`` states, in its order. A name may contain commas.

    A text that is a name is that class, also if it is a number. Raises :class:`ConfigError` for unknown classes.
    """
    if stated == "all":
        return list(range(len(names)))
    numbers = {str(number): number for number in range(len(names))} | {name: k for k, name in enumerate(names)}
    parts, found = stated.split(","), []
    while parts:
        ends = range(len(parts), 0, -1)  # the longest name first
        end = next((end for end in ends if ",".join(parts[:end]).strip() in numbers), 0)
        if not end:
            wrong = parts[0].strip()
            near = difflib.get_close_matches(wrong, names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--classes: the run has no class '{wrong}', expected 0 to {len(names) - 1}, or a name, "
                              f"such as {names[0]}{hint}")  # fmt: skip
        found.append(numbers[",".join(parts[:end]).strip()])
        parts = parts[end:]
    return list(dict.fromkeys(found))


def file_name(label: int, name: str, number: int) -> str:
    """The name of an image's file: letters, digits, dots, dashes and underscores."""
    safe = re.sub(r"[^\w.-]+", "-", name)[:MOST_NAME]
    return f"{label:04d}_{safe}_{number:04d}.png"


def load_autoencoder(folder: str, model: Any, trained: Mapping[str, Any], device: torch.device) -> Autoencoder:
    """The autoencoder in ``folder``; ConfigError if it is not the one whose latents the model was trained on.

    ``trained``: what the run's ``config.json`` says under "diffusion".
    """
    if trained.get("autoencoder") == "":
        raise ConfigError(
            "--vae: the model was trained on files of FFCV, which do not say what scale and autoencoder their latents "
            "have. Train on latents that write_dataset.py --format latent wrote"
        )
    found = Autoencoder.load(folder, device)
    ours = found.channels, found.stride, found.digest
    expected = model.in_chans, model.stride, trained.get("autoencoder", found.digest)
    if ours != expected:
        parts = zip(("channels", "stride", "digest"), ours, expected, strict=True)
        differs = ", ".join(f"{name} {mine} instead of {other}" for name, mine, other in parts if mine != other)
        raise ConfigError(f"--vae: {folder} is another autoencoder than the model was trained with: {differs}")
    return found


def trained_schedule(trained: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a run. ``trained``: see :func:`load_autoencoder`."""
    return NoiseSchedule(trained.get("steps", 1000), trained.get("schedule", "linear"))


class Sampler:
    """A run's exported model, its noise schedule and, for latents, its autoencoder.

    Raises :class:`ConfigError` if ``run`` has no finished diffusion model, or if ``vae`` does not fit it.
    """

    def __init__(self, run: str | os.PathLike[str], vae: str | None, device: torch.device, precision: torch.dtype):
        self.exported = ExportedRun(run)
        if task_name(self.exported.architecture) != "diffusion":
            raise ConfigError(f"--run: {run} holds a classifier, expected a diffusion model; python -m "
                              f"vitlocal.predict --run {run} classifies photos with it")  # fmt: skip
        self._trained: dict[str, Any] = self.exported.description.get("diffusion", {})
        self.schedule = trained_schedule(self._trained)
        self._device, self._precision = device, precision
        self.model: Any = self.exported.load().to(device)
        self.size = self.exported.side * self.model.stride  # of images, px
        self._files: list[Path] = []  # the autoencoder's weights
        self.autoencoder = self._open_autoencoder(vae or self._trained.get("vae"))

    def _open_autoencoder(self, folder: str | None) -> Autoencoder | None:
        if self.model.stride == 1:
            if folder is not None:
                raise ConfigError(f"--vae: {self.exported.folder} has a model of pixels; leave it out")
            return None
        if folder is None:
            raise ConfigError("--vae: it is missing, because the model draws latents; expected the folder of the "
                              "autoencoder that it was trained with")  # fmt: skip
        self._files = sorted(Path(folder).glob("diffusion_pytorch_model*"))
        return load_autoencoder(folder, self.model, self._trained, self._device)

    def draw(
        self, labels: Tensor, keys: Tensor, options: SamplerOptions, batch_size: int, progress: Callable[[int], None]
    ) -> Iterator[Tensor]:
        """Yields batches of images (B, 3, H, W) uint8 of the classes ``labels`` (N,).

        ``keys`` and ``progress``: see :func:`vitlocal.tasks.sampling.sample`.
        """
        remedy = f"use --batch-size {max(1, batch_size // 2)}"
        with explained_memory_errors("drawing samples", self.size, batch_size, remedy):
            for drawn in sample_batches(
                self.model, self.schedule, labels, keys, self.size, options, batch_size=batch_size,
                device=self._device, precision=self._precision, progress=progress,
            ):  # fmt: skip
                yield to_images(drawn, self.autoencoder)

    def options(self, stated: SampleOptions) -> SamplerOptions:
        """How images are drawn: as ``stated``, and the rest as in the run's evaluations."""
        evaluated = self._trained | {"steps": self._trained.get("sample_steps")}  # "steps" are those of the noise there
        pairs = {each.name: (getattr(stated, each.name), evaluated.get(each.name)) for each in fields(SamplerOptions)}
        values = {name: theirs if mine is None else mine for name, (mine, theirs) in pairs.items()}
        return SamplerOptions(**{name: value for name, value in values.items() if value is not None})

    def record(self) -> dict[str, Any]:
        """What identifies the model, for ``samples.json``."""
        return {
            "run": str(self.exported.folder.resolve()), "weights": self.exported.digest,
            "architecture": self.exported.architecture, "size": self.size,
            "schedule": self.schedule.kind, "schedule_steps": self.schedule.steps,
            "autoencoder": {path.name: file_digest(path) for path in self._files},
            "limits_x0": self.autoencoder is None, "device": str(self._device),
            "precision": str(self._precision).removeprefix("torch."),
        }  # fmt: skip


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that becomes ``path`` when the block ends. After an error or Ctrl-C, there is nothing at ``path``."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"--out: {path} is there already; remove it, or name another folder by --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def main(argv: Sequence[str]) -> None:
    """Writes a PNG for each image, ``grid.png``, and ``samples.json``, which has all that the images depend on."""
    options = read_sample_options(argv)
    device = choose_device(options.device)
    sampler = Sampler(options.run or "", options.vae, device, choose_precision(options.precision, device))
    how = sampler.options(options)
    how.times(sampler.schedule.steps)  # refuses too many steps
    names, count = sampler.exported.class_names, options.count
    classes, out = chosen_classes(options.classes, names), Path(options.out or sampler.exported.folder / "samples")
    labels, numbers = torch.tensor(classes).repeat_interleave(count), torch.arange(count).repeat(len(classes))
    keys = sample_keys(options.seed, labels, numbers)
    samples = [
        {"file": file_name(label, names[label], number), "label": label, "class": names[label], "key": key}
        for label, number, key in zip(labels.tolist(), numbers.tolist(), keys.tolist(), strict=True)
    ]
    total, signals, shown = how.steps * len(samples), StopSignals(prints=False), []
    bar = tqdm(total=total, disable=not sys.stderr.isatty(), leave=False, unit=" steps")

    def progress(steps: int) -> None:
        bar.update(steps)
        if signals.received is not None:
            raise Interrupted(signals.received)

    with signals.handled(), new_folder(out) as folder, bar:
        rest = enumerate(samples)
        for images in sampler.draw(labels, keys, how, options.batch_size, progress):
            for image, (place, sample) in zip(images, rest, strict=False):
                with naming(out / sample["file"]):
                    Image.fromarray(image.movedim(0, -1).numpy()).save(folder / sample["file"])
                if place // count < GRID_ROWS and place % count < GRID_COLUMNS:
                    shown.append(image)
        rows = torch.stack(shown).unflatten(0, (-1, min(count, GRID_COLUMNS)))
        record = sampler.record() | asdict(how) | {"seed": options.seed, "samples": samples}
        with naming(out):
            draw_grid(rows, [names[label] for label in classes[:GRID_ROWS]]).save(folder / "grid.png")
            (folder / "samples.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{len(samples)} images of {len(classes)} classes, grid.png and samples.json are in {out}")
