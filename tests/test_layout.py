"""The storage layout: is it the best one, are its predictions true, and does the next write use it?"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitlocal import write_dataset
from vitlocal.data.beton_source import choose_file
from vitlocal.data.costs import DecodingCosts, costs_path, ensure_costs
from vitlocal.data.crops import CropPolicy
from vitlocal.data.images import open_images
from vitlocal.data.manifest import BetonFile, Manifest
from vitlocal.data.writer.layout import (
    TIME_STEP,
    CandidateFile,
    SizeDemand,
    StorageLayout,
    StorageLimits,
    best_files,
    fastest_file,
    layout_lines,
    measure_candidates,
    missing_seconds,
    propose_layout,
)
from vitlocal.data.writer.write import write
from vitlocal.errors import ConfigError, run_command
from vitlocal.write_options import JpegForm, WriteOptions, read_plan, read_write_options

LIMITS = StorageLimits(cores=4, disk=10**9, memory=10**9)
TRAIN = CropPolicy(random=True)
JPEG = JpegForm(90, 420, 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlocal.data.writer.layout.MEASURE_SECONDS", 1.0)


def value(
    files: tuple[CandidateFile, ...], stages: list[SizeDemand], limits: StorageLimits
) -> tuple[int, int, int, int]:
    """The value of a set by the rules; lower is better."""
    read = [(stage, fastest_file(stage, files)) for stage in stages]
    tick = TIME_STEP * sum(stage.images / stage.rate for stage in stages)
    return (
        sum(file.bytes > limits.memory for _, file in read),
        math.ceil(sum(missing_seconds(stage, file) for stage, file in read) / tick - 1e-9),
        sum(file.bytes for file in files),
        len(files),
    )


@pytest.mark.parametrize("seed", range(80))
def test_no_set_of_files_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [32, 64, 96, 128][: rng.integers(1, 5)]
    stages = [SizeDemand(size, float(rng.uniform(1e4, 1e6)), float(rng.uniform(500, 20000))) for size in sizes]
    files = []
    for number in range(rng.integers(1, 8)):
        least = int(rng.integers(0, len(sizes)))
        rates = {size: float(rng.uniform(300, 30000)) for size in sizes[: least + 1]}
        files.append(CandidateFile(100 + number, "raw", int(rng.integers(10, 100)), rates))
    limits = StorageLimits(4, int(rng.integers(50, 250)), int(rng.integers(30, 100)))
    found = best_files(stages, files, limits)
    sets = [
        subset
        for count in range(1, len(files) + 1)
        for subset in itertools.combinations(files, count)
        if sum(file.bytes for file in subset) <= limits.disk and all(fastest_file(stage, subset) for stage in stages)
    ]
    if not sets:
        assert found is None
        return
    assert value(found, stages, limits) == min(value(subset, stages, limits) for subset in sets)


def test_the_smallest_set_that_keeps_up() -> None:
    stages = [SizeDemand(32, 1e6, 9000), SizeDemand(224, 1e6, 1000)]
    small = CandidateFile(48, "raw", 100, {32: 90_000})
    quick = CandidateFile(336, "raw", 5000, {32: 20_000, 224: 9000})
    slow = CandidateFile(336, "jpg", 900, {32: 2000, 224: 1300})
    assert best_files(stages, [small, quick, slow], LIMITS) == (small, slow)
    assert best_files([SizeDemand(224, 1e6, 2000)], [small, quick, slow], LIMITS) == (quick,)
    assert best_files([SizeDemand(32, 1e6, 1000), SizeDemand(224, 1e6, 1000)], [small, quick, slow], LIMITS) == (slow,)
    # The fast file is too large for the page cache, or for the disk.
    for limits in (replace(LIMITS, memory=4000), replace(LIMITS, disk=4000)):
        assert best_files([SizeDemand(224, 1e6, 2000)], [small, quick, slow], limits) == (slow,)
    assert best_files(stages, [quick], replace(LIMITS, memory=4000)) == (quick,)  # there is no other
    # No file fits in memory. Then a single file may be read at all sizes.
    assert best_files(
        [SizeDemand(32, 1e6, 10), SizeDemand(224, 1e6, 10)], [small, slow], replace(LIMITS, memory=50)
    ) == (slow,)
    assert best_files(stages, [small, quick, slow], replace(LIMITS, disk=800)) is None


def test_the_first_quality_that_is_fast_enough_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {90: 1050.0, 80: 1150.0, 70: 1300.0}

    def pretend(images, sizes, cropping, ratio, cores, jpeg, formats):
        sizes_of = {90: 900, 80: 700, 70: 500}
        file = CandidateFile(336, "jpg", sizes_of[jpeg.quality], {224: rates[jpeg.quality]})
        return tuple(file for form in formats if form == "jpg")

    monkeypatch.setattr("vitlocal.data.writer.layout.measure_candidates", pretend)
    for need, quality, keeps_up in ((800, 90, True), (950, 80, True), (1000, 70, True), (1200, 70, False)):
        choice = propose_layout(None, [SizeDemand(224, 1e6, need)], TRAIN, 1.5, LIMITS, JPEG)
        assert (choice.jpeg.quality, not choice.missing_seconds) == (quality, keeps_up)
    small = replace(LIMITS, disk=600)  # for the lowest quality alone
    assert propose_layout(None, [SizeDemand(224, 1e6, 100)], TRAIN, 1.5, small, JPEG).jpeg.quality == 70
    with pytest.raises(ConfigError, match=r"--disk-limit: 0.0 MB are too few.*336:jpg of quality 70"):
        propose_layout(None, [SizeDemand(224, 1e6, 100)], TRAIN, 1.5, replace(LIMITS, disk=100), JPEG)


def test_the_report_names_the_stage_that_waits() -> None:
    stages = (SizeDemand(32, 5e6, 9000), SizeDemand(224, 5e6, 2600))
    small, slow = (
        CandidateFile(48, "raw", 10**8, {32: 90_000}),
        CandidateFile(336, "jpg", 10**10, {32: 2000, 224: 1300}),
    )
    choice = StorageLayout(stages, (small, slow), JPEG)
    assert choice.serving == (small, slow) and choice.missing_seconds > 0
    assert choice.waits == (0.0, 0.5)
    text = "\n".join(layout_lines(choice, LIMITS, 10**6))
    for words in (
        "224     5.0     2,600/s     1,300/s    0.5 x  336:jpg  waits 50 % of its time", "10 GB on disk, of 1.0 GB",
        "more cores (--cores)", "48:raw (100 MB)", "does not fit in memory (1.0 GB), so the disk limits its rate",
        "quality 90 and chroma 420",
    ):  # fmt: skip
        assert words in text, text
    spare = replace(choice, demands=(stages[0], SizeDemand(224, 5e6, 1200)))
    assert "little to spare" in "\n".join(layout_lines(spare, LIMITS, 10**6)) and spare.waits == (0.0, 0.0)


def test_predicted_bytes_match_the_written_files(tmp_path: Path) -> None:
    images = open_images("sample:10", "train")
    found = measure_candidates(images, [16, 32], TRAIN, 1.5, 2, JpegForm(80, 420, 1))
    assert [(file.side, file.format, sorted(file.rates)) for file in found] == [
        (32, "raw", [16]), (32, "jpg", [16]), (48, "raw", [16, 32]), (48, "jpg", [16, 32]),
    ]  # fmt: skip
    options = WriteOptions("train", "sample:10", str(tmp_path), ",".join(map(str, found)), quality=80)
    manifest = write(options, progress=False)
    written = {(file.side, file.format): file.bytes for file in manifest.files}
    for file in found:
        assert file.bytes == pytest.approx(written[file.side, file.format], rel=0.03)
        assert all(rate > 100 for rate in file.rates.values())


# --- the demands of a recipe ---------------------------------------------------------------------------------


def a_recipe(**options: object) -> list[str]:
    options = {"model.name": "vitlocal_tiny_patch8_64", "model.size": 48, "model.depth": 2, "methods": "image_size",
               "image_size.init": 16, "image_size.step_pixels": 16, "image_size.step_epochs": 2,
               "train.batch_size": 8, **options}  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


# --- the command --------------------------------------------------------------------------------------------


def test_planned_files_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(threads: object, file: object, rows: np.ndarray, *more: object) -> float:
        return 1e-5 if rows["raw"][0] else 1e-3

    monkeypatch.setattr("vitlocal.data.writer.layout.crop_seconds", seconds)
    recipe, out = tmp_path / "recipe.yaml", str(tmp_path / "data")
    recipe.write_text("model: {name: vitlocal_tiny_patch8_64, size: 32, depth: 2}\nbudget: {length: 3ep}\n")
    common = ["--source", "sample:5", "--out", out]
    plan = [*common, "--plan", "--recipe", str(recipe), "--disk-limit", "1GB", "--memory-limit", "1GB", "--cores", "3"]
    assert run_command(write_dataset.main, [*plan, "--rates", "32:10"]) == 0
    shown = capsys.readouterr().out
    assert "100 images; 3 cores" in shown and "48:jpg" in shown and "write_dataset.py --split train" in shown
    # Too much for JPEG.
    assert run_command(write_dataset.main, [*plan, "--rates", "32:30000", "--quality", "75"]) == 0
    shown = capsys.readouterr().out
    assert "48:raw" in shown
    chosen = read_plan(tmp_path / "data" / "plan.yaml", read_write_options([], {}))
    assert (chosen.sides, chosen.quality, chosen.sampling) == ("48:raw", 75, "420")
    stated = read_plan(
        tmp_path / "data" / "plan.yaml", read_write_options(["--quality", "60", "--sampling", "444"], {})
    )
    assert (stated.sides, stated.quality, stated.sampling) == ("48:raw", 60, "444")
    assert run_command(write_dataset.main, common) == 0
    assert "plan.yaml says (remove it for the default files): 48:raw" in capsys.readouterr().out
    assert run_command(write_dataset.main, [*plan, "--rates", "32:10"]) == 2  # it is written already
    assert "train.json exists" in capsys.readouterr().err
    manifest = Manifest.load(Path(out) / "train.json")
    assert [file.file for file in manifest.files] == ["train_48_raw.beton"]
    assert run_command(write_dataset.main, [*common, "--sides", "24"]) == 2  # other options, so another split
    assert "another configuration" in capsys.readouterr().err
    (tmp_path / "data" / "plan.yaml").write_text("write: {quality: 80}\n")
    assert run_command(write_dataset.main, common) == 2
    assert "the option write.sides is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates", "32:5"], "--rates: it needs --plan"),
        (["--disk-limit", "5GB"], "--disk-limit: it needs --plan"),
        (["--plan", "--disk-limit", "5 parsecs"], "bytes with a unit: 150GB"),
        (["--plan", "--disk-limit", "150"], "bytes with a unit: 150GB"),
        (["--plan", "--memory-limit", "0GB"], "bytes with a unit: 150GB"),
        (["--plan", "--workers", "3"], "remove --workers"),
        (["--plan", "--source", "sample:1", "--rates", "32:5,32:6"], "given twice"),
        (["--plan", "--source", "sample:1", "--rates", "225:5"], "takes no images of 225 px"),
        (["--plan", "--verify"], "they exclude each other"),
        (["--plan", "--sides", "64"], "remove --sides"),
        (["--plan", "--split", "val"], "split train"),
        (["--plan", "--recipe", "nowhere.yaml"], "nowhere.yaml: cannot be read as a recipe"),
        (["--plan", "--source", "sample:1", "--rates", "5"], "SIZE:IMAGES_A_SECOND"),
    ],
)
def test_wrong_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    assert run_command(write_dataset.main, ["--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run_command(write_dataset.main, ["--plan", "--source", "sample:1", "--out", str(out)]) == 2
        assert "is not a folder that can be written to" in capsys.readouterr().err


def test_a_disk_that_is_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: vitlocal_tiny_patch8_64, size: 32, depth: 2}\nbudget: {length: 3ep}\n")
    plan = ["--plan", "--source", "sample:2", "--out", str(tmp_path / "data"), "--recipe", str(recipe)]
    assert run_command(write_dataset.main, [*plan, "--rates", "32:10", "--disk-limit", "10KB"]) == 2
    error = capsys.readouterr().err
    assert "--disk-limit" in error and "48:jpg" in error and "Raise the limit" in error
    assert not (tmp_path / "data").exists()


# --- the file that a source reads ------------------------------------------------------------------------------


def files_of(*names: str) -> Manifest:
    files = []
    for name in names:
        side, format = name.split(":")
        files.append(BetonFile(f"train_{side}_{format}.beton", int(side), format, 90, 420, 1, 1 << 21, 1, name, 9, 9))
    return Manifest("train", 1, ("ant",), tuple(files), None, (), ("x",))


def test_the_cheapest_large_enough_file_is_chosen() -> None:
    manifest = files_of("64:raw", "160:jpg", "256:raw", "256:jpg")
    costs = DecodingCosts({
        "train_64_raw.beton": {32: 8.0, 64: 14.0}, "train_160_jpg.beton": {64: 100.0, 128: 140.0},
        "train_256_raw.beton": {64: 40.0, 128: 70.0}, "train_256_jpg.beton": {64: 200.0, 128: 300.0},
    })  # fmt: skip
    picked = [choose_file(manifest, costs, TRAIN, 1.5, size).file for size in (32, 64, 96, 160, 224)]
    assert picked == ["train_64_raw.beton", *["train_256_raw.beton"] * 4]
    centre = CropPolicy(random=False, centre=1.0)
    assert choose_file(manifest, costs, centre, 1.5, 160).file == "train_256_raw.beton"
    # If some files were not measured, the smallest side is chosen, and raw before JPEG.
    some = DecodingCosts({name: cost for name, cost in costs.microseconds.items() if "256_raw" not in name})
    picked = [choose_file(manifest, some, TRAIN, 1.5, size).file for size in (32, 64, 96, 160)]
    assert picked == ["train_64_raw.beton", "train_160_jpg.beton", "train_160_jpg.beton", "train_256_raw.beton"]


def test_costs_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write(WriteOptions("train", "sample:3", str(tmp_path), "24:raw,32:raw,32:jpg"), progress=False)
    monkeypatch.setattr("vitlocal.data.costs.SECONDS", 0.01)
    assert DecodingCosts.load(tmp_path, manifest).microseconds == {}
    ensure_costs(tmp_path, manifest)
    costs = DecodingCosts.load(tmp_path, manifest)
    assert {name: list(by_size) for name, by_size in costs.microseconds.items()} == {
        "train_24_raw.beton": [16], "train_32_jpg.beton": [16, 32], "train_32_raw.beton": [16, 32],
    }  # fmt: skip
    stored = {file.file: file for file in manifest.files}
    assert min(costs.microseconds_for(file, 24) for file in stored.values()) > 0
    before = costs_path(tmp_path, "train").read_text()
    ensure_costs(tmp_path, manifest)
    assert costs_path(tmp_path, "train").read_text() == before
    other = replace(manifest, files=tuple(replace(file, checksum="crc32:0") for file in manifest.files))
    assert DecodingCosts.load(tmp_path, other).microseconds == {}  # these are not the files that were measured
    for damaged in ("", "[]", "{}", json.dumps({"files": [3]}), '{"files": [{"file": "x"}]}'):
        costs_path(tmp_path, "train").write_text(damaged)
        assert DecodingCosts.load(tmp_path, manifest).microseconds == {}
