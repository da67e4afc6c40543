"""The ILSVRC2012 tars: as downloaded, unpacked in part, with links, and damaged."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from fake_images import WNIDS, check_set, fork_pool, make_folder, make_tars, photo, read_in_child, tar_of

from vitlocal.data.images import image_set, open_images
from vitlocal.data.images.folder import FolderImages
from vitlocal.data.images.listing import LeftOut
from vitlocal.data.images.tar_index import read_index
from vitlocal.data.images.tars import TarImages
from vitlocal.errors import ConfigError, DataError, UndecodableImage


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
    data = path.read_bytes()
    found = read_index(str(path), 0, None, "a.tar", LeftOut())
    assert {member.name: data[member.offset : member.offset + member.size] for member in found} == files


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
    with pytest.raises(ConfigError, match=r"lacks ILSVRC2012_validation_ground_truth.txt"):
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
    make_folder(tmp_path)
    train.unlink()
    for split in ("train", "val"):
        with pytest.raises(ConfigError, match=r"has 1 images, but.*6 lines"):
            open_images(str(tmp_path), split)


def test_a_tar_that_is_cut_off_later(tmp_path: Path) -> None:
    make_tars(tmp_path)
    source = open_images(str(tmp_path), "train")
    with open(tmp_path / "ILSVRC2012_img_train.tar", "r+b") as file:
        file.truncate(1024)
    with pytest.raises(DataError, match=r"n01440764_0.JPEG.*cut off"):
        source.read(0)


@pytest.mark.parametrize("place", ["before a header", "within a header", "within padding"])
def test_a_tar_that_is_cut_off_between_its_files(tmp_path: Path, place: str) -> None:
    path = tmp_path / "train" / "ant.tar"
    path.parent.mkdir()
    path.write_bytes(tar_of({f"{k}.jpg": photo(k) for k in range(3)}))
    with tarfile.open(path) as tar:
        *_, last = tar.getmembers()
    cut = {"before a header": 0, "within a header": 300, "within padding": -1}
    os.truncate(path, last.offset + cut[place])
    with pytest.raises(ConfigError, match=rf"cut off: .*end mark.* at byte {last.offset}; download"):
        open_images(str(tmp_path), "train")


def test_an_empty_split(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of({}))
    with pytest.raises(ConfigError, match=r"no images in the split 'train'"):
        open_images(str(tmp_path), "train")


# Unpacked in part


def unpack(root: Path, *names: str, split: str = "train") -> None:
    """Copies images of the tars' made-up content to the folder of the split."""
    source = open_images(str(root), split)
    for i in range(len(source)):
        if not names or source.entry(i) in names:
            path = root / split / source.entry(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read(i))


def test_a_tar_beside_its_unpacked_images(tmp_path: Path) -> None:
    make_tars(tmp_path)
    unpack(tmp_path)
    for more in (False, True):
        if more:
            (tmp_path / "train" / WNIDS[0] / "mine.jpg").write_bytes(photo(90))
        source = open_images(str(tmp_path), "train")
        assert isinstance(source, FolderImages) and len(source) == 9 + more
        assert any("not ILSVRC2012_img_train.tar: all its 9 images" in line for line in source.reads)


@pytest.mark.parametrize("fault", ["some", "cut off", "no class", "empty class"])
def test_a_tar_beside_a_part_of_its_images(tmp_path: Path, fault: str) -> None:
    make_tars(tmp_path)
    unpack(tmp_path)
    last = sorted((tmp_path / "train" / WNIDS[2]).iterdir())[-1]
    if fault == "cut off":
        last.write_bytes(last.read_bytes()[:-1])
    elif fault == "some":
        last.unlink()
    else:
        for path in (tmp_path / "train" / WNIDS[2]).iterdir():
            path.unlink()
        if fault == "no class":
            (tmp_path / "train" / WNIDS[2]).rmdir()
    source = open_images(str(tmp_path), "train")
    assert isinstance(source, TarImages) and len(source) == 9 and source.read(8) == photo(8)
    count = 6 if "class" in fault else 8
    assert any(f"only {count} of 9 images of ILSVRC2012_img_train.tar" in note for note in source.notes)
    assert open_images(str(tmp_path), "val").classes == WNIDS


def test_a_folder_beside_a_damaged_or_empty_tar(tmp_path: Path) -> None:
    make_tars(tmp_path)
    unpack(tmp_path)
    tar = tmp_path / "ILSVRC2012_img_train.tar"
    tar.write_bytes(tar.read_bytes()[:9000])
    with pytest.raises(ConfigError, match=r"cut off: .*; or move it elsewhere to read '.*train'"):
        open_images(str(tmp_path), "train")
    tar.write_bytes(tar_of({}))
    assert isinstance(open_images(str(tmp_path), "train"), FolderImages)


def test_a_tar_and_a_folder_that_both_lack_images(tmp_path: Path) -> None:
    make_tars(tmp_path)
    unpack(tmp_path, f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG")
    (tmp_path / "train" / WNIDS[0] / "mine.jpg").write_bytes(photo(90))
    with pytest.raises(ConfigError, match=rf"lack images: 8 of 9.*{WNIDS[0]}_1.JPEG.*: '{WNIDS[0]}/mine.jpg'. Unp"):
        open_images(str(tmp_path), "train")


@pytest.mark.parametrize("sorted_into_classes", [True, False])
@pytest.mark.parametrize("complete", [True, False])
def test_validation_images_beside_their_tar(tmp_path: Path, sorted_into_classes: bool, complete: bool) -> None:
    make_tars(tmp_path)
    packed = open_images(str(tmp_path), "val")
    rows = [(packed.entry(i), packed.read(i)) for i in range(6)]
    for name, data in rows if complete else rows[:4]:
        path = tmp_path / "val" / (name if sorted_into_classes else Path(name).name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    source = open_images(str(tmp_path), "val")
    assert isinstance(source, FolderImages if complete else TarImages)
    assert [(source.entry(i), source.read(i)) for i in range(6)] == rows
    if complete and sorted_into_classes:  # then the list is not needed
        (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
        assert len(open_images(str(tmp_path), "val")) == 6


def unpack_outer(root: Path) -> None:
    make_tars(root)
    with tarfile.open(root / "ILSVRC2012_img_train.tar") as tar:
        (root / "train").mkdir()
        for member in tar:
            (root / "train" / member.name).write_bytes(tar.extractfile(member).read())
    (root / "ILSVRC2012_img_train.tar").unlink()


@pytest.mark.parametrize("splits", [True, False])
def test_only_the_outer_tar_is_unpacked(tmp_path: Path, splits: bool) -> None:
    unpack_outer(tmp_path)
    root = tmp_path if splits else tmp_path / "train"
    source = open_images(str(root), "train")
    check_set(source, str(root))
    assert source.classes == WNIDS and [source.read(i) for i in range(9)] == [photo(i) for i in range(9)]
    if splits:
        assert open_images(str(root), "val").classes == WNIDS


def test_class_folders_and_tars_of_classes(tmp_path: Path) -> None:
    unpack_outer(tmp_path)
    unpack(tmp_path)
    source = open_images(str(tmp_path), "train")
    assert isinstance(source, FolderImages) and source.left_out == {f"outside of class folders: {WNIDS[0]}.tar, …": 3}
    (tmp_path / "train" / WNIDS[1] / f"{WNIDS[1]}_0.JPEG").unlink()
    source = open_images(str(tmp_path), "train")
    assert isinstance(source, TarImages) and any("only 8 of 9 images of tars in" in note for note in source.notes)
    (tmp_path / "train" / f"{WNIDS[0]}.tar").unlink()  # as by a script that deletes each tar that it has unpacked
    with pytest.raises(ConfigError, match=rf"both lack images: 1 of 6.*{WNIDS[1]}_0.*{WNIDS[0]}_0.*Unpack the rest"):
        open_images(str(tmp_path), "train")


# Members


def write_train(root: Path, members: list[tuple[str, bytes, bytes, str]], format: int = tarfile.GNU_FORMAT) -> Path:
    """A training tar of one class with members (name, type, data, link)."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w", format=format) as tar:
        for name, kind, data, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname, info.mtime = kind, len(data), link, 1234
            tar.addfile(info, io.BytesIO(data))
    path = root / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_of({"n01.tar": inner.getvalue()}))
    return path


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_in_a_tar(tmp_path: Path, format: int) -> None:
    far = "d" * 120  # needs a long name and a long link
    members = [
        ("./a.jpg", tarfile.REGTYPE, photo(1), ""),
        ("hard.jpg", tarfile.LNKTYPE, b"", "./a.jpg"),
        (f"{far}/soft.jpg", tarfile.SYMTYPE, b"", "../hard.jpg"),
        ("chain.jpg", tarfile.SYMTYPE, b"", f"{far}/soft.jpg"),
        ("gone.jpg", tarfile.SYMTYPE, b"", "nowhere.jpg"),
        ("outside.jpg", tarfile.SYMTYPE, b"", "/etc/passwd"),
        ("ring1.jpg", tarfile.SYMTYPE, b"", "ring2.jpg"),
        ("ring2.jpg", tarfile.LNKTYPE, b"", "ring1.jpg"),
        ("./", tarfile.DIRTYPE, b"", ""),
    ]
    write_train(tmp_path, members, format)
    source = open_images(str(tmp_path), "train")
    entries = ["n01/a.jpg", "n01/chain.jpg", f"n01/{far}/soft.jpg", "n01/hard.jpg"]
    assert [source.entry(i) for i in range(len(source))] == entries
    assert {source.read(i) for i in range(4)} == {photo(1)}
    assert source.left_out == {"a link that leads nowhere: gone.jpg, …": 4}
    assert source.stamps().tolist() == [[len(photo(1)), 1234 * 10**9]] * 4


def test_members_that_are_left_out(tmp_path: Path) -> None:
    names = ("a.jpg", "._a.jpg", "__MACOSX/a.jpg", "@eaDir/a.jpg", "x/.hidden/a.jpg", "notes.txt", "README", "b.HEIC")
    members = [(name, tarfile.REGTYPE, photo(1), "") for name in names]
    write_train(tmp_path, [*members, ("pipe.jpg", tarfile.FIFOTYPE, b"", "")])
    source = open_images(str(tmp_path), "train")
    assert len(source) == 1 and source.left_out == {
        ".heic (`pip install pillow-heif` makes them readable)": 1,
        ".txt": 1,
        "@eaDir": 1,
        "__MACOSX": 1,
        "hidden": 2,
        "no suffix": 1,
        "not a file: pipe.jpg": 1,
    }


def test_of_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    write_train(tmp_path, [("a.jpg", tarfile.REGTYPE, photo(1), ""), ("./a.jpg", tarfile.REGTYPE, photo(2), "")])
    source = open_images(str(tmp_path), "train")
    assert len(source) == 1 and source.read(0) == photo(2)


def test_a_member_that_is_too_large_for_a_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_train(tmp_path, [("a.jpg", tarfile.REGTYPE, photo(1), "")])
    source = open_images(str(tmp_path), "train")
    monkeypatch.setattr(image_set, "LARGEST_FILE", 100)
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()  # it is not read
    with pytest.raises(UndecodableImage, match=rf"n01/a.jpg: {len(photo(1))} bytes, expected .* at most 100"):
        source.read(0)


def rewrite(header: bytes, place: int, field: bytes) -> bytes:
    """A header with another field and the checksum that belongs to it."""
    header = header[:place] + field + header[place + len(field) :]
    total = 256 + sum(header[:148]) + sum(header[156:512])
    return header[:148] + b"%06o\0 " % total + header[156:]


SIZE, KIND = 124, 156
FAULTS = {
    "negative": (SIZE, b"\xff" * 12, r"no size of a file, .*at byte 1148:"),
    "in base 256, of exabytes": (SIZE, b"\x80" + b"\1" * 11, r"cut off"),
    "half base 256": (SIZE, b"\xc0" + b"\0" * 11, r"at byte 1148:"),
    "not octal": (SIZE, b"00000000999\0", r"at byte 1148:"),
    "with a sign": (SIZE, b"-0000000001\0", r"at byte 1148:"),
    "with underscores": (SIZE, b"0_000_000_1\0", r"at byte 1148:"),
    "a long name without end": (KIND, b"L", r"a name or record of 2097152 bytes.* at byte 1024"),
    "pax records without end": (KIND, b"x", r"a name or record of 2097152 bytes.* at byte 1024"),
    "global records without end": (KIND, b"g", r"a name or record of 2097152 bytes.* at byte 1024"),
    "sparse": (KIND, b"S", r"'a.jpg' at byte 1024 is a sparse file, which is not supported; unpack"),
    "of several volumes": (KIND, b"M", r"'a.jpg' at byte 1024 is the continuation of a file in another volume"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_headers_with_strange_numbers(tmp_path: Path, fault: str) -> None:
    members = [("0.jpg", tarfile.REGTYPE, b"x", ""), ("a.jpg", tarfile.REGTYPE, bytes(2 << 20), "")]
    place, field, message = FAULTS[fault]
    write_train(tmp_path, members)
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar") as outer:
        inner = outer.extractfile("n01.tar").read()
    (tmp_path / "train").mkdir()
    changed = inner[:1024] + rewrite(inner[1024:1536], place, field) + inner[1536:]
    (tmp_path / "train" / "n01.tar").write_bytes(changed)
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(ConfigError, match=message):
        open_images(str(tmp_path), "train")


def test_pax_records(tmp_path: Path) -> None:
    def write(headers: dict[str, str]) -> str:
        info, buffer = tarfile.TarInfo("a.jpg"), io.BytesIO()
        info.size, info.pax_headers = len(photo(1)), headers
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(info, io.BytesIO(photo(1)))
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / "n01.tar").write_bytes(buffer.getvalue())
        return str(tmp_path)

    source = open_images(write({"comment": "9 path=no\n9 path=no\n", "size": str(len(photo(1)))}), "train")
    assert source.entry(0) == "n01/a.jpg" and source.read(0) == photo(1)
    with pytest.raises(ConfigError, match=r"is a sparse file"):
        open_images(write({"GNU.sparse.major": "1"}), "train")
    with pytest.raises(ConfigError, match=r"no size of a file"):
        open_images(write({"size": "-1"}), "train")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_not_a_damaged_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    make_tars(tmp_path)
    source = open_images(str(tmp_path), "train")

    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=rf"ILSVRC2012_img_train.tar cannot be read: {os.strerror(number)}"):
        open_images(str(tmp_path), "train")
    monkeypatch.undo()
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train.tar cannot be read"):
        open_images(str(tmp_path), "train")
    monkeypatch.undo()
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train.tar cannot be read"):
        source.read(0)


def test_tars_without_photos_beside_class_folders(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "train" / "labels.tar").write_bytes(tar_of({"labels.txt": b"0"}))
    (tmp_path / "train" / "empty.tar").write_bytes(b"")
    source = open_images(str(tmp_path), "train")
    assert isinstance(source, FolderImages) and len(source) == 9
    assert sum(source.left_out.values()) == 2
    (tmp_path / "train" / "n9.tar").write_bytes(tar_of({"n9_1.JPEG": photo(0)})[:600])
    with pytest.raises(ConfigError, match="cut off"):
        open_images(str(tmp_path), "train")


def test_photos_missing_from_a_folder_are_found_by_sizes(tmp_path: Path) -> None:
    """A tar ends in zeros, which may be longer than a photo."""
    make_tars(tmp_path)
    unpack(tmp_path)
    first = sorted((tmp_path / "train" / WNIDS[0]).iterdir())[0]
    os.utime(first, ns=(10**9, 10**9))  # not the newest file, whose class is compared file by file
    assert isinstance(open_images(str(tmp_path), "train"), FolderImages)
    data = first.read_bytes()
    for change in (first.unlink, lambda: first.write_bytes(data[:100]), lambda: first.write_bytes(data + bytes(9000))):
        change()
        if first.exists():
            os.utime(first, ns=(10**9, 10**9))
        assert isinstance(open_images(str(tmp_path), "train"), TarImages)
