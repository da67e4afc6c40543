"""Files that shrink, vanish or cannot be read while they are in use: one message, and no signal that ends the run."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitlocal.data import reader
from vitlocal.data.beton import MappedFile
from vitlocal.data.crops import CropPolicy
from vitlocal.data.dataset import BetonDataset
from vitlocal.data.loader import Loader
from vitlocal.data.native import DecoderThreads, native_policy
from vitlocal.data.peers.torchvision import TorchvisionSource
from vitlocal.data.writer import encode
from vitlocal.data.writer.indexed import write
from vitlocal.errors import DataError
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.train.command import train

POLICY = native_policy(CropPolicy(random=True), 0)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "data"))


def test_a_file_that_shrinks_is_an_error_with_its_name(copied: Path):
    """Whole pages of it are gone: reading them raises SIGBUS. The decoder's threads go on with other files."""
    threads = DecoderThreads(2)
    crops, draws = np.zeros((16, 24, 24, 3), np.uint8), np.arange(100, 116)
    for name in ("train_96_raw.beton", "train_128_jpg.beton"):
        file, other = MappedFile(copied / name), MappedFile(copied / "train_48_raw.beton")
        os.truncate(file.path, 8192)
        with pytest.raises(DataError, match=rf"{name}: row 100 cannot be read: the file became shorter"):
            threads.decode(file.bytes, file.rows, draws, POLICY, crops)
        assert threads.decode(other.bytes, other.rows, draws, POLICY, crops) == {} and crops.any()
    threads.close()


def test_a_loader_names_the_file_that_shrinks(copied: Path, shared):
    loader = Loader(copied, "train", 8, 24, num_workers=1, on_error="skip", prefetch=1)
    with pytest.raises(DataError, match=r"train_48_raw\.beton.*shorter.*restore it"):
        for _ in loader:  # also with on_error="skip": it is not the fault of a photo
            os.truncate(copied / "train_48_raw.beton", os.path.getsize(copied / "train_48_raw.beton") - 1)
    loader.close()
    dataset = BetonDataset(copied, "val", 24)
    assert dataset[0]
    os.truncate(copied / "val_96_raw.beton", 4096)
    with pytest.raises(DataError, match=r"val_96_raw\.beton became shorter"):
        dataset[1]


def test_a_file_whose_server_is_gone(copied: Path):
    class Stale(mmap.mmap):
        def size(self) -> int:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    file = MappedFile(copied / "train_48_raw.beton")
    file.bytes = SimpleNamespace(base=Stale(-1, 1))
    with pytest.raises(DataError, match=r"train_48_raw\.beton cannot be read: Stale file handle"):
        file.check()


def test_further_values_of_a_file_that_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [(np.full((64, 64, 3), k, np.uint8), 0, bytes([k]) * 5000) for k in range(8)]
    write(rows, tmp_path, sides="64:raw", fields={"text": "bytes"}, workers=1, progress=False)
    file = MappedFile(tmp_path / "train_64_raw.beton")
    assert file.values("text", np.array([3, 1])) == [b"\3" * 5000, b"\1" * 5000]
    os.truncate(file.path, 8192)
    with pytest.raises(DataError, match=r"train_64_raw\.beton became shorter"):
        file.values("text", np.array([7]))
    monkeypatch.setattr(MappedFile, "check", lambda self: None)  # it shrinks between the check and the copy
    with pytest.raises(DataError, match=r"train_64_raw\.beton: a value cannot be read"):
        file.values("text", np.array([7]))


def test_bus_errors_of_others_end_the_process(tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(8192))
    code = (
        "import mmap, os, sys; from vitlocal.data.native import DecoderThreads; threads = DecoderThreads(1)\n"
        "file = open(sys.argv[1], 'r+b'); memory = mmap.mmap(file.fileno(), 0); file.truncate(0); memory[5000]"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")])
    assert done.returncode == -signal.SIGBUS


WORKER = """
import faulthandler, os, signal, sys
from torch.utils.data import DataLoader
from vitlocal.data.beton import MappedFile
from vitlocal.data.dataset import BetonDataset
MappedFile.check = lambda self: None  # it shrinks after the check
dataset = BetonDataset(sys.argv[1], 'val', 24)
assert dataset[0]
batches = iter(DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context='fork', prefetch_factor=1))
next(batches)
os.truncate(dataset.path, 4096)
try: list(batches)
except Exception as error: print(error)
faulthandler.enable(sys.stdout)
from vitlocal.data.native import DecoderThreads
threads = DecoderThreads(1)
signal.raise_signal(signal.SIGBUS)
"""


def test_workers_of_pytorch_name_the_file_that_shrinks(copied: Path):
    """They have a handler of their own. Handlers that call each other end."""
    done = subprocess.run([sys.executable, "-c", WORKER, str(copied)], capture_output=True, text=True)
    assert "val_96_raw.beton: row " in done.stdout and "cannot be read: the file became shorter" in done.stdout
    assert done.returncode == -signal.SIGBUS and done.stdout.count("Fatal Python error: Bus error") == 1


@pytest.mark.parametrize("fault", ["missing", "cut off", "another"])
def test_files_of_later_sizes_are_checked_at_the_start(copied: Path, configure, fault: str):
    """The run begins at 16 px; the file for 48 px is needed two epochs later."""
    path = copied / "train_96_raw.beton"
    if fault == "missing":
        path.unlink()
    elif fault == "cut off":
        os.truncate(path, os.path.getsize(path) - 9)
    else:
        path.write_bytes(bytes(os.path.getsize(path)))
    config = configure(f"--data.root={copied}", "--run.seed=1")
    with pytest.raises(DataError, match=r"train_96_raw\.beton"):
        train(config)
    assert not (Path(config.run.folder) / "log.jsonl").exists()


# --- threads and processes that end ---


def test_a_thread_that_vanishes_is_noticed(folder: Path, shared, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader, "ALIVE_SECONDS", 0.05)
    loader = Loader(folder, "val", 8, 24, resources=shared)
    monkeypatch.setattr(reader.PassReader, "_run", lambda self, slices: None)
    with pytest.raises(DataError, match="the thread that reads batches has ended"):
        list(loader)
    loader.close()


def test_a_thread_of_the_writer_that_vanishes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encode, "ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(encode, "_work", lambda *_: None)
    with pytest.raises(DataError, match="a thread that encodes images has ended"):
        write([(np.zeros((8, 8, 3), np.uint8), 0)], tmp_path, sides="64:raw", workers=1, progress=False)


@pytest.mark.slow
def test_a_process_of_the_torchvision_loader_that_is_killed(folder: Path):
    source = TorchvisionSource(str(folder), None, "val", CropPolicy(random=False), torch.device("cpu"), workers=1)
    with source.open(Feed(16, 4), Position()) as batches:
        next(batches)
        (worker,) = source.loader._iterator._workers
        worker.kill()
        with pytest.raises(DataError, match="a process that reads images has ended"):
            list(batches)
    source.close()
