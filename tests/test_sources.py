from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vitlocal.data.ffcv import FFCVSource
from vitlocal.data.source import Cropping, load_manifest, open_sources
from vitlocal.data.torchvision import TorchvisionSource
from vitlocal.errors import ConfigError, DataError
from vitlocal.plan import Feed, Position

CPU = torch.device("cpu")
TRAIN = Cropping(random=True, seed=3)
VAL = Cropping(random=False)


def source(folder: Path, decoder, split: str = "train", cropping: Cropping = TRAIN, ratio: float = 1.5) -> FFCVSource:
    return FFCVSource(str(folder), load_manifest(str(folder), split), cropping, ratio, CPU, decoder)


def read(source, feed: Feed, at: Position = Position()) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # noqa: B008
    with source.open(feed, at) as batches:
        return [(batch.images.clone(), batch.labels, batch.ids) for batch in batches]


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for mine, other in zip(first, second, strict=True) for a, b in zip(mine, other, strict=True)
    )


def test_a_pass_holds_every_row_once_with_its_label(folder: Path, compiled):
    it = source(folder, compiled)
    batches = read(it, Feed(32, 50))
    assert [len(ids) for _, _, ids in batches] == [50, 50, 20]
    ids = torch.cat([ids for _, _, ids in batches])
    assert sorted(ids.tolist()) == list(range(120))
    images, labels, ids = batches[0]
    assert images.shape == (50, 3, 32, 32) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    names = [it.manifest.entries[i].split("/")[1] for i in ids]
    assert [it.classes[label] for label in labels] == names


def test_batches_repeat_bit_for_bit(folder: Path, compiled):
    first = read(source(folder, compiled), Feed(32, 50))
    assert same(first, read(source(folder, compiled), Feed(32, 50)))
    # other epochs and seeds are others
    assert not same(first, read(source(folder, compiled), Feed(32, 50), Position(1)))
    assert not same(first, read(source(folder, compiled, cropping=Cropping(True, seed=4)), Feed(32, 50)))


def test_a_pass_goes_on_from_where_it_was_left(folder: Path, compiled):
    it = source(folder, compiled)
    whole = read(it, Feed(32, 20))
    assert same(whole[2:], read(it, Feed(32, 20), Position(0, 40)))
    # ... also at another size: no row is lost or repeated
    rest = read(it, Feed(48, 30), Position(0, 40))
    assert torch.equal(torch.cat([ids for _, _, ids in rest]), torch.cat([ids for _, _, ids in whole[2:]]))


def test_crops_do_not_depend_on_the_number_of_threads(folder: Path, compiled):
    from vitlocal.data.ffcv import Decoder

    single = source(folder, Decoder(workers=1))
    assert same(read(single, Feed(64, 40)), read(source(folder, compiled), Feed(64, 40)))  # from the JPEG file


def test_the_smallest_file_that_serves_is_chosen(folder: Path, compiled):
    it = source(folder, compiled)
    assert {size: it.choose(size).file for size in (16, 32, 33, 64, 65, 85, 224)} == {
        16: "train_48_raw.beton", 32: "train_48_raw.beton", 33: "train_96_raw.beton", 64: "train_96_raw.beton",
        65: "train_128_jpg.beton", 85: "train_128_jpg.beton", 224: "train_128_jpg.beton",
    }  # fmt: skip


def test_size_changes_compile_nothing_and_leave_no_threads(folder: Path, compiled):
    it = source(folder, compiled)
    read(it, Feed(16, 40))
    loader, code = compiled.loader, compiled.loader.code
    threads = threading.active_count()
    for size in (32, 48, 64, 80, 16) * 3:
        with it.open(Feed(size, 40), Position()) as batches:
            assert next(batches).images.shape[-1] == size  # and leave early
    assert compiled.loader is loader and loader.code is code
    assert threading.active_count() == threads


def test_leaving_a_pass_joins_its_thread(folder: Path, compiled):
    it = source(folder, compiled)
    with it.open(Feed(64, 4), Position()) as batches:
        next(batches)
        assert batches.is_alive()
    assert not batches.is_alive()


def test_validation_is_in_order_and_central(folder: Path, compiled):
    it = source(folder, compiled, "val", Cropping(random=False, centre=1.0))
    batches = read(it, Feed(96, 64))
    assert torch.cat([ids for _, _, ids in batches]).tolist() == list(range(it.count))
    row = next(i for i, name in enumerate(it.manifest.entries) if name)
    file = it.decoder.file(it.root / it.choose(96).file, 20)
    field = file.reader.metadata["f0"][row]
    height, width = int(field["height"]), int(field["width"])
    stored = file.manager.context.mmap[int(field["data_ptr"]) :][: height * width * 3].reshape(height, width, 3)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    import cv2

    expected = cv2.resize(stored[top : top + side, left : left + side], (96, 96), interpolation=cv2.INTER_AREA)
    assert np.abs(batches[0][0][row].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_a_corrupt_jpeg_is_raised_in_the_consumer(folder: Path, tmp_path: Path, compiled):
    shutil.copytree(folder, tmp_path / "data")
    it = source(tmp_path / "data", compiled, ratio=3)
    path = it.root / it.choose(40).file
    assert path.name.endswith("jpg.beton")
    pointer = int(it.decoder.file(path, 20).reader.metadata["f0"]["data_ptr"][7])
    with open(path, "r+b") as file:
        file.seek(pointer)
        file.write(b"\x00" * 64)
    before = threading.active_count()
    with pytest.raises(DataError, match=r"train_128_jpg.beton: row 7 is not a readable JPEG"):
        read(it, Feed(40, 16))
    assert threading.active_count() == before


def test_a_truncated_file_is_named(folder: Path, tmp_path: Path, compiled):
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / "train_48_raw.beton"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match="train_48_raw.beton"):
        read(source(tmp_path / "data", compiled), Feed(16, 40))


def test_a_file_of_another_writing_is_refused(folder: Path, tmp_path: Path, compiled):
    shutil.copytree(folder, tmp_path / "data")
    shutil.copy(tmp_path / "data" / "val_96_raw.beton", tmp_path / "data" / "train_48_raw.beton")
    with pytest.raises(DataError, match="its manifest says 120"):
        read(source(tmp_path / "data", compiled), Feed(16, 40))


def test_errors_in_the_thread_do_not_hang(folder: Path, compiled, monkeypatch: pytest.MonkeyPatch):
    from vitlocal.data.ffcv import Pass

    def fail(*arguments):
        raise MemoryError("no memory for the batch")

    monkeypatch.setattr(Pass, "run_pipeline", fail)
    began = time.monotonic()
    with pytest.raises(MemoryError, match="no memory for the batch"):
        read(source(folder, compiled), Feed(16, 40))
    assert time.monotonic() - began < 10


def test_threads_of_pytorch_are_left_alone(folder: Path, compiled):
    before = torch.get_num_threads()
    read(source(folder, compiled), Feed(16, 40))
    assert torch.get_num_threads() == before


def test_more_threads_than_cores_are_refused():
    from vitlocal.data.ffcv import Decoder

    with pytest.raises(ConfigError, match=r"data.workers: got 4096"):
        Decoder(workers=4096)


# --- torchvision ---


@pytest.fixture(scope="module")
def twin(folder: Path):
    made = TorchvisionSource(str(folder), None, "train", TRAIN, CPU, workers=1)
    yield made
    made.close()


def test_torchvision_reads_the_same_crops_of_the_originals(folder: Path, compiled, twin):
    mine, theirs = read(source(folder, compiled, ratio=2), Feed(48, 60)), read(twin, Feed(48, 60))
    for (images, labels, ids), (others, other_labels, other_ids) in zip(mine, theirs, strict=True):
        assert torch.equal(ids, other_ids) and torch.equal(labels, other_labels)
        assert others.is_contiguous(memory_format=torch.channels_last)
        # Stored at side 96 and resized twice, theirs once from the original: alike, not equal.
        assert (images.float() - others.float()).abs().mean() < 8
        matched = (images.float() - others.float()).abs().mean((1, 2, 3))
        mismatched = (images.float() - others.flip(0).float()).abs().mean((1, 2, 3))
        assert (matched < mismatched).float().mean() > 0.95


def test_torchvision_resumes_and_ends_early(twin):
    whole = read(twin, Feed(16, 20))
    with twin.open(Feed(16, 20), Position()) as batches:
        next(batches)
    assert same(whole[2:], read(twin, Feed(16, 20), Position(0, 40)))


def test_a_source_without_a_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = TorchvisionSource(str(tmp_path), "sample:5", "val", VAL, CPU, workers=1)
    assert len(made.classes) == 20 and made.count == len(made.loader.dataset.images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    with pytest.raises(ConfigError, match=r"--data.source=FOLDER"):
        TorchvisionSource(str(tmp_path), None, "val", VAL, CPU, workers=1)


def test_a_missing_split_says_how_to_write_it(folder: Path, tmp_path: Path, configure, decoder):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "val.json").unlink()
    with pytest.raises(ConfigError, match="write_dataset.py --split val"):
        open_sources(configure(f"--data.root={tmp_path}/data"), CPU)


def test_splits_of_different_classes_are_refused(folder: Path, tmp_path: Path, configure, decoder):
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / "val.json"
    path.write_text(path.read_text().replace('"arrow"', '"pfeil"', 1))
    with pytest.raises(ConfigError, match="arrow, pfeil"):
        open_sources(configure(f"--data.root={tmp_path}/data"), CPU)
