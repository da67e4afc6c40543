"""Parquet shards: their names, their columns, their classes, and the memory that reading them takes."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_images import check_set, contents, fork_pool, make_folder, photo, read_in_child, write_config

from vitlocal.data.images import columns, open_images, parquet
from vitlocal.data.images.find import FILES, PARQUET, format_of
from vitlocal.data.images.image_set import SourceChoice
from vitlocal.data.images.parquet import ParquetImages
from vitlocal.data.manifest import BetonFile
from vitlocal.data.writer import encode
from vitlocal.data.writer.encode import RowsRead
from vitlocal.data.writer.write import write
from vitlocal.errors import ConfigError, DataError, UndecodableImage

pyarrow = pytest.importorskip("pyarrow")
files = pytest.importorskip("pyarrow.parquet")


def write_shard(path: Path, labels: list | None, names: list[str] | None = None, *, first: int = 0, **options) -> None:
    """A shard with one photo for each label. Options: more columns, and their features; the cells of the images."""
    count = options.get("count", len(labels or ()))
    cells = options.get("cells", [{"bytes": photo(first + k), "path": f"{k}.jpg"} for k in range(count)])
    columns = {options.get("image", "image"): cells, options.get("label", "label"): labels, **options.get("more", {})}
    table = pyarrow.table({name: cells for name, cells in columns.items() if cells is not None})
    features = dict(options.get("features", {}))
    if names is not None:
        features[options.get("image", "image")] = {"_type": "Image"}
        features[options.get("label", "label")] = {"_type": "ClassLabel", "names": names}
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(table, path, row_group_size=options.get("group", 2))


def class_label(*names: str) -> dict[str, object]:
    return {"_type": "ClassLabel", "names": list(names)}


# --- names of shards ---


@pytest.mark.parametrize("names", [["tench", "shark", "dog"], None])
@pytest.mark.parametrize(
    "shards",
    [
        ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"),
        ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001"),
        ("train-00000-of-00002-b42a775f407cee45", "train-00001-of-00002-0123456789abcdef", "val"),
        ("train/0000", "train/0001", "validation/0000"),
        ("default/train/0000", "default/train/0001", "default/validation/0000"),
        ("photos/train/0000", "photos/train/0001", "photos/validation/0000"),
        ("default/partial-train/0000", "default/partial-train/0001", "default/dev/0000"),
        ("imagenet-1k-train-00000-of-00002", "imagenet-1k-train-00001-of-00002", "imagenet-1k-validation"),
        ("train/part-00000-of-00002", "train/part-00001-of-00002", "valid/data"),
        ("train/cats", "train/dogs", "valid/all"),
        ("train_0", "train_1", "test-0"),
        ("training-1", "training-2", "evaluation.0"),
    ],
)
def test_layouts(tmp_path: Path, shards: tuple[str, ...], names: list[str] | None) -> None:
    paths = [f"{shard}.parquet" for shard in shards]
    write_shard(tmp_path / paths[0], [0, 1, 2, 0, 1], names)
    write_shard(tmp_path / paths[1], [2, 2, 0], names, first=5)
    write_shard(tmp_path / paths[2], [1, 0, 1], names, first=8)
    train = open_images(str(tmp_path), "train")
    assert isinstance(train, ParquetImages)
    check_set(train, str(tmp_path))
    assert train.classes == (tuple(names) if names else ("0", "1", "2"))
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 2, 0]
    assert [train.read(i) for i in (7, 0, 4, 5, 3)] == [photo(i) for i in (7, 0, 4, 5, 3)]
    assert train.entry(0) == f"{paths[0]}/0" and train.entry(6) == f"{paths[1]}/1"
    assert f"shards: {paths[0]} and 1 more" in train.reads and "labels: column 'label'" in train.reads
    assert ("configuration: 'imagenet-1k'" in train.reads) == shards[0].startswith("imagenet")
    assert ("only a part of the split" in "".join(train.notes)) == ("partial" in shards[0])
    val = open_images(str(tmp_path), "val")
    assert val.classes == train.classes and val.labels.tolist() == [1, 0, 1] and val.read(2) == photo(10)
    stands_in = shards[2].startswith(("test", "evaluation"))
    assert any("reads those of 'test'" in note for note in val.notes) == stands_in


def test_other_splits_are_left_out(tmp_path: Path) -> None:
    for name in ("train", "train_mini", "validation", "validation_v2", "val-small", "unlabeled"):
        write_shard(tmp_path / f"{name}-00000-of-00001.parquet", [0, 1])
    write_shard(tmp_path / "train_full" / "0000.parquet", [0, 1])
    for split in ("train", "val"):
        images = open_images(str(tmp_path), split)
        assert len(images) == 2
        others = "train_full, train_mini, unlabeled, val-small, validation_v2"
        assert images.left_out == {f"parquet shards of other splits ({others})": 5}


def test_missing_split(tmp_path: Path) -> None:
    write_shard(tmp_path / "train_mini-0.parquet", [0, 1])
    with pytest.raises(ConfigError, match=r"no split 'train'.*found 'train_mini'"):
        open_images(str(tmp_path), "train")
    write_shard(tmp_path / "train-0.parquet", [0, 1])
    with pytest.raises(ConfigError, match=r"no split 'val'.*found 'train', 'train_mini'"):
        open_images(str(tmp_path), "val")


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (("train-00000-of-00003", "train-00002-of-00003"), "00001 is missing"),
        (("train-00002-of-00012",), r"00000, 00001, 00003, 00004, 00005, 00006 and 5 more are missing"),
        (("train-1-of-3", "train-3-of-3"), "2 is missing"),
        (("train/0000", "train/0002"), "0001 is missing"),
        (("train/0003",), "0001, 0002 are missing"),
        (("train-0-of-2", "train-1-of-2", "train-2-of-2"), "above 2"),
        (("train-0-of-2", "train-1-of-2", "train-0-of-1"), "2 different sets"),
        (("train", "training"), "2 different sets"),
        (("train", "train-0"), "2 different sets"),
        (("train", "train/0000"), "2 different sets"),
        (("train-0-of-1-aaaa", "train-0-of-1-bbbb"), "are the same shard"),
    ],
)
def test_incomplete_splits(tmp_path: Path, shards: tuple[str, ...], message: str) -> None:
    for shard in shards:
        write_shard(tmp_path / f"{shard}.parquet", [0, 1])
    with pytest.raises(ConfigError, match=message):
        open_images(str(tmp_path), "train")


def test_a_copied_shard_is_read_once(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "data"):
        write_shard(folder / "train-00000-of-00001.parquet", [0, 1])
    assert len(open_images(str(tmp_path), "train")) == 2
    write_shard(tmp_path / "data" / "train-00000-of-00001.parquet", [0, 1, 1, 1])
    with pytest.raises(ConfigError, match=r"are the same shard; remove one"):
        open_images(str(tmp_path), "train")


def test_configurations(tmp_path: Path) -> None:
    write_shard(tmp_path / "cifar10" / "train-00000-of-00001.parquet", [0, 1])
    write_shard(tmp_path / "cifar100" / "train" / "0000.parquet", [0, 1, 2])
    write_shard(tmp_path / "data" / "mini-train-0.parquet", [0, 1, 2, 3])
    with pytest.raises(ConfigError, match=r"3 configurations: 'cifar10', 'cifar100', 'mini'; .*--subset NAME"):
        open_images(str(tmp_path), "train")
    for subset, count in (("cifar10", 2), ("cifar100", 3), ("mini", 4)):
        images = open_images(str(tmp_path), "train", SourceChoice(subset=subset))
        assert len(images) == count and f"configuration: '{subset}'" in images.reads
    with pytest.raises(ConfigError, match=r"--subset other: .*'cifar10', 'cifar100', 'mini'; choose"):
        open_images(str(tmp_path), "train", SourceChoice(subset="other"))
    write_shard(tmp_path / "train-0.parquet", [0])
    images = open_images(str(tmp_path), "train")
    assert len(images) == 1
    assert images.left_out == {"parquet shards of other configurations (cifar10, cifar100, mini)": 3}
    assert len(open_images(str(tmp_path), "train", SourceChoice(subset="default"))) == 1


def test_other_parquet_files_are_no_shards(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", "train")
    write_shard(tmp_path / "a" / "metadata.parquet", [0])
    write_shard(tmp_path / "a" / "features.parquet", [0])
    (tmp_path / "a" / ".cache").mkdir()
    write_shard(tmp_path / "a" / ".cache" / "val-0.parquet", [0])
    assert format_of(tmp_path / "a", "train") is FILES and format_of(tmp_path / "a", "val") is FILES
    write_shard(tmp_path / "b" / "train-0.parquet", [0])
    assert format_of(tmp_path / "b", "val") is PARQUET


# --- columns ---


def test_the_usual_names_of_columns_come_first(tmp_path: Path) -> None:
    more, features = {"is_dog": [1, 0, 1]}, {"is_dog": class_label("no", "yes")}
    write_shard(tmp_path / "train.parquet", [2, 1, 0], more=more, features=features)
    images = open_images(str(tmp_path), "train")
    assert images.labels.tolist() == [2, 1, 0] and "labels: column 'label'" in images.reads
    dogs = open_images(str(tmp_path), "train", SourceChoice(label="is_dog"))
    assert dogs.labels.tolist() == [1, 0, 1] and dogs.classes == ("no", "yes")


@pytest.mark.parametrize("cells", [[photo(0), photo(1)], [{"bytes": photo(k), "path": None} for k in (0, 1)]])
def test_unusual_columns_are_found_by_their_type(tmp_path: Path, cells: list) -> None:
    more = {"author": [7, 8]}
    write_shard(tmp_path / "train.parquet", [1, 0], ["a", "b"], image="scan", label="kind", cells=cells, more=more)
    images = open_images(str(tmp_path), "train")
    assert images.read(1) == photo(1) and images.labels.tolist() == [1, 0]
    assert images.reads[-2:] == ("images: column 'scan'", "labels: column 'kind'")


def test_coarse_and_fine_labels(tmp_path: Path) -> None:
    more, features = {"coarse_label": [0, 0]}, {"coarse_label": class_label("pets")}
    write_shard(
        tmp_path / "train.parquet",
        [1, 0],
        ["cat", "dog"],
        image="img",
        label="fine_label",
        more=more,
        features=features,
    )
    assert open_images(str(tmp_path), "train").classes == ("cat", "dog")


def test_ambiguous_columns(tmp_path: Path) -> None:
    two = {"colour": class_label("red"), "shape": class_label("round")}
    write_shard(tmp_path / "a" / "train.parquet", None, count=1, more={"colour": [0], "shape": [0]}, features=two)
    with pytest.raises(ConfigError, match=r"2 columns could have the labels.*'shape' \(ClassLabel\).*--label NAME"):
        open_images(str(tmp_path / "a"), "train")
    assert open_images(str(tmp_path / "a"), "train", SourceChoice(label="shape")).classes == ("round",)
    write_shard(tmp_path / "b" / "train.parquet", [0, 1], label="caption")
    with pytest.raises(ConfigError, match=r"no column has a usual name of labels.*'caption' \(int64\).*--label NAME"):
        open_images(str(tmp_path / "b"), "train")
    write_shard(tmp_path / "c" / "train.parquet", [0], image="left", more={"right": [photo(0)]})
    with pytest.raises(ConfigError, match=r"2 columns could have the images.*--image NAME"):
        open_images(str(tmp_path / "c"), "train")
    assert open_images(str(tmp_path / "c"), "train", SourceChoice(image="right")).read(0) == photo(0)


@pytest.mark.parametrize("choice", [SourceChoice(label="boxes"), SourceChoice(label="absent")])
def test_a_chosen_column_must_be_of_use(tmp_path: Path, choice: SourceChoice) -> None:
    write_shard(tmp_path / "train.parquet", [0], more={"boxes": [[1.0, 2.0]]})
    with pytest.raises(ConfigError, match=rf"--label {choice.label}: expected a column of labels: 'label', in .*boxes"):
        open_images(str(tmp_path), "train", choice)
    with pytest.raises(ConfigError, match=r"--image label: expected a column of images: 'image', in "):
        open_images(str(tmp_path), "train", SourceChoice(image="label"))


def test_another_shard_lacks_a_column(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", [0])
    write_shard(tmp_path / "train-1.parquet", [0], label="target")
    with pytest.raises(ConfigError, match=r"train-1.*expected the columns 'image' and 'label'.*'target' \(int64\)"):
        open_images(str(tmp_path), "train")


@pytest.mark.parametrize("cells", [[photo(0)], ["0.jpg"]], ids=["bytes", "text"])
def test_another_shard_has_another_type_of_images(tmp_path: Path, cells: list) -> None:
    write_shard(tmp_path / "train-0.parquet", [0])
    write_shard(tmp_path / "train-1.parquet", [0], cells=cells)
    with pytest.raises(ConfigError, match=r"train-1.*expected.*of the types in train-0.*'image' \((binary|string)\)"):
        open_images(str(tmp_path), "train")


# --- classes ---


def test_shards_may_order_their_classes_differently(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", [0, 1, 2], ["a", "b", "c"])
    write_shard(tmp_path / "train-1.parquet", [0, 1, 2], ["c", "a", "b"])
    write_shard(tmp_path / "val.parquet", [0, 1], ["b", "a"])
    images = open_images(str(tmp_path), "train")
    assert images.classes == ("a", "b", "c") and images.labels.tolist() == [0, 1, 2, 2, 0, 1]
    val = open_images(str(tmp_path), "val")
    assert val.classes == ("a", "b", "c") and val.labels.tolist() == [1, 0]
    write_shard(tmp_path / "train-1.parquet", [0, 1], ["c", "d"])
    with pytest.raises(ConfigError, match=r"train-0.*train-1.*'a', 'b' only in the first, 'd' only in the second"):
        open_images(str(tmp_path), "train")
    write_shard(tmp_path / "train-1.parquet", [0, 1])
    with pytest.raises(ConfigError, match=r"nothing only in the second"):
        open_images(str(tmp_path), "train")


def test_numbers_without_names_are_numbered_in_their_order(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", [15075141, 1440764])
    write_shard(tmp_path / "train-1.parquet", [9468604, 1440764])
    write_shard(tmp_path / "val.parquet", [9468604])
    train = open_images(str(tmp_path), "train")
    assert train.classes == ("1440764", "9468604", "15075141") and train.labels.tolist() == [2, 0, 1, 0]
    assert "3 numbers from 1440764 to 15075141" in train.notes[0]
    assert open_images(str(tmp_path), "val").labels.tolist() == [1]
    write_shard(tmp_path / "val.parquet", [5])
    with pytest.raises(ConfigError, match=r"not among the 3 of the split 'train': '5'"):
        open_images(str(tmp_path), "train")


def test_labels_may_be_words(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.parquet", ["dog", "cat", "dog"])
    words = pyarrow.array(["dog", "dog"]).dictionary_encode()
    write_shard(tmp_path / "val.parquet", words)
    assert open_images(str(tmp_path), "train").labels.tolist() == [1, 0, 1]
    val = open_images(str(tmp_path), "val")
    assert val.classes == ("cat", "dog") and val.labels.tolist() == [1, 1]


def test_a_class_without_images_can_be_named_by_its_data_folder(tmp_path: Path) -> None:
    write_shard(tmp_path / "s" / "train-0.parquet", [0, 2, 0, 2], ["ant", "bee", "cow"])
    manifest = write(write_config(tmp_path / "out", source=str(tmp_path / "s")), progress=False)
    assert manifest.classes == ("ant", "bee", "cow")
    images = open_images(str(tmp_path / "s"), "train", SourceChoice(classes=manifest.classes))  # as other loaders do
    assert images.labels.tolist() == [0, 2, 0, 2]
    with pytest.raises(ConfigError, match=r"names classes without images.*1.*'unicorn'"):
        open_images(str(tmp_path / "s"), "train", SourceChoice(classes=("ant", "bee", "unicorn")))


def test_forms_of_unicode_are_one_word(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_shard(tmp_path / "train-0.parquet", [composed, decomposed, "tea"])
    write_shard(tmp_path / "val-0.parquet", ["tea", decomposed])
    train, val = (open_images(str(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == (composed, "tea")
    assert train.labels.tolist() == [0, 0, 1] and val.labels.tolist() == [1, 0]


def test_classes_with_one_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", [0, 1, 2], ["crane", "bee", "crane"])
    write_shard(tmp_path / "val-0.parquet", [0, 1, 2], ["crane", "bee", "crane"])
    assert open_images(str(tmp_path), "val").labels.tolist() == [0, 1, 2]
    write_shard(tmp_path / "val-0.parquet", [0, 1, 2], ["bee", "crane", "crane"])
    with pytest.raises(ConfigError, match=r"several classes with one name: 'crane'"):
        open_images(str(tmp_path), "val")
    with pytest.raises(ConfigError, match=r"several classes with one name: 'crane'"):
        open_images(str(tmp_path), "train", SourceChoice(classes=("crane", "bee")))


def test_rows_without_labels(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.parquet", [0, 1], ["x", "y"])
    write_shard(tmp_path / "test.parquet", [-1, -1], ["x", "y"])
    assert len(open_images(str(tmp_path), "train")) == 2  # nobody asked for the test split
    with pytest.raises(
        ConfigError, match=r"'test', which is read because.* no validation.* labels -1..-1, expected 0..1"
    ):
        open_images(str(tmp_path), "val")
    write_shard(tmp_path / "val.parquet", [-1, -1], ["x", "y"])
    with pytest.raises(ConfigError, match=r"split 'val' has labels -1..-1"):
        open_images(str(tmp_path), "train")
    write_shard(tmp_path / "val.parquet", [0, None], ["x", "y"])
    with pytest.raises(ConfigError, match=r"1 of 2 rows have no value in column 'label'"):
        open_images(str(tmp_path), "val")
    write_shard(tmp_path / "val.parquet", [0, 2], ["x", "y"])
    with pytest.raises(ConfigError, match=r"labels 0..2, expected 0..1"):
        open_images(str(tmp_path), "val")


def test_a_damaged_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", [0, 1], ["x", "y"])
    whole = (tmp_path / "train-0.parquet").read_bytes()
    images = open_images(str(tmp_path), "train")
    (tmp_path / "train-0.parquet").write_bytes(whole[:4] + bytes(600) + whole[604:])
    with pytest.raises(DataError, match=r"train-0.parquet cannot be read.*download"):
        images.read(0)
    (tmp_path / "train-0.parquet").unlink()
    with pytest.raises(DataError, match=r"train-0.parquet is not a complete parquet file"):
        images.read(0)
    (tmp_path / "train-0.parquet").write_bytes(whole[:-20])
    with pytest.raises(ConfigError, match=r"not a complete parquet file.*download"):
        open_images(str(tmp_path), "train")


@pytest.mark.parametrize("byte", [20, 32])  # of the footer, which end the process with Arrow 26
def test_a_footer_that_ends_the_process_that_reads_it(tmp_path: Path, byte: int) -> None:
    write_shard(tmp_path / "train-0.parquet", [0, 1], ["x", "y"])
    write_shard(tmp_path / "train-1.parquet", [0, 1], ["x", "y"])
    data = bytearray((tmp_path / "train-1.parquet").read_bytes())
    data[-8 - int.from_bytes(data[-8:-4], "little") + byte] ^= 0x20
    (tmp_path / "train-1.parquet").write_bytes(data)
    with pytest.raises(ConfigError, match=r"train-1.parquet is not a complete parquet file.*download it again"):
        open_images(str(tmp_path), "train")


# --- reading and memory ---


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that were opened, in order."""
    numbers: list[int] = []

    class CountedGroup(parquet._OpenGroup):
        def __init__(self, file, number: int, column: str) -> None:
            numbers.append(number)
            super().__init__(file, number, column)

    monkeypatch.setattr(parquet, "_OpenGroup", CountedGroup)
    return numbers


def test_threads_share_two_row_groups(tmp_path: Path, opened: list[int]) -> None:
    write_shard(tmp_path / "train-0.parquet", [0, 1] * 20, group=4)
    images = open_images(str(tmp_path), "train")
    most = []

    def read(thread: int) -> None:
        mine = copy.copy(images)
        for row in np.random.default_rng(thread).permutation(40).tolist():
            assert mine.read(row) == photo(row)
            most.append(len(mine._store._open))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert max(most) == 2
    opened.clear()
    for row in range(40):
        assert images.read(row) == photo(row)
    assert opened[-9:] == list(range(1, 10))  # in order, each is read once


def test_a_row_group_is_read_only_up_to_the_row(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", [0, 1] * 20, group=40)
    images = open_images(str(tmp_path), "train")
    assert not images._store._open
    images.read(5)
    assert sorted(images._store._open[0].rows) == [0, 1, 2, 3, 4, 5]
    images.release(4)
    assert sorted(images._store._open[0].rows) == [4, 5]
    assert images.read(2) == photo(2)  # reads the group again
    images.release(len(images))
    assert not images._store._open
    images.release(30)  # a write continues there
    for row in (33, 34, 31):
        assert images.read(row) == photo(row)
    assert sorted(images._store._open[0].rows) == [30, 31, 32, 33, 34]
    assert images.read(20) == photo(20)
    assert sorted(images._store._open[0].rows) == [20]


def test_the_writer_reads_each_row_group_once(tmp_path: Path, opened: list[int], monkeypatch) -> None:
    count = 120
    write_shard(tmp_path / "s" / "train-0.parquet", [0, 1] * (count // 2), group=3)
    write(write_config(tmp_path / "one"), open_images(str(tmp_path / "s"), "train"), False)
    opened.clear()
    images = open_images(str(tmp_path / "s"), "train")
    monkeypatch.setattr(encode, "CHUNK_BYTES", 60_000)
    write(write_config(tmp_path / "many", workers=7), images, False)
    assert opened == list(range(count // 3))
    assert not images._store._open
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    opened.clear()
    chosen = open_images(str(tmp_path / "s"), "train", SourceChoice(classes=("1",)))
    write(write_config(tmp_path / "chosen", workers=3), chosen, False)
    assert opened == list(range(count // 3))


def test_few_large_photos_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = photo(0) + bytes(3000)
    write_shard(tmp_path / "train-0.parquet", [0, 1] * 50, cells=[{"bytes": large, "path": None}] * 100)
    images, unwritten, most = open_images(str(tmp_path), "train"), set(), []
    monkeypatch.setattr(encode, "CHUNK_BYTES", 10_000)
    read = images.read

    def counted(index: int) -> bytes:
        unwritten.add(index)
        most.append(len(unwritten))
        return read(index)

    images.read = counted
    job, rows = encode.EncodeJob((BetonFile("a", 8, "raw", None, None, None, 1 << 21),), 0, False), []
    for chunk in encode.encode_chunks(images, job, 0, 2):
        rows += range(chunk.start, chunk.next)
        unwritten -= set(rows)
    assert rows == list(range(100))
    assert max(most) <= (encode.CHUNKS_AHEAD * 2 + 1) * (10_000 // len(large) + 1)


def test_errors_of_rows_that_were_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [{"bytes": photo(0), "path": None}, {"bytes": None, "path": "1.jpg"}, None, {"bytes": photo(3), "path": ""}]
    write_shard(tmp_path / "train-0.parquet", [0, 1, 0, 1], cells=cells, group=4)
    images = open_images(str(tmp_path), "train")
    monkeypatch.setattr(parquet, "LARGEST_FILE", len(photo(3)) - 1)
    rows = RowsRead(images, range(0, 4))
    assert rows.span == range(0, 4) and rows.entry(1) == "train-0.parquet/1"
    for row, message in (
        (1, "only the path"),
        (2, "only the path"),
        (3, rf"parquet/3: has {len(photo(3))} bytes, expected"),
    ):
        with pytest.raises(UndecodableImage, match=message):
            rows.read(row)
    monkeypatch.setattr(images, "read", lambda index: (_ for _ in ()).throw(DataError("Stale file handle")))
    assert RowsRead(images, range(0, 4)).span == range(0, 1)  # no row after it is written


def test_stamps(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", [0, 1, 0], group=2)
    images = open_images(str(tmp_path), "train")
    stamps = images.stamps()
    assert stamps.shape == (3, 2) and stamps.dtype == np.int64
    assert set(stamps[:, 1].tolist()) == {(tmp_path / "train-0.parquet").stat().st_mtime_ns}
    assert stamps[0, 0] == stamps[1, 0] > stamps[2, 0] > 0


def test_forked_processes(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", [0, 1] * 3)
    images = open_images(str(tmp_path), "train")
    images.read(0)
    with fork_pool() as pool:
        assert pool.starmap(read_in_child, [(images, i) for i in range(6)]) == [photo(i) for i in range(6)]
    images._store._process, lock = -1, images._store._lock
    with lock:  # as another thread might at the fork
        thread = threading.Thread(target=images.read, args=(0,), daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("packing", ["none", "zstd"])
def test_a_row_that_is_too_large_for_a_photo_is_not_read(tmp_path: Path, monkeypatch, packing: str) -> None:
    """Also one that unpacks to much more than it was packed to, among photos."""
    large = {"bytes": bytes(3 << 20), "path": None}
    photos = [{"bytes": photo(k), "path": None} for k in range(3)]
    cells = [*photos[:2], large] if packing == "none" else [*photos[:2], photos[2], large]
    table = pyarrow.table({"image": cells, "label": [0, 1] + [2] * (len(cells) - 2)})
    path = tmp_path / "train-00000-of-00001.parquet"
    files.write_table(table, path, row_group_size=2, compression=packing)
    for module in (columns, parquet):
        monkeypatch.setattr(module, "LARGEST_FILE", 1 << 20)
    source = open_images(str(tmp_path), "train")
    monkeypatch.setattr(parquet, "_OpenGroup", None)  # no row group is opened
    with pytest.raises(UndecodableImage, match=r"parquet/\d: has 31\d{5} bytes, expected at most 1048576"):
        source.read(len(cells) - 1)


def test_labels_of_any_number_do_not_make_classes(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.parquet", [0, 1 << 40, 1 << 40])
    assert open_images(str(tmp_path), "train").classes == ("0", str(1 << 40))


def test_a_column_of_labels_larger_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "train.parquet", ["x" * 5000, "y"])
    monkeypatch.setattr(columns, "LARGEST_TEXT", 4000)
    with pytest.raises(ConfigError, match=r"its column 'label' has 5\d{3} bytes, expected at most 4000"):
        open_images(str(tmp_path), "train")
