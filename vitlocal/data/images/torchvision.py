"""Any data set of torchvision.datasets, by its name."""

import functools
import inspect
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitlocal.data.images.classes import numbered_by_rank, with_classes
from vitlocal.data.images.image_set import NO_CHOICE, ImageSet, SourceChoice, listed
from vitlocal.data.images.pixels import to_rgb
from vitlocal.errors import ConfigError, DataError, UndecodableImage

TORCHVISION_ROOT = "data/torchvision"


# Modules of torchvision.datasets whose sets have no images with one class each, and such sets of other modules.
OTHER_TASKS = set(
    "LFWPairs LSUNClass _optical_flow _stereo_matching celeba cityscapes coco fakedata flickr folder hmdb51 kinetics "
    "kitti moving_mnist phototour sbd sbu ucf101 vision voc widerface".split()
)
# Sets that need more than train=True or split='train': the arguments for train and for val (None: it has none), and
# the subsets that replace {}. The first is the default.
Arguments = dict[str, Any]
SETS: dict[str, tuple[Arguments, Arguments | None, tuple[str, ...]]] = {
    "EMNIST": (
        {"split": "{}", "train": True},
        {"split": "{}", "train": False},
        ("balanced", "byclass", "bymerge", "letters", "digits", "mnist"),
    ),
    "FGVCAircraft": (
        {"split": "train", "annotation_level": "{}"},
        {"split": "val", "annotation_level": "{}"},
        ("variant", "family", "manufacturer"),
    ),
    "INaturalist": ({"version": "{}"}, {"version": "2021_valid"}, ("2021_train", "2021_train_mini")),
    "Imagenette": ({"split": "train", "size": "{}"}, {"split": "val", "size": "{}"}, ("full", "320px", "160px")),
    "LSUN": ({"classes": "train"}, {"classes": "val"}, ()),
    "Omniglot": ({"background": True}, None, ()),  # its other part has other characters
    "Places365": ({"split": "train-{}"}, {"split": "val"}, ("standard", "challenge")),
    "SVHN": ({"split": "{}"}, {"split": "test"}, ("train", "extra")),
}
# Where sets keep their labels: the attribute, and the place of the label in each of its items.
LABELS = {
    "targets": None, "labels": None, "_labels": None, "y": None, "samples": 1, "_samples": 1,
    "_flat_character_images": 1, "index": 0,
}  # fmt: skip
VALIDATION_WORDS = ("val", "valid", "validation", "test")
CLASSES = ("classes", "categories", "all_categories", "_characters")


def open_torchvision(rest: str, split: str, choice: SourceChoice = NO_CHOICE) -> ImageSet:
    """Opens 'NAME' or 'NAME:ROOT'. The split becomes the argument train=… or split=… that the set's signature has.

    Raises ConfigError if the set is not known, is not for classification, has no such split or subset, or fails.
    """
    from torchvision import datasets

    name, _, given = rest.partition(":")
    root = str(Path(given).expanduser().absolute()) if given else TORCHVISION_ROOT
    spec = f"torchvision:{name}:{root}" if given else f"torchvision:{name}"
    kind: Any = getattr(datasets, name, None)
    if name not in datasets.__all__ or not inspect.isclass(getattr(datasets, name)):
        raise ConfigError(
            f"source '{spec}': torchvision.datasets has no '{name}'; expected a name such as CIFAR10, "
            "Flowers102, Food101 or Imagenette, in this spelling"
        )
    if OTHER_TASKS & {name, kind.__module__.rpartition(".")[2]}:
        raise ConfigError(
            f"source '{spec}': {name} has no images with one class each, but attributes, boxes, masks, texts, pairs or "
            "videos; name a set for classification, or a folder of images without 'torchvision:'"
        )
    if split not in ("train", "val"):
        raise ConfigError(f"source '{spec}' has no split '{split}'; expected 'train' or 'val'")
    takes = inspect.signature(kind.__init__).parameters
    choices = _arguments(spec, name, split, takes, choice.subset)
    problem = "no such split"
    downloads = "download" in takes or hasattr(kind, "download")
    for download in (False, True) if downloads else (False,):
        for chosen in choices:
            arguments = {"root": root, **chosen}
            try:
                if download:
                    os.makedirs(root, exist_ok=True)
                    kind(**arguments, download=True)
                images = TorchvisionImages(spec, name, split, arguments)
            except ConfigError:
                raise
            except ImportError as error:
                raise ConfigError(f"source '{spec}' needs another package: {error}; install it with pip") from error
            except Exception as error:  # for example missing files, no network
                if isinstance(error, ValueError) and "split" in str(error):
                    continue  # the set has no split of that name
                problem = f"{type(error).__name__}: {error}"
                break  # the next name, such as 'test', would be another split of the set
            images.reads = tuple(f"{argument}: {value}" for argument, value in chosen.items())
            if chosen.get("split") == "test":
                images.notes += (f"{name} has no split for validation, so '{split}' reads 'test'",)
            if split == "val" and images.has_gaps:  # the training split numbers the labels
                return with_classes(images, open_torchvision(rest, "train", choice).classes, False)
            return images
    raise ConfigError(
        f"source '{spec}', split '{split}' could not be opened from '{root}': {problem}. Download it there "
        f"with torchvision on a machine with a network, or name its folder: torchvision:{name}:FOLDER"
    )


def _arguments(spec: str, name: str, split: str, takes: Mapping[str, Any], subset: str | None) -> list[Arguments]:
    """The arguments to try."""
    training = split == "train"
    train, val, subsets = SETS.get(name, ({}, {}, ()))
    chosen = subset
    if subset is not None:
        chosen = next(
            (known for known in subsets if subset in (known, known.rpartition("_")[2], f"train-{known}")), None
        )
        if chosen is None:
            expected = f"expected one of {listed(subsets)}" if subsets else "remove it, because the set has only one"
            raise ConfigError(f"source '{spec}' has no --subset {subset}; {expected}")
    arguments = train if training else val
    if arguments:
        word = chosen or next(iter(subsets), "")
        filled = {key: value.format(word) if isinstance(value, str) else value for key, value in arguments.items()}
        return [filled]
    if arguments is not None and "train" in takes:
        return [{"train": training}]
    if arguments is not None and "split" in takes:
        return [{"split": word} for word in (("train", "trainval") if training else VALIDATION_WORDS)]
    if training:
        return [{}]
    raise ConfigError(
        f"source '{spec}' has no splits, so it has no '{split}'; name another set, or copy its images to folders "
        "train/<class>/ and val/<class>/"
    )


class TorchvisionImages(ImageSet):
    """A set of torchvision.datasets. Each process that reads builds the dataset again."""

    holds_files = False
    has_gaps = False  # its classes have no names, and their numbers have gaps

    def __init__(self, spec: str, name: str, split: str, arguments: dict[str, Any]) -> None:
        self.spec = spec
        self._name, self._split, self._arguments = name, split, arguments
        dataset = self._dataset
        self.labels = _dataset_labels(dataset, spec)
        if self.labels.min(initial=0) < 0:
            raise ConfigError(f"source '{spec}', split '{split}' has images without a class; name another set")
        classes = _dataset_classes(dataset, int(self.labels.max(initial=-1)) + 1)
        if classes is None:
            self.labels, self.classes, self.notes = numbered_by_rank(self.labels)
            self.has_gaps = bool(self.notes)
        else:
            self.classes = classes

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
            image = self._dataset[index][0]
            image.load()  # some sets only open the file
            return to_rgb(image)
        except Exception as error:
            failed = isinstance(error, OSError) and error.errno is not None  # by the system, not by a decoder
            raise (DataError if failed else UndecodableImage)(
                f"{self.entry(index)} of {self.spec} cannot be read ({error}); "
                f"remove '{self._arguments['root']}' to download it again"
            ) from error


def _dataset_labels(dataset: Any, spec: str) -> np.ndarray:
    """The labels, (n,) int64, from the attribute that holds them, else by reading every item once."""
    if "indices" in vars(dataset) and "dbs" in vars(dataset):  # LSUN: a database for each class
        return np.repeat(np.arange(len(dataset.indices)), np.diff([0, *dataset.indices]))
    for name, place in LABELS.items():
        kept = getattr(dataset, name, None)
        if kept is not None and len(kept) == len(dataset):
            labels = np.asarray(kept if place is None else [item[place] for item in kept])
            if labels.ndim == 1 and labels.dtype.kind in "iu":
                return labels.astype(np.int64)
    items = [dataset[index][1] for index in range(len(dataset))]
    try:
        return np.array([int(label) for label in items], np.int64)
    except (TypeError, ValueError):
        raise ConfigError(
            f"source '{spec}': expected one class for each image, got {items[0]!r}; name another set"
        ) from None


def _dataset_classes(dataset: Any, least: int) -> tuple[str, ...] | None:
    """The names of the classes; None if the set has none, or fewer than ``least``."""
    names = next((kept for kept in (getattr(dataset, name, None) for name in CLASSES) if kept is not None), None)
    if names is None and isinstance(getattr(dataset, "class_to_idx", None), dict):
        names = sorted(dataset.class_to_idx, key=dataset.class_to_idx.get)
    if names is None or len(names) < least:
        return None
    words = (name if isinstance(name, str) else ", ".join(map(str, name)) for name in names)
    if "dbs" in vars(dataset):  # LSUN's classes are bedroom_train, bedroom_val, …
        return tuple(word.rpartition("_")[0] for word in words)
    return tuple(words)
