"""The native code: the fused decoder and the photo encoder. Both run without Python's lock.

The decoder makes finished crops, with one call for each batch. It decodes the part of a JPEG that the box needs at the
largest useful reduction, resizes it with antialiasing and flips it while it writes. The same draw gives the same bytes
for any number of threads and any instruction set. The encoder decodes a photo once for all its stored forms.

Shape letters: B batch, S size, n rows of a file, F forms of a photo.
"""

import ctypes
import functools
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from vitlocal.data.crops import ROW_MASK, Box, CropPolicy
from vitlocal.errors import ConfigError, DataError
from vitlocal.machine import cores

CENTRE, RANDOM, WHOLE = 0, 1, 2  # kinds of box: the central square, a random resized crop, the whole image
FULL, EIGHTH = 1, 8  # the largest reduction of a JPEG while it is decoded

# The structs of native.h.
ROW = np.dtype([("offset", "u8"), ("bytes", "u8"), ("width", "u4"), ("height", "u4"), ("raw", "u4"), ("padding", "u4")])
POLICY = np.dtype(
    [("kind", "i8"), ("seed", "i8"), ("epoch", "i8"), ("scale", "f8", 2), ("ratio", "f8", 2), ("flip", "f8"),
     ("centre", "f8")]
)  # fmt: skip
BOX = np.dtype([*((name, "f8") for name in ("top", "left", "height", "width", "reach")), ("flipped", "i4")], align=True)
PHOTO = np.dtype([("width", "u4"), ("height", "u4"), ("upright", "u4"), ("plain", "u4"), ("keepable", "u4")])
FORM = np.dtype(
    [("width", "u4"), ("height", "u4"), ("kind", "u4"), ("quality", "u4"), ("sampling", "u4"), ("padding", "u4"),
     ("offset", "u8"), ("bytes", "u8")]
)  # fmt: skip
AS_JPEG, AS_RAW, AS_ORIGINAL = 0, 1, 2  # how a photo is stored; AS_ORIGINAL: its own JPEG without metadata
MESSAGE_BYTES = 200
_NO_MEMORY, _OUTSIDE, _REFUSED, _WARNED, _UNREADABLE = 3, 4, 5, 7, 8
_PROBLEMS = {
    1: "is a damaged JPEG ({message})",
    2: "has another size than the table of the file says: {message}",
    _NO_MEMORY: "needs more memory to decode than there is",
    _OUTSIDE: "lies outside of the file",
    _REFUSED: "would take too long to decode, or too much memory ({message})",
    6: "has a box that is not inside of the image, or has no area",
    _UNREADABLE: "cannot be read: the file became shorter after it was opened, or its disk fails",
    _WARNED: "is a damaged JPEG ({message})",
}


_NUMBER, _ADDRESS, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_FUNCTIONS: dict[str, tuple[type | None, str]] = {  # results, and arguments: n number, a address, b bytes, i int
    "pool_new": (_ADDRESS, "n"),
    "pool_free": (None, "a"),
    "decode": (_NUMBER, "aanananaannaaaa"),
    "gather": (_INT, "anaana"),
    "encoder_new": (_ADDRESS, ""),
    "encoder_free": (None, "a"),
    "inspect": (_INT, "abna"),
    "check": (_INT, "abna"),
    "encode": (_INT, "abnannanaa"),
    "box": (None, "annnna"),
    "instructions": (_INT, "i"),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The native functions with declared arguments. Calls release Python's lock."""
    path = Path(__file__).with_name("_native.so")
    if not path.exists():
        raise ImportError(f"{path}, vitlocal's native code, is not compiled; run pip install -e . in its folder")
    functions = ctypes.CDLL(str(path))
    types: dict[str, Any] = {"n": _NUMBER, "a": _ADDRESS, "b": ctypes.c_char_p, "i": _INT}
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(functions, f"vitlocal_{name}")
        function.restype, function.argtypes = result, [types[letter] for letter in arguments]
    return functions


def native_policy(crops: CropPolicy, epoch: int, kind: int | None = None) -> np.ndarray:
    """The crop policy of one pass for the native code: (1,) of POLICY; ``kind`` WHOLE decodes every byte."""
    kind = kind if kind is not None else RANDOM if crops.random else CENTRE
    epoch = crops.box_epoch(epoch)
    return np.array([(kind, crops.box_seed, epoch, crops.scale, crops.ratio, crops.flip, crops.centre)], POLICY)


def native_box(policy: np.ndarray, draw: int, height: int, width: int, size: int) -> Box:
    """The box that is cut from an image of ``height`` x ``width`` px for a crop of ``size`` px."""
    box = np.zeros(1, BOX)
    library().vitlocal_box(policy.ctypes.data, draw, height, width, size, box.ctypes.data)
    top, left, height_, width_, reach, flipped = box[0].item()
    return Box(top, left, height_, width_, bool(flipped), reach)


def _free_threads(pool: int, process: int) -> None:
    if os.getpid() == process:  # a forked child has none of the threads, and would wait for their end forever
        library().vitlocal_pool_free(pool)


class DecoderThreads:
    """The threads of the decoder, ``count`` (0: one for each core), until ``close``. Passes may share them.

    They belong to the process that makes them. ConfigError if the system cannot start so many.
    """

    def __init__(self, count: int = 0):
        if count < 0:
            raise ConfigError(f"threads of the decoder: got {count}, expected a number from 1, or 0 for one per core")
        self.count, self._process = count or cores(), os.getpid()
        self.pool = library().vitlocal_pool_new(self.count)
        if not self.pool:
            raise ConfigError(f"data.workers: the system cannot start {self.count} threads; set fewer")
        self.close = weakref.finalize(self, _free_threads, self.pool, self._process)
        self.close.atexit = False  # a thread of a loader may still decode

    def decode(
        self, file: np.ndarray, rows: np.ndarray, draws: np.ndarray, policy: np.ndarray, crops: np.ndarray,
        most_reduction: int = EIGHTH, boxes: np.ndarray | None = None,
    ) -> dict[int, str]:  # fmt: skip
        """Fills ``crops`` (B, S, S, 3) uint8 with the boxes of ``draws`` (B,) int64.

        ``file`` (bytes,) uint8 holds the images at the offsets in ``rows`` (n,) of ROW. ``policy`` is
        :func:`native_policy`'s; ``boxes`` (B,) of BOX replaces its boxes. Returns what is wrong with images that do not
        decode, by their place in the batch. DataError if a mapped ``file`` cannot be read.
        """
        if os.getpid() != self._process:  # the threads do not exist here, and waiting for them would never end
            raise ConfigError("the decoder was made in another process, before a fork; open the loader after it")
        assert self.close.alive, "closed"
        assert crops.dtype == np.uint8 and crops.flags.c_contiguous
        assert crops.ndim == 4 and crops.shape[1] == crops.shape[2] and crops.shape[3] == 3
        assert file.dtype == np.uint8 and file.flags.c_contiguous and policy.dtype == POLICY
        assert draws.dtype == np.int64 and draws.flags.c_contiguous and len(draws) == len(crops)
        assert rows.dtype == ROW and rows.flags.c_contiguous and len(rows)
        if boxes is not None:
            assert boxes.dtype == BOX and boxes.flags.c_contiguous and len(boxes) == len(draws)
        statuses = np.zeros(len(draws), np.int32)
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        first = library().vitlocal_decode(
            self.pool, file.ctypes.data, file.size, rows.ctypes.data, len(rows), draws.ctypes.data, len(draws),
            policy.ctypes.data, None if boxes is None else boxes.ctypes.data, crops.shape[1], most_reduction,
            crops.ctypes.data, statuses.ctypes.data, message, None,
        )  # fmt: skip
        if first < 0:
            return {}
        if (unreadable := np.flatnonzero(statuses == _UNREADABLE)).size:
            row = int(draws[unreadable[0]]) & ROW_MASK
            raise DataError(f"{getattr(file, 'filename', None)}: row {row} {_PROBLEMS[_UNREADABLE]}; restore it")
        messages = {first: message.value.decode("latin-1")}
        return {
            place: _PROBLEMS[int(statuses[place])].format(message=messages.get(place, "libjpeg-turbo rejects it"))
            for place in np.flatnonzero(statuses).tolist()
        }


def read_parts(file: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Joins the parts of a mapped ``file`` at ``offsets`` (n,) of ``sizes`` (n,) in ``out``, all (bytes,) uint8.

    Raises DataError if they cannot be read: numpy's own reads would end the process.
    """
    offsets, sizes = (np.ascontiguousarray(numbers, np.uint64) for numbers in (offsets, sizes))
    found = np.empty(int(sizes.sum()), np.uint8) if out is None else out
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.size == sizes.sum()
    status = library().vitlocal_gather(
        file.ctypes.data, file.size, offsets.ctypes.data, sizes.ctypes.data, len(offsets), found.ctypes.data
    )
    if status:
        raise DataError(f"{getattr(file, 'filename', None)}: a value {_PROBLEMS[status]}; restore it")
    return found


class Encoder:
    """Makes the stored forms of photos, one photo at a time. Each thread needs its own encoder."""

    def __init__(self) -> None:
        self._encoder = library().vitlocal_encoder_new()
        if not self._encoder:
            raise MemoryError("no memory for an encoder")
        weakref.finalize(self, library().vitlocal_encoder_free, self._encoder).atexit = False
        self._photo = np.zeros(1, PHOTO)
        self._output = ctypes.c_void_p()
        self._message = ctypes.c_char_p()

    def inspect(self, data: bytes) -> np.void | None:
        """The header of a JPEG, of PHOTO; None if it cannot be read."""
        failed = library().vitlocal_inspect(self._encoder, data, len(data), self._photo.ctypes.data)
        return None if failed else self._photo[0]

    def require_whole(self, jpeg: bytes) -> None:
        """Raises ValueError if parts of a JPEG are damaged, so that a decoder such as Pillow would invent their pixels.

        It decodes the JPEG at an eighth of its size. Files of other formats, and JPEGs that no decoder accepts, pass.
        """
        status = library().vitlocal_check(self._encoder, jpeg, len(jpeg), ctypes.byref(self._message))
        if status in (_REFUSED, _WARNED):
            raise ValueError(_PROBLEMS[status].format(message=(self._message.value or b"").decode("latin-1")))

    def encode(self, photo: bytes | np.ndarray, height: int, width: int, forms: np.ndarray) -> list[bytes] | None:
        """The photo in each of ``forms`` (F,) of FORM, none of them larger than the photo. FFCV's filter shrinks it.

        ``photo`` is a JPEG, or pixels (height, width, 3) uint8. If a JPEG cannot be stored AS_ORIGINAL, its ``kind``
        becomes AS_JPEG. None if libjpeg-turbo rejects a JPEG. ValueError if it would take minutes, or if parts are
        damaged, so that other decoders would invent their pixels.
        """
        assert forms.dtype == FORM and forms.flags.c_contiguous
        data, pixels = (photo, None) if isinstance(photo, bytes) else (None, photo.ctypes.data)
        if not isinstance(photo, bytes):
            assert photo.dtype == np.uint8 and photo.flags.c_contiguous and photo.shape == (height, width, 3)
        status = library().vitlocal_encode(
            self._encoder, data, len(data or b""), pixels, height, width, forms.ctypes.data, len(forms),
            ctypes.byref(self._output), ctypes.byref(self._message),
        )  # fmt: skip
        if status == _NO_MEMORY:
            raise MemoryError(f"no memory to encode {width} x {height} px")
        if status in (_REFUSED, _WARNED):
            raise ValueError(_PROBLEMS[status].format(message=(self._message.value or b"").decode("latin-1")))
        if status:
            return None
        start = self._output.value
        return [ctypes.string_at(start + offset, count) for offset, count in forms[["offset", "bytes"]].tolist()]
