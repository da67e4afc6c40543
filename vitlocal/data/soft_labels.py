"""Soft labels: what a teacher says about every crop of a run, stored instead of asked for (FKD, arXiv 2112.01528).

A crop follows from (seed, epoch, image), so only the labels are stored. ``train_labels/seed_0/labels.json`` says what
the labels of seed 0 belong to. A file for each epoch has the TOP most probable classes of each image, in 40 bytes.

Shape letters: B batch, n images of the split, K classes that are kept of each.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitlocal.data.crops import CropPolicy
from vitlocal.data.manifest import Manifest
from vitlocal.data.transfer import send
from vitlocal.errors import ConfigError, DataError, first_line
from vitlocal.reading import read_whole

FACTS = "labels.json"
FORMAT, TOP, MOST_CLASSES = 1, 10, 1 << 16
LABEL = np.dtype([("class", "<u2"), ("probability", "<f2")])


class SoftTargets(NamedTuple):
    """The K most probable classes of each image according to a teacher. The other classes share the rest equally."""

    classes: Tensor  # (B, K) int64, all different in a row
    probabilities: Tensor  # (B, K) float32, whose sum is at most 1

    def part(self, chosen: Tensor) -> "SoftTargets":
        """Those of the images ``chosen`` (m,) int64."""
        return SoftTargets(self.classes[chosen], self.probabilities[chosen])


@dataclass(frozen=True)
class LabelFacts:
    """What soft labels belong to."""

    crops: dict[str, Any]  # the options of random crops
    images: int
    data: str  # fingerprint of the source
    teacher: str  # SHA-256 of its weights
    epochs: int  # those that are complete
    top: int
    format: int = FORMAT

    @classmethod
    def of(cls, crops: CropPolicy, manifest: Manifest, teacher: str, epochs: int) -> "LabelFacts":
        top = min(TOP, len(manifest.classes))
        return cls(crop_facts(crops), manifest.count, manifest.source.fingerprint, teacher, epochs, top)

    @property
    def digest(self) -> str:
        """Identifies the labels for a run that continues: teacher, crops and epochs."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, found: "LabelFacts") -> str:
        """What ``found`` in a folder has that is not as here; epochs do not count."""
        return "; ".join(
            f"{name}: {getattr(found, name)!r}, here {value!r}"
            for name, value in vars(self).items()
            if name != "epochs" and value != getattr(found, name)
        )


def crop_facts(crops: CropPolicy) -> dict[str, Any]:
    """The options that decide which crop (seed, epoch, image) gets, as JSON holds them."""
    facts = asdict(crops)
    for name in ("random", "centre", "shuffle", "variant", "box_epochs"):
        del facts[name]
    return json.loads(json.dumps(facts))


def labels_folder(seed: int) -> Path:
    """The folder of the labels for runs with this seed, within the data folder."""
    return Path("train_labels", f"seed_{seed}")


def epoch_file(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:03}.npy"


def read_facts(folder: Path) -> LabelFacts | None:
    """What ``folder`` says about its labels; None if there are none. DataError if it is damaged."""
    path = folder / FACTS
    if not path.exists():
        return None
    try:
        return LabelFacts(**json.loads(read_whole(path)))
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); remove {folder} and write it again") from error


class SoftLabels:
    """The stored labels of ``manifest``'s split in ``root``, for random crops of the policy ``crops``.

    Raises ConfigError if they are missing, not complete, or of other crops or data, and DataError if they are damaged.
    """

    def __init__(self, root: str | Path, manifest: Manifest, crops: CropPolicy):
        folder = Path(root) / labels_folder(crops.seed)
        facts = read_facts(folder)
        command = (
            f"python write_dataset.py --labels-from RUN --epochs N --recipe RECIPE --seed {crops.seed} --out {root}"
        )
        if facts is None or not facts.epochs:
            raise ConfigError(f"train.soft_labels: there are no labels in {folder}; write them: {command}")
        mine = LabelFacts.of(crops, manifest, facts.teacher, facts.epochs)
        if found := mine.differences(facts):
            raise ConfigError(
                f"train.soft_labels: {folder} has labels of other crops or data ({found}); use the options that it was "
                f"written with, or remove it and write it again: {command}"
            )
        self.facts, self._folder = facts, folder
        for epoch in range(facts.epochs):
            self._open(epoch)  # not kept: each mapped file would take a file descriptor
        self._opened = -1, np.empty(0, np.uint32)  # the last epoch that was read
        self._classes = len(manifest.classes)

    def _open(self, epoch: int) -> np.ndarray:
        path = epoch_file(self._folder, epoch)
        if not path.exists():
            raise ConfigError(
                f"train.soft_labels: {path} does not exist, of {self.facts.epochs} epochs; run the command that writes "
                "the labels again, which continues"
            )
        try:
            labels = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({first_line(error)}); remove it and write it again") from error
        if labels.dtype != LABEL or labels.shape != (self.facts.images, self.facts.top):
            raise DataError(f"{path} has labels of another form; remove it and write it again")
        # As numbers of 32 bits, because numpy takes rows of structures, and of memory maps, four times as slowly.
        return labels.view(np.ndarray).view(np.uint32)

    def read(self, epoch: int, ids: Tensor, device: torch.device) -> SoftTargets:
        """The targets of the crops of the rows ``ids`` (B,) int64 in ``epoch``. DataError if there is no such class."""
        stored = epoch % self.facts.epochs
        if self._opened[0] != stored:
            self._opened = stored, self._open(stored)
        labels = self._opened[1].take(ids.numpy(), axis=0).view(LABEL)  # (B, K)
        classes = labels["class"].astype(np.int64)
        if classes.size and classes.max() >= self._classes:
            path = epoch_file(self._folder, stored)
            raise DataError(f"{path} has class {classes.max()} of {self._classes}; remove it and write it again")
        parts = classes, labels["probability"].astype(np.float32)
        return SoftTargets(*(send(part, device) for part in parts))
