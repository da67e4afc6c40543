"""The native loader with a crop policy, as the trainer opens it."""

from pathlib import Path
from typing import Any

from vitlocal.data.crops import CropPolicy
from vitlocal.data.loader import Loader
from vitlocal.data.reader import LoaderResources


def native(folder: Path, split: str, crops: CropPolicy, resources: LoaderResources, **options: Any) -> Loader:
    return Loader(
        folder, split, shuffle=crops.shuffles, crop="random" if crops.random else "centre", seed=crops.seed,
        scale=crops.scale, ratio=crops.ratio, flip=crops.flip, repeats=crops.repeats, crop_pct=crops.centre,
        drop_last=False, copy=False, resources=resources, **{"batch_size": 16, **options},
    )  # fmt: skip
