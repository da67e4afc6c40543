"""The checkpoints of a run: the last two, each with a checksum that is verified before anything of it is loaded.

A file is what ``torch.save`` wrote, and a trailer: MAGIC, FORMAT, the number of bytes before the trailer, and the
SHA-256 of everything before the digest. PyTorch reads a file with such an end as it is.
"""

import hashlib
import struct
from pathlib import Path
from typing import IO, Any

import torch

from vitlocal.errors import DataError, first_line
from vitlocal.jsonl import replacing

CHECKPOINT = Path("checkpoints") / "last.pt"
PREVIOUS = Path("checkpoints") / "previous.pt"
FORMAT = 5  # of a checkpoint's content; increased when older checkpoints cannot be continued
MAGIC = b"vitlocal.pt\n"
HEAD = struct.Struct("<12sIQ")
TRAILER_BYTES = HEAD.size + hashlib.sha256().digest_size
BLOCK_BYTES = 1 << 20


class DamagedCheckpoint(DataError):
    """A file that is not a whole checkpoint."""


class Checkpoints:
    """``last.pt`` and ``previous.pt`` of the run in ``folder``. ``notes``: what :meth:`load` found wrong."""

    def __init__(self, folder: Path):
        self.folder, self.last, self.previous = folder, folder / CHECKPOINT, folder / PREVIOUS
        self.notes: list[str] = []
        self._last_is_whole = False  # a damaged one must not replace the previous one

    def exist(self) -> bool:
        return self.last.exists() or self.previous.exists()

    def save(self, content: dict[str, Any]) -> None:
        """Replaces the last checkpoint, which becomes the previous one. See :func:`save_checkpoint`."""
        keeps = self._last_is_whole and self.last.exists()
        save_checkpoint(self.last, content, self.previous if keeps else None)
        self._last_is_whole = True

    def load(self) -> dict[str, Any]:
        """The content of the last checkpoint, or of the previous one if the last one is damaged or missing.

        DataError if both are, or if another version wrote it. Nothing is changed.
        """
        self.notes = []
        for path in (self.last, self.previous):
            try:
                content = load_checkpoint(path)
            except FileNotFoundError:
                self.notes.append(f"{path} is missing")
            except DamagedCheckpoint as error:
                self.notes.append(str(error))
            else:
                self._last_is_whole = path == self.last
                self.notes += [f"continuing from {path}"] if self.notes else []
                return content
        raise DataError(
            f"no checkpoint of the run can be read: {'; '.join(self.notes)}. Nothing was changed. Put a copy of one of "
            f"them in its place, or remove {self.folder} and run the same command again to train from the start"
        )


class _Hashed:
    """Writes to ``file``, and hashes what it writes. ``error``: why a write failed, which torch.save does not say."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest, self.length = file, hashlib.sha256(), 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except BaseException as error:
            self.error = error
            raise
        self.digest.update(data)
        self.length += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Replaces ``path`` atomically; the old file gets the name ``keep``. DataError if the disk is full.

    ``state`` holds tensors and plain values only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path, "wb", keep=keep) as file:
            hashed = _Hashed(file)
            try:
                torch.save(state, hashed)  # type: ignore[arg-type]  # it needs no more than these two functions
            except RuntimeError:
                if hashed.error is not None:
                    raise hashed.error from None
                raise
            hashed.write(HEAD.pack(MAGIC, FORMAT, hashed.length))
            file.write(hashed.digest.digest())
    except OSError as error:
        raise DataError(
            f"{path}: the checkpoint could not be written ({error.strerror or error}). The checkpoint before it is "
            "intact. Free some space, or see to the disk, and run the same command again"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote, on the CPU.

    Raises FileNotFoundError if there is no file, DamagedCheckpoint if it is not whole or cannot be read, and DataError
    if it is whole, but another version wrote it.
    """
    try:
        with open(path, "rb") as file:
            found = _verified_format(path, file)
            if found == FORMAT:
                file.seek(0)
                content = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except DataError:
        raise
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # pickle raises many types
        raise DataError(f"{path} has a right checksum, but holds no checkpoint ({first_line(error)})") from error
    if found != FORMAT:
        raise DataError(
            f"{path} was written by another version of vitlocal (format {found}, expected {FORMAT}). Continue with "
            f"that version, or remove {path.parents[1]} and run the command again to train from the start"
        )
    if not isinstance(content, dict):
        raise DataError(f"{path} has a right checksum, but holds no checkpoint (a {type(content).__name__})")
    return content


def _verified_format(path: Path, file: IO[bytes]) -> int:
    """The format of a checkpoint whose checksum is right. Raises DamagedCheckpoint otherwise."""
    length = max(0, file.seek(0, 2) - TRAILER_BYTES)
    file.seek(length)
    trailer = file.read(TRAILER_BYTES)
    if len(trailer) < TRAILER_BYTES or not trailer.startswith(MAGIC):
        raise DamagedCheckpoint(
            f"{path} has no checksum at its end: it was cut short, or an older version of vitlocal or another program "
            "wrote it"
        )
    file.seek(0)
    digest, left = hashlib.sha256(), length + HEAD.size
    while left and (block := file.read(min(left, BLOCK_BYTES))):
        digest.update(block)
        left -= len(block)
    _, found, stated = HEAD.unpack(trailer[: HEAD.size])
    if digest.digest() != trailer[HEAD.size :] or stated != length:
        raise DamagedCheckpoint(f"{path} is damaged: its checksum is wrong")
    return found
