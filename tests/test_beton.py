"""Checking .beton files and manifests."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from fake_images import FakeImages, write_config

from vitlocal.data import beton
from vitlocal.data.beton import MappedFile
from vitlocal.data.manifest import Manifest
from vitlocal.data.writer.write import write
from vitlocal.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("frequent_commits")


def test_a_truncated_file_is_detected(tmp_path: Path, reference: dict[str, bytes]) -> None:
    path = tmp_path / "cut.beton"
    for name in ("train_64_raw.beton", "train_96_jpg.beton"):
        data = reference[name]
        cuts = {*range(40), *range(len(data) - 60 * 24 - 3, len(data)), *range(0, len(data), 4999)}
        path.write_bytes(data)
        for cut in sorted(cuts, reverse=True):
            os.truncate(path, cut)
            with pytest.raises(DataError, match=r"cut.beton: .*(cut off|expected|no images).*write the split again"):
                MappedFile(path)
        path.write_bytes(data + b"\0")
        with pytest.raises(DataError, match=r"damaged"):
            MappedFile(path)


def test_damaged_and_foreign_files(tmp_path: Path, reference: dict[str, bytes]) -> None:
    data = np.frombuffer(reference["train_64_raw.beton"], np.uint8)
    path = tmp_path / "bad.beton"
    metadata_at = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize
    table_at = len(data) - 60 * 24
    for at, value in (
        (0, 3),  # version
        (2, 1),  # fields
        (4, 7),  # page size
        (8, 61),  # samples
        (beton.HEADER.itemsize, 3),  # type of a field
        (metadata_at, 2),  # mode
        (metadata_at + 2, 77),  # width
        (metadata_at + 5, data[metadata_at + 5] ^ 1),  # pointer
        (metadata_at + 17, 1),  # label
        (table_at + 15, 255),  # pointer, near 2^64
        (table_at + 16, data[table_at + 16] ^ 1),  # size
        (table_at + 23, 255),  # size, near 2^64
    ):
        changed = data.copy()
        changed[at] = value
        path.write_bytes(changed.tobytes())
        with pytest.raises(DataError, match=r"bad.beton: .*write the split again"):
            MappedFile(path, classes=3)
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(DataError, match=r"not a .beton file"):
        MappedFile(path)
    with pytest.raises(DataError, match=r"does not exist"):
        MappedFile(tmp_path / "none.beton")


def test_a_million_rows_are_checked(tmp_path: Path) -> None:
    count = 1_280_000
    rng, start = np.random.default_rng(0), beton.data_start(count)
    metadata, table = np.zeros(count, beton.metadata_type()), np.zeros(count, beton.ALLOCATION)
    metadata["f0"]["mode"], metadata["f0"]["width"], metadata["f0"]["height"] = beton.RAW, 2, 1
    metadata["f0"]["data_ptr"] = start + 8 * np.arange(count)
    order = rng.permutation(count)
    table["sample_id"], table["ptr"], table["size"] = order, metadata["f0"]["data_ptr"][order], 6
    path = tmp_path / "many.beton"
    with open(path, "wb") as file:
        file.write(beton.head_bytes(metadata, beton.NO_FIELDS, 1 << 21, start + 8 * count))
        file.seek(start + 8 * count)
        file.write(table.tobytes())
    assert len(MappedFile(path).rows) == count


def test_wrong_manifests(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.json does not exist.*write_dataset.py --split train"):
        Manifest.load(tmp_path / "train.json")
    write(write_config(tmp_path), FakeImages(4), progress=False)
    path = tmp_path / "train.json"
    text = path.read_text()
    content = json.loads(text)
    path.write_text(json.dumps({**content, "version": 2, "other": 1}))
    with pytest.raises(DataError, match=r"version 2 of a newer vitlocal"):
        Manifest.load(path)
    wrong = [text[:-20], "[]", "{}", '{"version": "1"}', "\x00", ""]
    for change in (
        {"count": 5},
        {"entries": None},
        {"entries": "abc"},
        {"files": []},
        {"files": [3]},
        {"files": [{**content["files"][0], "side": None}]},
        {"files": [{**content["files"][0], "file": "../x.beton"}]},
        {"source": None},
        {"source": {**content["source"], "length": 9}},
        {"count": True},
    ):
        wrong.append(json.dumps({**content, **change}))
    for damaged in wrong:
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"train.json is damaged: .*write the split again"):
            Manifest.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"damaged"):
        Manifest.load(path)
