"""The files of a split as a source: which one serves a crop size, and whether they are those of the manifest."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vitlocal.data.batch import Source
from vitlocal.data.beton import MappedFile
from vitlocal.data.costs import DecodingCosts
from vitlocal.data.crops import CropPolicy
from vitlocal.data.manifest import (
    FILE_NAME,
    FILE_SUFFIXES,
    LATENT_FLAGS,
    BetonFile,
    Manifest,
    load_manifest,
    manifest_of_file,
    written_splits,
)
from vitlocal.data.shares import WHOLE, Share
from vitlocal.errors import ConfigError, DataError
from vitlocal.paths import WRITE


def choose_file(manifest: Manifest, costs: DecodingCosts, crops: CropPolicy, side_ratio: float, size: int) -> BetonFile:
    """The file for crops of ``size`` px: the cheapest to decode among the files that are large enough.

    For random crops a side of ``side_ratio`` x size is large enough; for centre crops, a side that covers the crop. If
    no file is, the largest side serves. Without measured costs the smallest side wins, and raw before JPEG.
    """
    need = size * side_ratio if crops.random else size / crops.centre
    files = sorted(manifest.files, key=lambda file: (file.side, file.format != "raw"))
    enough = [file for file in files if file.side >= need - 1e-6]
    enough = enough or [file for file in files if file.side == files[-1].side]
    measured = [cost for file in enough if (cost := costs.microseconds_for(file, size)) is not None]
    return enough[int(np.argmin(measured))] if len(measured) == len(enough) else enough[0]


def split_of(root: str | Path) -> str:
    """The split by the name of a file: val for ``val_256_jpg.beton`` and ``cifar-test.beton``; train for a folder."""
    name = Path(root).name if Path(root).suffix in FILE_SUFFIXES else ""
    ours, words = FILE_NAME.fullmatch(name), set(re.split(r"[\W_\d]+", name.lower()))
    if ours and ours["split"] in ("train", "val"):
        return ours["split"]
    return "val" if words & {"val", "valid", "validation", "test"} else "train"


def open_manifest(root: str | Path, split: str, file: str = "auto") -> tuple[Path, Manifest]:
    """The data folder and the manifest of a split. ``root`` is the folder, or one .beton file.

    ``file`` selects one file of the folder by its name; "auto": all. Raises ConfigError if there is no such file.
    """
    root = Path(root)
    if root.suffix in FILE_SUFFIXES:
        root, file = root.parent, root.name
        if not (root / file).is_file():
            raise ConfigError(f"root: {root / file} does not exist; name a data folder, or a .beton file in it")
        if not (root / f"{split}.json").exists():
            return root, manifest_of_file(root / file, split)
    written = written_splits(root)
    if written and split not in ("train", "val") and not (root / f"{split}.json").exists():
        raise ConfigError(f"split: got {split!r}, expected a split of {root}: {', '.join(written)}")
    manifest = load_manifest(str(root), split)
    if file == "auto":
        return root, manifest
    names = [found.file for found in manifest.files]
    if file in names:
        return root, replace(manifest, files=(manifest.files[names.index(file)],))
    if (root / file).is_file():
        return root, manifest_of_file(root / file, split)  # a file that the manifest does not describe
    raise ConfigError(f"file: {root} has no {file!r}; expected auto, or a file of split {split}: {', '.join(names)}")


class BetonSource(Source):
    """A split of the data folder ``root``, read from the file that :func:`choose_file` picks for each size.

    DataError if a file has another length than the manifest says. ConfigError if it holds latents and the source reads
    photos, or the other way round.
    """

    reads_latents = False

    def __init__(
        self, root: str | Path, manifest: Manifest, crops: CropPolicy, device: torch.device, costs: DecodingCosts,
        side_ratio: float, share: Share = WHOLE,
    ):  # fmt: skip
        if (manifest.latents is not None) != self.reads_latents:
            held, wanted = ("photos", "latents") if self.reads_latents else ("latents", "photos")
            flags = f" {LATENT_FLAGS}" * self.reads_latents
            raise ConfigError(
                f"data.root: the split {manifest.split!r} in {root} holds {held}, and {wanted} are needed. Name another"
                f" folder, or write one: {WRITE} --split {manifest.split} --source PHOTOS{flags} --out FOLDER"
            )
        side = max(file.side for file in manifest.files)
        super().__init__(manifest.classes, manifest.count, side, crops, device, share)
        self.root, self.manifest, self.costs, self.side_ratio = Path(root), manifest, costs, side_ratio
        for file in manifest.files:  # before a run starts, because a curriculum may need a file hours later
            path = self.root / file.file
            if path.exists() and path.stat().st_size != file.bytes:
                raise DataError(
                    f"{path} has {path.stat().st_size} bytes, its manifest says {file.bytes}: it is cut off, or "
                    f"another file. Remove {manifest.split}.json and {manifest.split}_*.beton from {root}, and write "
                    f"them again with the same command: {WRITE} --split {manifest.split} --out {root} …"
                )

    def choose(self, size: int) -> BetonFile:
        """The file for crops of ``size`` px."""
        return choose_file(self.manifest, self.costs, self.crops, self.side_ratio, size)

    def check_size(self, size: int) -> None:
        self.check_count(path := self.root / self.choose(size).file, len(MappedFile(path, len(self.classes)).rows))

    def check_count(self, path: Path, count: int) -> None:
        if count != self.count:
            raise DataError(f"{path} has {count} rows, its manifest says {self.count}; write both again")
