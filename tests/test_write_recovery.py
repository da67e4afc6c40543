"""Writing .beton files: unreadable images, interruptions, and files that are already there."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_images import SLOW_SECONDS, FakeImages, commit_often, contents, finished_names, no_longer_slow, write_config

from vitlocal.data import native
from vitlocal.data.manifest import Manifest
from vitlocal.data.writer import encode, journal
from vitlocal.data.writer import write as write_module
from vitlocal.data.writer.write import write
from vitlocal.errors import ConfigError, DataError
from vitlocal.write_options import WriteOptions

pytestmark = pytest.mark.usefixtures("frequent_commits")


# --- unreadable images, threads that die ---------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_image_stops_the_write_unless_skipped(tmp_path: Path, workers: int) -> None:
    images = FakeImages(40, acts={21: "unreadable", 30: "unreadable"})
    with pytest.raises(DataError) as caught:
        write(write_config(tmp_path, workers=workers), images, progress=False)
    for word in (images.entry(21), "cut off after 12 bytes", "--on-error skip"):
        assert word in str(caught.value)
    assert finished_names(tmp_path) == []
    seen = dataclasses.replace(images, acts={**images.acts, 20: "bug"})  # row 20 is not encoded again
    manifest = write(write_config(tmp_path, workers=workers, on_error="skip"), seen, progress=False)
    assert manifest.count == 38 and len(manifest.skipped) == 2
    whole = tmp_path / "whole"
    write(write_config(whole, on_error="skip"), images, progress=False)
    shutil.move(whole, tmp_path.with_name(f"whole{workers}"))
    assert contents(tmp_path) == contents(tmp_path.with_name(f"whole{workers}"))


def test_a_file_that_cannot_be_read_stops_the_write(tmp_path: Path, reference: dict[str, bytes]) -> None:
    """A fault of a disk is not a fault of a photo: nothing is skipped, and the same command continues."""
    images = FakeImages(60, acts={40: "absent"})
    with pytest.raises(DataError, match=r"bee/40.png.*Stale file handle. Make the source readable. The same command"):
        write(write_config(tmp_path, on_error="skip"), images, progress=False)
    assert finished_names(tmp_path) == []
    rest = FakeImages(60, acts=dict.fromkeys(range(30), "bug"))  # earlier rows were saved
    assert write(write_config(tmp_path, on_error="skip"), rest, progress=False).skipped == ()
    assert contents(tmp_path) == reference


def test_skipped_images_are_tried_again(tmp_path: Path, reference: dict[str, bytes], capsys) -> None:
    """In an interrupted write and in a finished split. The files are as if nothing had been skipped."""
    damaged, one = dict.fromkeys((21, 30), "unreadable"), {30: "unreadable"}
    with pytest.raises(DataError, match="Stale"):
        write(write_config(tmp_path, on_error="skip"), FakeImages(60, acts={**damaged, 50: "absent"}), progress=False)
    manifest = write(write_config(tmp_path, on_error="skip"), FakeImages(60, acts=one), progress=False)
    assert [image.entry for image in manifest.skipped] == ["ant/30.png"] and manifest.count == 59
    before = contents(tmp_path)
    again = write(write_config(tmp_path, on_error="skip"), FakeImages(60, acts=one), progress=False)
    assert again == manifest and contents(tmp_path) == before
    with pytest.raises(KeyboardInterrupt):  # the finished split stays until the new one is complete
        write(write_config(tmp_path, on_error="skip"), FakeImages(60, acts={55: "SIGTERM"}), progress=False)
    assert contents_of_files(tmp_path) == before
    assert "ant/30.png was skipped and decodes now" in capsys.readouterr().out
    write(write_config(tmp_path, on_error="skip"), FakeImages(60), progress=False)
    assert contents(tmp_path) == reference


def test_complete_files_are_published_before_skipped_images_are_tried(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the names of the files and the manifest. Meanwhile the skipped image was repaired."""

    class Killed(Exception):
        pass

    def save(manifest: Manifest, path: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Manifest, "save", save)
        write(write_config(tmp_path, on_error="skip"), FakeImages(60, acts={30: "unreadable"}), progress=False)
    assert write(write_config(tmp_path, on_error="skip"), FakeImages(60), progress=False).count == 59
    assert write(write_config(tmp_path, on_error="skip"), FakeImages(60), progress=False).count == 60
    assert contents(tmp_path) == reference


def test_errors_of_a_decoder_are_not_errors_of_a_disk(tmp_path: Path) -> None:
    """Pillow raises OSError too, without a number. Such images are skipped, and tried again without an error."""
    images = FakeImages(40, acts={3: "cut off"})
    manifest = write(write_config(tmp_path, on_error="skip"), images, progress=False)
    assert [image.reason for image in manifest.skipped] == ["image file is truncated"]
    assert write(write_config(tmp_path, on_error="skip"), images, progress=False) == manifest


def test_a_long_run_of_skipped_images_stops_the_write(tmp_path: Path) -> None:
    """A few damaged images in a row are skipped. More than a hundred, and one in a hundred, are not chance."""
    few = FakeImages(300, size=(8, 8), acts=dict.fromkeys(range(20, 110), "unreadable"))
    assert len(write(write_config(tmp_path / "few", on_error="skip"), few, progress=False).skipped) == 90
    many = FakeImages(300, size=(8, 8), acts=dict.fromkeys(range(20, 290), "unreadable"))
    with pytest.raises(DataError, match=r"images in a row do not decode.*tries them again"):
        write(write_config(tmp_path / "many", on_error="skip"), many, progress=False)
    assert finished_names(tmp_path / "many") == []
    whole = write(write_config(tmp_path / "many", on_error="skip"), FakeImages(300, size=(8, 8)), progress=False)
    assert whole.skipped == () and whole.count == 300


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_no_readable_image(tmp_path: Path) -> None:
    images = FakeImages(6, acts=dict.fromkeys(range(6), "unreadable"))
    with pytest.raises(DataError, match=r"none of the 6 images.*ant/0.png"):
        write(write_config(tmp_path, on_error="skip"), images, progress=False)
    assert finished_names(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_ours_names_the_image(tmp_path: Path, workers: int) -> None:
    images = FakeImages(40, acts={10: "bug"})
    with pytest.raises(RuntimeError, match=r"bee/10.png(?s:.*)TypeError: an error of ours"):
        write(write_config(tmp_path, workers=workers, on_error="skip"), images, progress=False)


def test_threads_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # it would start a thread too
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(DataError, match=r"cannot start 2 threads.*fewer --workers"):
        write(write_config(tmp_path, workers=2), FakeImages(60), progress=False)


def test_a_thread_that_dies_raises_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(encoder: native.Encoder) -> None:
        raise TypeError("an error of ours")

    monkeypatch.setattr(native.Encoder, "__init__", fail)
    with pytest.raises(TypeError, match="an error of ours"):
        write(write_config(tmp_path, workers=2), FakeImages(60), progress=False)


def test_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_none(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(native.Encoder, "encode", encode_none)
    with pytest.raises(DataError, match=r"memory ran out at 'ant/0.png'.*fewer --workers"):
        write(write_config(tmp_path), FakeImages(6), progress=False)


# --- interruptions ----------------------------------------------------------------------------------------


def run_with_frequent_commits(options: WriteOptions, images: FakeImages, die_at_replace: int | None = None) -> None:
    commit_often()
    if die_at_replace is not None:
        replace, calls = os.replace, []

        def counted(*paths: object) -> None:
            calls.append(paths)
            if len(calls) > die_at_replace:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = counted
    write(options, images, progress=False)


def in_child(*arguments: object, **more: object) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=run_with_frequent_commits, args=arguments, kwargs=more)
    child.start()
    return child


def test_killed_at_any_image_and_continued(tmp_path: Path, reference: dict[str, bytes]) -> None:
    for index in (0, 13, 59):  # each write continues the one before
        child = in_child(write_config(tmp_path), FakeImages(60, acts={index: "SIGKILL"}))
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        assert finished_names(tmp_path) == []
    resumed = FakeImages(60, acts={0: "bug", 8: "bug"})  # these rows are not encoded again
    write(write_config(tmp_path), resumed, progress=False)
    assert contents(tmp_path) == reference


def test_killed_while_publishing(tmp_path: Path, reference: dict[str, bytes]) -> None:
    for replaced in range(3):
        out = tmp_path / str(replaced)
        child = in_child(write_config(out), FakeImages(60), die_at_replace=replaced)
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        assert "train.json" not in finished_names(out)
        for name in finished_names(out):  # complete, or absent
            assert (out / name).read_bytes() == reference[name]
        write(write_config(out), FakeImages(60), progress=False)
        assert contents(out) == reference


def test_killed_with_workers(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    child = in_child(write_config(out, workers=2), FakeImages(60, acts={50: "slow"}))
    journal, deadline = out / ".train.writing" / "journal", time.monotonic() + 120
    while not (journal.exists() and b"start" in journal.read_bytes()):
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    child.kill()
    child.join(120)
    assert finished_names(out) == []
    write(write_config(out), FakeImages(60), progress=False)
    assert contents(out) == reference


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_and_continued(
    tmp_path: Path, name: str, reference: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        write(write_config(tmp_path), FakeImages(60, acts={33: name}), progress=False)
    assert "The same command continues from there" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert finished_names(tmp_path) == []
    rest = FakeImages(60, acts=dict.fromkeys(range(16), "bug"))  # earlier rows were saved
    write(write_config(tmp_path), rest, progress=False)
    assert contents(tmp_path) == reference


def test_interrupted_with_workers(tmp_path: Path, reference: dict[str, bytes]) -> None:
    class Interrupting(journal.SplitFiles):
        def append(self, chunk: encode.Chunk) -> None:
            super().append(chunk)
            if chunk.next >= 20:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_module, "SplitFiles", Interrupting)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            write(write_config(tmp_path, workers=2), FakeImages(60, acts={50: "slow"}), progress=False)
        assert time.monotonic() - started < SLOW_SECONDS  # the slow image was not waited for
    no_longer_slow.set()  # its thread ends
    no_longer_slow.clear()
    assert finished_names(tmp_path) == []
    write(write_config(tmp_path), FakeImages(60, acts=dict.fromkeys(range(20), "bug")), progress=False)
    assert contents(tmp_path) == reference


def test_a_torn_journal_loses_only_its_end(tmp_path: Path, reference: dict[str, bytes]) -> None:
    with pytest.raises(DataError):
        write(write_config(tmp_path / "a"), FakeImages(60, acts={40: "unreadable"}), progress=False)
    journal = (tmp_path / "a" / ".train.writing" / "journal").read_bytes()
    for cut in np.linspace(0, len(journal) - 1, 12).astype(int).tolist():
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b" / ".train.writing" / "journal").write_bytes(journal[:cut])
        write(write_config(tmp_path / "b"), FakeImages(60), progress=False)
        assert contents(tmp_path / "b") == reference
        shutil.rmtree(tmp_path / "b")


@pytest.mark.parametrize("what", ["images", "journal", "flush"])
def test_a_full_disk(tmp_path: Path, what: str, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    call, left = "fsync" if what == "flush" else "pwrite", [300_000 if what == "images" else 7]
    real = getattr(os, call)

    def limited(descriptor: int, *arguments):
        if what == "journal" and bytes(arguments[0][:2]) != b'{"':  # not a line of the journal
            return real(descriptor, *arguments)
        if what == "images":
            data, offset = arguments
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done = real(descriptor, data[: left[0]], offset)  # the last write is partial
            left[0] -= done
            return done
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(descriptor, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, limited)
        with pytest.raises(DataError) as caught:
            write(write_config(tmp_path), FakeImages(60), progress=False)
    for word in (
        "cannot write",
        "quota exceeded" if what != "images" else "No space left",
        str(tmp_path / ".train.writing"),
        "free",
        "more needed",
        "same command",
    ):
        assert word in str(caught.value)
    assert finished_names(tmp_path) == []
    write(write_config(tmp_path), FakeImages(60, acts={0: "bug"}), progress=False)
    assert contents(tmp_path) == reference


def test_a_warning_if_the_space_will_not_suffice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    write(write_config(tmp_path, sides="8:raw"), FakeImages(300, size=(16, 16)), progress=False)
    assert capsys.readouterr().err.count("warning: about") == 1


# --- existing files --------------------------------------------------------------------------------


def test_a_finished_split_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(write_config(tmp_path), FakeImages(10), progress=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write(write_config(tmp_path, workers=2, on_error="skip"), FakeImages(10, acts={3: "bug"})) == first
    assert "already finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    for changed, images in (
        (write_config(tmp_path, quality=80), FakeImages(10)),
        (write_config(tmp_path, sides="64:raw"), FakeImages(10)),
        (write_config(tmp_path), FakeImages(11)),
        (write_config(tmp_path), FakeImages(10, spec="elsewhere")),
        (write_config(tmp_path), FakeImages(10, classes=("ant", "bee", "dog"))),
    ):
        with pytest.raises(ConfigError, match=r"another configuration.*Remove .*another --out"):
            write(changed, images, progress=False)
    path = tmp_path / "train_64_raw.beton"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train_64_raw.beton: cut off"):
        write(write_config(tmp_path), FakeImages(10), progress=False)


def test_an_interrupted_write_of_another_configuration(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write(write_config(tmp_path), FakeImages(10, acts={9: "unreadable"}), progress=False)
    for changed, images, name in (
        (write_config(tmp_path, quality=80), FakeImages(10), "quality 80"),
        (write_config(tmp_path), FakeImages(11), "images in the source"),
        (write_config(tmp_path), FakeImages(10, spec="elsewhere"), "elsewhere"),
    ):
        with pytest.raises(ConfigError, match=f"{name}(?s:.*)remove the folder"):
            write(changed, images, progress=False)
    write(write_config(tmp_path), FakeImages(10), progress=False)


def test_other_files_stay(tmp_path: Path) -> None:
    stranger = tmp_path / "train_64_raw.beton"
    stranger.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"train_64_raw.beton exists, but no manifest.*Remove it"):
        write(write_config(tmp_path), FakeImages(10), progress=False)
    assert stranger.read_bytes() == b"mine"


def test_one_write_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write(write_config(tmp_path), FakeImages(10, acts={9: "unreadable"}), progress=False)
    with open(tmp_path / ".train.writing" / "journal") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process writes to"):
            write(write_config(tmp_path), FakeImages(10), progress=False)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot write to the data folder.*--out"):
        write(write_config(tmp_path / "file" / "out"), FakeImages(4), progress=False)
