"""Images in class folders, or in one folder with a list of their classes."""

import os
import re
from pathlib import Path

import numpy as np

from vitlocal.data.images.classes import normalized
from vitlocal.data.images.image_set import ImageSet, listed, read_file
from vitlocal.data.images.listing import LeftOut, list_photos, scan_split, stat_files
from vitlocal.data.images.pixels import photo_suffixes, suffix_reason
from vitlocal.data.images.solutions import EXPECTED_LISTS, TINY, find_solution, image_id
from vitlocal.errors import ConfigError


class FolderImages(ImageSet):
    """The images of a split's folder: in <class>/, at any depth, or all in it beside a list of their classes.

    Rows are ordered by class, then by path. ``root`` is the source, in which the list may be.
    """

    def __init__(self, root: Path, folder: Path, split: str) -> None:
        self.spec, self.folder = str(root), str(folder)
        self._left_out = LeftOut()
        names, loose = scan_split(self.folder, self._left_out)
        photos = [name for name in loose if name.lower().endswith(photo_suffixes())]
        self._paths: list[str] = []  # in the folder
        is_tiny = split != "train" and set(names) <= {"images"} and (TINY in loose or bool(names))
        if split == "train" or not is_tiny:
            self._read_class_folders(names, split)
        self._entries = self._paths
        if self._paths:
            for name in loose:
                self._left_out.add("outside of class folders", name)
        elif split != "train" and (photos or is_tiny):
            self._read_solution(root)
        else:
            for name in loose:
                self._left_out.add(suffix_reason(name))
            found = f"{len(photos)} images without a class folder" if photos else str(self._left_out)
            if split == "train" or loose or self._left_out.counts():  # else it is not filled yet
                raise ConfigError(
                    f"'{folder}': expected a folder with images for each class, found {found}; sort them so"
                )
        self.left_out = self._left_out.counts()

    def _read_class_folders(self, names: list[str], split: str) -> None:
        counts = {}
        for name, folders in class_folders(names).items():
            paths = sorted(path for below in folders for path in list_photos(self.folder, below, self._left_out))
            if not paths and split == "train":
                list_photos(self.folder, folders[0], found := LeftOut())
                raise ConfigError(
                    f"class folder '{os.path.join(self.folder, folders[0])}' has no images, found {found} "
                    f"(images are {', '.join(photo_suffixes())}); add some, or remove the folder from every split"
                )
            if paths:
                counts[name] = len(paths)
                self._paths += paths
        self.classes = tuple(counts)
        self.labels = np.repeat(np.arange(len(counts)), np.array(list(counts.values()), np.int64)).astype(np.int64)

    def _read_solution(self, root: Path) -> None:
        """The images with their classes from a list."""
        solution = find_solution(Path(self.folder), root)
        self._left_out = LeftOut()
        photos = list_photos(self.folder, "", self._left_out)
        if solution is None:
            raise ConfigError(
                f"'{self.folder}' has {len(photos)} images without a class folder, and no list of their classes: "
                f"expected {EXPECTED_LISTS} in it or in '{root}'. Add the list, or sort the images into class folders"
            )
        if solution.path.parent == Path(self.folder):
            self._left_out.add(suffix_reason(solution.path.name), count=-1)  # it is read
        rows = []
        for path in photos:
            if name := solution.classes.get(image_id(path)):
                rows.append((name, path))
            else:
                self._left_out.add(f"not in {solution.path.name}", path)
        if not rows:
            raise ConfigError(f"{solution.path} has none of the {len(photos)} images in '{self.folder}'; replace it")
        if absent := sorted(solution.classes.keys() - {image_id(path) for path in photos}):
            self.notes += (f"{len(absent)} images of {solution.path} are not in '{self.folder}': {listed(absent, 3)}",)
        self.reads += (f"classes: {solution.path}",)
        rows.sort()
        self._paths = [path for _, path in rows]
        self._entries = [f"{name}/{path}" for name, path in rows]  # as if they were in class folders
        classes, labels = np.unique([name for name, _ in rows], return_inverse=True)
        self.classes, self.labels = tuple(classes.tolist()), labels.astype(np.int64)

    def stamps(self) -> np.ndarray:
        return stat_files(self.folder, self._paths)

    def entry(self, index: int) -> str:
        return self._entries[index]

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.folder, self._paths[index]))


def class_folders(names: list[str]) -> dict[str, list[str]]:
    """The folders of each class, in order. Names that differ only in their Unicode form (NFC, NFD) are one class."""
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(normalized(name), []).append(name)
    return dict(sorted((found[0] if len(found) == 1 else form, found) for form, found in forms.items()))


def order_notes(classes: tuple[str, ...]) -> tuple[str, ...]:
    """What to say if timm orders the class folders differently: by the numbers in them, and without case."""

    def natural_key(name: str) -> list[str | int]:  # as timm.utils.misc.natural_key
        return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name.lower()))]

    for label, (ours, natural) in enumerate(zip(classes, sorted(classes, key=natural_key), strict=True)):
        if ours != natural:
            return (
                f"label {label} is '{ours}', because class names are sorted as text, as in torchvision. timm sorts "
                f"by the numbers in them and without case: there it is '{natural}'. Give timm our order (--class-map "
                "with the data folder's classes.txt), or write both splits in another one (--classes FILE)",
            )
    return ()
