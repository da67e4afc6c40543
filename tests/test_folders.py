"""Sources of files: class folders, a flat folder with a list of classes, and files that are not read."""

from __future__ import annotations

import errno
import os
import socket
import sys
import types
from pathlib import Path

import pytest
from fake_images import WNIDS, check_set, encode_colour, make_folder, photo

from vitlocal.data.images import SourceChoice, decode_rgb, image_set, open_images, pixels, resolve_source
from vitlocal.errors import ConfigError, DataError, UndecodableImage


def test_folder(tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_folder(tmp_path, "val", per_class=1)
    deep = tmp_path / "train" / WNIDS[1] / "more"
    deep.mkdir()
    (deep / "a.PNG").write_bytes(encode_colour())
    (deep / "._a.png").write_bytes(b"left by a file manager")
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    source = open_images(str(tmp_path), "train")
    check_set(source, str(tmp_path))
    assert source.classes == WNIDS
    assert source.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert source.entry(0) == f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG"
    assert source.entry(3) == f"{WNIDS[1]}/more/a.PNG"
    assert source.read(4) == photo(3)
    assert len(open_images(str(tmp_path), "val")) == 3


@pytest.mark.parametrize("folder", ["val", "validation", "valid"])
@pytest.mark.parametrize("alias", ["val", "validation", "valid"])
def test_folder_split_alias(tmp_path: Path, folder: str, alias: str) -> None:
    make_folder(tmp_path, folder)
    assert len(open_images(str(tmp_path), alias)) == 9


def test_folder_without_splits_is_the_training_split(tmp_path: Path) -> None:
    make_folder(tmp_path, ".")
    source = open_images(str(tmp_path), "train")
    assert source.classes == WNIDS and len(source) == 9
    with pytest.raises(ConfigError, match=r"no split 'val'.*found 'n01440764/'"):
        open_images(str(tmp_path), "val")


def test_a_folder_one_level_too_high(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", ".")
    with pytest.raises(ConfigError, match=r"one folder, 'photos'.*Did you mean '.*/photos'"):
        open_images(str(tmp_path), "train")


def test_spec_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert open_images("photos", "train").spec == str(tmp_path / "photos")


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist.*'sample'"):
        open_images(str(tmp_path / "nowhere"), "train")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "photos.tar").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"photos.tar' is an archive; unpack it"):
        open_images(str(tmp_path / "photos.tar"), "train")
    with pytest.raises(ConfigError, match=r"is a file; name its folder"):
        open_images(str(tmp_path / "file"), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty folder"):
        open_images(str(tmp_path / "empty"), "train")

    make_folder(tmp_path / "a", "train")
    with pytest.raises(ConfigError, match=r"no split 'val'.*found 'train/'"):
        open_images(str(tmp_path / "a"), "val")
    make_folder(tmp_path / "a", "val", classes=(*WNIDS[:2], "n09999999"))
    for split in ("train", "val"):
        with pytest.raises(ConfigError, match=r"1 of 3 classes are not among the 3 of the split 'train'.*n09999999"):
            open_images(str(tmp_path / "a"), split)

    make_folder(tmp_path / "b", "train")
    (tmp_path / "b" / "train" / "n0_bare").mkdir()
    with pytest.raises(ConfigError, match=r"n0_bare' has no images"):
        open_images(str(tmp_path / "b"), "train")

    flat = tmp_path / "c" / "val"
    flat.mkdir(parents=True)
    (flat / "ILSVRC2012_val_00000001.JPEG").write_bytes(photo(1))
    with pytest.raises(ConfigError, match=r"1 images without a class folder.*LOC_val_solution.csv.*devkit"):
        open_images(str(tmp_path / "c"), "val")
    make_folder(tmp_path / "c", "train")
    with pytest.raises(ConfigError, match=r"1 images without a class folder"):  # before anything is written
        open_images(str(tmp_path / "c"), "train")


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    source = open_images(str(tmp_path), "train")
    (tmp_path / "train" / source.entry(2)).unlink()
    with pytest.raises(DataError, match=r"n01440764_2.JPEG cannot be read"):
        source.read(2)


# Files that are not read


def test_files_that_are_left_out_are_counted_by_reason(tmp_path: Path) -> None:
    make_folder(tmp_path)
    folder = tmp_path / "train" / WNIDS[0]
    for name in ("a.HEIC", "b.heif", "notes.txt", "more.TXT", "no_suffix", "odd.2024", ".hidden.jpg", "._x.jpg"):
        (folder / name).write_bytes(b"x")
    for name in ("@eaDir", "__MACOSX", ".thumbnails", "x.jpg"):
        (folder / name).mkdir()
        (folder / name / "y.jpg").write_bytes(photo(0))
    for name in ("@eaDir", "__MACOSX", ".git"):
        (tmp_path / "train" / name).mkdir()
    for name in ("loose.jpg", "README"):
        (tmp_path / "train" / name).write_bytes(photo(0))
    server = socket.socket(socket.AF_UNIX)
    with pytest.MonkeyPatch.context() as patch:  # names of sockets are short
        patch.chdir(folder)
        server.bind("socket.jpg")
    server.close()
    os.mkfifo(folder / "pipe.jpg")
    source = open_images(str(tmp_path), "train")
    assert len(source) == 9 and source.classes == WNIDS
    assert source.left_out == {
        ".heic (`pip install pillow-heif` makes them readable)": 1,
        ".heif (`pip install pillow-heif` makes them readable)": 1,
        ".txt": 2,
        "@eaDir": 2,
        "__MACOSX": 2,
        "a folder with the name of a photo: n01440764/x.jpg": 1,
        "hidden": 4,
        "no suffix": 2,
        "not a file: n01440764/pipe.jpg, …": 2,
        "outside of class folders: README, …": 2,
    }


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.Jpeg", "a.AVIF", "a.webp", "a.TIFF"])
def test_suffixes_of_photos_in_any_case(tmp_path: Path, name: str) -> None:
    format = {"avif": "AVIF", "webp": "WEBP", "tiff": "TIFF"}.get(name[2:].lower(), "JPEG")
    if name == "a.AVIF" and ".avif" not in pixels.SUFFIXES:
        pytest.skip("Pillow here does not decode AVIF")
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / name).write_bytes(encode_colour(format=format))
    source = open_images(str(tmp_path), "train")
    assert source.load(0).size == (12, 8) and not source.left_out


def test_avif_that_pillow_cannot_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "photo_suffixes", lambda: (".jpg",))
    assert pixels.suffix_reason("a.AVIF") == ".avif (a newer Pillow reads them: `pip install -U pillow`)"


@pytest.fixture
def heif(monkeypatch: pytest.MonkeyPatch):
    """A package that opens PNG files for .heic; returns the registrations."""
    calls: list[int] = []
    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = lambda: calls.append(1)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    for cached in (pixels.register_heif, pixels.photo_suffixes):
        cached.cache_clear()
    yield calls
    for cached in (pixels.register_heif, pixels.photo_suffixes):
        cached.cache_clear()


def test_heic_with_the_optional_package(tmp_path: Path, heif: list[int]) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name in ("1.HEIC", "2.heif"):
        (tmp_path / "train" / "a" / name).write_bytes(encode_colour())
    source = open_images(str(tmp_path), "train")
    assert [source.load(i).size for i in range(len(source))] == [(12, 8)] * 2
    assert heif == [1] and not source.left_out
    pixels.register_heif.cache_clear()  # as in another process, which only decodes
    decode_rgb(encode_colour(), "a.heic")
    assert heif == [1, 1]


def test_an_empty_class_folder_says_what_is_in_it(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "train" / "n0_phone").mkdir()
    (tmp_path / "train" / "n0_phone" / "a.HEIC").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"n0_phone' has no images, found 1 .heic \(`pip install pillow-heif`"):
        open_images(str(tmp_path), "train")


def test_links(tmp_path: Path) -> None:
    make_folder(tmp_path)
    train = tmp_path / "train"
    elsewhere = tmp_path / "elsewhere"
    make_folder(elsewhere, ".", per_class=1, classes=("n03",))
    (train / "n03").symlink_to(elsewhere / "n03")  # a class that lies elsewhere
    (elsewhere / "n03" / "back").symlink_to(train)  # leads back
    (elsewhere / "n03" / "first.jpg").symlink_to(train / WNIDS[0] / f"{WNIDS[0]}_0.JPEG")
    (train / "here").symlink_to(".")
    (train / WNIDS[0] / "loop").symlink_to(".")
    (train / WNIDS[0] / "up").symlink_to("..")
    (train / WNIDS[0] / "gone.jpg").symlink_to("nowhere.jpg")
    (train / WNIDS[0] / "itself.jpg").symlink_to("itself.jpg")
    (train / WNIDS[0] / "again").symlink_to(train / WNIDS[1])
    source = open_images(str(tmp_path), "train")
    assert source.classes == (*WNIDS, "n03")
    assert len(source) == 9 + 3 + 2
    assert source.entry(0) == f"{WNIDS[0]}/again/{WNIDS[1]}_0.JPEG"
    assert source.read(13) == photo(0)
    left_out = dict(source.left_out)
    broken = [reason for reason in left_out if reason.startswith(f"a broken link: {WNIDS[0]}/")]
    above = [reason for reason in left_out if reason.startswith("a link to a folder above: ")]
    assert left_out.pop(broken[0]) == left_out.pop(above[0]) == 2
    assert len(left_out) == 1 and left_out.popitem()[1] == 2
    assert any(reason.startswith("a link to its own folder: ") for reason in source.left_out)


def deny(patch: pytest.MonkeyPatch, name: str, path: Path, number: int) -> None:
    """Calls of os.NAME fail for the path."""
    original = getattr(os, name)

    def denied(asked, *args, **kwargs):
        if not isinstance(asked, int) and os.path.abspath(asked) == str(path):
            raise OSError(number, os.strerror(number), str(asked))
        return original(asked, *args, **kwargs)

    patch.setattr(os, name, denied)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    "below", [".", "train", f"train/{WNIDS[1]}", f"train/{WNIDS[1]}/deep", "val", f"val/{WNIDS[0]}"]
)
def test_a_folder_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str, number: int
) -> None:
    make_folder(tmp_path)
    make_folder(tmp_path, "val")
    (tmp_path / "train" / WNIDS[1] / "deep").mkdir()
    deny(monkeypatch, "scandir", (tmp_path / below).resolve(), number)
    with pytest.raises(DataError, match=rf"{(tmp_path / below).resolve()}/? cannot be read: {os.strerror(number)}"):
        open_images(str(tmp_path), "train")


def test_a_split_folder_or_link_whose_kind_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    with monkeypatch.context() as patch:
        deny(patch, "stat", tmp_path / "train", errno.ESTALE)
        with pytest.raises(DataError, match=r"train cannot be read: Stale file handle"):
            open_images(str(tmp_path), "train")
    deny(monkeypatch, "stat", tmp_path, errno.EACCES)
    with pytest.raises(DataError, match=r"cannot be read: Permission denied"):
        open_images(str(tmp_path), "train")


def test_a_file_that_is_too_large_for_a_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    monkeypatch.setattr(image_set, "LARGEST_FILE", 100)
    with pytest.raises(UndecodableImage, match=rf"n01440764_0.JPEG: {len(photo(0))} bytes, expected .* at most 100"):
        open_images(str(tmp_path), "train").read(0)


def test_stamps(tmp_path: Path) -> None:
    make_folder(tmp_path)
    source = open_images(str(tmp_path), "train")
    info = (tmp_path / "train" / source.entry(4)).stat()
    stamps = source.stamps()
    assert stamps.shape == (9, 2) and stamps.dtype == "int64"
    assert stamps[4].tolist() == [info.st_size, info.st_mtime_ns]
    (tmp_path / "train" / source.entry(4)).unlink()
    with pytest.raises(DataError, match=r"n01443537_1.JPEG cannot be read"):
        source.stamps()


# Splits and classes


@pytest.mark.parametrize("train, val", [("Train", "VAL"), ("training", "Validation"), ("TRAIN", "valid")])
def test_usual_names_of_splits(tmp_path: Path, train: str, val: str) -> None:
    make_folder(tmp_path, train)
    make_folder(tmp_path, val, per_class=1)
    assert len(open_images(str(tmp_path), "train")) == 9
    assert len(open_images(str(tmp_path), "val")) == 3


def test_two_folders_of_one_split(tmp_path: Path) -> None:
    for split in ("train", "val", "validation"):
        make_folder(tmp_path, split)
    assert any("validation'" in note for note in open_images(str(tmp_path), "val").notes)


def test_the_test_split_serves_for_validation(tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_folder(tmp_path, "test", per_class=1)
    source = open_images(str(tmp_path), "val")
    assert len(source) == 3
    assert any("test', because there is no folder val/" in note for note in source.notes)
    assert not any("test" in note for note in open_images(str(tmp_path), "test").notes)
    make_folder(tmp_path, "val", per_class=2)
    source = open_images(str(tmp_path), "val")
    assert len(source) == 6 and not source.notes


def test_a_test_folder_without_known_classes_is_not_validation(tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_folder(tmp_path, "test", classes=("images",))
    assert len(open_images(str(tmp_path), "train")) == 9
    with pytest.raises(ConfigError, match=r"no split 'val'"):
        open_images(str(tmp_path), "val")


@pytest.mark.parametrize("empty", [True, False])
def test_a_class_without_validation_photos(tmp_path: Path, empty: bool) -> None:
    make_folder(tmp_path)
    make_folder(tmp_path, "val", per_class=1, classes=WNIDS[:2])
    if empty:
        (tmp_path / "val" / WNIDS[2]).mkdir()
    source = open_images(str(tmp_path), "val")
    assert source.classes == WNIDS and source.labels.tolist() == [0, 1]
    assert len(open_images(str(tmp_path), "train")) == 9


def test_forms_of_unicode_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    make_folder(tmp_path, classes=(composed, "tea"))
    make_folder(tmp_path, "val", per_class=1, classes=(decomposed, "tea"))
    assert open_images(str(tmp_path), "train").classes == (composed, "tea")
    val = open_images(str(tmp_path), "val")
    assert val.classes == (composed, "tea") and val.labels.tolist() == [0, 1]
    assert val.entry(0).startswith(f"{decomposed}/")
    make_folder(tmp_path, classes=(decomposed,), per_class=2)
    train = open_images(str(tmp_path), "train")
    assert train.classes == (composed, "tea") and train.labels.tolist() == [0] * 5 + [1] * 3
    assert len({train.entry(i) for i in range(8)}) == 8


def test_class_folders_that_timm_orders_by_number(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=("10", "9", "100"))
    source = open_images(str(tmp_path), "train")
    assert source.classes == ("10", "100", "9")
    note = next(note for note in source.notes if "timm" in note)
    assert "label 0 is '10'" in note and "'9'" in note and "--classes FILE" in note and "--class-map" in note
    chosen = open_images(str(tmp_path), "train", SourceChoice(classes=("9", "10", "100")))
    assert chosen.labels.tolist() == [1] * 3 + [2] * 3 + [0] * 3 and "timm" not in str(chosen.notes)
    make_folder(tmp_path / "same", classes=("08", "09", "10"))
    assert "timm" not in str(open_images(str(tmp_path / "same"), "train").notes)


def test_the_note_about_timm_is_true(tmp_path: Path) -> None:
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    make_folder(tmp_path, classes=("10", "9", "b2", "B10"))
    theirs = ReaderImageFolder(str(tmp_path / "train")).class_to_idx
    note = next(note for note in open_images(str(tmp_path), "train").notes if "timm" in note)
    assert f"there it is '{min(theirs, key=theirs.get)}'" in note
    ours = open_images(str(tmp_path), "train").classes
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in ours))
    mapped = ReaderImageFolder(str(tmp_path / "train"), class_map=str(tmp_path / "classes.txt")).class_to_idx
    assert sorted(mapped, key=mapped.get) == list(ours)


# The source's name


def test_resolve_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    with pytest.raises(ConfigError, match=r"--source.*IMAGENET_DIR.*data/source.*--source sample"):
        resolve_source(None)
    (tmp_path / "data" / "source").mkdir(parents=True)
    assert resolve_source(None) == "data/source"
    monkeypatch.setenv("IMAGENET_DIR", "/elsewhere")
    assert resolve_source(None) == "/elsewhere"
    assert resolve_source("sample") == "sample"
    with pytest.raises(ConfigError, match=r"'/elsewhere' does not exist"):
        open_images(None, "train")


def test_a_missing_validation_split_is_mentioned(tmp_path: Path) -> None:
    make_folder(tmp_path)
    assert any("no split 'val'" in note for note in open_images(str(tmp_path), "train").notes)
    make_folder(tmp_path, "val")
    assert not open_images(str(tmp_path), "train").notes
