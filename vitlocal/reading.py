"""Opens files that others wrote: only regular ones, and whole only up to a size."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

LARGEST_TEXT = 1 << 30  # bytes of a list or a manifest; that of ImageNet has 60 MB
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file for reading. Raises OSError, and does not wait, for a pipe, a device, a socket or a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file", str(path))
    return open(descriptor, "rb")


def read_whole(path: str | Path, most: int = LARGEST_TEXT) -> bytes:
    """The bytes of a file. Raises OSError, before it is read, if it has more than ``most``, or is not regular."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, expected at most {most}", str(path))
        return file.read(size)
