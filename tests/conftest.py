"""Fixtures that tests share: a small data folder, written once, and the decoder's threads."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The threads of numba, which FFCV uses. Its other layer, TBB, may hang at the end of a process with one core.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
# The device of every run that a test starts, also in other processes. Tests marked gpu state another one.
os.environ["run.device"] = "cpu"
# Compiled code, which is otherwise kept in the home folder.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/vitlocal-tests-{os.getuid()}/inductor")
os.environ.setdefault("TRITON_CACHE_DIR", f"{tempfile.gettempdir()}/vitlocal-tests-{os.getuid()}/triton")
# Its compiler's own processes would import PyTorch again, in each process that compiles.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from counted_once import count_once
from fake_images import FakeImages, commit_often, contents, write_config
from latent_files import options as latent_options
from latent_files import use_stand_in

from vitlocal.config import Config, read_config
from vitlocal.data.batch import Sources
from vitlocal.data.peers import has_extra
from vitlocal.data.shares import WHOLE, Share
from vitlocal.data.sources import open_sources
from vitlocal.data.writer.write import write
from vitlocal.report.page import read_run
from vitlocal.train.trainer import Trainer
from vitlocal.write_options import WriteOptions

# What children of the forkserver run is imported there, once.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["vitlocal.data.writer.write", "vitlocal.train.command"]
)
# Background jobs of a shell ignore SIGINT, and what is ignored at the start stays ignored. Tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # equal results do not need it; two cores shared with FFCV's threads are faster for it

TRAIN_PER_CLASS = 6
CPU = torch.device("cpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("ffcv") and not has_extra("ffcv"):
        pytest.skip('needs the extra: pip install "vitlocal[ffcv]"')
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def costs_are_counted_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        count_once(patch.setattr)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of the built-in sample: 120 training images in three files, and the validation split."""
    out = tmp_path_factory.mktemp("data")
    for split, sides in (("train", "48:raw,96:raw,128:jpg"), ("val", "96:raw")):
        write(WriteOptions(split, f"sample:{TRAIN_PER_CLASS}", str(out), sides, workers=1), progress=False)
    return out


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of latents of 16 and 32 px: 60 training rows, 20 held-out ones."""
    out = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        use_stand_in(patch.setattr)
        write(latent_options(out), FakeImages(60), progress=False)
        write(latent_options(out, "val"), FakeImages(20), progress=False)
    return out


@pytest.fixture(scope="session")
def shared():
    """One decoder for all tests of this process."""
    from vitlocal.data.loader import LoaderResources  # imports it before a test replaces it

    return LoaderResources(workers=2 if len(os.sched_getaffinity(0)) > 1 else 1)


@pytest.fixture
def decoder(shared, monkeypatch: pytest.MonkeyPatch):
    """Sources opened in this test use the shared decoder, whatever number of workers they ask for."""
    monkeypatch.setattr("vitlocal.data.reader.LoaderResources", lambda workers=0: shared)
    return shared


@pytest.fixture(scope="session")
def open_configured():
    """``open_configured(config, device, share)``: the sources that a configuration names."""

    def build(config: Config, device: torch.device = CPU, share: Share = WHOLE) -> Sources:
        return open_sources(**config.source_arguments(), device=device, share=share)

    return build


@pytest.fixture(scope="session")
def small(folder: Path):
    """Builds the configuration of a very small model on the sample: three sizes, an epoch each."""

    def build(run: Path, *options: str) -> Config:
        small = {
            "data.root": folder, "model.name": "vitlocal_tiny_patch8_64", "model.size": 48, "model.depth": 2,
            "model.width": 32, "model.heads": 2, "train.batch_size": 32, "train.lr_batch": 0, "methods": "image_size",
            "image_size.init": 16, "image_size.step_pixels": 16, "image_size.step_epochs": 1, "budget.length": "3ep",
            "run.folder": run, "run.device": "cpu", "run.progress": "no",
        }  # fmt: skip
        return read_config([*(f"--{name}={value}" for name, value in small.items()), *options], {})

    return build


@pytest.fixture
def configure(small, tmp_path: Path):
    """The small configuration with further options, as from the command line; its run is in ``tmp_path/run``."""
    return lambda *options: small(tmp_path / "run", *options)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their page and curve, which take as long to draw as such a small run trains."""
    monkeypatch.setattr("vitlocal.train.command.write_report", read_run)


@pytest.fixture
def killed_after():
    """``with killed_after(5): train(…)``: the process 'dies' in the middle of its sixth step, as with kill -9."""

    class Killed(Exception):
        pass

    @contextmanager
    def kill(steps: int) -> Iterator[pytest.MonkeyPatch]:
        original, count = Trainer.train_step, [0]

        def train_step(self, batch, plan):
            count[0] += 1
            if count[0] > steps:
                raise Killed
            return original(self, batch, plan)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Trainer, "train_step", train_step)
            yield patch

    return kill


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):
    """``stop_after(6)``: the process gets SIGTERM after its sixth step."""

    def stop(steps: int, patch: pytest.MonkeyPatch = monkeypatch) -> None:
        original, count = Trainer.train_step, [0]

        def train_step(self, batch, plan):
            now = original(self, batch, plan)
            count[0] += 1
            if count[0] == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return now

        patch.setattr(Trainer, "train_step", train_step)

    return stop


@pytest.fixture(scope="module")
def frequent_commits() -> Iterator[None]:
    """Writes commit after every chunk of a few rows. Meanwhile, the server for child processes starts."""
    multiprocessing.forkserver.ensure_running()
    with pytest.MonkeyPatch.context() as patch:
        commit_often(patch.setattr)
        yield


@pytest.fixture(scope="module")
def reference(frequent_commits: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted write of FakeImages(60)."""
    out = tmp_path_factory.mktemp("reference")
    write(write_config(out), FakeImages(60), progress=False)
    return contents(out)
