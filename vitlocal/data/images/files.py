"""A split that consists of files: class folders, tars, or both, if the tars were unpacked in part."""

import os
from pathlib import Path

import numpy as np

from vitlocal.data.images.classes import normalized
from vitlocal.data.images.folder import FolderImages, class_folders, order_notes
from vitlocal.data.images.image_set import (
    KINDS,
    SPLIT_NAMES,
    ImageSet,
    SourceChoice,
    known_split,
    listed,
    scan_folder,
    split_folder,
)
from vitlocal.data.images.listing import LeftOut, entry_kind, list_photos, scan_split, stat_files
from vitlocal.data.images.tar_index import BLOCK
from vitlocal.data.images.tars import DOWNLOADED, ClassTar, TarImages, class_rows, class_tars, ends_at, index_tars
from vitlocal.errors import ConfigError


def open_files(root: Path, split: str, choice: SourceChoice) -> ImageSet:
    """The images of a split. If it has tars and their images lie unpacked beside them, the complete one is read."""
    folder, notes = _find_folder(root, split)
    tars = _find_tars(root, split, folder)
    if tars:
        images = _complete(root, folder, split, tars)
    elif folder:
        images = FolderImages(root, folder, split)
    else:
        raise _no_split(root, split)
    if split == "train" and not choice.classes:
        notes += order_notes(images.classes)
    images.notes += notes
    return images


def file_classes(root: Path, split: str, choice: SourceChoice) -> tuple[str, ...] | None:
    """The classes of a split; None if there is no such split. Those of a training split may lack images."""
    folder, _ = _find_folder(root, split)
    tars = _find_tars(root, split, folder)
    if folder is None and not tars:
        return None
    if split != "train":  # it is small enough to find all its faults before the training split is written
        return open_files(root, split, choice).classes
    unpacked = _class_names(folder) if folder else []
    packed = {tar.name for tar in class_tars(tars, split, LeftOut())}
    # `_complete` refuses other mixtures.
    return tuple(unpacked if packed <= set(map(normalized, unpacked)) else sorted(packed))


def _class_names(folder: Path) -> list[str]:
    return list(class_folders(scan_split(str(folder), LeftOut())[0]))


def _find_folder(root: Path, split: str) -> tuple[Path | None, tuple[str, ...]]:
    """The folder of a split if it has one, and notes about the choice."""
    folder, names = split_folder(root, split), _class_names(root)
    if folder:
        same = [str(root / name) for name in names if known_split(name) == split and name != folder.name]
        return folder, (f"'{folder}' is read, and not {listed(same)}",) if same else ()
    if split == "train" and not any(map(known_split, names)) and not _downloaded(root):
        if len(names) == 1 and _class_names(root / names[0]):
            raise ConfigError(
                f"source '{root}' has only one folder, '{names[0]}', with folders in it; expected folders "
                f"of classes or splits. Did you mean '{root / names[0]}'?"
            )
        return root if names or _find_tars(root, split, root) else None, ()  # root/<class>/ without splits
    test, train = split_folder(root, "test"), split_folder(root, "train")
    if split == "val" and not _downloaded(root, split) and test and train:
        if set(map(normalized, _class_names(test))) <= set(map(normalized, _class_names(train))):
            return test, (f"the validation images are those of '{test}', because there is no folder val/",)
    return None, ()


def _downloaded(root: Path, split: str = "") -> list[str]:
    """The names of the downloaded tars (of a split) in a folder."""
    return sorted(
        entry.name
        for entry in scan_folder(root)
        if (entry.name == DOWNLOADED.format(split) if split else entry.name.startswith("ILSVRC2012_img_"))
        and entry.name.endswith(".tar")
        and entry_kind(entry) == "file"
    )


def _find_tars(root: Path, split: str, folder: Path | None) -> list[Path]:
    """The downloaded tar of a split, in the source or in the split's folder, else the tars of classes in the folder."""
    for place in filter(None, (root, folder)):
        if names := _downloaded(place, split):
            return [place / names[0]]
    if folder is None:
        return []
    names, loose = scan_split(str(folder), LeftOut())
    tars = [folder / name for name in loose if name.lower().endswith(".tar") and not name.startswith("ILSVRC2012_img_")]
    if folder == root and names:
        return []  # beside class folders in the source, a tar is something else
    if not names:
        return tars
    return [path for path in tars if class_rows(ClassTar(path, path.name), "")[0]]  # without photos, it is no class


def _no_split(root: Path, split: str) -> ConfigError:
    if tars := _downloaded(root):
        return ConfigError(
            f"source '{root}' has no split '{split}': expected {DOWNLOADED.format(split)}, found {listed(tars)}; "
            "download it from image-net.org to this folder"
        )
    found = [f"{name}/" for name in _class_names(root)] or sorted(os.listdir(root))
    return ConfigError(
        f"source '{root}' has no split '{split}': expected a folder "
        f"{' or '.join(SPLIT_NAMES.get(split, (split,)))} in it, or {KINDS.split(', ', 1)[1]}; "
        f"found {listed(found)}. Move the images there, or name another --source or --split"
    )


def _fill_tars(tars: list[Path], paths: list[str], stamps: np.ndarray) -> bool:
    """Whether the files in class folders, with ``stamps`` (n, 2), are those of the tars of the classes, by their sizes.

    The sizes must add up to each tar. In the class of the newest file, which an interrupted tar may have left cut off,
    all are compared. So the 1.28 million headers of ImageNet's tars, all over the disk, are not read.
    """
    packed = class_tars(tars, "train", LeftOut())
    filled = dict.fromkeys((tar.name for tar in packed), 0)
    for path, size in zip(paths, stamps[:, 0].tolist(), strict=True):
        name = normalized(path.split("/")[0])
        if name not in filled:
            return False
        filled[name] += BLOCK + -(-size // BLOCK) * BLOCK  # a header and the file
    if not all(ends_at(tar, filled[tar.name]) for tar in packed):
        return False
    newest = normalized(paths[int(stamps[:, 1].argmax())].split("/")[0])
    rows, _ = class_rows(next(tar for tar in packed if tar.name == newest), "train")
    sizes = dict(zip(map(normalized, paths), stamps[:, 0].tolist(), strict=True))
    return all(sizes.get(normalized(row.entry)) == row.member.size for row in rows)


def _complete(root: Path, folder: Path | None, split: str, tars: list[Path]) -> ImageSet:
    """The unpacked images if they are complete, else those in the tars. Raises ConfigError if both lack images."""
    left_out = LeftOut()
    paths = list_photos(str(folder), "", LeftOut()) if folder else []
    tar = tars[0].name if len(tars) == 1 else f"tars in {tars[0].parent}"
    stamps = stat_files(str(folder), paths)
    try:
        if folder and paths and split == "train" and _fill_tars(tars, paths, stamps):
            images: ImageSet = FolderImages(root, folder, split)
            images.reads += (f"'{folder}', not {tar}: all its {len(paths)} images are unpacked there",)
            return images
        rows = index_tars(tars, split, left_out)
    except ConfigError as error:
        raise ConfigError(f"{error}; or move it elsewhere to read '{folder}'") if paths else error from None
    if not paths or not folder:
        return TarImages(root, rows, left_out)
    # Validation images may have been sorted into class folders after they were unpacked.
    has_classes = bool(rows and rows[0].name)

    def key(path: str) -> str:
        return normalized(path if has_classes else os.path.basename(path))

    packed = {key(row.entry): row.member.size for row in rows}
    unpacked = dict(zip(map(key, paths), stamps[:, 0].tolist(), strict=True))
    missing = [name for name, size in packed.items() if unpacked.get(name) != size]  # or not unpacked to its end
    others = sorted(unpacked.keys() - packed.keys())
    if not missing:
        images = FolderImages(root, folder, split)
        more = f", and {len(others)} others" if others else ""
        images.reads += (f"'{folder}', not {tar}: all its {len(packed)} images are unpacked there{more}",)
        return images
    if others:
        raise ConfigError(
            f"'{folder}' and {tar} both lack images: {len(missing)} of {len(packed)} images of the tar are not (or "
            f"not whole) in the folder: {listed(missing, 3)}; {len(others)} in the folder are not in the tar: "
            f"{listed(others, 3)}. Unpack the rest, or move one of the two elsewhere"
        )
    images = TarImages(root, rows, left_out)
    images.reads += (f"{tar}, not '{folder}'",)
    images.notes += (
        f"only {len(packed) - len(missing)} of {len(packed)} images of {tar} are unpacked in '{folder}', so the tar "
        "is read; to read the folder, unpack the rest",
    )
    return images
