"""FFCV's own loader as a source: data.loader=ffcv."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from native_loader import native

from vitlocal.data.crops import CropPolicy
from vitlocal.data.manifest import load_manifest
from vitlocal.data.shares import WHOLE, Share
from vitlocal.errors import DataError
from vitlocal.plan import Feed
from vitlocal.progress import Position

pytestmark = pytest.mark.ffcv
CPU = torch.device("cpu")
TRAIN = CropPolicy(random=True, seed=3)


def ffcv_source(folder: Path, split: str = "train", crops: CropPolicy = TRAIN):
    from vitlocal.data.peers.ffcv import FFCVSource

    manifest = load_manifest(str(folder), split)
    manifest = dataclasses.replace(manifest, files=manifest.files[:1])  # FFCV compiles for seconds, for each file
    return FFCVSource(folder, manifest, crops, CPU, workers=1)


@pytest.fixture(scope="module")
def train(folder: Path) -> Iterator:
    source = ffcv_source(folder)
    yield source
    source.close()


def read(source, feed: Feed, at: Position = Position()) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # noqa: B008
    with source.open(feed, at) as batches:
        return [(batch.images.clone(), batch.labels, batch.ids) for batch in batches]


def test_order_and_labels_are_those_of_the_native_loader(folder: Path, shared, train):
    ours_of = native(folder, "train", TRAIN, shared)
    for feed, at in ((Feed(32, 50), Position()), (Feed(48, 50), Position(1)), (Feed(16, 30), Position(2, 40))):
        ours, theirs = read(ours_of, feed, at), read(train, feed, at)
        for (images, labels, ids), (others, other_labels, other_ids) in zip(ours, theirs, strict=True):
            assert torch.equal(ids, other_ids) and torch.equal(labels, other_labels)
            assert others.shape == images.shape and others.dtype == torch.uint8
            assert others.is_contiguous(memory_format=torch.channels_last)
            # Another part of the same photo has more in common than another photo, on average.
            distances = (images.float().mean((2, 3))[:, None] - others.float().mean((2, 3))[None]).abs().mean(2)
            assert distances.diagonal().mean() < distances.mean()


def test_a_subset_of_the_rows(train):
    train.rows.set(7, np.arange(0, 120, 3))
    ids = torch.cat([ids for _, _, ids in read(train, Feed(16, 16, subset=7))])
    assert sorted(ids.tolist()) == list(range(0, 120, 3))


def test_size_changes_compile_nothing_and_early_exits_leave_no_threads(train):
    sizes = (16, 24, 32)
    for size in sizes:
        read(train, Feed(size, 40))
    threads, loaders = len(os.listdir("/proc/self/task")), dict(train.loaders)
    code = [loader.loader.code for loader in loaders.values()]
    for number in range(30):
        with train.open(Feed(sizes[number % 3], 10), Position()) as batches:
            assert next(batches).images.shape[-1] == sizes[number % 3]
    deadline = time.monotonic() + 60  # the system may take a moment to remove a joined thread
    while len(os.listdir("/proc/self/task")) > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) <= threads
    assert all(after.loader.code is before for after, before in zip(train.loaders.values(), code, strict=True))


def test_errors_of_ffcvs_thread_are_raised_in_the_consumer(train, monkeypatch: pytest.MonkeyPatch):
    from ffcv.loader.epoch_iterator import EpochIterator

    def fail(*arguments):
        raise MemoryError("no memory for the batch")

    monkeypatch.setattr(EpochIterator, "run_pipeline", fail)
    before = threading.active_count()
    with pytest.raises(MemoryError, match="no memory for the batch"):
        read(train, Feed(16, 40))
    assert threading.active_count() == before


def test_validation_is_in_order_and_central(folder: Path, shared):
    crops = CropPolicy(random=False, centre=1.0)
    source = ffcv_source(folder, "val", crops)
    ours_of = native(folder, "val", crops, shared)
    ours, theirs = read(ours_of, Feed(64, 64)), read(source, Feed(64, 64))
    for (images, labels, ids), (others, other_labels, other_ids) in zip(ours, theirs, strict=True):
        assert torch.equal(ids, other_ids) and torch.equal(labels, other_labels)
        assert (images.float() - others.float()).abs().mean() < 8  # FFCV resizes with another filter
    source.close()


def test_several_processes_read_every_place_once(train, monkeypatch: pytest.MonkeyPatch):
    passes = []
    for share in (WHOLE, Share(0, 2), Share(1, 2)):
        monkeypatch.setattr(train, "share", share)
        with train.open(Feed(16, 30), Position(1, 29)) as batches:  # of 120 rows
            passes.append([dataclasses.replace(batch, images=batch.images.clone()) for batch in batches])
    for whole, *parts in zip(*passes, strict=True):
        assert {part.total for part in parts} == {len(whole)}
        places = np.concatenate([part.places for part in parts])
        assert sorted(places.tolist()) == list(range(len(whole)))
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids[places])


def test_the_number_of_pytorch_threads_stays(train):
    before = torch.get_num_threads()
    read(train, Feed(16, 40))
    assert torch.get_num_threads() == before


def test_a_file_with_another_length_is_named(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / "train_48_raw.beton"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"train_48_raw.beton has .*cut off"):
        ffcv_source(tmp_path / "data")


def test_the_configuration_selects_it(configure, open_configured, decoder):
    from vitlocal.data.peers.ffcv import FFCVSource

    sources = open_configured(configure("--data.loader=ffcv", "--data.workers=1"))
    assert isinstance(sources.train, FFCVSource) and isinstance(sources.val, FFCVSource)
    sources.close()
