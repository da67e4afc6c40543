"""``vitlocal.write``: a data folder from any dataset in Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitlocal.data.costs import ensure_costs
from vitlocal.data.fields import field_types
from vitlocal.data.images.indexed import IndexedImages
from vitlocal.data.manifest import Manifest
from vitlocal.data.writer.write import write as write_images
from vitlocal.errors import ConfigError
from vitlocal.write_options import WriteOptions


def write(
    dataset: Any, out: str | Path, split: str = "train", *, sides: str | int | Sequence[int] = "auto",
    format: str = "auto", quality: int | None = None, sampling: int | None = None, keep_jpegs: bool | None = None,
    image: str = "image", label: str = "label", labels: Sequence[Any] | np.ndarray | None = None,
    classes: Sequence[str] | None = None, fields: Mapping[str, Any] | None = None, workers: int = 0,
    on_error: str = "raise", progress: bool = True, vae: str | Path | None = None,
) -> Manifest:  # fmt: skip
    """Writes the .beton files and the manifest of a split, as ``write_dataset.py`` does, from a dataset in Python.

    If it is interrupted, the same call continues. A split that is finished, and rows that are written, stay as they
    are, because changed images of a dataset in Python are not found: remove them to write other images. The dataset
    is read in order by one thread. Others encode.

    Args:
        dataset: anything with ``len()`` and ``[]``. A row is a tuple (image, label, values of the ``fields`` …) or a
            mapping. An image is the bytes or the path of a file, a PIL image, an array (H, W, 3) uint8, or a tensor
            (3, H, W) uint8. Labels are whole numbers from 0, or names.
        out: the data folder.
        split: "train" or "val".
        sides: long edges of the files, px: 64, [64, 256] or "64:raw,256:jpg"; "auto": the defaults for ImageNet.
        format, quality, sampling, keep_jpegs, workers: as the options of ``write_dataset.py``.
        image, label: the names of the image and the label in a mapping.
        labels: a label for each row. A row may then be an image alone. None: the labels are those of
            ``dataset.targets``, of a column of Hugging Face, or of the rows. Each row is read twice in the last case.
        classes: the names of the classes. None: the dataset's, or the numbers.
        fields: further fields to store, with their types: "int", "float", "bytes", "json", or an array's
            (dtype, shape).
        on_error: at an image that does not decode: "raise", or "skip" it.
        progress: show it.
        vae: for ``format="latent"``: the folder of diffusers' AutoencoderKL.

    Raises ConfigError for wrong arguments, DataError for an image that cannot be read and for a full disk.
    """
    if on_error not in ("raise", "skip"):
        raise ConfigError(f"on_error: got {on_error!r}, expected raise or skip")
    if split not in ("train", "val"):
        raise ConfigError(f"split: got {split!r}, expected train or val")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
        raise ConfigError(f"dataset: got {type(dataset).__name__}, expected rows with len() and [], at least one")
    if workers < 0:
        raise ConfigError(f"workers: got {workers}, expected a number of threads, or 0 for one per core")
    if quality is not None and not 1 <= quality <= 100:
        raise ConfigError(f"quality: got {quality}, expected 1 to 100")
    names = classes if classes is None else list(classes)
    if names is not None and (
        isinstance(classes, str)
        or not all(isinstance(name, str) and "\n" not in name for name in names)
        or len(set(names)) < len(names)
    ):
        raise ConfigError("classes: expected a list of different names, each on one line")
    edges = sides if isinstance(sides, str) else ",".join(map(str, np.atleast_1d(np.asarray(sides)).tolist()))
    images = IndexedImages(
        dataset, split, image=image, label=label, labels=labels, classes=names, fields=field_types(fields)
    )
    options = WriteOptions(
        split, images.spec, str(out), edges, format, quality, None if sampling is None else str(sampling), keep_jpegs,
        workers, "skip" if on_error == "skip" else "stop", vae=None if vae is None else str(vae),
    )  # fmt: skip
    manifest = write_images(options, images, progress)
    ensure_costs(out, manifest, progress)
    return manifest
