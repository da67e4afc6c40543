"""The benches on very little data: they run, and their rows have the fields that tools rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vitlocal.bench import clock
from vitlocal.bench.__main__ import main
from vitlocal.bench.contestants import started
from vitlocal.bench.measurement import spread
from vitlocal.errors import ConfigError, DataError, run_command
from vitlocal.progress import Length

ROW = {"source", "images_per_second", "per_core", "spread", "n", "workers", "rss_mib"}
FORM = {"what", "command", "machine", "versions", "commit", "rows"}


def test_the_loader_bench(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "loader.json"
    main(["loader", "--data", str(folder), "--sizes", "32", "--only", "ours,torchvision", "--rounds", "1",
          "--seconds", "0", "--images", "50", "--json", str(out), "--plot",
          str(tmp_path / "plots" / "loader.png")])  # fmt: skip
    measured = json.loads(out.read_text())
    assert measured.keys() >= FORM and measured["images"] == 50
    assert {(row["source"], row["stored"]) for row in measured["rows"]} == {
        ("ours", "train_48_raw.beton"), ("ours", "train_96_raw.beton"), ("ours", "train_128_jpg.beton"),
        ("torchvision", "original"),
    }  # fmt: skip
    for row in measured["rows"]:
        assert row.keys() >= ROW | {"stored", "size", "chosen"} and row["images_per_second"] > 0 and row["n"] == 1
    chosen = [(row["size"], row["stored"]) for row in measured["rows"] if row["chosen"]]
    assert chosen == [(32, "train_48_raw.beton")]
    assert all(row["to_torchvision"] > 1 for row in measured["rows"] if row["chosen"])
    shown = capsys.readouterr().out
    assert "*ours" in shown and "torchvision" in shown
    assert (tmp_path / "plots" / "loader.png").stat().st_size > 5000


@pytest.mark.ffcv
def test_the_writer_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vitlocal.data.images import open_images

    images = open_images("sample:1", "train")
    for index in range(len(images)):
        path = tmp_path / "source" / f"{images.entry(index)}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.read(index))
    json_file = tmp_path / "write.json"
    main(["write", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--sides", "24:raw,32:jpg",
          "--rounds", "1", "--images", "12", "--json", str(json_file)])  # fmt: skip
    measured = json.loads(json_file.read_text())
    assert measured.keys() >= FORM and [row["source"] for row in measured["rows"]] == ["ours", "ffcv"]
    for row in measured["rows"]:
        assert row.keys() >= ROW | {"files", "megabytes", "images"}
        assert (row["images"], row["files"]) == (12, "24:raw,32:jpg") and row["images_per_second"] > 0
    assert measured["rows"][0]["to_ffcv"] > 0
    assert "to ffcv" in capsys.readouterr().out
    assert not any((tmp_path / "out").iterdir())  # all written files are removed


@pytest.mark.slow
def test_the_clock_bench(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "TRIALS", [clock.Trial("busy", kills=(0.3,), load=(0.5, 0.7))])
    main(["clock", "--budgets", "3s", f"--data.root={folder}", "--train.batch_size=16", "--methods=none",
          "--model.width=32", "--model.depth=1", "--json", str(tmp_path / "clock.json")])  # fmt: skip
    measured = json.loads((tmp_path / "clock.json").read_text())
    (row,) = measured["rows"]
    assert measured.keys() >= FORM and (row["budget"], row["trial"], row["counts"]) == ("3s", "busy", "train")
    assert row["train_seconds"] == row["spent_seconds"] > 2 and row["alive_seconds"] > row["spent_seconds"]
    assert row["off_percent"] == pytest.approx(100 * (row["spent_seconds"] / 3 - 1), abs=0.001)
    assert row["lr"] >= row["end_lr"] == 1e-5 and row["steps"] > 1 and "busy" in capsys.readouterr().out


def test_the_clock_bench_shows_a_run_that_fails(folder: Path, tmp_path: Path) -> None:
    wrong = [f"--data.root={folder}", "--model.patch_size=5"]
    with pytest.raises(DataError, match=r"exit status 2\)[^!]*the patch of 5x5 pixels"):
        clock.attempt(clock.Trial("left alone"), Length.parse("3s"), wrong, tmp_path / "run")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("loader", "profile", "runs", "step", "write"))


def test_help_imports_no_bench() -> None:
    code = "import sys, vitlocal.bench.__main__ as bench; bench.main(['--help']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("False\n") and "report " in shown


def broken() -> None:
    raise ValueError("no such thing")


def test_one_round_has_no_spread() -> None:
    assert spread([3.0]) is None and spread([3.0, 4.0, 5.0]) == 0.5


def test_a_contestant_that_fails_is_named() -> None:
    with started(broken, {"the broken one": ()}, 1) as [contestant]:
        with pytest.raises(DataError, match="the broken one: ValueError: no such thing"):
            contestant.ask()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loader", "--only", "ours,spark"], "spark"),
        (["loader", "--sizes", "32,x"], "whole numbers"),
        (["loader", "--workers", "4096"], "cores of this machine"),
        (["loader", "--rounds", "0"], "expected at least 1"),
        (["loader", "--only", "torchvision", "--source", "nowhere"], "nowhere"),
        (["clock", "--budgets", "3ep"], "expected lengths of time"),
        (["clock", "--budgets", "3s", "--data.root=nowhere"], "nowhere"),
        (["report", "runs/one", "--json", "out.json"], "give --forecast"),
        (["write", "--images", "0"], "at least 1"),
        (["write", "--sides", "64:png"], "got '64:png'"),
        (
            ["nothing"],
            "expected the name of a bench (arms, augment, card, clock, compiled, forecast, gpu, kernel, loader, paper",
        ),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "loader":
        arguments = [*arguments, "--data", str(folder)]
    raised: list[Exception] = []

    def watched(words: Sequence[str]) -> None:
        try:
            main(words)
        except ConfigError as error:
            raised.append(error)
            raise

    assert run_command(watched, arguments) == 2 and raised
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.beton"))
