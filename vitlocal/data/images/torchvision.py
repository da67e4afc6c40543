"""Any data set of torchvision.datasets, by its name."""

import functools
import inspect
import io
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitlocal.data.images.image_set import NO_CHOICE, ImageSet, SourceChoice
from vitlocal.data.images.pixels import to_rgb
from vitlocal.errors import ConfigError, DataError, UndecodableImage

TORCHVISION_ROOT = "data/torchvision"


def open_torchvision(rest: str, split: str, choice: SourceChoice = NO_CHOICE) -> ImageSet:
    """Opens 'NAME' or 'NAME:ROOT'. The split becomes the argument train=… or split=… that the set's signature has."""
    from torchvision import datasets

    name, _, given = rest.partition(":")
    root = str(Path(given).expanduser().absolute()) if given else TORCHVISION_ROOT
    spec = f"torchvision:{name}:{root}" if given else f"torchvision:{name}"
    if name not in datasets.__all__:
        raise ConfigError(
            f"source '{spec}': torchvision.datasets has no '{name}'; expected a name such as CIFAR10, "
            "Flowers102, Food101 or Imagenette, in this spelling"
        )
    if split not in ("train", "val"):
        raise ConfigError(f"source '{spec}' has no split '{split}'; expected 'train' or 'val'")
    takes = inspect.signature(getattr(datasets, name).__init__).parameters
    if "train" in takes:
        choices: list[dict[str, Any]] = [{"train": split == "train"}]
    elif "split" in takes:
        words = ("train", "trainval") if split == "train" else ("val", "valid", "validation", "test")
        choices = [{"split": word} for word in words]
    elif split == "train":
        choices = [{}]
    else:
        raise ConfigError(f"source '{spec}' has no splits, so it has no '{split}'; name another source")
    problem = "no such split"
    for download, split_argument in itertools.product((False, True) if "download" in takes else (False,), choices):
        arguments = {"root": root, **split_argument}
        try:
            if download:
                os.makedirs(root, exist_ok=True)
                getattr(datasets, name)(**arguments, download=True)
            return TorchvisionImages(spec, name, split, arguments)
        except ConfigError:
            raise
        except Exception as error:  # for example missing files, no such split, no network
            if not (isinstance(error, ValueError) and "split" in str(error)):
                problem = f"{type(error).__name__}: {error}"
    raise ConfigError(
        f"source '{spec}', split '{split}' could not be opened from '{root}': {problem}. Download it there "
        f"with torchvision on a machine with a network, or name its folder: torchvision:{name}:FOLDER"
    )


class TorchvisionImages(ImageSet):
    """A set of torchvision.datasets. Each process that reads builds the dataset again."""

    holds_files = False

    def __init__(self, spec: str, name: str, split: str, arguments: dict[str, Any]) -> None:
        self.spec = spec
        self._name, self._split, self._arguments = name, split, arguments
        dataset = self._dataset
        self.labels = _dataset_labels(dataset, spec)
        self.classes = _dataset_classes(dataset, int(self.labels.max(initial=-1)) + 1)

    @functools.cached_property
    def _dataset(self) -> Any:
        from torchvision import datasets

        return getattr(datasets, self._name)(**self._arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_dataset"}

    def entry(self, index: int) -> str:
        return f"{self._split}/{range(len(self))[index]}"

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        self.load(index).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def load(self, index: int) -> Image.Image:
        index = range(len(self))[index]
        try:
            return to_rgb(self._dataset[index][0])
        except Exception as error:
            failed = isinstance(error, OSError) and error.errno is not None  # by the system, not by a decoder
            raise (DataError if failed else UndecodableImage)(
                f"{self.entry(index)} of {self.spec} cannot be read ({error}); "
                f"remove '{self._arguments['root']}' to download it again"
            ) from error


def _dataset_labels(dataset: Any, spec: str) -> np.ndarray:
    """The labels, (n,) int64, from the attribute that holds them, else by reading every item once."""
    for name in ("targets", "labels", "_labels", "_samples", "samples"):
        kept = getattr(dataset, name, None)
        if kept is not None and len(kept) == len(dataset):
            labels = np.asarray([item[1] for item in kept] if name.endswith("samples") else kept)
            if labels.ndim == 1 and labels.dtype.kind in "iu":
                return labels.astype(np.int64)
    items = [dataset[index][1] for index in range(len(dataset))]
    try:
        return np.array([int(label) for label in items], np.int64)
    except (TypeError, ValueError):
        raise ConfigError(
            f"source '{spec}': expected one class for each image, got {items[0]!r}; name another set"
        ) from None


def _dataset_classes(dataset: Any, least: int) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if names is None and isinstance(getattr(dataset, "class_to_idx", None), dict):
        names = sorted(dataset.class_to_idx, key=dataset.class_to_idx.get)
    if names is None or len(names) < least:
        return tuple(str(k) for k in range(least))
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in names)
