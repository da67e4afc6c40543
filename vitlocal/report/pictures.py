"""The pictures of a run's evaluations on its page: grids of samples, and how they were drawn and judged."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitlocal.data.images.pixels import open_image
from vitlocal.report.run_folder import PICTURES, RunRecord, escaped

OLDER = 5  # older pictures, from all over the run
WIDTH, OLDER_WIDTH = 1200, 360  # px, at most
QUALITY, OLDER_QUALITY = 88, 70  # of JPEG


def image_data(image: Image.Image, form: str = "PNG", **options: int) -> str:
    """The image as the address of an HTML element, encoded as PNG or JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def shown_pictures(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """The pictures of a run folder to show, by name: steps and files, oldest first; the newest and some older ones."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted((folder / PICTURES).glob("*_*.png")):
        step, _, name = path.stem.partition("_")
        if step.isdecimal():
            found.setdefault(name, []).append((int(step), path))
    return {
        name: [files[place] for place in np.unique(np.linspace(0, len(files) - 1, OLDER + 1).round().astype(int))]
        for name, files in found.items()
    }


def embedded(path: Path, width: int, quality: int, alt: str) -> str:
    """A picture as an HTML element of at most ``width`` px."""
    with open_image(path) as file:
        image = file.convert("RGB")
    image.thumbnail((width, image.height))
    return f'<img alt="{escaped(alt)}" src="{image_data(image, "JPEG", quality=quality)}">'


def judged_text(run: RunRecord) -> str:
    """How the samples of the last Fréchet distance were drawn and judged; empty without one."""
    record = next((record for record in reversed(run.records) if record.get("frechet")), None)
    if record is None:
        return ""
    note, floor = record["frechet"], record["frechet"]["floor"]
    real = "" if floor is None else f", where {note['floor_images']:,} held-out images have {floor:.2f}"
    accuracy = record.get("sample_accuracy")
    right = "" if accuracy is None else f" {accuracy:.1f} % of the samples show the requested class."
    channels = "" if note["guided_channels"] == "all" else f" of {note['guided_channels']} channels"
    return (
        f"{note['name']}, epoch {record['epoch']:.2f}: {record['frechet_distance']:.2f}{real}. Measured on "
        f"{note['samples']:,} samples and {note['reference_images']:,} {note['reference']}. Drawn with "
        f"{note['sampler'].upper()}, {note['steps']} steps, guidance {note['guidance']:g}{channels}, seed "
        f"{note['seed']}.{right}"
    )


def pictures_part(runs: Sequence[RunRecord]) -> str:
    """The newest picture of each run, older ones in a row, and how samples were judged. Empty without pictures."""
    parts = []
    for run in runs:
        epochs = {record["step"]: record["epoch"] for record in run.records}
        found, title = [], f"<h3>{escaped(run.name)}</h3>" if len(runs) > 1 else ""
        for name, files in shown_pictures(run.folder).items():
            whens = [f"{name} at epoch {epochs[step]:.2f}" if step in epochs else f"{name} at step {step}"
                     for step, _ in files]  # fmt: skip
            newest = embedded(files[-1][1], WIDTH, QUALITY, whens[-1])
            found.append(f'<figure class="picture">{newest}<figcaption>{escaped(whens[-1])}</figcaption></figure>')
            older = [
                f"<figure>{embedded(path, OLDER_WIDTH, OLDER_QUALITY, when)}"
                f"<figcaption>{escaped(when)}</figcaption></figure>"
                for (_, path), when in zip(files[:-1], whens, strict=False)
            ]
            found.append(f'<div class="pictures">{"".join(older)}</div>' if older else "")
        if text := judged_text(run):
            found.append(f"<p>{escaped(text)}</p>")
        parts += [title, *found] if found else []
    return "<h2>Samples</h2>" + "".join(parts) if parts else ""
