"""Reads the folder of a run: its log, its configuration, and its accuracy for each class."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitlocal.config import Config, read_config
from vitlocal.errors import ConfigError, shown
from vitlocal.jsonl import count_damaged, read_lines, replace_text, replacing
from vitlocal.report.figures import Line
from vitlocal.tasks.metrics import is_evaluated, metrics_of

CLASSES, PICTURES, LOG, ORIGIN = "classes.json", "pictures", "log.jsonl", "trained_on.jsonl"
TEACHER_DIGITS = 12  # of the SHA-256 of its weights, in tables
LOGGED = (  # by every pass
    "epoch", "step", "images_seen", "image_size", "batch_size", "fraction", "train_seconds", "wall_seconds",
    "images_per_second", "data_wait_fraction",
)  # fmt: skip


@dataclass(frozen=True)
class RunRecord(Line):
    """A run that was evaluated at least once, as its folder has it."""

    folder: Path
    config: Config
    classes: list[dict[str, Any]]  # the last evaluation: class, right, images
    damaged_lines: int = 0  # of the log

    @cached_property
    def teacher(self) -> str:
        """The teacher of the run's soft labels: the start of its weights' SHA-256. Empty without soft labels."""
        if not self.config.train.soft_labels:
            return ""
        found = (str(origin["teacher"])[:TEACHER_DIGITS] for origin in read_origin(self.folder) if "teacher" in origin)
        return ", ".join(dict.fromkeys(found)) or "unknown"


def escaped(text: object) -> str:
    """A text for a page, in which hostile names do nothing, and that UTF-8 can hold."""
    return html.escape(shown(text, keep="\n"))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of the run's log, oldest first, without damaged lines."""
    return read_lines(folder / LOG, is_record)


def read_origin(folder: Path) -> list[dict[str, Any]]:
    """What trained the run: an object for each machine, version, commit and data, in order, without damaged lines."""
    return read_lines(folder / ORIGIN, lambda line: isinstance(line.get("machine"), dict) and "commit" in line)


def is_record(line: dict[str, Any]) -> bool:
    """Whether an object is a record of a pass."""
    return all(isinstance(line.get(name), (int, float)) for name in LOGGED)


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """The run in ``folder``. Raises ConfigError if there is none, or if it was never evaluated."""
    if not folder.is_dir():
        others = sorted(path.name for path in folder.parent.glob(f"{folder.name}*") if path.is_dir())
        hint = f"; did you mean {folder.with_name(others[0])}?" if others else ""
        raise ConfigError(f"{folder} does not exist; expected a folder that train_imagenet.py made{hint}")
    records = read_log(folder)
    config, metrics = None, metrics_of("")
    if (folder / "config.yaml").exists():
        config = read_config(["--config-file", str(folder / "config.yaml")], {})
        metrics = metrics_of(config.model.name)
    if config is None or not any(is_evaluated(record, metrics[0]) for record in records):
        raise ConfigError(
            f"{folder} holds no run with an evaluation in its {LOG}; expected a folder that train_imagenet.py made"
        )
    try:
        found = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
        if not all("class" in each and isinstance(each["right"] + each["images"], int) for each in found):
            raise ValueError
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        found = []  # diffusion has none; a damaged one costs its part of the page
    damaged = count_damaged(folder / LOG, is_record)
    return RunRecord(shown(name or folder.name), records, folder, config, found, damaged, metrics=metrics)


def write_classes(folder: Path, classes: Sequence[str], by_class: np.ndarray) -> None:
    """Writes ``classes.json``: how many images of each class were right (top-1), and how many there are (C, 2)."""
    pairs = zip(classes, by_class.tolist(), strict=True)
    found = [{"class": name, "right": right, "images": count} for name, (right, count) in pairs]
    replace_text(folder / CLASSES, json.dumps(found, indent=0) + "\n")


def write_picture(folder: Path, name: str, picture: Image.Image) -> None:
    """Writes ``pictures/NAME.png``."""
    (folder / PICTURES).mkdir(exist_ok=True)
    with replacing(folder / PICTURES / f"{name}.png", "wb", sync=False) as file:
        picture.save(file, format="PNG")


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: the shortest end of the paths that differs between all folders."""
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(set(folders)) and parts < 20:
        parts += 1
    return ["/".join(folder.parts[-parts:]) for folder in folders]


def duration(seconds: float) -> str:
    """``1:02:03`` for 3723 seconds."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
