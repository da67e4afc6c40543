"""Files that are written as a whole or not at all, and files with one JSON object per line."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, mode: str = "w", sync: bool = True) -> Iterator[IO[Any]]:
    """Opens a file that replaces ``path`` when the block ends. After a kill or an error, ``path`` is as before.

    Text is UTF-8; ``mode="wb"`` is for bytes. ``sync``: the file is on the disk when it replaces ``path``.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in ``path``, up to the first damaged line (a kill can cut the last one); empty without the file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replaces ``path`` by ``records``, one per line."""
    with replacing(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends ``record``; it is on the disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
