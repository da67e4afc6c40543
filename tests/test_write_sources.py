"""What the writer knows about its source: changed files, moved folders, classes, and what it does not read."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_images import WNIDS, FakeImages, commit_often, contents, make_folder, photo, write_config
from PIL import Image

from vitlocal.data.manifest import Manifest, load_manifest
from vitlocal.data.writer import write as write_module
from vitlocal.data.writer.journal import SplitFiles
from vitlocal.data.writer.write import write, write_from_options
from vitlocal.errors import ConfigError, DataError, run_command


def stamped(count: int = 40, **changes: object) -> FakeImages:
    return FakeImages(count, files=np.array([[100 + row, 10**9 * row] for row in range(count)]), **changes)


def stored(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".beton")}


@pytest.mark.parametrize("column", [0, 1], ids=["size", "time"])
def test_changed_files_are_written_again(tmp_path: Path, column: int, capsys: pytest.CaptureFixture[str]) -> None:
    images = stamped()
    write(write_config(tmp_path), images, progress=False)
    before = stored(tmp_path)
    write(write_config(tmp_path), images, progress=False)
    assert "written again" not in capsys.readouterr().out
    images.size = (50, 50)  # other pixels
    images.files[17, column] += 1
    write(write_config(tmp_path), images, progress=False)
    assert "files of fake changed" in capsys.readouterr().out
    assert stored(tmp_path) != before
    write(write_config(tmp_path), images, progress=False)
    assert capsys.readouterr().out == ""


def test_an_interrupted_write_finds_changed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_often(monkeypatch.setattr)
    images = stamped(acts={30: "absent"})
    with pytest.raises(DataError, match="Stale file handle"):
        write(write_config(tmp_path / "a"), images, progress=False)
    images.acts = {}
    images.files[12, 1] += 1
    loaded: list[int] = []
    load = FakeImages.load

    def note_and_load(self: FakeImages, index: int) -> Image.Image:
        loaded.append(index)
        return load(self, index)

    monkeypatch.setattr(FakeImages, "load", note_and_load)
    write(write_config(tmp_path / "a"), images, progress=False)
    assert 12 in loaded and 0 not in loaded
    assert "images from" in capsys.readouterr().out
    write(write_config(tmp_path / "b"), images, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_moved_source_is_recognized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "here")
    write_from_options(write_config(tmp_path / "out", source=str(tmp_path / "here")))
    before = stored(tmp_path / "out")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copy)  # other times
    shutil.rmtree(tmp_path / "here")
    options = write_config(tmp_path / "out", source=str(tmp_path / "there"))
    write_from_options(options)
    assert "(already finished)" in capsys.readouterr().out
    assert stored(tmp_path / "out") == before
    assert load_manifest(str(tmp_path / "out"), "train").source.spec == str(tmp_path / "there")  # for other loaders
    changed = next((tmp_path / "there" / "train" / WNIDS[0]).iterdir())
    changed.write_bytes(photo(99) + b"more")
    write_from_options(options)
    assert "the split is written again" in capsys.readouterr().out


def test_another_source_with_the_same_names_is_refused(tmp_path: Path) -> None:
    write(write_config(tmp_path / "a"), stamped(), progress=False)
    other = stamped(spec="elsewhere")
    other.files[3, 0] += 1
    with pytest.raises(ConfigError, match=r"'fake' there, 'elsewhere' wanted, with files of other sizes"):
        write(write_config(tmp_path / "a"), other, progress=False)
    write(write_config(tmp_path / "b"), FakeImages(9), progress=False)  # not from files: only its name is known
    with pytest.raises(ConfigError, match=r"'fake' there, 'elsewhere' wanted\)"):
        write(write_config(tmp_path / "b"), FakeImages(9, spec="elsewhere"), progress=False)


def test_an_interrupted_write_continues_from_a_moved_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_often(monkeypatch.setattr)
    for name in ("a", "b"):
        with pytest.raises(DataError, match="Stale file handle"):
            write(write_config(tmp_path / name), stamped(acts={30: "absent"}), progress=False)
    moved = stamped(spec="elsewhere")
    moved.files[:, 1] += 5  # copied
    manifest = write(write_config(tmp_path / "a"), moved, progress=False)
    assert manifest.count == 40 and manifest.source.spec == "elsewhere"
    moved.files[2, 0] += 1
    with pytest.raises(ConfigError, match=r"interrupted write of another source.*elsewhere"):
        write(write_config(tmp_path / "b"), moved, progress=False)


@pytest.mark.parametrize("column", [0, 1], ids=["size", "time"])
def test_files_that_change_after_a_move_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: int, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_often(monkeypatch.setattr)
    for spec, row in (("fake", 10), ("elsewhere", 20), ("elsewhere", 30)):
        images = stamped(spec=spec, acts={row: "absent"})
        images.files[:, 1] += 5 * (spec == "elsewhere")
        with pytest.raises(DataError, match="Stale file handle"):
            write(write_config(tmp_path), images, progress=False)
    assert "written again" not in capsys.readouterr().out
    images.acts = {}
    images.files[12, column] += 1
    assert write(write_config(tmp_path), images, progress=False).source.spec == "elsewhere"
    assert "images from 10 on are written again" in capsys.readouterr().out


def test_a_complete_write_whose_source_moved_before_it_had_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = stamped()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SplitFiles, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        write(write_config(tmp_path), images, progress=False)
    moved = stamped(spec="elsewhere")
    moved.files[:, 1] += 5  # copied
    moved.files[3, 0] += 1
    with pytest.raises(ConfigError, match="interrupted write of another source"):
        write(write_config(tmp_path), moved, progress=False)
    moved.files[3, 0] -= 1
    for _ in range(2):
        assert write(write_config(tmp_path), moved, progress=False).source.spec == "elsewhere"
    assert "written again" not in capsys.readouterr().out


def test_an_old_manifest_needs_its_path(tmp_path: Path) -> None:
    write(write_config(tmp_path), stamped(), progress=False)
    path = tmp_path / "train.json"
    content = json.loads(path.read_text())
    for name in ("sizes", "times", "reads", "left_out", "image", "label", "subset"):
        del content["source"][name]
    path.write_text(json.dumps(content))
    assert Manifest.load(path).source.sizes == ""
    changed = stamped()
    changed.files += 1
    write(write_config(tmp_path), changed, progress=False)  # unknown, so not compared
    with pytest.raises(ConfigError, match="'elsewhere' wanted"):
        write(write_config(tmp_path), stamped(spec="elsewhere"), progress=False)


def test_the_writer_says_what_it_reads_and_what_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = stamped()
    images.reads, images.left_out = ("labels: column 'fine'",), {".heic": 2, "hidden": 1}
    images.notes = ("mind the gap",)
    write(write_config(tmp_path), images)
    out = capsys.readouterr().out
    assert "train: reads labels: column 'fine'\n" in out and "train: mind the gap\n" in out
    assert "train: left out 3 files: 2 .heic, 1 hidden\n" in out
    source = Manifest.load(tmp_path / "train.json").source
    assert source.reads == images.reads and source.left_out == images.left_out


def test_chosen_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "photos")
    make_folder(tmp_path / "photos", "val", classes=("another", WNIDS[0], WNIDS[2]))
    chosen = tmp_path / "chosen.txt"
    chosen.write_text(f"{WNIDS[2]}\n\n {WNIDS[0]}\n")
    options = write_config(tmp_path / "out", source=str(tmp_path / "photos"), classes=str(chosen))
    for split in ("train", "val"):
        write_from_options(dataclasses.replace(options, split=split))
        manifest = load_manifest(str(tmp_path / "out"), split)
        assert manifest.classes == (WNIDS[2], WNIDS[0]) and manifest.count == 6
        assert manifest.source.left_out["of other classes"] == 3
    assert (tmp_path / "out" / "classes.txt").read_text() == f"{WNIDS[2]}\n{WNIDS[0]}\n"
    assert "left out 3 files: 3 of other classes" in capsys.readouterr().out
    chosen.write_text(f"{WNIDS[2]}\r\n{WNIDS[0]}\r\n", encoding="utf-8-sig")
    write_from_options(options)
    assert "(already finished)" in capsys.readouterr().out
    chosen.write_text(f"{WNIDS[2]}\nunicorn\n")
    with pytest.raises(ConfigError, match=r"--classes names classes without images.*1.*'unicorn'"):
        write_from_options(options)
    chosen.write_text(f"{WNIDS[2]}\n{WNIDS[2]}\n")
    with pytest.raises(ConfigError, match=r"each class once.*twice"):
        write_from_options(options)
    with pytest.raises(ConfigError, match=r"--classes .*none.txt cannot be read"):
        write_from_options(dataclasses.replace(options, classes=str(tmp_path / "none.txt")))


def test_a_data_folders_classes_can_be_chosen(tmp_path: Path) -> None:
    names = ("ant", "bo\u0302b", "caf\udce9", "fox\u2028x")  # the second is as macOS stores it
    for split in ("train", "val"):
        make_folder(tmp_path / "photos", split, classes=names)
    options = write_config(tmp_path / "out", source=str(tmp_path / "photos"))
    write(options, progress=False)
    chosen = dataclasses.replace(options, split="val", classes=str(tmp_path / "out" / "classes.txt"))
    assert write(chosen, progress=False).classes == names


def test_messages_name_files_that_are_not_unicode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "photos")
    damaged = tmp_path / "photos" / "train" / WNIDS[0] / "caf\udce9.jpg"
    damaged.write_bytes(b"x")
    options = write_config(tmp_path / "out", source=str(tmp_path / "photos"), on_error="skip")
    assert run_command(lambda argv: write_from_options(options)) == 0
    damaged.write_bytes(photo(5))
    assert run_command(lambda argv: write_from_options(options)) == 0
    assert r"caf\udce9.jpg was skipped and decodes now" in capsys.readouterr().out


def test_both_splits_of_a_folder_have_the_same_classes(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "b", "val", classes=WNIDS[:2])
    write_from_options(write_config(tmp_path / "out", source=str(tmp_path / "a")))
    with pytest.raises(ConfigError, match=r"train.json and this split must have the same classes.*classes.txt"):
        write_from_options(write_config(tmp_path / "out", split="val", source=str(tmp_path / "b")))


def test_the_torchvision_loader_reads_the_chosen_classes(tmp_path: Path) -> None:
    import torch

    from vitlocal.data.crops import CropPolicy
    from vitlocal.data.peers.torchvision import TorchvisionSource

    make_folder(tmp_path / "photos")
    (tmp_path / "chosen.txt").write_text(f"{WNIDS[2]}\n{WNIDS[0]}\n")
    options = write_config(tmp_path / "out", source=str(tmp_path / "photos"), classes=str(tmp_path / "chosen.txt"))
    write_from_options(options)
    policy = CropPolicy(random=False)
    source = TorchvisionSource(str(tmp_path / "out"), None, "train", policy, torch.device("cpu"), 1)
    assert source.classes == (WNIDS[2], WNIDS[0])
    assert source.images.labels[source.numbers].tolist() == [1] * 3 + [0] * 3
    source.close()


def test_ffcv_imagenets_names(tmp_path: Path) -> None:
    write(write_config(tmp_path / "ours", sides="64:raw"), FakeImages(9), progress=False)
    file = (tmp_path / "ours" / "train_64_raw.beton").read_bytes()
    for name in ("train_500_0.50_90.ffcv", "val_400_0.10_90.beton", "test_1_raw.txt"):
        (tmp_path / name).write_bytes(file)
    manifest = load_manifest(str(tmp_path), "train")
    assert [(file.file, file.side, file.format) for file in manifest.files] == [("train_500_0.50_90.ffcv", 500, "raw")]
    assert load_manifest(str(tmp_path), "val").count == 9


def test_a_jpeg_larger_than_a_page_is_stored_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_module, "page_size_for", lambda largest: 1 << 21)
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3000, 3), np.uint8)

    class Noise(FakeImages):
        def load(self, index: int) -> Image.Image:
            return Image.fromarray(noise)

    manifest = write(write_config(tmp_path, sides="4000:jpg", quality=95), Noise(1), progress=False)
    file = manifest.files[0]
    assert 500 < file.max_width < 3000 and file.bytes < 1 << 22


@pytest.mark.parametrize("spec", ["sample:1", "photos"])
def test_a_choice_that_the_source_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    make_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    options = write_config(tmp_path / "out", source=spec, label="fine_label", subset="small")
    with pytest.raises(ConfigError, match="has no columns or subsets.*remove --label and --subset"):
        write_from_options(options)
