"""A trained run on photos: python -m vitlocal.predict --run runs/x photo.jpg [more.jpg …]"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import vitlocal.models  # noqa: F401 (registers ours with timm)
from vitlocal.data.augment import Normalize
from vitlocal.data.crops import centre_box, cut
from vitlocal.data.images import decode_rgb
from vitlocal.errors import ConfigError, run_command

EXPORT = ("model.safetensors", "config.json")


@dataclass(frozen=True)
class Guess:
    name: str
    probability: float


class Predictor:
    """A run's exported model with its preprocessing: the centre crop that its validation used."""

    def __init__(self, run: str | os.PathLike[str]):
        """Raises ConfigError where ``run`` is not the folder of a finished run."""
        folder = Path(run)
        for name in EXPORT:
            if not (folder / name).is_file():
                raise ConfigError(
                    f"--run: {folder / name} is not there; expected the folder of a finished run, as train_imagenet.py "
                    "leaves it"
                )
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        preprocessing = described["pretrained_cfg"]
        self.names: list[str] = described["label_names"]
        self.size, self.part = preprocessing["input_size"][1], preprocessing["crop_pct"]
        self.model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        self.normalize = Normalize()

    def crop(self, image: Image.Image) -> torch.Tensor:
        """The (3, S, S) uint8 centre crop of an RGB image, at the run's evaluation size."""
        return pil_to_tensor(cut(image, centre_box(image.height, image.width, self.part), self.size))

    @torch.inference_mode()
    def __call__(self, image: Image.Image, count: int = 5) -> list[Guess]:
        """The ``count`` most probable classes of an RGB image, best first."""
        logits = self.model(self.normalize(self.crop(image)[None]).contiguous(memory_format=torch.channels_last))
        best = logits.softmax(1).topk(min(count, len(self.names)))
        return [
            Guess(self.names[place], probability)
            for probability, place in zip(best.values[0].tolist(), best.indices[0].tolist(), strict=True)
        ]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m vitlocal.predict", description=__doc__)
    parser.add_argument("--run", required=True, help="the folder of a finished run")
    parser.add_argument("photos", nargs="+", metavar="photo", help="image files")
    options = parser.parse_args(argv)
    for photo in options.photos:
        if not Path(photo).is_file():
            raise ConfigError(f"{photo} is not a file; expected photos after --run")
    predictor = Predictor(options.run)
    for photo in options.photos:
        guesses = predictor(decode_rgb(Path(photo).read_bytes(), photo, "leave it out, or restore it"))
        print(photo)
        for guess in guesses:
            print(f"  {100 * guess.probability:5.1f} %  {guess.name}")


if __name__ == "__main__":
    sys.exit(run_command(main))
