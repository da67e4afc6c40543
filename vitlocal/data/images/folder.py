"""Images in class folders."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vitlocal.data.images.image_set import (
    KINDS,
    NO_CHOICE,
    SPLIT_NAMES,
    SUFFIXES,
    ImageSet,
    SourceChoice,
    known_split,
    listed,
    read_file,
    split_folder,
)
from vitlocal.errors import ConfigError


class FolderImages(ImageSet):
    """Images in root/<split>/<class>/, at any depth below the class. Rows are ordered by class, then by path."""

    def __init__(self, root: Path, split: str, choice: SourceChoice = NO_CHOICE) -> None:
        self.spec = str(root)
        folder = split_folder(root, split)
        if folder is None:
            folders = class_folders(root)
            named = [name for name in folders if known_split(name)]
            if split != "train" or named or not folders:
                found = [f"{name}/" for name in folders] or sorted(os.listdir(root))
                raise ConfigError(
                    f"source '{root}' has no split '{split}': expected a folder "
                    f"{' or '.join(SPLIT_NAMES.get(split, (split,)))} in it, or {KINDS.split(', ', 1)[1]}; "
                    f"found {listed(found)}. Move the images there, or name another --source or --split"
                )
            if len(folders) == 1 and class_folders(root / folders[0]):
                raise ConfigError(
                    f"source '{root}' has only one folder, '{folders[0]}', with folders in it; expected folders "
                    f"of classes or splits. Did you mean '{root / folders[0]}'?"
                )
            folder = root  # root/<class>/ without splits
        self.classes = tuple(class_folders(folder))
        if not self.classes:
            loose = sum(name.lower().endswith(SUFFIXES) for name in os.listdir(folder))
            problem = f"{loose} images without a class folder" if loose else "no folders"
            raise ConfigError(
                f"'{folder}': expected a folder with images for each class, found {problem}; sort them so"
            )
        self.folder = str(folder)
        self._paths: list[str] = []
        counts = []
        for name in self.classes:
            paths = sorted(_image_paths(self.folder, name))
            if not paths:
                raise ConfigError(
                    f"class folder '{folder / name}' has no images ({', '.join(SUFFIXES)}); "
                    "add some, or remove the folder from every split"
                )
            self._paths += paths
            counts.append(len(paths))
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def entry(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.folder, self._paths[index]))


def folder_classes(root: Path, split: str, choice: SourceChoice) -> tuple[str, ...] | None:
    """The classes of a split, which may lack images; None without its folder."""
    folder = split_folder(root, split)
    return tuple(class_folders(folder)) if folder else None


def class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _image_paths(folder: str, below: str) -> Iterator[str]:
    """The images under the subfolder `below`, as paths relative to `folder`. Follows links."""
    with os.scandir(os.path.join(folder, below)) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # for example ._name.jpg of macOS
                continue
            path = f"{below}/{entry.name}"
            if entry.name.lower().endswith(SUFFIXES):
                yield path
            elif entry.is_dir():
                yield from _image_paths(folder, path)
