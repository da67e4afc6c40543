from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from native_loader import native
from PIL import Image

from vitlocal.data.beton import MappedFile
from vitlocal.data.crops import CropPolicy, cut
from vitlocal.data.loader import Loader
from vitlocal.data.manifest import Manifest, load_manifest
from vitlocal.data.native import native_box, native_policy
from vitlocal.data.peers.torchvision import TorchvisionSource
from vitlocal.data.reader import LoaderResources
from vitlocal.data.shares import WHOLE, Share
from vitlocal.data.writer.verify import verify
from vitlocal.data.writer.write import write
from vitlocal.errors import ConfigError, DataError, DeviceMemoryError
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.write_options import WriteOptions

CPU = torch.device("cpu")
TRAIN = CropPolicy(random=True, seed=3)
VAL = CropPolicy(random=False)


def source(
    folder: Path, resources: LoaderResources, split: str = "train", crops: CropPolicy = TRAIN, ratio: float = 1.5,
    on_error: str = "raise",
) -> Loader:  # fmt: skip
    return native(folder, split, crops, resources, side_ratio=ratio, on_error=on_error)


def read(source, feed: Feed, at: Position = Position()) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # noqa: B008
    with source.open(feed, at) as batches:
        return [(batch.images.clone(), batch.labels, batch.ids) for batch in batches]


def resident() -> int:
    """Bytes of memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for mine, other in zip(first, second, strict=True) for a, b in zip(mine, other, strict=True)
    )


def test_a_pass_holds_every_row_once_with_its_label(folder: Path, shared):
    it = source(folder, shared)
    batches = read(it, Feed(32, 50))
    assert [len(ids) for _, _, ids in batches] == [50, 50, 20]
    ids = torch.cat([ids for _, _, ids in batches])
    assert sorted(ids.tolist()) == list(range(120))
    images, labels, ids = batches[0]
    assert images.shape == (50, 3, 32, 32) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    names = [it.manifest.entries[i].split("/")[1] for i in ids]
    assert [it.classes[label] for label in labels] == names


def test_slices_cover_a_pass():
    for world, batch, count in itertools.product(range(1, 9), (33, 150), range(100, 200)):
        for rank in range(world):
            totals = [part.total for part in Share(rank, world).slices(np.arange(count), batch)]
            assert sum(totals) == count and len(totals) == -(-count // batch)


def test_batches_repeat_bit_for_bit(folder: Path, shared):
    first = read(source(folder, shared), Feed(32, 50))
    assert same(first, read(source(folder, shared), Feed(32, 50)))
    # other epochs and seeds give other batches
    assert not same(first, read(source(folder, shared), Feed(32, 50), Position(1)))
    assert not same(first, read(source(folder, shared, crops=CropPolicy(True, seed=4)), Feed(32, 50)))


def test_a_pass_resumes_at_a_position(folder: Path, shared):
    it = source(folder, shared)
    whole = read(it, Feed(32, 20))
    assert same(whole[2:], read(it, Feed(32, 20), Position(0, 40)))
    # ... also at another size: no row is lost or repeated
    rest = read(it, Feed(48, 30), Position(0, 40))
    assert torch.equal(torch.cat([ids for _, _, ids in rest]), torch.cat([ids for _, _, ids in whole[2:]]))


def test_crops_do_not_depend_on_the_number_of_threads(folder: Path, shared):
    for size in (32, 80):  # from a raw and from the JPEG file
        expected = read(source(folder, shared), Feed(size, 40))
        for workers in (1, 2, 16):
            assert same(read(source(folder, LoaderResources(workers)), Feed(size, 40)), expected)


def test_the_smallest_file_that_is_large_enough_is_chosen(folder: Path, shared):
    it = source(folder, shared)
    assert {size: it.choose(size).file for size in (16, 32, 33, 64, 65, 85, 224)} == {
        16: "train_48_raw.beton", 32: "train_48_raw.beton", 33: "train_96_raw.beton", 64: "train_96_raw.beton",
        65: "train_128_jpg.beton", 85: "train_128_jpg.beton", 224: "train_128_jpg.beton",
    }  # fmt: skip


def test_size_changes_leave_no_threads_and_no_memory(folder: Path, shared):
    it = source(folder, shared)
    sizes = (16, 32, 48, 64, 80)
    for size in sizes:
        read(it, Feed(size, 40))
    threads, memory = len(os.listdir("/proc/self/task")), resident()
    for number in range(200):
        with it.open(Feed(sizes[number % 5], 40), Position()) as batches:
            assert next(batches).images.shape[-1] == sizes[number % 5]  # and leave early
    deadline = time.monotonic() + 60  # the system may take a moment to remove a joined thread
    while len(os.listdir("/proc/self/task")) > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) <= threads
    assert resident() - memory < 50 << 20


def test_passes_may_overlap(folder: Path, shared):
    train, val = source(folder, shared), source(folder, shared, "val", VAL)
    alone, central = read(train, Feed(32, 20)), read(val, Feed(64, 16))
    turns, together, other = min(len(alone), len(central)), [], []
    with train.open(Feed(32, 20), Position()) as first, val.open(Feed(64, 16), Position()) as second:
        for _ in range(turns):
            batch = next(first)
            together.append((batch.images.clone(), batch.labels, batch.ids))
            batch = next(second)
            other.append((batch.images.clone(), batch.labels, batch.ids))
    assert turns > 1 and same(alone[:turns], together) and same(central[:turns], other)


def test_an_early_exit_joins_the_thread(folder: Path, shared):
    it = source(folder, shared)
    with it.open(Feed(64, 4), Position()) as batches:
        next(batches)
        assert "vitlocal-loader" in [thread.name for thread in threading.enumerate()]
    assert "vitlocal-loader" not in [thread.name for thread in threading.enumerate()]


def test_validation_is_in_order_and_central(folder: Path, shared):
    it = source(folder, shared, "val", CropPolicy(random=False, centre=1.0))
    batches = read(it, Feed(96, 64))
    assert torch.cat([ids for _, _, ids in batches]).tolist() == list(range(it.count))
    row = next(i for i, name in enumerate(it.manifest.entries) if name)
    file = it.resources.file(it.root / it.choose(96).file, 20)
    field = file.rows[row]
    height, width = int(field["height"]), int(field["width"])
    stored = file.bytes[int(field["offset"]) :][: height * width * 3].reshape(height, width, 3)
    box = native_box(native_policy(CropPolicy(random=False, centre=1.0), 0), 0, height, width, 96)
    expected = np.asarray(cut(Image.fromarray(stored), box, 96))
    assert np.abs(batches[0][0][row].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.fixture
def damaged(folder: Path, tmp_path: Path, shared) -> Path:
    """A data folder with a damaged row 7 in its JPEG file, and a JPEG validation file with a damaged row 3."""
    shutil.copytree(folder, tmp_path / "data")
    write(WriteOptions("val", "sample:6", str(tmp_path / "jpg"), "96:jpg", workers=1), progress=False)
    for path, row in ((tmp_path / "data/train_128_jpg.beton", 7), (tmp_path / "jpg/val_96_jpg.beton", 3)):
        offset = int(MappedFile(path, 20).rows["offset"][row])
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(b"\x00" * 64)
    return tmp_path


def test_a_corrupt_jpeg_is_raised_in_the_consumer(damaged: Path, shared):
    it = source(damaged / "data", shared, ratio=3)
    assert it.choose(40).file == "train_128_jpg.beton"
    before = threading.active_count()
    with pytest.raises(DataError, match=r"train_128_jpg.beton: row 7 is a damaged JPEG .*--data.on_error=skip"):
        read(it, Feed(40, 16))
    assert threading.active_count() == before


def test_a_corrupt_jpeg_is_replaced_with_on_error_skip(damaged: Path, shared, capfd: pytest.CaptureFixture[str]):
    it = source(damaged / "data", shared, ratio=3, on_error="skip")
    batches = read(it, Feed(40, 16))
    ids = torch.cat([ids for _, _, ids in batches])
    assert len(ids) == it.count and len(set(ids.tolist())) == it.count - 1 and 7 not in ids
    assert it.damaged == {7}
    report = capfd.readouterr().err
    assert "skipped row 7" in report and it.manifest.entries[7] in report
    assert same(batches, read(it, Feed(40, 16)))
    assert not capfd.readouterr().err  # each row is reported once
    for images, labels, ids in batches:  # the label is that of the image shown
        assert (images.flatten(1).float().std(1) > 0).all()
        assert [it.classes[label] for label in labels] == [it.manifest.entries[i].split("/")[1] for i in ids]


def test_evaluation_leaves_a_corrupt_jpeg_out(damaged: Path, shared):
    crops = CropPolicy(random=False, centre=1.0)
    it = source(damaged / "jpg", shared, "val", crops, on_error="skip")
    ids = torch.cat([ids for _, _, ids in read(it, Feed(96, 16))])
    assert sorted(ids.tolist()) == [row for row in range(it.count) if row != 3]


def test_verify_finds_damage(folder: Path, damaged: Path):
    assert verify(str(folder), "train", progress=False).count == 120
    with pytest.raises(DataError) as raised:
        verify(str(damaged / "data"), "train", progress=False)
    message = str(raised.value)
    assert "train_128_jpg.beton: row 7 (" in message and "damaged JPEG" in message and "checksum crc32:" in message
    assert "train_48_raw.beton" not in message and "train_96_raw.beton" not in message


def test_the_command_for_a_missing_split_names_the_source_of_the_other(folder: Path, tmp_path: Path):
    manifest = load_manifest(str(folder), "train")
    for files, sides in ((manifest.files, ""), (manifest.files[:1], r" --sides \d+:\w+")):
        dataclasses.replace(manifest, files=files).save(tmp_path / "train.json")
        with pytest.raises(ConfigError, match=rf"--split val --out \S+ --source \S+{sides}$"):
            load_manifest(str(tmp_path), "val")


def test_files_without_a_manifest_may_have_others_beside_them(folder: Path, tmp_path: Path):
    shutil.copy(folder / "train_96_raw.beton", tmp_path)
    (tmp_path / "params.json").write_text("{}")
    assert load_manifest(str(tmp_path), "train").count == 120
    with pytest.raises(ConfigError, match="val.json does not exist. Write it: .* --source PHOTOS"):
        load_manifest(str(tmp_path), "val")


def test_a_truncated_file_is_named(folder: Path, tmp_path: Path, shared):
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / "train_48_raw.beton"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match="train_48_raw.beton has .*cut off.*write_dataset.py --split train"):
        source(tmp_path / "data", shared)  # before a run starts, which may need the file later


def test_a_file_of_another_write_is_rejected(folder: Path, tmp_path: Path, shared):
    shutil.copytree(folder, tmp_path / "data")
    shutil.copy(tmp_path / "data" / "val_96_raw.beton", tmp_path / "data" / "train_48_raw.beton")
    with pytest.raises(DataError, match=r"train_48_raw.beton has \d+ bytes, its manifest says \d+: .*another file"):
        source(tmp_path / "data", shared)
    path = tmp_path / "data" / "train.json"  # of the same length by chance
    manifest = Manifest.load(path)
    lengths = [(tmp_path / "data" / file.file).stat().st_size for file in manifest.files]
    files = [dataclasses.replace(file, bytes=each) for file, each in zip(manifest.files, lengths, strict=True)]
    dataclasses.replace(manifest, files=tuple(files)).save(path)
    with pytest.raises(DataError, match="its manifest says 120"):
        read(source(tmp_path / "data", shared), Feed(16, 40))


def test_errors_in_the_thread_do_not_hang(folder: Path, shared, monkeypatch: pytest.MonkeyPatch):
    from vitlocal.data.reader import EpochReader

    def fail(*arguments):
        raise MemoryError("no memory for the batch")

    monkeypatch.setattr(EpochReader, "_decode", fail)
    with pytest.raises(DeviceMemoryError, match="memory ran out while a batch was read"):
        read(source(folder, shared), Feed(16, 40))


def test_a_pass_that_has_ended_stays_ended(folder: Path, shared):
    with source(folder, shared).open(Feed(16, 120), Position()) as batches:
        assert len(list(batches)) == 1 and list(batches) == []


def test_importing_the_loader_loads_torch_and_numpy_only():
    modules = ("ffcv", "numba", "cv2", "fastargs", "timm", "PIL", "yaml", "vitlocal.config")
    code = f"import sys, vitlocal.data.loader; print([name for name in {modules} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_number_of_pytorch_threads_stays(folder: Path, shared):
    before = torch.get_num_threads()
    read(source(folder, shared), Feed(16, 40))
    assert torch.get_num_threads() == before


# --- torchvision ---


@pytest.fixture(scope="module")
def twin(folder: Path):
    made = TorchvisionSource(str(folder), None, "train", TRAIN, CPU, workers=1)
    yield made
    made.close()


def test_torchvision_reads_the_same_crops_of_the_originals(folder: Path, shared, twin):
    mine, theirs = read(source(folder, shared, ratio=2), Feed(48, 60)), read(twin, Feed(48, 60))
    for (images, labels, ids), (others, other_labels, other_ids) in zip(mine, theirs, strict=True):
        assert torch.equal(ids, other_ids) and torch.equal(labels, other_labels)
        assert others.is_contiguous(memory_format=torch.channels_last)
        # Ours are stored at side 96 and resized twice; theirs are resized once. So they are similar, not equal.
        assert (images.float() - others.float()).abs().mean() < 8
        matched = (images.float() - others.float()).abs().mean((1, 2, 3))
        mismatched = (images.float() - others.flip(0).float()).abs().mean((1, 2, 3))
        assert (matched < mismatched).float().mean() > 0.95


def test_torchvision_resumes_and_can_be_left_early(twin):
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


def test_a_missing_split_says_how_to_write_it(folder: Path, tmp_path: Path, configure, open_configured, decoder):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "val.json").unlink()
    with pytest.raises(ConfigError, match="write_dataset.py --split val"):
        open_configured(configure(f"--data.root={tmp_path}/data"))


def test_splits_with_different_classes_are_rejected(folder: Path, tmp_path: Path, configure, open_configured, decoder):
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / "val.json"
    path.write_text(path.read_text().replace('"arrow"', '"pfeil"', 1))
    with pytest.raises(ConfigError, match="arrow, pfeil"):
        open_configured(configure(f"--data.root={tmp_path}/data"))


@pytest.mark.parametrize(("loader", "world"), [("native", 2), ("native", 3), ("torchvision", 2)])
def test_several_processes_read_every_place_once(
    folder: Path, decoder, configure, open_configured, loader: str, world: int
):
    config = configure(f"--data.loader={loader}", "--data.workers=1")
    opened = [open_configured(config, CPU, share) for share in (WHOLE, *(Share(rank, world) for rank in range(world)))]
    batches = []
    for sources in opened:
        with sources.train.open(Feed(16, 30), Position(1, 29)) as read:  # of 120 rows
            batches.append([dataclasses.replace(batch, images=batch.images.clone()) for batch in read])
        sources.close()
    assert [len(batch) for batch in batches[0]] == [30, 30, 30, 1]  # the last is for one process alone
    for whole, *parts in zip(*batches, strict=True):
        assert {part.total for part in parts} == {len(whole)}
        places = np.concatenate([part.places for part in parts])
        assert sorted(places.tolist()) == list(range(len(whole)))
        for name in ("images", "labels", "ids"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(whole, name)[places])
        for part in parts:  # mirrored pairs: mixup's partners are in the same process
            assert np.array_equal(len(whole) - 1 - part.places[::-1], part.places)


def test_a_damaged_original_is_named_without_a_traceback(tmp_path: Path):
    for number in range(6):
        path = tmp_path / "train" / "ant" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40), (number, 90, 200)).save(path)
    path.write_bytes(path.read_bytes()[:300])
    slow = TorchvisionSource("nowhere", str(tmp_path), "train", TRAIN, CPU, 1)
    with pytest.raises(DataError) as caught:
        read(slow, Feed(16, 2))
    assert str(caught.value).startswith("ant/5.jpg: expected a whole image") and "\n" not in str(caught.value)
    assert "--on-error skip" in str(caught.value)
    slow.close()
