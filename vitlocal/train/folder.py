"""A run's folder: what lies where in it, whether there is a run to go on with, and who may write there."""

from __future__ import annotations

import fcntl
import hashlib
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vitlocal.config import IMMATERIAL, Config
from vitlocal.errors import ConfigError
from vitlocal.jsonl import read_lines, write_lines
from vitlocal.machine import commit, hardware, versions
from vitlocal.methods import METHODS
from vitlocal.report.run_folder import read_log
from vitlocal.train.journal import read_spent

CHECKPOINT = Path("checkpoints") / "last.pt"
JOURNAL = Path("spent.json")
ORIGIN = Path("trained_on.jsonl")


def changes(before: Mapping[str, Any], config: Config) -> list[str]:
    """In what ``config`` is another one than that of the options ``before``, by their dotted names: a phrase each."""
    before = Config().flat() | before  # what an older version did not know of was as it is by default
    idle = METHODS.keys() - {*before["methods"], *config.methods}  # whose options have no say, whatever their defaults
    return [
        f"{name} was {before[name]!r} and is now {value!r}"
        for name, value in config.flat().items()
        if name not in IMMATERIAL and name.partition(".")[0] not in idle and before[name] != value
    ]


def stated(config: Config) -> dict[str, Any]:
    """What makes ``config`` itself: the options that matter to a result and are not as by default."""
    default = Config().flat()
    return {name: value for name, value in config.flat().items() if name not in IMMATERIAL and default[name] != value}


def check_same(folder: Path, config: Config, option: str = "run.folder") -> None:
    """Raises ConfigError where ``folder``, which ``option`` names, holds a run of another configuration."""
    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    before = {
        f"{section}.{key}" if key else section: value
        for section, inner in stored.items()
        for key, value in (inner.items() if isinstance(inner, dict) else [("", inner)])
    }
    if changed := changes(before, config):
        raise ConfigError(
            f"{option}: {folder} holds a run of another configuration: {'; '.join(changed)}. Use the same options "
            f"to go on with it, or another --{option}"
        )


def resumes_from(folder: Path, config: Config) -> bool:
    """Whether ``folder`` holds a run to go on with; ConfigError where that is not what ``run.resume`` asks for."""
    checkpoint = folder / CHECKPOINT
    resumes = checkpoint.exists() and config.run.resume != "never"
    if config.run.resume == "must" and not resumes:
        raise ConfigError(f"run.resume: there is no run to go on with in {folder} ({checkpoint} is not there)")
    if config.run.resume == "never" and checkpoint.exists():
        raise ConfigError(f"run.resume: {folder} holds a run already; remove it, or use another --run.folder")
    if resumes:
        check_same(folder, config)
    # A run of one pass may have been killed between its line and its checkpoint; one of several had a checkpoint.
    elif (folder / "model.safetensors").exists() or len(read_log(folder)) > 1:
        raise ConfigError(
            f"run.folder: {folder} holds what a run has left, and no checkpoint to go on from ({checkpoint} is not "
            "there); remove the folder, or use another --run.folder"
        )
    return resumes


def spent_in(folder: Path, config: Config) -> tuple[float, float]:
    """What this run has spent so far, even if it was killed before its first checkpoint; nothing if it is a new one."""
    if config.run.resume == "never" or not (folder / "config.yaml").exists():
        return 0.0, 0.0
    try:
        check_same(folder, config)
    except ConfigError:
        return 0.0, 0.0
    return read_spent(folder / JOURNAL)


def in_use(folder: Path) -> bool:
    """Whether a process is training in ``folder``."""
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the folder."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"run.folder: another process is training in {folder}; use another --run.folder"
            ) from error
        yield


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it; a wrong configuration takes it away again, but for what has been trained."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        try:
            yield
        except ConfigError:
            if is_new and not (folder / CHECKPOINT).exists():
                shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed must not hide what is wrong
            raise


def header() -> str:
    """What stands above a run's configuration: how to repeat it."""
    return f"# Repeats this run: python train_imagenet.py --config-file THIS\n# It was: {shlex.join(sys.argv)}\n"


def data_of(count: int, classes: Sequence[str]) -> dict[str, Any]:
    """What tells training images apart: their number, that of their classes, and a digest of these."""
    digest = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return {"images": count, "classes": len(classes), "digest": digest}


def note_origin(folder: Path, data: Mapping[str, Any]) -> None:
    """Writes down on what machine, with what code and libraries and on what ``data`` (:func:`data_of`) the run is
    trained: again only where they change."""
    found, here = origin_of(folder), {"machine": hardware(), "versions": versions(), "commit": commit(), "data": data}
    if not found or found[-1] != here:
        write_lines(folder / ORIGIN, [*found, here])


def origin_of(folder: Path) -> list[dict[str, Any]]:
    """What :func:`note_origin` wrote, in order; nothing where it is not there, or damaged."""
    return read_lines(folder / ORIGIN)
