"""The fused decoder as an operation for any FFCV pipeline, instead of FFCV's own image decoders.

Loader("train_256_jpg.beton", pipelines={"image": [CropDecoder(224), ToTensor()], …})

It needs FFCV, which ``pip install "vitlocal[ffcv]"`` installs.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from vitlocal.data.crops import CropPolicy
from vitlocal.data.native import EIGHTH, MESSAGE_BYTES, ROW, DecoderThreads, library, native_policy
from vitlocal.data.peers import missing_extra


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Restores PyTorch's number of threads at the end: importing ffcv and making an ffcv Loader change it."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


try:
    with keep_torch_threads(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # distutils and invalid escapes, inside ffcv
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.compiler import Compiler
        from ffcv.pipeline.state import State
except ImportError as error:
    raise missing_extra("ffcv", error) from error


class CropDecoder(SimpleRGBImageDecoder):  # FFCV recognizes decoders of images by this base class
    """Decodes stored images to (B, S, S, 3) uint8 crops.

    ``size`` (px) may be set between passes. By default, crops are random resized crops with flips, with seed 0. Each
    pass is an epoch with its own boxes. A damaged image becomes black and is counted in ``damaged``, because FFCV's
    loader would hang at an error. (FFCV's own decoders return the pixels of another image.)
    """

    def __init__(self, size: int, crops: CropPolicy | None = None):
        super().__init__()
        self.size = size
        # The compiled code knows these by their addresses, because numba would freeze their values.
        self.policy = native_policy(crops or CropPolicy(random=True), -1)  # Loader() adds 1, and so does each pass
        self.damaged = np.zeros(1, np.int64)
        self.threads: DecoderThreads | None = None

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        self.policy["epoch"] += 1
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        if self.threads is None:
            self.threads = DecoderThreads(Compiler.num_threads)
        read, native = self.memory_read, library().vitlocal_decode
        pool, policy, damaged = self.threads.pool, self.policy.ctypes.data, self.damaged.ctypes.data
        row_words = ROW.itemsize // 8

        def decode(rows_asked, crops, metadata, storage_state):  # type: ignore[no-untyped-def]  # numba compiles it
            count = len(rows_asked)
            rows = np.zeros((count, row_words), np.uint64)  # native.ROW, with an address as the offset
            draws = np.empty(count, np.int64)
            for place in range(count):
                draws[place] = rows_asked[place]
                field = metadata[rows_asked[place]]
                stored = read(field["data_ptr"], storage_state)
                rows[place, 0] = stored.ctypes.data
                rows[place, 1] = stored.size
                rows[place, 2] = np.uint64(field["width"]) | (np.uint64(field["height"]) << np.uint64(32))
                rows[place, 3] = np.uint64(field["mode"])
            statuses = np.zeros(count, np.int32)
            message = np.zeros(MESSAGE_BYTES, np.uint8)
            native(
                pool, 0, 0x7FFFFFFFFFFFFFFF, rows.ctypes.data, 0, draws.ctypes.data, count, policy, 0, crops.shape[1],
                EIGHTH, crops.ctypes.data, statuses.ctypes.data, message.ctypes.data, damaged,
            )  # fmt: skip
            return crops[:count]

        return decode
