"""Crops of photos to latents, in batches that depend on the row numbers alone.

A network's result for an image may change in its last bits with the shape of the batch. So a call has always the same
number of images, and a row always the same place in it. Missing rows leave zeros. The bytes of a file then do not
depend on the number of workers, or on where a write was interrupted.

Letters: F files, K readable rows of a block, S side of a crop, C channels of a latent, h its side (S / stride).
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing

import numpy as np
import torch

from vitlocal.data.autoencoder import Autoencoder, images_per_call
from vitlocal.data.manifest import BetonFile
from vitlocal.data.writer.encode import Chunk, no_room
from vitlocal.errors import DataError

BLOCK_ROWS = 32  # a multiple of the rows of each call: a power of two, at most 32 plain and 32 mirrored images


def encode_latents(
    chunks: Generator[Chunk, None, None], files: Sequence[BetonFile], autoencoder: Autoencoder, entries: Sequence[str]
) -> Generator[Chunk, None, None]:
    """The ``chunks`` of crops as blocks of latents, float16 (2, 2C, h, h): [plain, mirrored][mean, standard deviation].

    ``entries`` names all rows of the source. A block ends at a multiple of BLOCK_ROWS, or at the last row. Rows after
    the last whole block are lost if ``chunks`` ends early. Closing it closes ``chunks``. Raises DataError if a latent
    has values that float16 cannot hold, and ConfigError if a page cannot hold a row.
    """
    found: dict[int, tuple[np.ndarray, list[bytes]]] = {}  # by row: records (F,) of stored_row(), and F crops
    skipped: dict[int, str] = {}
    start = -1
    with closing(chunks):
        for chunk in chunks:
            start = chunk.start if start < 0 else start
            readable = [row for row in range(chunk.start, chunk.next) if row not in chunk.skipped]
            found |= {
                row: (chunk.rows[:, place], [images[place] for images in chunk.images])
                for place, row in enumerate(readable)
            }
            skipped |= chunk.skipped
            while start < (end := min(start - start % BLOCK_ROWS + BLOCK_ROWS, len(entries))) <= chunk.next:
                mine = {row: found.pop(row) for row in range(start, end) if row in found}
                records = np.stack([record for record, _ in mine.values()], 1) if mine else chunk.rows[:, :0].copy()
                images = []
                for place, file in enumerate(files):
                    crops = {row: data[place] for row, (_, data) in mine.items()}
                    images.append(_latents_of(crops, file, autoencoder, entries))
                    records["size"][place] = [size for size, _ in images[-1]]
                left_out = {row: skipped.pop(row) for row in range(start, end) if row in skipped}
                yield Chunk(start, end, records, [[data for _, data in stored] for stored in images], left_out, None)
                start = end


def _latents_of(
    crops: Mapping[int, bytes], file: BetonFile, autoencoder: Autoencoder, entries: Sequence[str]
) -> list[tuple[int, bytes]]:
    """The stored bytes of rows of one block: their latents, and what follows the pixels in ``crops``.

    Returns the number of bytes of each latent too.
    """
    side = file.side
    count, size = max(1, images_per_call(side) // 2), 3 * side * side  # rows of a call, bytes of a crop
    stored: dict[int, tuple[int, bytes]] = {}
    for first in sorted({row - row % count for row in crops}):
        pixels = np.zeros((count, side, side, 3), np.uint8)
        mine = [row for row in range(first, first + count) if row in crops]
        for row in mine:
            pixels[row - first] = np.frombuffer(crops[row], np.uint8, size).reshape(pixels.shape[1:])
        both = np.concatenate([pixels, pixels[:, :, ::-1]])  # plain, mirrored
        latents = autoencoder.encode(both).to("cpu", torch.float16).numpy()
        for row in mine:
            pair = latents[[row - first, count + row - first]]  # (2, 2C, h, h)
            if not np.isfinite(pair).all():
                raise DataError(
                    f"the autoencoder's latent of {entries[row]!r} at {side} px has values that float16 cannot hold; "
                    "use another --vae"
                )
            stored[row] = pair.nbytes, pair.tobytes() + crops[row][size:]
            if len(stored[row][1]) > file.page_size:
                raise no_room(len(crops[row]) - size, pair.nbytes)
    return [stored[row] for row in crops]
