"""The original images of a split in the order of its manifest, for the sources that read no .beton files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vitlocal.data.images import ImageSet, open_images, resolve_source
from vitlocal.data.manifest import Manifest
from vitlocal.errors import ConfigError


def open_originals(root: str, spec: str | None, split: str) -> tuple[ImageSet, np.ndarray]:
    """The images, and for each row of the split the index of its image, (n,) int64.

    ``spec`` names the images; None: the manifest in ``root`` does. Without a manifest, every image is a row.
    Raises ConfigError if neither names them, or if images of the manifest are missing.
    """
    path = Path(root) / f"{split}.json"
    manifest = Manifest.load(path) if path.exists() else None
    if spec is None and manifest is None:
        try:
            spec = resolve_source(None)
        except ConfigError as error:
            raise ConfigError(
                f"data.source: no source is given, and {path}, which would name the original images, does not exist. "
                f"Set --data.source=FOLDER, or write the data folder. ({error})"
            ) from error
    if manifest is None:
        images = open_images(spec, split)
        return images, np.arange(len(images))
    images = open_images(spec or manifest.source.spec, split)
    index_of = {images.entry(index): index for index in range(len(images))}
    missing = [entry for entry in manifest.entries if entry not in index_of]
    if missing:
        raise ConfigError(
            f"data.source: {spec or manifest.source.spec} lacks {len(missing)} of the {manifest.count} images in the "
            f"{manifest.split} manifest, for example {missing[0]}; name the source that the files were written from"
        )
    return images, np.array([index_of[entry] for entry in manifest.entries])
