"""Which classes of a source are read, and which label each has."""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitlocal.data.images.image_set import ImageSet, listed
from vitlocal.errors import ConfigError


def normalized(name: str) -> str:
    """The name in Unicode's composed form (NFC): macOS stores names of files decomposed (NFD)."""
    return unicodedata.normalize("NFC", name)


def read_classes(path: str) -> tuple[str, ...]:
    """The class names in a file, one per line; raises ConfigError if it cannot be read or names a class twice."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes {path} cannot be read: {error}; name a text file, one class per line") from None
    names = [normalized(line.strip()) for line in lines if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice or not names:
        raise ConfigError(f"--classes {path}: expected each class once, got {listed(twice)}{' twice' * bool(twice)}")
    return tuple(names)


def require_known_classes(names: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raises ConfigError if a class of ``names``, which are those of ``where``, is not ``known`` in training."""
    trained = {normalized(name) for name in known}
    if surplus := [name for name in names if normalized(name) not in trained]:
        raise ConfigError(
            f"{where}: {len(surplus)} of {len(names)} classes are not among the {len(known)} of the split 'train': "
            f"{listed(surplus, 3)}. Rename or remove them, add images of them to 'train', or choose classes with "
            "--classes FILE"
        )


def with_classes(images: ImageSet, classes: Sequence[str], chosen: bool) -> ImageSet:
    """The images with labels that are indices into ``classes``; the same object if its labels are already.

    If the user has ``chosen`` the classes, images of others are left out; else ConfigError is raised for them.
    """
    if not chosen:
        require_known_classes(images.classes, classes, f"source '{images.spec}'")
    index_of = {normalized(name): label for label, name in enumerate(classes)}
    labels = np.array([index_of.get(normalized(name), -1) for name in images.classes], np.int64)
    return images if tuple(classes) == images.classes else SelectedImages(images, labels, tuple(classes))


class SelectedImages(ImageSet):
    """Rows of other images, with other labels: ``new_labels`` (K,) has the new label of each label, -1 to leave out."""

    def __init__(self, images: ImageSet, new_labels: np.ndarray, classes: tuple[str, ...]) -> None:
        labels = new_labels[images.labels]
        self._images, self._rows = images, np.flatnonzero(labels >= 0)
        self.labels, self.classes = labels[self._rows], classes
        self.spec, self.holds_files, self.reads, self.notes = (
            images.spec,
            images.holds_files,
            images.reads,
            images.notes,
        )
        self.left_out: Mapping[str, int] = images.left_out
        if len(self._rows) < len(images):
            self.left_out = {**images.left_out, "of other classes": len(images) - len(self._rows)}

    def stamps(self) -> np.ndarray | None:
        stamps = self._images.stamps()
        return None if stamps is None else stamps[self._rows]

    def entry(self, index: int) -> str:
        return self._images.entry(int(self._rows[index]))

    def read(self, index: int) -> bytes:
        return self._images.read(int(self._rows[index]))

    def load(self, index: int) -> Image.Image:
        return self._images.load(int(self._rows[index]))
