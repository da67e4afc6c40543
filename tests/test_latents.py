"""Latents in .beton files: the writer with a stand-in for the autoencoder, the check, and the source."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_images import FakeImages, area_mean, contents, finished_names, make_photo
from latent_files import Pair, StandIn, options, stored, use_stand_in
from PIL import Image

import vitlocal
from vitlocal.data.batch import Source
from vitlocal.data.beton import MappedFile
from vitlocal.data.crops import centre_squares
from vitlocal.data.loader import Loader
from vitlocal.data.manifest import Manifest
from vitlocal.data.shares import WHOLE, Share
from vitlocal.data.sources import open_sources
from vitlocal.data.writer.verify import verify
from vitlocal.data.writer.write import parse_files, write
from vitlocal.errors import ConfigError, DataError
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.write_dataset import main

CPU = torch.device("cpu")
ROWS, SIDES = 60, (16, 32)
compiled: list[object] = []  # loaders of FFCV stay alive, because numba fails in a finalizer if it frees their code


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch.setattr)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of latents of the stand-in: 60 rows of train, 20 of val."""
    out = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        use_stand_in(patch.setattr)
        write(options(out), FakeImages(ROWS), progress=False)
        write(options(out, "val"), FakeImages(20), progress=False)
    return out


# --- the crop ---


def adm_square(image: Image.Image, side: int) -> np.ndarray:
    """The crop of one side alone, step by step."""
    while min(image.size) >= 2 * side:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    width, height = (round(edge * side / min(image.size)) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("size", [(70, 50), (64, 64), (300, 41), (20, 33), (9, 270), (1, 90), (517, 389)])
def test_squares_of_several_sides_are_those_of_each_alone(size: tuple[int, int]):
    photo = make_photo(*size)
    for side, square in zip((64, 16, 32, 8), centre_squares(photo, (64, 16, 32, 8)), strict=True):
        assert square.shape == (side, side, 3) and square.dtype == np.uint8
        assert np.array_equal(square, adm_square(photo, side))


def test_the_longest_panorama_takes_little_memory():
    narrow = Image.new("RGB", (60_000, 1), (9, 80, 200))
    assert (centre_squares(narrow, [256])[0] == (9, 80, 200)).all()


def test_halving_is_the_mean_of_pixels():
    photo = make_photo(64, 64)
    (square,) = centre_squares(photo, [32])
    assert np.abs(square - area_mean(np.asarray(photo), (32, 32))).max() <= 1


# --- the files ---


def test_both_mirrors_of_each_photo_are_stored(written: Path):
    """With the results of the row's place in its call: the plain photos of a call come first, then the mirrored."""
    manifest, encoder = Manifest.load(written / "train.json"), StandIn("vae")
    assert manifest.latents is not None and manifest.latents.autoencoder == "digest of vae"
    assert (manifest.latents.channels, manifest.latents.stride, manifest.latents.scaling_factor) == (2, 8, 0.5)
    for file, rows in zip(manifest.files, (8, 2), strict=True):  # rows of a call
        assert file.file == f"train_{file.side}_latent.beton" and file.format == "latent"
        plain, mirrored = stored(written / file.file)
        photos = [centre_squares(FakeImages(ROWS).load(row), [file.side])[0] for row in range(ROWS)]
        photos += [np.zeros_like(photos[0])] * (-ROWS % rows)
        for first in range(0, ROWS, rows):
            part = np.stack(photos[first : first + rows])
            expected = encoder.encode(np.concatenate([part, part[:, :, ::-1]])).numpy().astype(np.float16)
            mine = slice(first, min(first + rows, ROWS))
            count = mine.stop - first
            assert np.array_equal(plain[mine], expected[:count])
            assert np.array_equal(mirrored[mine], expected[rows : rows + count])
    assert MappedFile(written / "train_16_latent.beton", 3).labels.tolist() == (np.arange(ROWS) % 3).tolist()


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path, written: Path, stand_in: None, workers: int):
    write(options(tmp_path, workers=workers), FakeImages(ROWS), progress=False)
    for name, data in contents(tmp_path).items():
        assert data == (written / name).read_bytes(), name


def write_with_stand_in(images: FakeImages, out: Path) -> None:
    use_stand_in()
    write(options(out), images, progress=False)


def test_killed_and_continued(tmp_path: Path, written: Path, stand_in: None):
    for row in (13, 59):  # each write continues the one before
        arguments = FakeImages(ROWS, acts={row: "SIGKILL"}), tmp_path
        child = multiprocessing.get_context("forkserver").Process(target=write_with_stand_in, args=arguments)
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL and finished_names(tmp_path) == []
    again = FakeImages(ROWS, acts={0: "bug", 30: "bug"})  # these rows are not encoded again
    write(options(tmp_path), again, progress=False)
    for name, data in contents(tmp_path).items():
        assert data == (written / name).read_bytes(), name


def test_damaged_photos_are_left_out_and_tried_again(tmp_path: Path, written: Path, stand_in: None):
    damaged = (0, 9, *range(24, 32), 59)  # a whole block among them
    images = FakeImages(ROWS, acts=dict.fromkeys(damaged, "unreadable"))
    with pytest.raises(DataError, match="ant/0.png.*--on-error skip"):
        write(options(tmp_path), images, progress=False)
    manifest = write(options(tmp_path, on_error="skip"), images, progress=False)
    kept = np.delete(np.arange(ROWS), damaged)
    assert manifest.count == len(kept) and len(manifest.skipped) == len(damaged)
    for side in SIDES:
        name = f"train_{side}_latent.beton"
        for mine, others in zip(stored(tmp_path / name), stored(written / name, kept), strict=True):
            assert np.array_equal(mine, others)
    write(options(tmp_path, on_error="skip"), FakeImages(ROWS), progress=False)
    assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_values_that_float16_cannot_hold_stop_the_write(tmp_path: Path, stand_in: None, monkeypatch):
    monkeypatch.setattr(StandIn, "encode", lambda self, images: torch.full((len(images), 4, 2, 2), 1e6))
    with pytest.raises(DataError, match=r"'ant/0.png' at 16 px has values that float16 cannot hold"):
        write(options(tmp_path, sides="16"), FakeImages(9), progress=False)
    assert finished_names(tmp_path) == []


def test_any_dataset_with_further_fields(tmp_path: Path, stand_in: None):
    rows = [(make_photo(40 + row, 30), row % 3, bytes(range(row)), row / 7) for row in range(12)]
    fields = {"blob": "bytes", "weight": "float"}
    vitlocal.write(rows, tmp_path, sides="16,32", format="latent", vae="vae", fields=fields, progress=False)
    file = MappedFile(tmp_path / "train_32_latent.beton", 3)
    assert file.values("blob", np.arange(12)) == [row[2] for row in rows]
    assert file.values("weight", np.arange(12)).tolist() == [row[3] for row in rows]
    assert not (tmp_path / "train.costs.json").exists()
    large = [(*rows[0][:2], bytes(9 << 20), 0.0)]  # a page has 8 MiB
    with pytest.raises(ConfigError, match="further fields have 9437184 bytes, which a page has no room for"):
        vitlocal.write(large, tmp_path / "c", sides="16", format="latent", vae="vae", fields=fields, progress=False)
    with pytest.raises(ConfigError, match="'latent' is the name of the latents"):
        vitlocal.write(
            rows, tmp_path / "b", format="latent", vae="vae", fields={"latent": "bytes", "weight": "float"},
            progress=False,
        )  # fmt: skip


def test_sides_and_formats():
    assert parse_files("train", "auto", "latent") == tuple((side, "latent") for side in (64, 128, 192, 256))
    assert (
        parse_files("val", "64,32", "latent")
        == parse_files("val", "32:latent,64:latent")
        == ((32, "latent"), (64, "latent"))
    )
    with pytest.raises(ConfigError, match="names photos and latents.*two --out"):
        parse_files("train", "64:raw,256:latent")


def test_wrong_options_are_refused(tmp_path: Path, written: Path, folder: Path, stand_in: None):
    def refused(message: str, out: Path = tmp_path, **changes: object) -> None:
        with pytest.raises(ConfigError, match=message):
            write(options(out, **changes), FakeImages(ROWS), progress=False)

    refused("needs the folder of an autoencoder: --vae FOLDER", vae=None)
    refused("--vae vae has no effect on photos", format="raw")
    refused(r"multiples of 8 px.*got \[20\]", sides="16,20")
    refused("of the autoencoder digest of vae, and this split of.*digest of other", written, vae="other")
    refused("either photos or latents of one autoencoder: .*val.json is of photos.*Use another --out", folder)
    os.makedirs(tmp_path / "b")
    shutil.copy(written / "train.json", tmp_path / "b")
    refused("of the autoencoder digest of vae, and this split of.*digest of new. Use another --out", tmp_path / "b",
            split="val", vae="new")  # fmt: skip
    refused("of latents of the autoencoder digest of vae, and this split of photos", tmp_path / "b", split="val",
            vae=None, format="raw")  # fmt: skip
    before = contents(written)
    (tmp_path / "b" / "train.json").unlink()
    for split in ("val", "train"):
        write(options(tmp_path / split, split), FakeImages(ROWS), progress=False)
        refused("autoencoder: 'digest of vae' there, 'digest of new' wanted", tmp_path / split, split=split, vae="new")
    assert write(options(written), FakeImages(ROWS), progress=False) and contents(written) == before  # already finished


def test_the_command(tmp_path: Path, stand_in: None, capsys: pytest.CaptureFixture[str]):
    for split in ("train", "val"):
        main(
            [f"--split={split}", "--source=sample:1", f"--out={tmp_path}", "--sides=16", "--format=latent", "--vae=a/b"]
        )
    main(["--split=train", f"--out={tmp_path}", "--verify", "--vae=a/b"])
    assert "20 images of 20 classes in 1 file" in capsys.readouterr().out
    assert finished_names(tmp_path) == ["train.json", "train_16_latent.beton", "val.json", "val_16_latent.beton"]


def test_an_interrupted_write_of_another_autoencoder_is_refused(tmp_path: Path, stand_in: None):
    with pytest.raises(DataError):
        write(options(tmp_path), FakeImages(ROWS, acts={40: "absent"}), progress=False)
    with pytest.raises(ConfigError, match="interrupted write.*'digest of vae' there, 'digest of other' wanted"):
        write(options(tmp_path, vae="other"), FakeImages(ROWS), progress=False)


# --- verify ---


def test_verify_finds_damage(tmp_path: Path, written: Path, capsys: pytest.CaptureFixture[str]):
    data = Path(shutil.copytree(written, tmp_path / "data"))
    verify(str(data), "train", workers=1)
    assert "120 images in 2 files, no damage found" in capsys.readouterr().out
    path = data / "train_32_latent.beton"
    whole, at = bytearray(path.read_bytes()), int(MappedFile(path).rows["offset"][7])
    path.write_bytes(whole[: at + 5] + bytes([whole[at + 5] ^ 1]) + whole[at + 6 :])
    with pytest.raises(DataError, match="train_32_latent.beton: checksum"):
        verify(str(data), "train", workers=1)
    path.write_bytes(whole[: at + 6] + b"\0\x7e" + whole[at + 8 :])
    with pytest.raises(DataError, match=r"row 7 \(bee/7.png\) has a value that is not finite"):
        verify(str(data), "train", workers=1)
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"train_32_latent.beton: (cut off|damaged)"):
        verify(str(data), "train", workers=1)
    shutil.copy(data / "train_16_latent.beton", path)
    with pytest.raises(DataError, match=r"holds int16 \[2, 4, 2, 2\], the manifest says int16 \[2, 4, 4, 4\]"):
        verify(str(data), "train", workers=1)


def test_verify_encodes_a_sample_again(tmp_path: Path, stand_in: None, folder: Path, capsys):
    write(options(tmp_path, source="sample:1"), progress=False)
    verify(str(tmp_path), "train", workers=1, vae="vae")
    assert "16 rows of each encoded again" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match="digest of other, and the latents in .* are of the autoencoder digest of vae"
    ):
        verify(str(tmp_path), "train", workers=1, vae="other")
    with pytest.raises(ConfigError, match="has no effect"):
        verify(str(folder), "train", workers=1, vae="vae")
    path = tmp_path / "train_32_latent.beton"
    data, (first, second) = bytearray(path.read_bytes()), MappedFile(path).rows[:2]
    at, other, size = (int(value) for value in (first["offset"], second["offset"], first["bytes"]))
    data[at : at + size] = data[other : other + size]
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"row 0 \(train/arrow/0\) is not the latent of its photo"):
        verify(str(tmp_path), "train", workers=1, vae="vae")


# --- the source ---


def opened(root: Path, share: Share = WHOLE, **changes: object) -> tuple[Source, Source]:
    sources = open_sources("native", str(root), device=CPU, share=share, latents=True, **{"seed": 3, **changes})
    return sources.train, sources.val


def read(source: Source, feed: Feed, at: Position = Position(), **more: bool) -> list[dict[str, object]]:  # noqa: B008
    with source.open(feed, at, **more) as batches:
        return [
            {"images": batch.images.clone(), "labels": batch.labels, "ids": batch.ids, "places": batch.places,
             "total": batch.total}
            for batch in batches
        ]  # fmt: skip


def joined(batches: list[dict[str, object]], name: str) -> torch.Tensor:
    return torch.cat([torch.as_tensor(batch[name]) for batch in batches])


def mirrored_of(batches: list[dict[str, object]], pair: Pair) -> np.ndarray:
    """Whether each latent is the mirrored one, (n,) bool, by row number. Each must be one of the two of its row."""
    ids, images = joined(batches, "ids").numpy(), joined(batches, "images").numpy()
    plain, mirrored = ((images == half[ids]).all((1, 2, 3)) for half in pair)
    assert (plain ^ mirrored).all()
    return mirrored[np.argsort(ids)]


@pytest.mark.parametrize("side", SIDES)
def test_every_row_comes_once_with_its_label(written: Path, side: int):
    train, _ = opened(written)
    assert train.latents is not None and train.side == 32
    batches = read(train, Feed(side, 16), Position(2))
    assert [len(batch["ids"]) for batch in batches] == [16, 16, 16, 12]
    images = joined(batches, "images")
    assert images.shape == (ROWS, 4, side // 8, side // 8) and images.dtype == torch.float16
    ids = joined(batches, "ids")
    assert ids.tolist() != list(range(ROWS)) and sorted(ids.tolist()) == list(range(ROWS))
    assert joined(batches, "labels").dtype == torch.int64 and torch.equal(joined(batches, "labels"), ids % 3)
    flips = mirrored_of(batches, stored(written / f"train_{side}_latent.beton"))
    assert 15 < flips.sum() < 45


def test_mirrors_depend_on_seed_epoch_and_row_alone(written: Path):
    pair = stored(written / "train_16_latent.beton")
    train, val = opened(written)
    first = mirrored_of(read(train, Feed(16, 16)), pair)
    assert np.array_equal(first, mirrored_of(read(train, Feed(16, 7)), pair))
    larger = mirrored_of(read(train, Feed(32, 16)), stored(written / "train_32_latent.beton"))
    assert np.array_equal(first, larger)
    assert not np.array_equal(first, mirrored_of(read(train, Feed(16, 16), Position(1)), pair))
    assert not np.array_equal(first, mirrored_of(read(opened(written, seed=4)[0], Feed(16, 16)), pair))
    for flip in (0.0, 1.0):
        train, val = opened(written, flip=flip)
        assert (mirrored_of(read(train, Feed(16, 16)), pair) == flip).all()
        batches = read(val, Feed(32, 16))
        assert joined(batches, "ids").tolist() == list(range(20))
        assert not mirrored_of(batches, stored(written / "val_32_latent.beton")).any()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_each_batch(written: Path, world: int):
    whole = read(opened(written)[0], Feed(32, 16), Position(1, 5))
    parts = [read(opened(written, Share(rank, world))[0], Feed(32, 16), Position(1, 5)) for rank in range(world)]
    assert [len(batch["ids"]) for batch in whole] == [16, 16, 16, 7]
    for batch, *mine in zip(whole, *parts, strict=True):
        places = np.concatenate([part["places"] for part in mine])
        assert sorted(places.tolist()) == list(range(batch["total"])) and {part["total"] for part in mine} == {
            len(places)
        }
        for name in ("images", "labels", "ids"):
            assert torch.equal(joined(mine, name), batch[name][places])


def test_positions_subsets_and_last_batches(written: Path):
    train, _ = opened(written)
    whole, rest = read(train, Feed(16, 10), Position(1)), read(train, Feed(16, 10), Position(1, 20))
    assert torch.equal(joined(whole[2:], "images"), joined(rest, "images"))
    assert len(read(train, Feed(16, 16), drop_last=True)) == 3
    train.rows.set(7, np.arange(0, ROWS, 3))
    part = read(train, Feed(16, 16, subset=7))
    assert sorted(joined(part, "ids").tolist()) == list(range(0, ROWS, 3))


def test_a_source_serves_its_own_sides_only(written: Path, folder: Path, shared):
    train, val = opened(written)
    train.check_size(32)
    with pytest.raises(
        ConfigError, match=r"no latents of 24 px for the split 'train', only of 16, 32 px.*--sides 16,24,32"
    ):
        train.check_size(24)
    with pytest.raises(ConfigError, match="no latents of 8 px for the split 'val'"):
        read(val, Feed(8, 4))
    photos = Loader(folder, "train", 16, resources=shared)
    photos.check_size(1000)
    assert photos.latents is None


def test_damaged_files_do_not_open_or_can_be_read(written: Path, tmp_path: Path):
    whole, path = (written / "train_16_latent.beton").read_bytes(), tmp_path / "train_16_latent.beton"
    head, rng, opened_anyway = 4096, np.random.default_rng(0), 0
    for place in [*rng.integers(0, head, 60), *rng.integers(len(whole) - 24 * ROWS, len(whole), 60)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
        try:
            plain, _ = stored(path)
        except DataError as error:
            assert "train_16_latent.beton" in str(error)
            continue
        opened_anyway += 1  # for example, a byte between head and data, or a label, has changed
        assert plain.shape[0] == ROWS
    assert 0 < opened_anyway < 100
    for end in (10, 3000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match="cut off|damaged"):
            stored(path)


def test_other_loaders_and_folders_are_refused(written: Path, folder: Path, shared, tmp_path: Path):
    with pytest.raises(ConfigError, match="got torchvision, which reads photos.*data.loader=native"):
        open_sources("torchvision", str(written), device=CPU, latents=True)
    with pytest.raises(ConfigError, match="holds photos, and latents are needed.*--format latent --vae FOLDER"):
        opened(folder)
    for root in (written, written / "train_16_latent.beton"):
        with pytest.raises(ConfigError, match="holds latents, and photos are needed"):
            Loader(root, "train", 16, resources=shared)
    data = Path(shutil.copytree(written, tmp_path / "data"))
    manifest = json.loads((data / "val.json").read_text())
    (data / "val.json").write_text(json.dumps(manifest | {"latents": manifest["latents"] | {"autoencoder": "another"}}))
    with pytest.raises(ConfigError, match=r"different latents.*digest of vae.*another.*the same --vae"):
        opened(data)
    (data / "val.json").write_text(json.dumps({name: value for name, value in manifest.items() if name != "latents"}))
    with pytest.raises(DataError, match="its files and its member latents do not agree"):
        opened(data)


def test_a_file_with_other_latents_than_its_manifest_says(written: Path, tmp_path: Path):
    data = Path(shutil.copytree(written, tmp_path / "data"))
    manifest = json.loads((data / "train.json").read_text())
    for split in ("train", "val"):
        manifest = json.loads((data / f"{split}.json").read_text())
        manifest["latents"]["channels"] = 3
        (data / f"{split}.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"holds int16 \[2, 4, 2, 2\], its manifest says int16 \[2, 6, 2, 2\]"):
        read(opened(data)[0], Feed(16, 16))


# --- FFCV ---


@pytest.mark.ffcv
def test_ffcv_reads_latents(written: Path):
    from vitlocal.data.peers.crop_decoder import keep_torch_threads

    with keep_torch_threads():
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.ndarray import NDArrayDecoder
        from ffcv.loader import Loader as FFCVLoader

        loader = FFCVLoader(
            str(written / "train_32_latent.beton"), batch_size=16, num_workers=1, os_cache=True, drop_last=False,
            pipelines={"latent": [NDArrayDecoder()], "label": [IntDecoder()]},
        )  # fmt: skip
        compiled.append(loader)
        batches = [(np.array(latents), np.array(labels).flatten()) for latents, labels in loader]
    latents, labels = map(np.concatenate, zip(*batches, strict=True))
    assert latents.dtype == np.int16 and labels.tolist() == [row % 3 for row in range(ROWS)]
    assert np.array_equal(latents.view(np.float16), np.stack(stored(written / "train_32_latent.beton"), 1))


@pytest.mark.ffcv
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_latents_that_ffcv_wrote_need_no_manifest(tmp_path: Path):
    from ffcv.fields import IntField, NDArrayField
    from ffcv.writer import DatasetWriter

    def write_stock(name: str, values: np.ndarray) -> None:
        fields = {"latent": NDArrayField(values.dtype, values.shape[1:]), "label": IntField()}
        rows = [(value, row % 3) for row, value in enumerate(values)]
        DatasetWriter(str(tmp_path / name), fields, num_workers=2).from_indexed_dataset(rows, chunksize=4)

    values = np.random.default_rng(0).standard_normal((30, 2, 6, 4, 4)).astype(np.float16)
    for split in ("train", "val"):
        write_stock(f"{split}_32_latent.beton", values)
    train, val = opened(tmp_path)
    assert train.latents == val.latents and train.latents is not None and train.classes == ("0", "1", "2")
    assert (train.latents.channels, train.latents.stride, train.latents.scaling_factor) == (3, 8, 1.0)
    assert 3 < mirrored_of(read(train, Feed(32, 7)), (values[:, 0], values[:, 1])).sum() < 27
    assert torch.equal(joined(read(val, Feed(32, 7)), "images"), torch.from_numpy(values[:, 0]))
    write_stock("train_16_latent.beton", values)
    with pytest.raises(DataError, match="different latents: .*keep one kind in each data folder"):
        opened(tmp_path)
    write_stock("train_16_latent.beton", values[:, 0])
    with pytest.raises(
        DataError, match=r"latents of float16 \[6, 4, 4\], expected float16 or its bits as int16, \[2, 2 x channels"
    ):
        opened(tmp_path)
