"""What the sources that read original images have in common."""

from pathlib import Path

import numpy as np
import torch

from vitlocal.data.batch import Source
from vitlocal.data.crops import CropPolicy
from vitlocal.data.images import SourceChoice, open_images, resolve_source
from vitlocal.data.images.image_set import NO_CHOICE
from vitlocal.data.manifest import Manifest
from vitlocal.data.shares import WHOLE, Share
from vitlocal.errors import ConfigError

MOVED = "If the images were moved, set --data.source, or run write_dataset.py again with their new place"


class OriginalsSource(Source):
    """A split read from its original images. If the data folder ``root`` has a manifest, its rows are the rows.

    ``spec`` names the images; None: the manifest does. ``numbers`` (n,) int64 has the index of each row's image.
    Raises ConfigError if neither names the images, or if images of the manifest are missing.
    """

    def __init__(
        self, root: str, spec: str | None, split: str, crops: CropPolicy, device: torch.device, workers: int,
        share: Share = WHOLE,
    ):  # fmt: skip
        path = Path(root) / f"{split}.json"
        manifest = Manifest.load(path) if path.exists() else None
        try:
            spec = resolve_source(spec or (manifest.source.spec if manifest else None))
        except ConfigError as error:
            raise ConfigError(
                f"data.source: no source is given, and {path}, which would name the original images, does not exist. "
                f"Set --data.source=FOLDER, or write the data folder. ({error})"
            ) from error
        choice = NO_CHOICE
        if manifest is not None:
            written = manifest.source
            choice = SourceChoice(written.image, written.label, written.subset, manifest.classes)
        try:
            self.images, self.workers = open_images(spec, split, choice), workers
        except ConfigError as error:
            raise ConfigError(f"data.source: {error}. {MOVED}") from error
        self.numbers = np.arange(len(self.images))
        if manifest is not None:
            index_of = {self.images.entry(index): index for index in range(len(self.images))}
            missing = [entry for entry in manifest.entries if entry not in index_of]
            if missing:
                raise ConfigError(
                    f"data.source: {spec} lacks {len(missing)} of the {manifest.count} images in the {split} manifest, "
                    f"for example {missing[0]}; name the source that the files were written from"
                )
            self.numbers = np.array([index_of[entry] for entry in manifest.entries])
        super().__init__(tuple(self.images.classes), len(self.numbers), None, crops, device, share)
