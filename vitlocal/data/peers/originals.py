"""The original images of a split, row by row as its manifest lists them: what the sources without .beton files read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vitlocal.data.images import ImageSet, open_images, resolve_source
from vitlocal.data.manifest import Manifest
from vitlocal.errors import ConfigError


def open_originals(root: str, spec: str | None, split: str) -> tuple[ImageSet, np.ndarray]:
    """The images, and the index among them of each row, (n,) int64.

    ``spec`` is where they are, else what the manifest in ``root`` says; without a manifest all images are rows.
    Raises ConfigError where neither tells, or images that the manifest lists are missing.
    """
    path = Path(root) / f"{split}.json"
    manifest = Manifest.load(path) if path.exists() else None
    if spec is None and manifest is None:
        try:
            spec = resolve_source(None)
        except ConfigError as error:
            raise ConfigError(
                f"data.source: {path}, which would name the original images, is not there, and no other source is "
                f"given. Set --data.source=FOLDER, or write the data folder. ({error})"
            ) from error
    images = open_images(spec or manifest.source.spec, split)
    return images, np.arange(len(images)) if manifest is None else _rows(images, manifest, spec)


def _rows(images: ImageSet, manifest: Manifest, spec: str | None) -> np.ndarray:
    """The source's index of each row of the manifest, ``(n,)`` int64."""
    if not manifest.skipped and len(images) == manifest.count:
        if all(images.entry(index) == entry for index, entry in enumerate(manifest.entries)):
            return np.arange(manifest.count)
    place = {images.entry(i): i for i in range(len(images))}
    missing = [entry for entry in manifest.entries if entry not in place]
    if missing:
        raise ConfigError(
            f"data.source: {spec or manifest.source.spec} lacks {len(missing)} of the {manifest.count} images that "
            f"the {manifest.split} manifest lists, {missing[0]} for one; name the source of the files"
        )
    return np.array([place[entry] for entry in manifest.entries])
