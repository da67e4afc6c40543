"""Files that are written as a whole or not at all, and files with one JSON object per line."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def naming(path: Path, *others: Path) -> Iterator[None]:
    """A context in which an OSError without a file's name, or about one of ``others``, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, *map(str, others)):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def replacing(path: Path, mode: str = "w", sync: bool = True, keep: Path | None = None) -> Iterator[IO[Any]]:
    """Opens a file that replaces ``path`` when the block ends. After a kill or an error, ``path`` is as before.

    Text is UTF-8, with escapes for what UTF-8 lacks (names of files need not be text); ``mode="wb"`` is for bytes.
    ``sync``: the file is on the disk when it replaces ``path``, and the folder afterwards. ``keep``: the name that the
    old file gets. An OSError names ``path``.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with naming(path, temporary):
            encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
            with open(temporary, mode, encoding=encoding, errors=errors) as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            if keep is not None:
                _rename(path, keep)
            os.replace(temporary, path)
            if sync:
                flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # an error here must not hide the first one
            temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Replaces the content of ``path``: the whole text or nothing."""
    with replacing(path, sync=False) as file:
        file.write(text)


def _rename(path: Path, other: Path) -> None:
    """Gives the file ``path`` the name ``other``. It keeps the old name too, if the disk has hard links."""
    link = other.with_name(f".{other.name}.linking")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, other)
        return
    try:
        os.replace(link, other)
    finally:
        link.unlink(missing_ok=True)  # it stays after an error, and if both names had the same file


def flush_folder(folder: Path) -> None:
    """Flushes renames within ``folder`` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems cannot flush a folder
        os.fsync(descriptor)
    os.close(descriptor)


def read_lines(path: Path, check: Callable[[dict[str, Any]], bool] = lambda record: True) -> list[dict[str, Any]]:
    """The objects in ``path`` that fulfil ``check``; empty without the file. Damaged lines are left out."""
    return [record for _, record in _lines(path, check) if record is not None]


def count_damaged(path: Path, check: Callable[[dict[str, Any]], bool] = lambda record: True) -> int:
    """The number of lines that :func:`read_lines` leaves out, without the end of a file that a kill cut short."""
    return sum(record is None for _, record in _lines(path, check))


def keep_lines(
    path: Path, keep: Callable[[dict[str, Any]], bool], check: Callable[[dict[str, Any]], bool] = lambda record: True
) -> int:
    """Removes records from ``path`` for which ``keep`` is false. Returns the number of damaged lines, which stay."""
    lines = list(_lines(path, check))
    with replacing(path, "wb") as file:
        file.writelines(line + b"\n" for line, record in lines if record is None or keep(record))
    return sum(record is None for _, record in lines)


def _lines(path: Path, check: Callable[[dict[str, Any]], bool]) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of ``path``, each with its record; None: it is damaged. Not the last one, if a kill has cut it."""
    *lines, end = (path.read_bytes() if path.exists() else b"").split(b"\n")
    for line in (*lines, end):
        try:
            record = json.loads(line)
            whole = isinstance(record, dict) and check(record)
        except (ValueError, RecursionError):
            whole = False
        if whole or (line is not end and line.strip()):
            yield line, record if whole else None


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replaces ``path`` by ``records``, one per line."""
    with replacing(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends ``record``; it is on the disk when this returns. After an error the file is as before."""
    with naming(path), open(path, "ab", buffering=0) as file:
        end, line = file.seek(0, os.SEEK_END), (json.dumps(record) + "\n").encode()
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise
