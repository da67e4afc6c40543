"""Every kind of image source, built small."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fake_images import WNIDS, check_set, encode_colour, fork_pool, make_folder, photo, read_in_child

from vitlocal.data.images import open_images, resolve_source, tars
from vitlocal.data.images.folder import FolderImages
from vitlocal.data.images.tars import TarImages
from vitlocal.errors import ConfigError, DataError

# Folders


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
    with pytest.raises(ConfigError, match=r"1 images without a class folder"):
        open_images(str(tmp_path / "c"), "val")


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    source = open_images(str(tmp_path), "train")
    (tmp_path / "train" / source.entry(2)).unlink()
    with pytest.raises(DataError, match=r"n01440764_2.JPEG cannot be read"):
        source.read(2)


# The ILSVRC2012 tars


def tar_of(files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def make_tars(root: Path, per_class: int = 3, val: int = 6) -> list[str]:
    """Writes both tars and the devkit as image-net.org gives them, small; returns the val images' wnids."""
    scipy_io = pytest.importorskip("scipy.io")
    root.mkdir(exist_ok=True)
    inner = {
        # neither classes nor images in order, as in the real one
        f"{wnid}.tar": tar_of({f"{wnid}_{k}.JPEG": photo(label * per_class + k) for k in reversed(range(per_class))})
        for label, wnid in reversed(list(enumerate(WNIDS)))
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    names = [f"ILSVRC2012_val_{k + 1:08}.JPEG" for k in range(val)]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of({name: photo(100 + k) for k, name in enumerate(names)}))

    identities = {1: WNIDS[2], 2: WNIDS[0], 3: WNIDS[1]}  # the devkit's numbers are not in the order of wnids
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, f"word {number}", "gloss", 0) for number, wnid in identities.items()]
    rows.append((4, "n00001740", "entity", "gloss", 3))  # an inner node
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": np.array(rows, kind).reshape(-1, 1)})
    truth = [1 + k % 3 for k in range(val)]
    devkit = {
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{k}\n" for k in truth).encode(),
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/readme.txt": b"read me",
    }
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_of(devkit)))
    return [identities[number] for number in truth]


def test_tars(tmp_path: Path) -> None:
    wnids = make_tars(tmp_path)
    train = open_images(str(tmp_path), "train")
    assert isinstance(train, TarImages)
    check_set(train, str(tmp_path))
    assert train.classes == WNIDS
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [train.read(i) for i in range(9)] == [photo(i) for i in range(9)]

    val = open_images(str(tmp_path), "val")
    check_set(val, str(tmp_path))
    assert val.classes == WNIDS
    for i in range(len(val)):
        number = int(val.entry(i).split("_")[-1].split(".")[0])
        wnid = wnids[number - 1]
        assert val.entry(i) == f"{wnid}/ILSVRC2012_val_{number:08}.JPEG"
        assert val.classes[val.labels[i]] == wnid
        assert val.read(i) == photo(100 + number - 1)


def test_tars_have_the_rows_of_the_unpacked_images(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    make_folder(tmp_path / "folder")
    packed = open_images(str(tmp_path / "tars"), "train")
    unpacked = open_images(str(tmp_path / "folder"), "train")
    assert isinstance(unpacked, FolderImages)
    assert packed.labels.tolist() == unpacked.labels.tolist()
    for i in range(len(packed)):
        assert packed.entry(i) == unpacked.entry(i) and packed.read(i) == unpacked.read(i)


def test_an_unpacked_devkit(tmp_path: Path) -> None:
    wnids = make_tars(tmp_path)
    packed = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(packed) as tar:
        for member in tar:
            target = tmp_path / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(member).read())
    packed.unlink()
    assert len(open_images(str(tmp_path), "val")) == len(wnids)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_tars_in_other_processes(tmp_path: Path, context: str) -> None:
    make_tars(tmp_path)
    source = open_images(str(tmp_path), "train")
    source.read(0)
    if context == "spawn":  # what a spawned worker gets
        assert pickle.loads(pickle.dumps(source)).read(5) == photo(5)
        return
    with fork_pool() as pool:
        assert pool.starmap(read_in_child, [(source, i) for i in range(9)]) == [photo(i) for i in range(9)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_headers(tmp_path: Path, format: int) -> None:
    files = {
        "plain.jpg": b"p" * 511,
        "d" * 60 + "/" + "e" * 60 + "/long.jpg": b"l" * 513,
        "empty.jpg": b"",
        "bloß-ä.jpg": b"u" * 512,
    }
    if format != tarfile.USTAR_FORMAT:
        files["f" * 300 + ".jpg"] = b"very long"
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(files, format))
    with open(path, "rb") as file:
        found = {
            member.name: os.pread(file.fileno(), member.size, member.offset)
            for member in tars._members(file.fileno(), 0, path.stat().st_size, "a.tar")
        }
    assert found == files


def test_tar_errors(tmp_path: Path) -> None:
    make_tars(tmp_path)
    spec = str(tmp_path)
    with pytest.raises(ConfigError, match=r"no split 'test'.*found.*ILSVRC2012_img_train.tar"):
        open_images(spec, "test")

    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    kept = devkit.read_bytes()
    devkit.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ConfigError, match=r"devkit_t12.tar.gz.*download"):
        open_images(spec, "val")
    devkit.unlink()
    with pytest.raises(ConfigError, match=r"lacks ILSVRC2012_devkit_t12.tar.gz"):
        open_images(spec, "val")
    devkit.write_bytes(gzip.compress(tar_of({"data/meta.mat": b"x"})))
    with pytest.raises(ConfigError, match=r"lacks data/ILSVRC2012_validation_ground_truth.txt"):
        open_images(spec, "val")
    devkit.write_bytes(
        gzip.compress(tar_of({"data/meta.mat": b"x" * 200, "data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}))
    )
    with pytest.raises(ConfigError, match=r"ground truth and meta.mat"):
        open_images(spec, "val")

    train = tmp_path / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) * 2 // 5])
    with pytest.raises(ConfigError, match=r"cut off.*download"):
        open_images(spec, "train")
    train.write_bytes(b"not a tar at all " * 100)
    with pytest.raises(ConfigError, match=r"no tar header at byte 0"):
        open_images(spec, "train")
    train.write_bytes(tar_of({"n01440764_1.JPEG": photo(1)}))
    with pytest.raises(ConfigError, match=r"one tar for each class"):
        open_images(spec, "train")
    train.write_bytes(tar_of({"n01440764.tar": tar_of({})}))
    with pytest.raises(ConfigError, match=r"n01440764.tar has no images"):
        open_images(spec, "train")
    train.unlink()
    with pytest.raises(ConfigError, match=r"no split 'train'"):
        open_images(spec, "train")


def test_tar_classes_and_counts_must_match(tmp_path: Path) -> None:
    make_tars(tmp_path)
    train = tmp_path / "ILSVRC2012_img_train.tar"
    train.write_bytes(tar_of({f"{wnid}.tar": tar_of({"a.JPEG": photo(0)}) for wnid in WNIDS[:2]}))
    for split in ("train", "val"):
        with pytest.raises(ConfigError, match=rf"not among the 2 of the split 'train': '{WNIDS[2]}'"):
            open_images(str(tmp_path), split)
    val = tmp_path / "ILSVRC2012_img_val.tar"
    val.write_bytes(tar_of({"ILSVRC2012_val_00000001.JPEG": photo(0)}))
    with pytest.raises(ConfigError, match=r"has 1 images, but.*6 lines"):
        open_images(str(tmp_path), "val")


def test_a_tar_that_is_cut_off_later(tmp_path: Path) -> None:
    make_tars(tmp_path)
    source = open_images(str(tmp_path), "train")
    with open(tmp_path / "ILSVRC2012_img_train.tar", "r+b") as file:
        file.truncate(1024)
    with pytest.raises(DataError, match=r"n01440764_0.JPEG.*cut off"):
        source.read(0)


def test_an_empty_split(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of({}))
    with pytest.raises(ConfigError, match=r"no images in the split 'train'"):
        open_images(str(tmp_path), "train")


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
