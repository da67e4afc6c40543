"""A flat folder of validation images, with a list of their classes."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from fake_images import WNIDS, check_set, make_devkit, make_folder, make_tars, photo

from vitlocal.data.images import open_images
from vitlocal.errors import ConfigError

KAGGLE = "ILSVRC/Data/CLS-LOC"


def make_flat(folder: Path, count: int = 6) -> None:
    folder.mkdir(parents=True)
    for k in range(count):
        (folder / f"ILSVRC2012_val_{k + 1:08}.JPEG").write_bytes(photo(100 + k))


def kaggle_list(wnids: list[str]) -> str:
    lines = [f"ILSVRC2012_val_{k:08},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for k, wnid in enumerate(wnids, 1)]
    return "\n".join(["ImageId,PredictionString", *reversed(lines)]) + "\n"


@pytest.mark.parametrize("place", ["val", "."])
def test_the_list_of_kaggle(tmp_path: Path, place: str) -> None:
    make_folder(tmp_path)
    make_flat(tmp_path / "val")
    (tmp_path / place / "LOC_val_solution.csv").write_text(kaggle_list([WNIDS[k % 3] for k in range(6)]))
    source = open_images(str(tmp_path), "val")
    check_set(source, str(tmp_path))
    assert source.classes == WNIDS and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.entry(1) == f"{WNIDS[0]}/ILSVRC2012_val_00000004.JPEG" and source.read(1) == photo(103)
    assert source.stamps()[1].tolist()[0] == len(photo(103))
    assert not source.left_out and "LOC_val_solution.csv" in source.reads[0]
    assert len(open_images(str(tmp_path), "train")) == 9


@pytest.mark.parametrize("named", [".", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_the_folder_of_the_competition(tmp_path: Path, named: str) -> None:
    make_folder(tmp_path / KAGGLE)
    make_flat(tmp_path / KAGGLE / "val")
    make_flat(tmp_path / KAGGLE / "test")
    (tmp_path / "ILSVRC" / "Annotations").mkdir()
    (tmp_path / "LOC_val_solution.csv").write_text(kaggle_list([WNIDS[k % 3] for k in range(6)]))
    assert len(open_images(str(tmp_path / named), "train")) == 9
    assert open_images(str(tmp_path / named), "val").labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("unpacked", [False, True])
def test_the_list_of_the_devkit(tmp_path: Path, unpacked: bool) -> None:
    make_folder(tmp_path)
    make_flat(tmp_path / "val")
    wnids = make_devkit(tmp_path)
    if unpacked:
        packed = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
        with tarfile.open(packed) as tar:
            for member in tar:
                (tmp_path / Path(member.name).name).write_bytes(tar.extractfile(member).read())
        packed.unlink()
    make_tars(tmp_path / "tars")
    flat, packed = open_images(str(tmp_path), "val"), open_images(str(tmp_path / "tars"), "val")
    assert [flat.entry(i) for i in range(6)] == [packed.entry(i) for i in range(6)]
    assert [flat.classes[label] for label in flat.labels] == sorted(wnids)


def test_tiny_imagenet(tmp_path: Path) -> None:
    for wnid in WNIDS:
        make_folder(tmp_path / "train", wnid, per_class=1, classes=("images",))
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    make_folder(tmp_path / "test", ".", classes=("images",))
    (tmp_path / "val" / "images").mkdir(parents=True)
    for k in range(6):
        (tmp_path / "val" / "images" / f"val_{k}.JPEG").write_bytes(photo(k))
    lines = [f"val_{k}.JPEG\t{WNIDS[2 - k % 3]}\t0\t32\t44\t62\n" for k in range(6)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    train, val = open_images(str(tmp_path), "train"), open_images(str(tmp_path), "val")
    assert len(train) == 3 and train.left_out == {".txt": 3}
    check_set(val, str(tmp_path))
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2] and val.read(0) == photo(2) and not val.left_out


def test_images_and_lines_without_each_other(tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_flat(tmp_path / "val")
    (tmp_path / "val" / "mine.JPEG").write_bytes(photo(1))
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").unlink()
    (tmp_path / "val" / "LOC_val_solution.csv").write_text(kaggle_list([WNIDS[k % 3] for k in range(6)]))
    source = open_images(str(tmp_path), "val")
    assert len(source) == 5 and source.left_out == {"not in LOC_val_solution.csv: mine.JPEG": 1}
    assert any("1 images of" in note and "'ILSVRC2012_val_00000001'" in note for note in source.notes)


@pytest.mark.parametrize(
    "text", ["ImageId,PredictionString\na,\n", "ImageId\na\n", "ImageId,PredictionString\na,n1 1\na,n2 1\n"]
)
def test_a_damaged_list(tmp_path: Path, text: str) -> None:
    make_folder(tmp_path)
    make_flat(tmp_path / "val")
    (tmp_path / "LOC_val_solution.csv").write_text(text)
    for split in ("train", "val"):
        with pytest.raises(ConfigError, match=r"LOC_val_solution.csv: expected one class for each image, got \['a'"):
            open_images(str(tmp_path), split)
    (tmp_path / "LOC_val_solution.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"LOC_val_solution.csv is not a text file"):
        open_images(str(tmp_path), "val")


def test_a_list_of_other_images(tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_flat(tmp_path / "val")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nother,n1 1 2 3 4\n")
    for split in ("train", "val"):
        with pytest.raises(ConfigError, match=r"LOC_val_solution.csv has none of the 6 images in .*val'"):
            open_images(str(tmp_path), split)


def test_photos_in_one_folder_of_val_without_a_list(tmp_path: Path) -> None:
    """Tiny ImageNet without its val_annotations.txt: `images` is not a class."""
    make_folder(tmp_path)
    make_folder(tmp_path, "val", classes=("images",))
    for split in ("train", "val"):
        with pytest.raises(ConfigError, match=r"3 images without a class folder, and no list of their classes"):
            open_images(str(tmp_path), split)
