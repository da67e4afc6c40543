"""Which classes of a source are read, and which label each has."""

import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

from vitlocal.data.images.image_set import ImageSet, listed
from vitlocal.errors import ConfigError
from vitlocal.reading import read_whole


def normalized(name: str) -> str:
    """The name in Unicode's composed form (NFC): macOS stores names of files decomposed (NFD)."""
    return unicodedata.normalize("NFC", name)


def read_classes(path: str) -> tuple[str, ...]:
    """The class names in a file, one per line; raises ConfigError if it cannot be read or names a class twice."""
    try:
        # Folders need not have names in UTF-8. splitlines() would also split at rare characters within a name.
        # Editors of Windows begin a file with a mark of UTF-8.
        lines = read_whole(path).decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise ConfigError(f"--classes {path} cannot be read: {error}; name a text file, one class per line") from None
    names = [line.strip() for line in lines if line.strip()]  # in their own form, so that classes.txt gives its names
    forms = list(map(normalized, names))
    twice = sorted({form for form in forms if forms.count(form) > 1}) if len(set(forms)) < len(forms) else []
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
    if tuple(classes) == images.classes:
        return images
    for names in (images.classes, classes):
        forms = sorted(map(normalized, names))
        if same := sorted({one for one, other in pairwise(forms) if one == other}):
            raise ConfigError(
                f"source '{images.spec}' has several classes with one name: {listed(same, 3)}. Without --classes, and "
                "with the same classes in both splits, it can be read; else classes are matched by name"
            )
    label_of = {normalized(name): label for label, name in enumerate(classes)}
    labels = np.array([label_of.get(normalized(name), -1) for name in images.classes], np.int64)[images.labels]
    rows = np.flatnonzero(labels >= 0)
    selected = SelectedImages(images, rows)
    selected.labels, selected.classes = labels[rows], tuple(classes)
    if len(rows) < len(images):
        selected.left_out = {**images.left_out, "of other classes": len(images) - len(rows)}
    return selected


def numbered_by_rank(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Labels, classes and notes for (n,) numbers without names. Numbers with gaps are numbered in their order."""
    numbers, labels = np.unique(values, return_inverse=True)
    notes: tuple[str, ...] = ()
    if len(numbers) and numbers[-1] >= len(numbers):
        notes = (f"the labels are {len(numbers)} numbers from {numbers[0]} to {numbers[-1]}; they name the classes",)
    return labels.astype(np.int64), tuple(map(str, numbers.tolist())), notes


class SelectedImages(ImageSet):
    """The ``rows`` (n,) int64 of another image set."""

    def __init__(self, images: ImageSet, rows: np.ndarray) -> None:
        self._images, self._rows = images, rows
        self.labels, self.classes = images.labels[rows], images.classes
        self.spec, self.holds_files, self.in_order = images.spec, images.holds_files, images.in_order
        self.reads, self.left_out, self.notes = images.reads, images.left_out, images.notes

    def stamps(self) -> np.ndarray | None:
        stamps = self._images.stamps()
        return None if stamps is None else stamps[self._rows]

    def entry(self, index: int) -> str:
        return self._images.entry(int(self._rows[index]))

    def read(self, index: int) -> bytes:
        return self._images.read(int(self._rows[index]))

    def release(self, index: int) -> None:
        self._images.release(int(self._rows[index]) if index < len(self._rows) else len(self._images))

    def load(self, index: int) -> Image.Image:
        return self._images.load(int(self._rows[index]))
