"""Lists the photos below a folder, and counts the files that are not read."""

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from vitlocal.data.images.image_set import LEADS_NOWHERE, scan_folder, unreadable
from vitlocal.data.images.pixels import photo_suffixes, suffix_reason
from vitlocal.errors import shown

SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")  # previews of a Synology disk, attributes of macOS
THREADS = 16  # they wait for the disk

Kind = Literal["file", "folder", "a broken link", "a link to its own folder", "a link to a folder above", "not a file"]


class LeftOut:
    """Counts files that are not read, by reason, and keeps the name of the first for most reasons."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str = "", count: int = 1) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + count
        if name:
            self._first.setdefault(reason, name)

    def update(self, other: "LeftOut") -> None:
        for reason, count in other._counts.items():
            self.add(reason, other._first.get(reason, ""), count)

    def counts(self) -> dict[str, int]:
        """The count of each reason, which names the first file: {".txt": 2, "a broken link: a/x.jpg, …": 3}."""
        named = {}
        for reason, count in sorted(item for item in self._counts.items() if item[1]):
            first = shown(self._first.get(reason, ""))
            named[f"{reason}{': ' * bool(first)}{first}{', …' * bool(first and count > 1)}"] = count
        return named

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts().items()) or "nothing"


def system_reason(name: str) -> str | None:
    """Why a file or folder that a system has made is not read; None for others."""
    return "hidden" if name.startswith(".") else name if name in SYSTEM_FOLDERS else None


def entry_kind(entry: os.DirEntry[str], trail: Sequence[str] = ()) -> Kind:
    """What an entry of a folder is. ``trail``: the folders in which the links lie that led to it, without links."""
    try:
        if not entry.is_symlink():
            return "file" if entry.is_file() else "folder" if entry.is_dir() else "not a file"
        mode = entry.stat().st_mode
    except OSError as error:
        if error.errno in LEADS_NOWHERE:
            return "a broken link"
        raise unreadable(entry.path, error) from error
    if not stat.S_ISDIR(mode):
        return "file" if stat.S_ISREG(mode) else "not a file"
    target, folder = os.path.realpath(entry.path), os.path.realpath(os.path.dirname(entry.path))
    if target == folder:
        return "a link to its own folder"
    # To follow it would never end.
    return "a link to a folder above" if any(_holds(target, path) for path in (folder, *trail)) else "folder"


def _holds(folder: str, path: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def list_photos(root: str, below: str, left_out: LeftOut) -> list[str]:
    """The photos in the folder `below` of `root`, at any depth, as sorted paths in `root`. Follows links."""
    found: list[str] = []
    _walk(root, below, left_out, found, (os.path.realpath(root),))
    return sorted(found)


def _walk(root: str, below: str, left_out: LeftOut, found: list[str], trail: tuple[str, ...]) -> None:
    folder, suffixes = os.path.join(root, below), photo_suffixes()
    for entry in scan_folder(folder):
        path = f"{below}/{entry.name}" if below else entry.name
        is_photo = entry.name.lower().endswith(suffixes)
        if reason := system_reason(entry.name):
            left_out.add(reason)
        elif (kind := entry_kind(entry, trail)) == "file":
            if is_photo:
                found.append(path)
            else:
                left_out.add(suffix_reason(entry.name))
        elif kind != "folder":
            left_out.add(kind, path)
        elif is_photo:
            left_out.add("a folder with the name of a photo", path)
        else:
            _walk(root, path, left_out, found, (*trail, os.path.realpath(folder)) if entry.is_symlink() else trail)


def scan_split(folder: str, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """The names of the class folders, and of the files beside them, each sorted."""
    names: dict[str, list[str]] = {"folder": [], "file": []}
    for entry in sorted(scan_folder(folder), key=lambda entry: entry.name):
        if reason := system_reason(entry.name):
            left_out.add(reason)
        elif (kind := entry_kind(entry)) in names:
            names[kind].append(entry.name)
        else:
            left_out.add(kind, entry.name)
    return names["folder"], names["file"]


def stat_files(folder: str, paths: Sequence[str]) -> np.ndarray:
    """Bytes and time of modification (ns) of each file: (n, 2) int64. DataError if one cannot be found."""

    def stamps(part: Sequence[str]) -> list[tuple[int, int]]:
        found = []
        for path in part:
            try:
                info = os.stat(os.path.join(folder, path))
            except OSError as error:
                raise unreadable(os.path.join(folder, path), error) from error
            found.append((info.st_size, info.st_mtime_ns))
        return found

    parts = [paths[start : start + 256] for start in range(0, len(paths), 256)]
    with ThreadPoolExecutor(THREADS) as pool:
        rows = [row for part in pool.map(stamps, parts) for row in part]
    return np.array(rows, np.int64).reshape(-1, 2)
