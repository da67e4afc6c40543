"""The folder of a run: whether it holds a run to continue, its lock, and the machines and data that trained it."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitlocal.data.manifest import FILE_SUFFIXES
from vitlocal.errors import ConfigError
from vitlocal.jsonl import write_lines
from vitlocal.machine import commit, hardware, versions
from vitlocal.reading import open_regular
from vitlocal.report.run_folder import ORIGIN, read_log, read_origin
from vitlocal.train.checkpoint import CHECKPOINT, Checkpoints

JOURNAL = Path("spent.json")
BLOCKS, BLOCK_BYTES = 64, 4096  # of each file of images


def has_run(folder: Path, resume: str = "auto") -> bool:
    """Whether ``folder`` holds a run to continue. ConfigError if that is not what ``run.resume`` asks for."""
    checkpoint, found = folder / CHECKPOINT, Checkpoints(folder).exist()
    if resume == "must" and not found:
        raise ConfigError(f"run.resume: there is no run to continue in {folder} ({checkpoint} does not exist)")
    if resume == "never" and found:
        raise ConfigError(f"run.resume: {folder} already holds a run; remove it, or use another --run.folder")
    # A run of one pass may have been killed between its log line and its checkpoint; longer ones have a checkpoint.
    if not found and ((folder / "model.safetensors").exists() or len(read_log(folder)) > 1):
        raise ConfigError(
            f"run.folder: {folder} holds the results of a run, but no checkpoint to continue from ({checkpoint} does "
            "not exist); remove the folder, or use another --run.folder"
        )
    return found


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
def run_folder_lock(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it against other processes. A ConfigError removes a new folder again."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"run.folder: another process is training in {folder}; use another --run.folder"
            ) from error
        try:
            yield
        except ConfigError:
            if is_new and not Checkpoints(folder).exist():
                shutil.rmtree(folder, ignore_errors=True)  # an error here must not hide the first one
            raise


def data_fingerprint(count: int, classes: Sequence[str]) -> dict[str, Any]:
    """Identifies the training data by the number of images, and the number and digest of the classes."""
    digest = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return {"images": count, "classes": len(classes), "digest": digest}


def file_digests(folder: Path) -> dict[str, str]:
    """A digest of each file of images in a data folder, by its name: of its length, and of a sample of its bytes.

    Each takes a few milliseconds. Other crops, another quality or another order of the images change most blocks.
    """
    found = {}
    for path in sorted(path for path in folder.glob("*") if path.suffix in FILE_SUFFIXES):
        with open_regular(path) as file:
            last = max(0, file.seek(0, 2) - BLOCK_BYTES)
            digest = hashlib.sha256(str(last).encode())
            for number in range(BLOCKS):
                digest.update(os.pread(file.fileno(), BLOCK_BYTES, last * number // (BLOCKS - 1)))
        found[path.name] = digest.hexdigest()[:16]
    return found


def record_origin(folder: Path, data: Mapping[str, Any], teacher: str | None = None) -> None:
    """Appends machine, library versions, commit and training data to ``trained_on.jsonl``, if they have changed.

    ``teacher``: that of soft labels, the SHA-256 of its weights.
    """
    found = read_origin(folder)
    here = {"machine": hardware(), "versions": versions(), "commit": commit(), "data": data}
    here |= {} if teacher is None else {"teacher": teacher}
    if not found or found[-1] != here:
        write_lines(folder / ORIGIN, [*found, here])
