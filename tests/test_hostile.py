"""Hostile and damaged data: refused with the file's name, before memory is spent, and without waiting."""

from __future__ import annotations

import io
import json
import os
import runpy
import socket
import struct
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_images import encode_jpeg, make_devkit, make_folder, make_photo, tar_of, write_config
from PIL import EpsImagePlugin, Image

from vitlocal.data import beton
from vitlocal.data.beton import MappedFile
from vitlocal.data.fields import ARRAY, FieldType
from vitlocal.data.images import open_images
from vitlocal.data.images.classes import read_classes
from vitlocal.data.images.image_set import read_file
from vitlocal.data.images.pixels import decode_rgb
from vitlocal.data.images.solutions import find_solution
from vitlocal.data.images.tar_index import _pax_records
from vitlocal.data.manifest import Manifest, load_manifest, manifest_of_file
from vitlocal.data.native import AS_JPEG, FORM, Encoder
from vitlocal.data.sources import open_sources
from vitlocal.data.writer.indexed import write as write_dataset
from vitlocal.data.writer.write import write, write_from_options
from vitlocal.errors import ConfigError, DataError, UndecodableImage, run_command, shown
from vitlocal.report.page import rows_table

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


# --- images ---


def test_no_image_starts_a_program(monkeypatch: pytest.MonkeyPatch):
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr(subprocess, "check_call", lambda *arguments, **_: started.append(arguments))
    with pytest.raises(UndecodableImage, match=r"x\.jpg: .*none of the formats JPEG, PNG"):
        decode_rgb(EPS, "x.jpg")
    image = Image.open(io.BytesIO(EPS))  # as torchvision, or a dataset of a user, does
    with pytest.raises(OSError, match="Ghostscript"):
        image.load()
    assert isinstance(image, EpsImagePlugin.EpsImageFile) and not started


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (1 << 21, 1), (1, 1 << 21), (65_000, 65_000)])
def test_more_pixels_than_photos_have(width: int, height: int):
    with pytest.raises(UndecodableImage, match=r"x\.png: .*too large to decode safely"):
        decode_rgb(png_header(width, height), "x.png")


def test_a_small_progressive_jpeg_that_needs_gigabytes():
    photo = encode_jpeg(make_photo(120, 90), progressive=True)
    size = photo.index(b"\xff\xc2") + 5
    photo = photo[:size] + struct.pack(">HH", 65_000, 65_000) + photo[size + 4 :]
    encoder = Encoder()
    with pytest.raises(ValueError, match="too much memory"):
        encoder.require_whole(photo)
    with pytest.raises(ValueError, match="too much memory"):
        encoder.encode(photo, 65_000, 65_000, np.array([(64, 64, AS_JPEG, 90, 420, 0, 0, 0)], FORM))


def damaged(photo: bytes) -> bytes:
    """A JPEG whose scan ends too early. libjpeg prints a warning about it, and Pillow accepts it."""
    cut = photo.index(b"\xff\xda") + 60
    return photo[:cut] + b"\xff\xd9"


def jpegs() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "plain": encode_jpeg(make_photo(120, 90)),
        "gray": encode_jpeg(make_photo(120, 90, "L")),
        "turned": encode_jpeg(make_photo(120, 90), exif=exif),
        "cmyk": encode_jpeg(make_photo(120, 90, "CMYK")),
    }


@pytest.mark.parametrize("kind", jpegs())
def test_a_damaged_jpeg_is_not_stored(tmp_path: Path, kind: str):
    photo = jpegs()[kind]
    assert decode_rgb(damaged(photo), "x").size in ((120, 90), (90, 120))  # Pillow invents the rest
    rows = [(photo, 0), (damaged(photo), 1)]
    with pytest.raises(DataError, match=r"'train/1'.*damaged JPEG.*premature end"):
        write_dataset(rows, tmp_path / "stop", sides=64, workers=1, progress=False)
    manifest = write_dataset(rows, tmp_path / "skip", sides=64, workers=1, on_error="skip", progress=False)
    assert manifest.count == 1 and "damaged JPEG" in manifest.skipped[0].reason


def test_whole_photos_with_strange_headers_are_stored():
    photo = encode_jpeg(make_photo(120, 90))
    jfif, adobe = photo.index(b"JFIF\0") + 5, b"\xff\xee\0\x0eAdobe" + bytes(6) + b"\x07"
    strange = {
        "revision of JFIF": photo[:jfif] + b"\x09" + photo[jfif + 1 :],
        "colours of Adobe": photo[:2] + adobe + photo[2:],
        "bytes between segments": photo[: jfif + 9] + b"\0\1\2\3" + photo[jfif + 9 :],
        "bytes before the end": photo[:-2] + bytes(9) + photo[-2:],
        "bytes after the end": photo + b"\xff\xd8 preview",
    }
    for what, data in strange.items():
        encoder = Encoder()
        encoder.require_whole(data)
        assert encoder.inspect(data) is not None, what
        assert encoder.encode(data, 90, 120, np.array([(60, 45, AS_JPEG, 90, 420, 0, 0, 0)], FORM)), what


# --- files that are none ---


def odd_files(folder: Path) -> dict[str, str]:
    os.mkfifo(folder / "pipe.jpg")
    os.symlink("/dev/zero", folder / "zeros.jpg")
    os.symlink("loop.jpg", folder / "loop.jpg")
    (folder / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket.jpg"))
    return {"pipe.jpg": "pipe", "zeros.jpg": "device", "loop.jpg": "symbolic links", "folder.jpg": "folder",
            "socket.jpg": "No such device|socket"}  # fmt: skip


def test_pipes_devices_and_links_that_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    for name, kind in odd_files(Path()).items():
        with pytest.raises(DataError, match=rf"{name} cannot be read: .*({kind})"):
            read_file(name)
        with pytest.raises((DataError, ConfigError), match=rf"{name}.*({kind}|does not exist)"):
            MappedFile(Path(name))
    for name in ("pipe.jpg", "zeros.jpg"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            write_dataset([(Path(name), 0)], tmp_path / "out", sides=64, workers=1, progress=False)
        with pytest.raises(ConfigError, match=f"--classes {name} cannot be read"):
            read_classes(name)
        os.rename(name, "train.json")
        with pytest.raises(DataError, match=r"train\.json cannot be read: it is a"):
            load_manifest(".", "train")


def test_a_list_longer_than_memory(tmp_path: Path):
    with open(tmp_path / "train.json", "wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(DataError, match=r"train\.json cannot be read: it has 1099511627776 bytes"):
        Manifest.load(tmp_path / "train.json")


# --- names ---

NAMES = ("caf\udce9", "\x1b[31mred", "\u202egpj")  # not UTF-8, a colour of a terminal, a direction of writing


def test_names_are_shown_safely(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """From writing to the loader and the report's tables."""
    for name in NAMES:
        for split in ("train", "val"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            (tmp_path / "photos" / split / name / f"{name}.jpg").write_bytes(encode_jpeg(make_photo(80, 60)))
        (tmp_path / "photos" / "train" / name / f"{name}2.jpg").write_bytes(b"no image")
        os.symlink("nowhere", tmp_path / "photos" / "train" / name / f"{name}3.jpg")
    options = write_config(tmp_path / "out", source=str(tmp_path / "photos"))
    assert run_command(lambda argv: write_from_options(options)) == 1
    said = capsys.readouterr()
    assert "cannot read the image" in said.err
    assert run_command(lambda argv: write_from_options(replace(options, on_error="skip"))) == 0
    assert run_command(lambda argv: write_from_options(replace(options, split="val"))) == 0
    files = open_sources("native", str(tmp_path / "out"), device=torch.device("cpu"), workers=1)
    assert set(files.train.classes) == set(NAMES) and files.val.count == 3
    files.close()
    page = rows_table(["class"], [[name] for name in NAMES])
    said_too = capsys.readouterr()
    for text in (said.out, said.err, said_too.out, said_too.err, page):
        assert not {"\x1b", "\u202e", "\udce9"} & set(text)
    assert r"\x1b[31mred" in page and r"caf\udce9" in page and "a broken link: " in said.out
    page.encode()


def test_names_of_other_scripts_are_shown_as_they_are():
    for name in ("coq\u00a0!", "10.00\u202fAM.png", "柴犬\u3000子犬", "می\u200cشود", "👩\u200d🌾", "naïve"):
        assert shown(name) == name
    assert shown("a\u200bb\u2028\x9b") == r"a\u200bb\u2028\x9b"


def test_a_class_name_of_two_lines_is_refused(tmp_path: Path):
    make_folder(tmp_path, classes=("ant\nbee", "cow"))
    with pytest.raises(ConfigError, match=r"several lines.*'ant\\nbee'; rename them"):
        open_images(str(tmp_path), "train")


# --- tars ---


def test_a_devkit_whose_file_points_at_itself(tmp_path: Path):
    make_devkit(tmp_path)
    path = next(tmp_path.glob("ILSVRC2012_devkit*"))
    header = bytearray(tar_of({"a": b"", "data/x": b"x" * 600}))
    header[512 + 124 : 512 + 136] = b"-0000001000\0"
    header[512 + 148 : 512 + 156] = b" " * 8
    header[512 + 148 : 512 + 156] = b"%06o\0 " % sum(header[512:1024])
    path.write_bytes(bytes(header))
    with pytest.raises(ConfigError, match=r"ILSVRC2012_devkit.* cannot be read: .*download it again"):
        find_solution(tmp_path, tmp_path)


def test_records_of_pax_take_linear_time():
    assert len(_pax_records(b"".join(b"14 %06d=abc\n" % k for k in range(70_000)))) == 70_000
    for wrong in (b"-9 a=b\n", b"0 a=b\n", b"99 a=b\n", b"6 ab=\n-6 a=b\n"):
        with pytest.raises(ValueError):
            _pax_records(wrong)


@pytest.mark.parametrize("name", ["val_annotations.txt", "LOC_val_solution.csv"])
def test_a_list_with_a_line_without_end(tmp_path: Path, name: str):
    (tmp_path / name).write_text("head\n" + "x" * 200_000 + "\ty\n")
    with pytest.raises(ConfigError, match=rf"{name} is not a list of images and classes"):
        find_solution(tmp_path, tmp_path)


# --- .beton files and manifests ---


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    make_folder(root / "photos")
    write(write_config(root / "data", split="train", source=str(root / "photos")), progress=False)
    return root / "data"


def test_labels_that_would_be_billions_of_classes(written: Path, tmp_path: Path):
    data = bytearray((written / "train_64_raw.beton").read_bytes())
    count = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize
    offset = beton.metadata_type().fields["f1"][1]
    data[count + offset : count + offset + 8] = (1 << 33).to_bytes(8, "little")
    path = tmp_path / "train_64_raw.beton"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train_64_raw\.beton: has a label 8589934592"):
        manifest_of_file(path, "train")
    with pytest.raises(DataError, match=r"has a label 8589934592"):
        load_manifest(str(tmp_path), "train")


def test_a_table_with_holes_larger_than_memory(tmp_path: Path):
    path, count = tmp_path / "holes.beton", 1 << 38
    start = beton.data_start(count)
    head = beton.head_bytes(np.zeros(0, beton.metadata_type()), {}, 1 << 21, start + 24)
    header = np.frombuffer(head, beton.HEADER, 1).copy()
    header["num_samples"] = count
    path.write_bytes(header.tobytes() + head[beton.HEADER.itemsize :])
    try:
        os.truncate(path, start + 24 + 24 * count)
    except OSError:
        pytest.skip("the file system has no files of that length")
    with pytest.raises(DataError, match=r"holes\.beton: needs more memory than there is for its metadata"):
        MappedFile(path)


@pytest.mark.parametrize("text", ['[["", "|O"]]', '[["", "<f8"]]', '[["", "V99999"]]', "[" * 700])
def test_types_of_fields_that_no_writer_makes(text: str):
    arguments = FieldType(ARRAY, np.dtype("<f4"), (2, 2)).arguments
    head = np.zeros(33, "<u8")
    head[:4], head[32] = 1 << 40, len(text)
    arguments[:] = 0
    described = head.tobytes() + text.encode()
    arguments[: len(described)] = np.frombuffer(described, np.uint8)
    with pytest.raises((ValueError, TypeError, RecursionError)):
        FieldType.stored(ARRAY, arguments)


@pytest.mark.parametrize(
    "changes",
    [{"split": "../train"}, {"classes": [1, 2]}, {"files": [{"side": "64"}]}, {"count": "9"}, {"version": []}],
)
def test_manifests_with_values_of_other_types(written: Path, tmp_path: Path, changes: dict):
    content = json.loads((written / "train.json").read_text())
    for name, value in changes.items():
        content[name] = [{**content[name][0], **value[0]}] if name == "files" else value
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"train\.json is damaged"):
        Manifest.load(tmp_path / "train.json")


def test_a_manifest_of_many_brackets(tmp_path: Path):
    (tmp_path / "train.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"train\.json is damaged"):
        Manifest.load(tmp_path / "train.json")


# --- fuzzing ---


def test_mutated_files_are_read_or_refused():
    """The short form of `make fuzz`."""
    parsers = runpy.run_path(str(Path(__file__).parent / "fuzz" / "parsers.py"))
    assert parsers["main"](30) == 0
