"""The loader in a loop of one's own."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from native_loader import native

import vitlocal
from vitlocal.data.beton import MappedFile
from vitlocal.data.beton_source import split_of
from vitlocal.data.crops import CropPolicy
from vitlocal.data.loader import Loader
from vitlocal.errors import ConfigError
from vitlocal.plan import Feed
from vitlocal.progress import Position

Batches = list[tuple[torch.Tensor, ...]]


def same(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for mine, other in zip(first, second, strict=True) for a, b in zip(mine, other, strict=True)
    )


@pytest.fixture
def opened(folder: Path, shared) -> Iterator:
    """``opened(batch_size=32, …)``: a loader of the sample with ids; the decoder is shared."""

    def build(split: str = "train", **options) -> Loader:
        options = {"batch_size": 32, "size": 24, "seed": 3, "return_ids": True, "resources": shared, **options}
        return Loader(folder, split, **options)

    yield build
    assert "vitlocal-loader" not in [thread.name for thread in threading.enumerate()]


def ids_of(batches: Batches) -> list[int]:
    return torch.cat([ids for _, _, ids in batches]).tolist()


def images_by_id(loader: Loader) -> dict[int, torch.Tensor]:
    return {int(row): image for images, _, ids in loader for row, image in zip(ids, images, strict=True)}


def trainer_batches(folder: Path, shared, feed: Feed, epoch: int) -> Batches:
    """What the trainer reads: the batches of an epoch, which the ring of buffers holds."""
    with native(folder, "train", CropPolicy(True, seed=3), shared).open(feed, Position(epoch)) as batches:
        return [(batch.images.clone(), batch.labels, batch.ids) for batch in batches]


def test_each_iteration_is_the_next_epoch_of_the_trainer(folder: Path, shared, opened):
    loader = opened(drop_last=False)
    assert vitlocal.Loader is Loader and len(loader) == 4 and loader.num_samples == 120
    for epoch in range(3):
        assert same(list(loader), trainer_batches(folder, shared, Feed(24, 32), epoch))  # kept batches stay as they are
    images, labels, _ = next(iter(loader))
    assert images.shape == (32, 3, 24, 24) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_training_drops_the_last_batch_and_evaluation_does_not(opened):
    train, val = opened(batch_size=50), opened("val", batch_size=50)
    assert [len(labels) for _, labels, _ in train] == [50, 50] and len(train) == 2
    assert ids_of(list(val)) == list(range(val.num_samples)) and len(val) == -(-val.num_samples // 50)


def test_memory_is_used_again_only_if_nobody_has_it(opened):
    loader = opened(batch_size=10, drop_last=False)
    kept = list(loader)
    copies = [images.clone() for images, _, _ in kept]
    seen = set()
    for images, _, _ in loader:
        seen.add(images.data_ptr())
    assert all(torch.equal(images, copy) for (images, _, _), copy in zip(kept, copies, strict=True))
    assert not seen & {images.data_ptr() for images, _, _ in kept}
    assert len(seen) < len(kept)  # the second epoch held one batch at a time
    ring = {images.data_ptr() for images, _, _ in opened(batch_size=4, copy=False, prefetch=2)}
    assert len(ring) <= 4


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_batches_do_not_depend_on_workers(folder: Path, opened, workers: int):
    expected = list(opened(size=64))
    with Loader(folder, "train", 32, 64, seed=3, return_ids=True, num_workers=workers) as loader:
        assert same(list(loader), expected)


@pytest.mark.parametrize(("world", "each"), [(2, 8), (4, 8), (2, 1), (3, 5), (4, 7)])
def test_processes_read_every_image_once(opened, world: int, each: int):
    whole = opened(batch_size=each * world)
    parts = [opened(batch_size=each, rank=rank, world_size=world) for rank in range(world)]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *others in zip(whole, *parts, strict=True):
        assert [len(labels) for _, labels, _ in others] == [each] * world
        by_id = dict(zip(batch[2].tolist(), batch[0], strict=True))
        together = torch.cat([ids for _, _, ids in others]).tolist()
        assert sorted(together) == sorted(by_id)
        images = torch.cat([images for images, _, _ in others])
        assert all(torch.equal(by_id[row], image) for row, image in zip(together, images, strict=True))


def test_the_state_continues_exactly_anywhere(opened):
    reference = opened(batch_size=7, drop_last=False)
    epochs = [list(reference) for _ in range(3)]
    chosen = random.Random(0)
    for _ in range(100):
        epoch, number = chosen.randrange(2), chosen.randrange(len(epochs[0]))
        before = opened(batch_size=7, drop_last=False)
        before.set_epoch(epoch)
        for _ in islice(before, number + 1):
            pass
        state = json.loads(json.dumps(before.state_dict()))
        after = opened(batch_size=7, drop_last=False)
        after.load_state_dict(state)
        rest = epochs[epoch][number + 1 :] or epochs[epoch + 1]
        assert same(list(islice(after, 2)), rest[:2])


def test_a_state_continues_in_another_number_of_processes(opened):
    one = opened(batch_size=16)
    for _ in islice(one, 3):
        pass
    rest = []
    for rank in range(2):
        part = opened(batch_size=8, rank=rank, world_size=2)
        part.load_state_dict(one.state_dict())
        rest += list(part)
    whole = opened(batch_size=16)
    assert sorted(ids_of(rest)) == sorted(ids_of(list(whole)[3:]))


def test_changes_of_size_and_batch_lose_and_repeat_nothing(opened):
    loader, chosen = opened(drop_last=False), random.Random(1)
    for epoch in range(5):
        ids = []
        while loader.position.epoch == epoch:
            for images, _, rows in loader:
                assert images.shape[2] == loader.size
                ids += rows.tolist()
                if chosen.random() < 0.5:
                    break
            if loader.position.epoch == epoch:
                loader.set_size(chosen.choice((16, 24, 40)), batch_size=chosen.randrange(1, 30))
                loader.position = loader.position
        assert sorted(ids) == list(range(120))


def test_a_new_size_takes_effect_at_the_next_iteration(opened):
    loader = opened(batch_size=40)
    sizes = []
    for images, _, _ in loader:
        sizes.append(images.shape[2])
        loader.set_size(16, batch_size=60)
    assert sizes == [24, 24, 24] and len(loader) == 2
    assert [tuple(images.shape[::2]) for images, _, _ in loader] == [(60, 16), (60, 16)]


def test_leaving_a_loop_goes_on_with_the_next_epoch(folder: Path, shared, opened):
    loader = opened()
    for _ in loader:
        break
    assert loader.position == Position(0, 32)
    assert torch.equal(next(iter(loader))[0], trainer_batches(folder, shared, Feed(24, 32), 1)[0][0])
    loader.sampler.set_epoch(0)
    assert loader.position == Position(0)
    order = list(loader.sampler)
    assert next(iter(loader))[2].tolist() == order[:32]


def test_setting_the_epoch_keeps_a_loaded_position(opened):
    loader = opened()
    loader.position = Position(2, 64)
    loader.set_epoch(2)  # as a loop over epochs does after a restart
    assert loader.position == Position(2, 64) and len(list(loader)) == 1
    loader.set_epoch(2)
    assert loader.position == Position(2) and len(list(loader)) == 3


def test_no_thread_is_left(folder: Path, opened):
    loader = Loader(folder, "train", 4, 24, num_workers=2)
    before = threading.active_count()
    for _ in loader:
        break
    assert threading.active_count() == before
    epoch = iter(loader)
    next(epoch)
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before
    assert list(epoch) == []
    with pytest.raises(ConfigError, match="closed"):
        iter(loader)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(loader)


def test_shared_resources_outlive_the_loader_that_made_them(folder: Path):
    first = Loader(folder, "train", 8, 24, num_workers=1)
    second = Loader(folder, "train", 8, 24, resources=first.resources)
    batches = iter(second)
    next(batches)
    first.close()
    assert len(list(batches)) == 14 and len(list(second)) == 15
    second.close()


def status_in_fork(act: Callable[[], object]) -> int:
    """The exit status of a forked process that does ``act``: 0; 1 if it raises, negative if it takes a minute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            act()
        except BaseException:  # the child is a copy of pytest, which must not see the error
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_loader_of_another_process_is_an_error(folder: Path):
    loader = Loader(folder, "train", 8, 24, num_workers=1)

    def use() -> None:
        with pytest.raises(ConfigError, match="before a fork"):
            next(iter(loader))

    assert status_in_fork(use) == 0
    assert status_in_fork(loader.close) == 0  # it waits for no threads, which the child does not have
    loader.close()


def test_the_name_of_a_file_tells_the_split_and_that_of_a_folder_does_not():
    names = ("data/my-test", "val", "cifar-test.beton", "val_64_raw.beton", "cifar.beton")
    assert [split_of(name) for name in names] == ["train", "train", "val", "val", "train"]


def test_a_loader_opened_before_the_processes_know_each_other_is_an_error(opened, monkeypatch: pytest.MonkeyPatch):
    early, stated = opened(), opened(rank=0, world_size=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"before torch.distributed was initialized"):
        iter(early)
    assert len(list(stated)) == 3 and opened().share.world == 2


def test_an_epoch_that_is_open_when_python_ends_prints_nothing(folder: Path):
    code = f"import vitlocal; it = iter(vitlocal.Loader({str(folder)!r}, 'train', 8, 24, num_workers=1)); next(it)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_new_iterator_is_the_one_that_moves_the_position(opened):
    loader = opened()
    old = iter(loader)
    next(old)
    loader.set_epoch(3)
    new = iter(loader)
    next(new)
    next(old)
    assert loader.position == Position(3, 32)
    new.close()
    old.close()
    late = iter(loader)
    loader.set_size(16)
    assert next(late)[0].shape[2] == 24  # as at iter()
    late.close()


def test_images_per_epoch(opened):
    assert opened(batch_size=50).images_per_epoch == 100
    assert opened(batch_size=50, drop_last=False).images_per_epoch == 120


def test_states_are_plain_values(opened):
    loader = opened(seed=np.int64(3))
    loader.set_epoch(np.int64(2))
    assert json.loads(json.dumps(loader.state_dict())) == loader.state_dict()
    with pytest.raises(ConfigError, match="no epoch or images"):
        loader.load_state_dict({k: v for k, v in loader.state_dict().items() if k != "images"})


def test_selected_rows(opened):
    rows = [5, 3, 90, 41]
    loader = opened(indices=rows, batch_size=2)
    assert loader.num_samples == 4 and len(loader) == 2 and len(loader.sampler) == 4
    assert sorted(ids_of(list(loader))) == sorted(rows)
    ordered = opened(indices=np.array(rows), batch_size=3, shuffle=False, drop_last=False)
    assert ids_of(list(ordered)) == rows
    full = {
        int(row): image
        for images, _, ids in opened(shuffle=False, drop_last=False)
        for row, image in zip(ids, images, strict=True)
    }
    ordered.set_epoch(0)
    assert all(
        torch.equal(full[int(row)], image) for images, _, ids in ordered for row, image in zip(ids, images, strict=True)
    )


def test_repeats_follow_each_other_with_other_crops(opened):
    ((images, _, ids),) = opened(repeats=3, batch_size=120)
    assert ids[0] == ids[1] == ids[2] and not torch.equal(images[0], images[1])


def test_centre_crops_in_random_order(opened):
    expected = images_by_id(opened("val"))
    shuffled = images_by_id(opened("val", shuffle=True))
    assert list(shuffled) != list(expected) and shuffled.keys() == expected.keys()
    assert all(torch.equal(expected[row], image) for row, image in shuffled.items())


def test_boxes_of_a_function(folder: Path, opened):
    calls = []

    def left_half(ids: np.ndarray, epoch: int) -> np.ndarray:
        calls.append((ids.tolist(), epoch))
        return np.tile([0, 0, 1, 0.5, 1.0], (len(ids), 1))

    loader = opened(crop=left_half, size=48, shuffle=False, drop_last=False, file="train_48_raw.beton")
    images, _, ids = next(iter(loader))
    assert calls[0] == (ids.tolist(), 0)
    file = MappedFile(folder / "train_48_raw.beton")
    row = file.rows[0]
    height, width = int(row["height"]), int(row["width"])
    stored = file.bytes[int(row["offset"]) :][: height * width * 3].reshape(height, width, 3)
    half = torch.from_numpy(stored[:, : width // 2].copy()).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(half, (48, 48), mode="bilinear", antialias=True).flip(3)
    assert (images[0] - expected[0]).abs().max() < 3

    def change(ids: np.ndarray, epoch: int) -> np.ndarray:
        ids[:] = 0
        return np.tile([0, 0, 1, 1], (len(ids), 1))

    assert ids_of(list(opened(crop=change))) == ids_of(list(opened()))
    for boxes in (np.zeros((32, 3)), np.tile([0.5, 0, 0.6, 1], (32, 1)), np.full((32, 4), np.nan)):
        with pytest.raises(ConfigError, match="crop: got"):
            next(iter(opened(crop=lambda ids, epoch, boxes=boxes: boxes)))


def test_floating_point_images(opened):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    pixels = next(iter(opened()))[0].double() / 255
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        images = next(iter(opened(dtype=dtype, mean=mean, std=std)))[0]
        assert images.dtype == dtype and (images - expected).abs().max() < error
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert (next(iter(opened(dtype=torch.float32)))[0] - pixels).abs().max() < 1e-6


def test_one_file_with_and_without_its_manifest(folder: Path, tmp_path: Path, opened):
    expected = list(opened(file="train_96_raw.beton"))
    with Loader(folder / "train_96_raw.beton", "train", 32, 24, seed=3, return_ids=True, num_workers=1) as loader:
        assert same(list(loader), expected) and "arrow" in loader.classes
    with Loader(folder / "val_96_raw.beton", batch_size=32, size=24, num_workers=1) as loader:  # its name says val
        assert same(list(loader), [batch[:2] for batch in opened("val")])
    named = tmp_path / "photos-test.beton"
    named.write_bytes((folder / "val_96_raw.beton").read_bytes())
    with Loader(named, batch_size=32, size=24, num_workers=1) as loader:
        assert same(list(loader), [batch[:2] for batch in opened("val")])
    alone = tmp_path / "any name.beton"
    alone.write_bytes((folder / "train_96_raw.beton").read_bytes())
    with Loader(alone, batch_size=32, size=24, seed=3, return_ids=True, num_workers=1) as loader:
        assert same(list(loader), expected) and loader.classes == tuple(map(str, range(20)))
        state = loader.state_dict()
        loader.load_state_dict(state)
        with pytest.raises(ConfigError, match="another data"):
            opened().load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"batch_size": 121}, "batch_size: 121 .* more than the 120 images.*drop_last=False"),
        ({"size": 0}, "size: got 0"),
        ({"scale": (0.5, 0.2)}, "scale: got"),
        ({"flip": 2}, "flip: got 2"),
        ({"crop": "center"}, "crop: got 'center', expected random, centre or a function"),
        ({"rank": 2, "world_size": 2}, "rank: got 2"),
        ({"world_size": 2}, "rank and world_size: got None and 2; give both or neither"),
        ({"world_size": 0, "rank": 0}, "world_size: got 0"),
        ({"device": "meta"}, "device: got 'meta'"),
        ({"device": "cuda:99"}, "device: got 'cuda:99'"),
        ({"size": 24.5}, "size: got 24.5, expected a whole number"),
        ({"scale": 0.5}, "scale: got 0.5, expected two numbers"),
        ({"dtype": "float32"}, "dtype: got 'float32'"),
        ({"indices": 500}, "indices: got '500 to 500'"),
        ({"resources": None, "num_workers": -1}, "num_workers: got -1"),
        ({"indices": [0, 120]}, "indices: got '0 to 120', expected rows from 0 to 119"),
        ({"indices": [0.5]}, "indices: got"),
        ({"dtype": torch.int32}, "dtype: got torch.int32"),
        ({"mean": (0.5,) * 3}, "mean: got .* expected None for torch.uint8"),
        ({"dtype": torch.float32, "std": (1, 1, 0)}, "std: got"),
        ({"on_error": "stop"}, "on_error: got 'stop'"),
        ({"file": "train_64_raw.beton"}, "has no 'train_64_raw.beton'; expected auto, .*train_48_raw.beton"),
        ({"fields": ["weight"]}, "no field 'weight'"),
        ({"split": "test"}, "split: got 'test', expected a split of .*: train, val"),
        ({"num_workers": "2"}, "num_workers: got '2', expected a whole number"),
    ],
)
def test_wrong_arguments_are_named(opened, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        opened(**options)


def test_a_state_of_other_data_or_another_order_is_refused(opened):
    state = opened().state_dict()
    for other, name in (
        (opened("val", shuffle=True), "data"), (opened(seed=4), "seed"), (opened(shuffle=False), "order"),
        (opened(indices=range(120)), "order"), (opened(indices=range(100)), "number of images"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"another {name}"):
            other.load_state_dict(state)
    with pytest.raises(ConfigError, match="another version"):
        opened().load_state_dict({**state, "version": 2})
