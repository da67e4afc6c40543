"""Parquet shards in the layout of Hugging Face."""

import json
from pathlib import Path

import pytest
from fake_images import check_set, fork_pool, photo, read_in_child

from vitlocal.data.images import open_images, parquet
from vitlocal.data.images.parquet import ParquetImages
from vitlocal.errors import ConfigError


def write_shard(
    path: Path,
    rows: range,
    labels: list[int],
    names: list[str] | None,
    *,
    group: int = 2,
    struct: bool = True,
    **columns,
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    cells = [{"bytes": photo(k), "path": f"{k}.jpg"} for k in rows] if struct else [photo(k) for k in rows]
    table = pyarrow.table({columns.get("image", "image"): cells, columns.get("label", "label"): labels})
    if names is not None:
        features = {
            columns.get("image", "image"): {"_type": "Image"},
            columns.get("label", "label"): {"_type": "ClassLabel", "names": names},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group)


@pytest.mark.parametrize("where", ["", "data/", "own/"])
@pytest.mark.parametrize("names", [["tench", "shark", "dog"], None])
def test_parquet(tmp_path: Path, where: str, names: list[str] | None) -> None:
    if where == "own/":
        shards = ["train/0000.parquet", "train/0001.parquet", "validation/0000.parquet"]
    else:
        shards = [
            f"{where}{n}.parquet" for n in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")
        ]
    write_shard(tmp_path / shards[0], range(0, 5), [0, 1, 2, 0, 1], names)
    write_shard(tmp_path / shards[1], range(5, 8), [2, 2, 0], names)
    write_shard(tmp_path / shards[2], range(8, 11), [1, 0, 1], names)
    train = open_images(str(tmp_path), "train")
    assert isinstance(train, ParquetImages)
    check_set(train, str(tmp_path))
    assert train.classes == (tuple(names) if names else ("0", "1", "2"))
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 2, 0]
    assert [train.read(i) for i in (7, 0, 4, 5, 3)] == [photo(i) for i in (7, 0, 4, 5, 3)]
    assert train.entry(0) == f"{shards[0]}/0" and train.entry(6) == f"{shards[1]}/1"
    val = open_images(str(tmp_path), "val")
    assert val.classes == train.classes and val.labels.tolist() == [1, 0, 1]
    assert val.read(2) == photo(10)


def test_parquet_caches_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "train-0.parquet", range(20), [0, 1] * 10, None)
    source = open_images(str(tmp_path), "train")
    monkeypatch.setattr(parquet, "CACHED_BYTES", 3 * 2 * len(photo(0)))
    for i in range(20):
        assert source.read(i) == photo(i)
    assert 1 <= len(source._groups) <= 3
    first = source._groups[9]
    source.read(18)
    assert source._groups[9] is first


def test_parquet_other_columns(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "train.parquet", range(3), [0, 1, 1], ["a", "b"], struct=False, image="img", label="fine_label"
    )
    source = open_images(str(tmp_path), "train")
    assert source.read(2) == photo(2) and source.classes == ("a", "b")


def test_parquet_in_forked_processes(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", range(6), [0, 1] * 3, None)
    source = open_images(str(tmp_path), "train")
    source.read(0)
    with fork_pool() as pool:
        assert pool.starmap(read_in_child, [(source, i) for i in range(6)]) == [photo(i) for i in range(6)]


def test_parquet_errors(tmp_path: Path) -> None:
    write_shard(tmp_path / "a" / "train-0.parquet", range(2), [0, 1], ["x", "y"])
    with pytest.raises(ConfigError, match=r"no split 'val'.*found 'train'"):
        open_images(str(tmp_path / "a"), "val")
    write_shard(tmp_path / "a" / "val-0.parquet", range(2), [0, 1], ["x", "z"])
    with pytest.raises(ConfigError, match=r"not among the 2 of the split 'train': 'z'"):
        open_images(str(tmp_path / "a"), "val")
    write_shard(tmp_path / "a" / "val-0.parquet", range(2), [0, 1], ["y", "x"])  # ordered differently
    images = open_images(str(tmp_path / "a"), "val")
    assert images.classes == ("x", "y") and images.labels.tolist() == [1, 0]
    write_shard(tmp_path / "b" / "train-0.parquet", range(2), [-1, -1], ["x", "y"])
    with pytest.raises(ConfigError, match=r"labels -1..-1, expected 0..1"):
        open_images(str(tmp_path / "b"), "train")
    write_shard(tmp_path / "c" / "train-0.parquet", range(2), [0, 1], None, label="caption")
    with pytest.raises(ConfigError, match=r"column label.*found 'image', 'caption'"):
        open_images(str(tmp_path / "c"), "train")
    (tmp_path / "d").mkdir()
    whole = (tmp_path / "a" / "train-0.parquet").read_bytes()
    (tmp_path / "d" / "train-0.parquet").write_bytes(whole[:-20])
    with pytest.raises(ConfigError, match=r"not a complete parquet file.*download"):
        open_images(str(tmp_path / "d"), "train")
    write_shard(tmp_path / "e" / "train-0.parquet", range(2), [0, 1], None)
    write_shard(tmp_path / "e" / "val-0.parquet", range(2), [0, 2], None)
    with pytest.raises(ConfigError, match=r"not among the 2 of the split 'train': '2'"):
        open_images(str(tmp_path / "e"), "val")
