"""Classifies photos with a trained run: python -m vitlocal.predict --run runs/x photo.jpg [more.jpg …]"""

if __name__ == "__main__":  # first, so that signals are handled while PyTorch is imported
    from vitlocal.launch import predict

    predict()

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from vitlocal.data.augment import Normalize
from vitlocal.data.crops import CropPolicy, cut
from vitlocal.data.images.image_set import read_file
from vitlocal.data.images.pixels import decode_whole
from vitlocal.data.native import native_box, native_policy
from vitlocal.errors import ConfigError, shown
from vitlocal.models.exported import ExportedRun
from vitlocal.tasks.metrics import task_name


class Predictor:
    """A run's exported model with its preprocessing, the center crop of the run's evaluation.

    Raises :class:`ConfigError` if ``run`` is not the folder of a classifier's finished run.
    """

    def __init__(self, run: str | os.PathLike[str]) -> None:
        exported = ExportedRun(run)
        if task_name(exported.architecture) != "classification":
            raise ConfigError(
                f"--run: {run} holds a diffusion model, expected a classifier; python -m vitlocal.sample --run {run} "
                "draws images with it"
            )
        self.class_names, self.size = exported.class_names, exported.side
        self._policy = native_policy(CropPolicy(random=False, centre=exported.crop_pct), epoch=0)
        self.model = exported.load()

    @torch.inference_mode()
    def __call__(self, image: Image.Image, count: int = 5) -> list[tuple[str, float]]:
        """Returns the ``count`` most probable classes of an RGB image with their probabilities, best first."""
        box = native_box(self._policy, 0, image.height, image.width, self.size)
        crop = cut(image, box, self.size)
        pixels = Normalize()(pil_to_tensor(crop)[None])  # (1, 3, S, S)
        logits = self.model(pixels.contiguous(memory_format=torch.channels_last))
        best = logits.softmax(1)[0].topk(min(count, len(self.class_names)))
        names = [self.class_names[index] for index in best.indices.tolist()]
        return list(zip(names, best.values.tolist(), strict=True))


def main(argv: Sequence[str]) -> None:
    """Prints the five most probable classes of each photo."""
    parser = argparse.ArgumentParser(prog="python -m vitlocal.predict", description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("photos", nargs="+", metavar="photo", help="image files")
    options = parser.parse_args(argv)
    for photo in options.photos:
        if not Path(photo).is_file():
            missing = "is a pipe or a device" if Path(photo).exists() else "does not exist"
            found = "is a folder; name the photos in it" if Path(photo).is_dir() else missing
            raise ConfigError(
                f"{photo} {found}; expected image files, as in python -m vitlocal.predict --run {options.run} *.jpg"
            )
    predictor = Predictor(options.run)
    for photo in options.photos:
        image = decode_whole(read_file(photo), photo, "leave it out, or restore it")
        print(shown(photo))
        for name, probability in predictor(image):
            print(f"  {100 * probability:5.1f} %  {shown(name)}")
