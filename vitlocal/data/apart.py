"""Reads in a process of its own what a damaged file may crash.

Arrow does not catch the C++ exceptions of ``RowGroupMetaData.column``, and scipy's reader of .mat files believes wrong
sizes. One flipped bit can end the process that reads.
"""

import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MOST_MEMORY, MOST_SECONDS = 1 << 30, 60  # bytes and processor time that reading may take


class Crashed(Exception):
    """The process ended while it read item ``index``."""

    def __init__(self, index: int, reason: str):
        super().__init__(reason)
        self.index = index


def read_apart(function: Callable[[str], Any], items: Sequence[str]) -> list[Any]:
    """``function``, one of this module, of each item. Raises :class:`Crashed` if it ends the process.

    Results are what JSON holds.
    """
    # Threads that are not used would reserve memory too.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    environment["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others reserve a GiB at the start
    child = subprocess.run(
        [sys.executable, "-m", __name__, function.__name__], input=json.dumps(items), capture_output=True, text=True,
        errors="replace", env=environment, start_new_session=True,  # signals of the terminal are for the parent
    )  # fmt: skip
    results = child.stdout.split("\n")[:-1]
    if len(results) < len(items):
        said = child.stderr.strip().split("\n")[-1].strip()
        number = -child.returncode
        raise Crashed(len(results), said or (signal.Signals(number).name if number > 0 else "no result"))
    return [json.loads(result) for result in results]


def read_footer(path: str) -> None:
    """Reads what a parquet file says about its columns.

    Raises MemoryError beyond :func:`limit_resources`. Other errors are left to those who read the file.
    """
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for group in map(file.metadata.row_group, range(file.num_row_groups)):
                for column in range(group.num_columns):
                    group.column(column)
    except MemoryError:  # those who read the file have no limit
        raise
    except Exception:
        return


def read_synsets(data: str) -> dict[int, str] | str:
    """The wnid of each number in the devkit's ``meta.mat`` (base64), or why it cannot be read."""
    try:
        import numpy as np
        from scipy.io import loadmat

        table = np.atleast_1d(loadmat(io.BytesIO(base64.b64decode(data)), squeeze_me=True)["synsets"])
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table if int(row["num_children"]) == 0}
    except Exception as error:  # scipy raises many kinds of errors on damaged data
        return repr(error)


def limit_resources(items: int) -> None:
    """Limits the memory of this process, beyond what it has, and its processor time."""
    import resource

    status = Path("/proc/self/status")
    pages = status.read_text().partition("VmData:")[2].split() if status.exists() else []
    has = int(pages[0]) * 1024 if pages else 0
    for kind, most in ((resource.RLIMIT_DATA, has + MOST_MEMORY), (resource.RLIMIT_CPU, MOST_SECONDS + items)):
        hard = resource.getrlimit(kind)[1]  # of the machine, such as a login node: a process cannot raise it
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    chosen, asked = globals()[sys.argv[1]], json.load(sys.stdin)
    limit_resources(len(asked))
    for item in asked:
        print(json.dumps(chosen(item)), flush=True)
