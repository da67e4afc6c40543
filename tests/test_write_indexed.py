"""Writing any dataset in Python, with further fields, and reading them again."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_images import commit_often, encode_jpeg, make_photo
from PIL import Image
from torch.utils.data import Subset

import vitlocal
from vitlocal.data.beton import MappedFile
from vitlocal.data.manifest import Manifest
from vitlocal.errors import ConfigError, DataError

compiled: list[Any] = []  # loaders of FFCV stay alive, because numba fails in a finalizer if it frees their code
FIELDS = {"weight": "float", "number": "int", "vector": ("float32", (3,)), "caption": "json", "blob": "bytes"}


def rows(count: int = 12) -> list[tuple[Any, ...]]:
    """Images with labels and a value of each field."""
    return [
        (
            make_photo(40 + row, 30),
            row % 3,
            row / 7,
            -row,
            np.arange(3, dtype=np.float32) * row,
            {"text": "ä" * row},
            bytes(range(row)),
        )
        for row in range(count)
    ]


def stored_pixels(path: Path, row: int) -> np.ndarray:
    file = MappedFile(path)
    found = file.rows[row]
    height, width = int(found["height"]), int(found["width"])
    return file.bytes[int(found["offset"]) :][: height * width * 3].reshape(height, width, 3)


def write(dataset: Any, out: Path, **options: Any) -> Manifest:
    return vitlocal.write(dataset, out, **{"sides": "64:raw", "workers": 2, "progress": False, **options})


def test_every_kind_of_image_is_stored_with_its_pixels(tmp_path: Path):
    photo = make_photo(50, 40)
    pixels = np.asarray(photo)
    photo.save(tmp_path / "a.png")
    png = (tmp_path / "a.png").read_bytes()
    kinds = {
        "path": tmp_path / "a.png", "text": str(tmp_path / "a.png"), "bytes": png, "pil": photo, "array": pixels,
        "tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1), "file": Image.open(tmp_path / "a.png"),
        "hugging face": {"bytes": png, "path": None}, "and its path": {"bytes": None, "path": str(tmp_path / "a.png")},
    }  # fmt: skip
    manifest = write([(image, name) for name, image in kinds.items()], tmp_path / "out")
    assert manifest.classes == tuple(sorted(kinds)) and manifest.count == len(kinds)
    for row in range(len(kinds)):
        assert np.array_equal(stored_pixels(tmp_path / "out" / "train_64_raw.beton", row), pixels)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, list])
def test_rows_may_be_images_alone_if_labels_are_given(tmp_path: Path, kind: Callable):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 3), np.uint8)
    images = [Image.fromarray(each) for each in pixels] if kind is list else kind(pixels)
    images = images.permute(0, 3, 1, 2) if kind is torch.from_numpy else images
    write(images, tmp_path, labels=[0, 1])
    for row in range(2):
        assert np.array_equal(stored_pixels(tmp_path / "train_64_raw.beton", row), pixels[row])


def test_jpegs_are_kept(tmp_path: Path):
    jpeg = encode_jpeg(make_photo(50, 40))
    write([{"image": jpeg, "label": 0}], tmp_path, sides=[64], format="jpg")
    assert jpeg in (tmp_path / "train_64_jpg.beton").read_bytes()


def test_labels_and_classes_come_from_the_dataset(tmp_path: Path):
    class Targets(list):
        targets, classes = [2, 0], ["a", "b", "c"]

        def __getitem__(self, index):
            raise AssertionError("the labels are known without the rows")

    dataset = Targets([(make_photo(9, 9), 7), (make_photo(9, 9), 7)])

    class Column(list):
        column_names = ["image", "fine_label"]
        features = {"fine_label": SimpleNamespace(names=["cat", "dog"])}

        def __getitem__(self, index):
            return [1, 0] if index == "fine_label" else super().__getitem__(index)

    from vitlocal.data.images.indexed import IndexedImages

    assert IndexedImages(dataset, "train").classes == ("a", "b", "c")
    assert IndexedImages(dataset, "train").labels.tolist() == [2, 0]
    column = IndexedImages(Column([{"image": 0}, {"image": 1}]), "train", label="fine_label")
    assert column.labels.tolist() == [1, 0] and column.classes == ("cat", "dog")
    subset = Subset(Targets(), [])
    assert IndexedImages(subset, "train").classes == ("a", "b", "c")
    given = IndexedImages([(0, 5)], "train", labels=np.array([1]), classes=["x", "y"])
    assert given.labels.tolist() == [1] and given.classes == ("x", "y")


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "dataset: got list, expected rows"),
        ([(make_photo(4, 4), -1)], {}, "labels: got -1 in row 0, expected whole numbers from 0, or names"),
        ([(make_photo(4, 4), 0.5)], {}, "labels: got 0.5"),
        ([(make_photo(4, 4), 0), (make_photo(4, 4), None)], {}, "labels: got None in row 1"),
        ([(make_photo(4, 4), 2**70)], {}, "labels: got"),
        ([(make_photo(4, 4), 3_000_000)], {}, "name them with classes="),
        ([(make_photo(4, 4), 0)], {"workers": -1}, "workers: got -1"),
        ([(make_photo(4, 4), 0)], {"classes": ["a", "a"]}, "classes: expected a list of different names"),
        ([(make_photo(4, 4), 0)], {"classes": [3, 4]}, "classes: expected a list of different names"),
        ({1: (make_photo(4, 4), 0)}, {}, "row 0 of the dataset does not exist"),
        ([(make_photo(4, 4), 0, [300])], {"fields": {"a": ("int8", (1,))}}, "expected int8 of shape"),
        ([(make_photo(4, 4), 0, 5)], {"fields": {"a": "bytes"}}, "fields: 'a' of row 0"),
        ([(make_photo(4, 4), 0)], {"fields": {"a": "f4"}}, "fields: 'a' has the type 'f4'"),
        ([(make_photo(4, 4), 0)], {"fields": {"a": ("U5", (2,))}}, "fields: 'a' has the type"),
        ([(make_photo(1500, 1500), 0, bytes(3 << 20))], {"fields": {"a": "bytes"}, "sides": "1600:raw"}, "no room for"),
        ([(make_photo(4, 4), "c")], {"classes": ["a"]}, "the label 'c' is not among"),
        ([(make_photo(4, 4), 3)], {"classes": ["a"]}, "got 1 names, but labels up to 3"),
        ([(make_photo(4, 4), 0)], {"labels": [0, 1]}, "labels: got 2, expected one for each of the 1 rows"),
        ([{"picture": 0, "label": 0}], {}, "'picture', 'label'; expected 'image'"),
        (np.zeros((2, 8, 8, 3), np.uint8), {}, r"row 0 of the dataset is an image \(ndarray\).*labels="),
        ([(make_photo(4, 4), 0)], {"fields": {"a": "float"}}, "row 0 of the dataset is tuple; expected 'a'"),
        ([(make_photo(4, 4), 0, "x")], {"fields": {"a": "float"}}, "fields: 'a' of row 0: could not convert"),
        ([(make_photo(4, 4), 0, [1, 2])], {"fields": {"a": ("f4", (3,))}}, "expected float32 of shape"),
        ([(make_photo(4, 4), 0)], {"fields": {"a": "text"}}, "fields: 'a' has the type 'text', expected int, float"),
        ([(make_photo(4, 4), 0)], {"fields": {"label": "int"}}, "fields: got the name 'label'"),
        ([(make_photo(4, 4), 0)], {"split": "test"}, "split: got 'test'"),
        ([(make_photo(4, 4), 0)], {"sides": [0]}, "--sides '0'"),
    ],
)
def test_wrong_datasets_and_arguments_are_named(tmp_path: Path, dataset: Any, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        write(dataset, tmp_path / "out", **options)


def test_damaged_images_stop_or_are_skipped(tmp_path: Path):
    dataset = [(make_photo(30, 20), 0), (b"not an image", 1), (np.zeros((4, 4, 2), np.uint8), 1)]
    with pytest.raises(DataError, match="'train/1' of a dataset in Python"):
        write(dataset, tmp_path)
    manifest = write(dataset, tmp_path, on_error="skip")
    assert manifest.count == 1 and [image.entry for image in manifest.skipped] == ["train/1", "train/2"]


def check_fields(found: dict[str, Any], ids: list[int]) -> None:
    expected = [rows()[row][2:] for row in ids]
    for place, name in enumerate(FIELDS):
        values = [value[place] for value in expected]
        if isinstance(found[name], torch.Tensor):
            assert torch.equal(found[name], torch.tensor(np.array(values)))
        else:
            assert list(found[name]) == values


def test_fields_are_read_by_the_loader(tmp_path: Path):
    manifest = write(rows(), tmp_path, sides="32:raw,64:jpg", fields=FIELDS)
    assert manifest.source.fields["vector"] == "float32 [3]"
    with vitlocal.Loader(tmp_path, "train", 5, 16, fields=list(FIELDS), return_ids=True, num_workers=1) as loader:
        for _, _, *values, ids in itertools.chain(loader, loader):
            check_fields(dict(zip(FIELDS, values, strict=True)), ids.tolist())
    with vitlocal.Loader(tmp_path, "train", 5, 16, fields=["caption"], num_workers=1) as loader:
        assert all("text" in caption for _, _, captions in loader for caption in captions)


def test_a_batch_without_images_has_no_values(tmp_path: Path):
    """The last batch of a split may leave nothing for some processes."""
    manifest = write(rows(), tmp_path, sides="16:raw", fields=FIELDS, classes=np.array(["a", "b", "c", "d"]))
    assert manifest.classes[1] == "b"
    options = dict(fields=list(FIELDS), drop_last=False, num_workers=1, rank=1, world_size=len(rows()) - 1)
    with vitlocal.Loader(tmp_path, "train", 1, 16, **options) as loader:
        *_, (images, _, *values) = loader
    assert len(images) == 0 and [len(value) for value in values] == [0] * len(FIELDS)


def test_an_interrupted_write_with_fields_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit_often(monkeypatch.setattr)
    write(rows(40), tmp_path / "whole", fields=FIELDS)

    class Failing(list):
        def __getitem__(self, index):
            if index == 33:
                raise OSError(5, "the disk failed")
            return super().__getitem__(index)

    labels = [row[1] for row in rows(40)]
    with pytest.raises(DataError, match="the disk failed"):
        write(Failing(rows(40)), tmp_path / "out", fields=FIELDS, labels=labels)
    with pytest.raises(ConfigError, match="another configuration .*further fields"):
        write(rows(40), tmp_path / "out", labels=labels)
    write(rows(40), tmp_path / "out", fields=FIELDS, labels=labels)
    name = "train_64_raw.beton"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ConfigError, match="another configuration .*further fields"):
        write(rows(40), tmp_path / "out")


@pytest.mark.ffcv
def test_ffcv_reads_our_fields(tmp_path: Path):
    from ffcv.fields import JSONField
    from ffcv.loader import Loader, OrderOption

    from vitlocal.data.peers import crop_decoder  # noqa: F401  it imports ffcv without warnings

    write(rows(), tmp_path, fields=FIELDS)
    loader = Loader(
        str(tmp_path / "train_64_raw.beton"), batch_size=12, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=True,
        custom_fields={}, pipelines={"image": None},
    )  # fmt: skip
    compiled.append(loader)
    labels, weights, numbers, vectors, captions, blobs = next(iter(loader))
    assert labels.flatten().tolist() == [row[1] for row in rows()]
    found = {"weight": torch.as_tensor(weights).flatten(), "number": torch.as_tensor(numbers).flatten()}
    found["vector"], found["caption"] = torch.as_tensor(vectors), JSONField.unpack(captions)
    found["blob"] = [bytes(np.asarray(blobs[row])[:row]) for row in range(12)]  # FFCV pads them
    check_fields(found, list(range(12)))


@pytest.mark.ffcv
def test_we_read_fields_of_ffcv(tmp_path: Path):
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        "photo": RGBImageField(write_mode="raw"), "class": IntField(), "weight": FloatField(), "number": IntField(),
        "vector": NDArrayField(np.dtype("float32"), (3,)), "caption": JSONField(), "blob": BytesField(),
    }  # fmt: skip
    dataset = [
        (np.asarray(row[0]), *row[1:-1], np.frombuffer(row[-1], np.uint8)) for row in rows() if len(row[-1])
    ]  # FFCV's writer fails on no bytes
    DatasetWriter(str(tmp_path / "a.beton"), fields, num_workers=2).from_indexed_dataset(dataset)
    loader = vitlocal.Loader(
        tmp_path / "a.beton", batch_size=11, size=16, fields=list(FIELDS), return_ids=True, num_workers=1
    )
    ((_, labels, *values, ids),) = loader
    assert labels.tolist() == [dataset[row][1] for row in ids.tolist()]
    check_fields(dict(zip(FIELDS, values, strict=True)), [row + 1 for row in ids.tolist()])
    loader.close()
    whole = (tmp_path / "a.beton").read_bytes()
    (tmp_path / "b.beton").write_bytes(whole[:-24])
    with pytest.raises(DataError, match=r"b.beton: cut off"):
        MappedFile(tmp_path / "b.beton")
