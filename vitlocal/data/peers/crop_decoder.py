"""The fused decoder as an operation of FFCV: for our own loader, and in place of FFCV's decoders in a stock one.

Loader("train_256_jpg.beton", pipelines={"image": [CropDecoder(224), ToTensor()], …})
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from vitlocal.data.crops import Cropping
from vitlocal.data.native import EIGHTH, ROW, Threads, library, policy_of


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Importing ffcv, and each loader of it, sets PyTorch's threads; the trainer wants its own number."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


with torch_threads_kept(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # distutils and invalid escapes, inside ffcv
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.state import State


class CropDecoder(SimpleRGBImageDecoder):  # FFCV tells by this base that it is a decoder of images
    """Stored images → (B, S, S, 3) uint8 crops.

    ``size`` (px) may be set between passes. Without ``cropping`` it is a random resized crop with flips, with seed
    0; each pass counts as an epoch, so each draws other boxes. A corrupt image comes out black and is counted in
    ``damaged`` (a stock loader would hang on an error); FFCV's own decoders give the pixels of another image.
    """

    def __init__(self, size: int, cropping: Cropping | None = None, most_reduction: int = EIGHTH):
        super().__init__()
        self.size, self.cropping, self.most_reduction = size, cropping or Cropping(random=True), most_reduction
        # The compiled code knows these by address: numba would freeze their values.
        self.policy = policy_of(self.cropping, -1)  # declared once by Loader(), then once by each pass
        self.damaged = np.zeros(1, np.int64)
        self.threads: Threads | None = None

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        self.policy["epoch"] += 1
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        if self.threads is None:
            self.threads = Threads(Compiler.num_threads)
        read, native = self.memory_read, library().vitlocal_decode
        pool, policy, most_reduction = self.threads.pool, self.policy.ctypes.data, self.most_reduction
        damaged, row_bytes = self.damaged.ctypes.data, ROW.itemsize

        def decode(rows_asked, crops, metadata, storage_state):
            count = len(rows_asked)
            rows = np.zeros((count, row_bytes // 8), np.uint64)  # of ROW: its offset is here an address
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
            message = np.zeros(200, np.uint8)
            native(
                pool, 0, 0x7FFFFFFFFFFFFFFF, rows.ctypes.data, 0, draws.ctypes.data, count, policy, crops.shape[1],
                most_reduction, crops.ctypes.data, statuses.ctypes.data, message.ctypes.data,
                damaged,
            )  # fmt: skip
            return crops[:count]

        return decode
