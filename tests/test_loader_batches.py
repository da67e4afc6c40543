"""The first 1,000 batches of the loader: with any number of workers and processes, and after many restarts."""

import json
import random
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest
import torch
from native_loader import native
from photos import PHOTOS, unpack_photos

from vitlocal.data.crops import CropPolicy
from vitlocal.data.loader import Loader
from vitlocal.data.reader import Slot
from vitlocal.data.writer.write import write
from vitlocal.errors import DeviceMemoryError
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.write_options import WriteOptions


def digests(batches: Iterator, count: int) -> list[tuple[str, list[int]]]:
    """A digest of the images of each batch, sorted by row, and its rows."""
    found = []
    for images, labels, ids in islice(batches, count):
        order = ids.argsort()
        pixels = images[order].permute(0, 2, 3, 1).contiguous().numpy().tobytes()
        found.append((sha256(pixels + labels[order].numpy().tobytes()).hexdigest(), ids[order].tolist()))
    return found


def epochs_of(loader: Loader) -> Iterator:
    while True:
        yield from loader


@pytest.fixture(scope="module", params=["sample", pytest.param("photos", marks=pytest.mark.realdata)])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, or real photos, in the default files of ImageNet."""
    out, spec = tmp_path_factory.mktemp("large"), "sample:10"
    if request.param == "photos":
        if not PHOTOS.exists():
            pytest.skip(f"{PHOTOS} is not there: VITLOCAL_REALDATA names its folder")
        spec = str(unpack_photos(tmp_path_factory.mktemp("photos"), 500))
    write(WriteOptions("train", spec, str(out)), progress=False)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 160])
def test_a_thousand_batches_are_those_of_the_trainer(large: Path, shared, size: int):
    batch, count = 16, 1000

    def opened(**options) -> Loader:
        return Loader(large, "train", **{"batch_size": batch, "size": size, "seed": 5, "return_ids": True, **options})

    with native(large, "train", CropPolicy(True, seed=5), shared) as source:
        expected, epoch = [], 0
        while len(expected) < count:
            with source.open(Feed(size, batch), Position(epoch), drop_last=True) as batches:
                expected += digests(((b.images, b.labels, b.ids) for b in batches), count - len(expected))
            epoch += 1
    for workers in (1, 2, 8):
        with opened(num_workers=workers) as loader:
            assert digests(epochs_of(loader), count) == expected
    for world in (2, 4):
        parts = [
            opened(batch_size=batch // world, rank=rank, world_size=world, resources=shared) for rank in range(world)
        ]
        together = (
            tuple(torch.cat(column) for column in zip(*batches, strict=True))
            for batches in zip(*map(epochs_of, parts), strict=True)
        )
        assert digests(together, count) == expected
        for part in parts:
            part.close()
    chosen = random.Random(size)
    stops = sorted(chosen.sample(range(1, count), 100))
    found, state = [], opened(resources=shared).state_dict()
    for stop in [*stops, count]:  # a new loader after each restart
        with opened(resources=shared) as loader:
            loader.load_state_dict(json.loads(json.dumps(state)))
            found += digests(epochs_of(loader), stop - len(found))
            state = loader.state_dict()
    assert found == expected


def test_too_little_memory_for_a_batch_names_the_options():
    with pytest.raises(DeviceMemoryError, match=r"no memory for 1000000 images of 90000 × 90000 × 3 .*batch_size"):
        Slot().take((10**6, 90000, 90000, 3), torch.uint8, pinned=False, owned=False)
