"""A run's folder with damaged or missing files, on a full disk, with an odd name, or whose data have changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trainers import open_trainer

from vitlocal import jsonl
from vitlocal.config import Config
from vitlocal.data.loader import Loader
from vitlocal.errors import ConfigError, DataError, run_command
from vitlocal.models.factory import build_model, export_model
from vitlocal.models.weight_files import write_weights
from vitlocal.report.figures import draw_curve
from vitlocal.report.page import page_of, remarks_part
from vitlocal.report.run_folder import LOG, is_record, read_log, read_origin, read_run, write_classes, write_picture
from vitlocal.train.budget import read_spent
from vitlocal.train.checkpoint import CHECKPOINT, load_checkpoint
from vitlocal.train.command import train
from vitlocal.train.run_folder import file_digests, record_origin
from vitlocal.train.search_log import SEARCHES, SearchLog
from vitlocal.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")
NAME = "vitlocal_tiny_patch8_64"
GARBAGE = {"half": None, "bytes": b"\xff\xfe\x00", "a list": b"[1, 2]\n", "a number": b"5\n", "an object": b"{}\n"}


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run of three passes."""
    run = tmp_path_factory.mktemp("finished") / "run"
    config = small(run, "--data.workers=1", "--budget.length=3ep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitlocal.train.command.write_report", read_run)
        assert train(config) == 0
    return config, run


@pytest.fixture
def copied(finished: tuple[Config, Path], tmp_path: Path) -> tuple[Config, Path]:
    config, run = finished
    shutil.copytree(run, tmp_path / "run")
    return replace(config, run=replace(config.run, folder=str(tmp_path / "run"))), tmp_path / "run"


def garble(path: Path, content: bytes | None) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)


# --- the log ----------------------------------------------------------------------------------------------------------

LINES = [b"\xff\xfe", b"5", b"{}", b'{"epoch": 1, "st', b'{"step": "four"}', b"[]", b"[" * 100_000]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_line_keeps_the_records_around_it(finished, tmp_path: Path, line: bytes, place: int):
    whole = (finished[1] / LOG).read_bytes().split(b"\n")[:-1]
    damaged = [*whole[:place], line, *whole[place + 1 :]]
    (tmp_path / LOG).write_bytes(b"\n".join(damaged) + b"\n" + whole[0][:20])  # a kill has cut the last line
    records = [json.loads(each) for number, each in enumerate(whole) if number != place]
    assert read_log(tmp_path) == records and jsonl.count_damaged(tmp_path / LOG, is_record) == 1
    jsonl.keep_lines(tmp_path / LOG, lambda record: record["step"] <= 8, is_record)
    kept = [each for number, each in enumerate(damaged) if number < 2 or number == place]
    assert (tmp_path / LOG).read_bytes() == b"\n".join(kept) + b"\n"


@pytest.mark.parametrize("name", [LOG, "classes.json"])
def test_a_damaged_name_within_a_line(copied, name: str):
    """A bit that flips there leaves valid JSON, without a value that the page needs."""
    _, run = copied
    content = (run / name).read_bytes()
    record = json.loads(content.splitlines()[0]) if name == LOG else json.loads(content)[0]
    for key in record:
        (run / name).write_bytes(content.replace(b'"%s"' % key.encode(), b'"%s"' % (key[:-1] + "~").encode(), 1))
        assert page_of([read_run(run)], crops=False)
    for other in (b"5", b'{"class": 1}', b'[{"class": "a", "right": "1", "images": "2"}]'):
        (run / "classes.json").write_bytes(other)
        assert read_run(run).classes == []


def test_damaged_lines_are_reported(copied, capsys):
    config, run = copied
    lines = (run / LOG).read_bytes().splitlines(keepends=True)
    (run / LOG).write_bytes(b"5\n" + lines[1] + lines[2])
    assert train(config) == 0
    assert f"note: 1 of the lines of {run / LOG} cannot be read" in capsys.readouterr().out
    assert (run / LOG).read_bytes() == b"5\n" + lines[1] + lines[2]
    assert "The log of run has damaged lines (1)" in remarks_part([read_run(run)])
    rewound = replace(read_run(run), records=[{**record, "rewinds": 2} for record in read_log(run)])
    assert "went back to an earlier state (run.on_nan=rewind): 2×" in page_of([rewound], crops=False)


def test_a_record_is_not_written_twice(configure, decoder, tmp_path: Path):
    """Killed between the record and the save of a pass without a step, after a checkpoint of the same step."""

    class Killed(Exception):
        pass

    options = ("--budget.length=1ep", "--methods=none")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        original, saves = Trainer.save, [0]

        def save(self: Trainer, **how: bool) -> None:
            saves[0] += 1
            if len(read_log(tmp_path / "run")) == 2:
                raise Killed
            original(self, **how)
            if len(read_log(tmp_path / "run")) == 1:  # as if the budget's last seconds went to a search
                self.state.last_evaluation = None
                original(self)

        patch.setattr(Trainer, "save", save)
        train(configure(*options))
    assert [record["step"] for record in read_log(tmp_path / "run")] == [4, 4]
    assert train(configure(*options)) == 0
    assert [record["loss"] is None for record in read_log(tmp_path / "run")] == [False, True]


def test_damaged_images_survive_a_kill(configure, decoder, killed_after, tmp_path: Path, monkeypatch):
    """The images that the first process skipped are counted by the second one, and none twice."""
    rows = chain([{3}, {3, 5}], repeat({5, 7}))  # the first pass only starts the loader
    original = Loader._read

    def read(self: Loader, *arguments: object):
        found = next(rows) if self.crops.random else set()
        self.damaged = {*self.damaged, *found}
        yield from original(self, *arguments)

    monkeypatch.setattr(Loader, "_read", read)
    options = ("--methods=none", "--run.save_every=1steps", "--budget.length=2ep")
    with killed_after(2):
        train(configure(*options))
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["damaged_rows"] == [3, 5]
    assert train(configure(*options)) == 0
    assert read_log(tmp_path / "run")[-1]["damaged_images"] == 3


# --- other files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("name", ["config.yaml", "spent.json", "trained_on.jsonl", "searches.jsonl", "classes.json"])
def test_a_run_with_a_whole_checkpoint_continues(copied, name: str, content: bytes | None, capsys):
    config, run = copied
    before, weights = read_log(run), (run / "model.safetensors").read_bytes()
    (run / SEARCHES).write_text('{"probe": {"kind": "loss"}, "answer": 1.0}\n')
    garble(run / name, content)
    assert run_command(lambda argv: train(config), []) == 0, capsys.readouterr().err
    assert read_log(run) == before and (run / "model.safetensors").read_bytes() == weights
    if name == "config.yaml":
        assert f"note: {run / name} is damaged" in capsys.readouterr().out
        assert read_run(run).config.flat() == config.flat()


@pytest.mark.parametrize("name", ["config.yaml", "spent.json", "trained_on.jsonl", LOG, "classes.json"])
def test_a_missing_file(copied, name: str, capsys):
    config, run = copied
    (run / name).unlink()
    status, words = run_command(lambda argv: train(config), []), capsys.readouterr()
    if name == LOG:  # the page needs an evaluation
        assert status == 2 and "holds no run with an evaluation" in words.err
    else:
        assert status == 0, words.err
    assert "Traceback" not in words.err


def test_a_config_that_is_gone_does_not_let_another_run_in(copied):
    config, run = copied
    (run / "config.yaml").unlink()
    other = replace(config, train=replace(config.train, lr=0.5))
    with pytest.raises(ConfigError, match=r"train.lr was 0.001 and is now 0.5"):
        train(other)
    assert not (run / "config.yaml").exists()


@pytest.mark.parametrize("text", [
    '{"train_seconds": 1e999, "wall_seconds": 1}', '{"train_seconds": -5, "wall_seconds": 1}',
    '{"train_seconds": NaN, "wall_seconds": 1}', "[" * 100_000, "7",
])  # fmt: skip
def test_impossible_times_in_the_journal(tmp_path: Path, text: str, capsys):
    (tmp_path / "spent.json").write_text(text)
    assert read_spent(tmp_path / "spent.json") == (0.0, 0.0)
    assert "is damaged; the budget continues from the checkpoint" in capsys.readouterr().err


def test_damaged_lines_of_other_files(tmp_path: Path):
    record_origin(tmp_path, {"images": 3})
    whole = read_origin(tmp_path)
    (tmp_path / "trained_on.jsonl").write_bytes(b"\xff\n{}\n" + (tmp_path / "trained_on.jsonl").read_bytes() + b"5\n")
    assert read_origin(tmp_path) == whole
    searches = SearchLog(tmp_path)
    searches._lines = 2
    (tmp_path / SEARCHES).write_bytes(b"\xff\n{}\n{}\n")
    searches.begin()
    assert (tmp_path / SEARCHES).read_bytes() == b"\xff\n{}\n"
    with pytest.raises(ConfigError, match="no time in its searches.jsonl"):
        SearchLog(replay=str(tmp_path))


def test_the_folder_is_removed_under_the_run(configure, decoder, tmp_path: Path, monkeypatch, capsys):
    run, options = tmp_path / "run", ("--methods=none", "--run.save_every=2steps", "--budget.length=4steps")
    original = Trainer.train_step

    def train_step(self: Trainer, batch, plan):
        if self.state.clock.step == 2:
            shutil.rmtree(run)
        return original(self, batch, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(DataError, match="was removed while the run trained"):
            train(configure(*options))
    assert train(configure(*options)) == 0
    assert read_log(run)[-1]["step"] == 4


def test_a_folder_that_took_its_place_is_left_alone(configure, decoder, tmp_path: Path):
    run = tmp_path / "run"
    with open_trainer(configure()) as trainer:
        run.rename(tmp_path / "moved")
        run.mkdir()
        (run / "config.yaml").write_text("other")
        with pytest.raises(DataError, match="was replaced by another run's folder"):
            trainer.save()
    assert not (run / "checkpoints").exists()


# --- a full disk ------------------------------------------------------------------------------------------------------


class FullFile:
    """A file on a disk with room for 10 more bytes."""

    def __init__(self, file):
        self.file, self.left = file, 10

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        fits = data[: self.left]
        self.left -= self.file.write(fits)
        if len(fits) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(fits)

    def writelines(self, lines):
        for line in lines:
            self.write(line)


def written(run: Path) -> dict[str, Callable[[], object]]:
    """Everything that a run writes, by the name of the file."""
    record = read_run(run)
    model, arguments = build_model(NAME, {"img_size": 16, "depth": 1}, 3)
    return {
        "classes.json": lambda: write_classes(run, ["a"], np.ones((1, 2), np.int64)),
        "pictures/x.png": lambda: write_picture(run, "x", Image.new("RGB", (9, 9))),
        "curve.png": lambda: draw_curve(record, run / "curve.png"),
        "report.html": lambda: jsonl.replace_text(run / "report.html", page_of([record], crops=False)),
        "config.json": lambda: export_model(
            run, model, "vitlocal_tiny_patch8_64", arguments, "abc", size=16, crop_pct=0.9
        ),
        "model.safetensors": lambda: write_weights(run / "model.safetensors", {"a": torch.ones(99)}),
        LOG: lambda: jsonl.append_line(run / LOG, record.records[0]),
        "trained_on.jsonl": lambda: record_origin(run, {"images": 9}),
        SEARCHES: lambda: jsonl.append_line(run / SEARCHES, {"probe": "a longer line"}),
    }


def test_on_a_full_disk_every_file_is_whole_and_named(copied, monkeypatch: pytest.MonkeyPatch):
    _, run = copied
    (run / "pictures").mkdir()
    for name, write in written(run).items():
        (run / name).touch()
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jsonl, "open", lambda *words, **named: FullFile(open(*words, **named)), raising=False)
            with pytest.raises(OSError, match=f"No space left on device.*{name}"):
                write()
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, name
        write()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_errors_of_the_disk_name_the_file(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").write_text("before")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, fail)
        with (
            pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/a'"),
            jsonl.replacing(tmp_path / "a") as file,
        ):
            file.write("after")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"


# --- names and data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "a\udcffb", "a\tb"])
def test_a_folder_whose_name_cannot_be_shown_is_refused_at_the_start(configure, tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=r"run.folder: .* has characters that cannot be shown") as caught:
        configure(f"--run.folder={tmp_path}/{name}")
    assert str(caught.value).isprintable() or "\n" in str(caught.value)
    assert name not in str(caught.value)


def test_odd_names_work_to_the_end(copied):
    """Names between $ are formulas to matplotlib. Not all names of classes are text."""
    _, run = copied
    odd = run.rename(run.with_name("a $b^$ & <i> ü"))
    write_classes(odd, ["plain", "\udcff", "<b>"], np.array([[1, 2], [0, 2], [1, 3]]))
    record = read_run(odd)
    draw_curve(record, odd / "curve.png")
    jsonl.replace_text(odd / "report.html", page_of([record, record], crops=False))
    page = (odd / "report.html").read_text(encoding="utf-8")
    assert "\\udcff" in page and "<b>" not in page and "<i>" not in page


def test_other_pixels_are_refused_by_name(copied, folder: Path, tmp_path: Path):
    config, _ = copied
    data = shutil.copytree(folder, tmp_path / "data")
    there = replace(config, data=replace(config.data, root=str(data)))
    assert train(there) == 0  # the same files elsewhere
    (data / "train_96_raw.beton").rename(tmp_path / "kept.beton")
    (data / "more.beton").write_bytes(b"a file that was added")
    digests = file_digests(data)
    content = bytearray((data / "val_96_raw.beton").read_bytes())
    quarter = len(content) // 4  # the pixels; at the end are the places of the images
    content[quarter : 3 * quarter] = np.random.default_rng(0).bytes(2 * quarter)
    (data / "val_96_raw.beton").write_bytes(content)
    assert [name for name, digest in file_digests(data).items() if digests[name] != digest] == ["val_96_raw.beton"]
    (tmp_path / "kept.beton").rename(data / "train_96_raw.beton")
    os.mkfifo(data / "pipe.beton")
    with pytest.raises(OSError, match="it is a pipe, not a file"):  # and does not wait for who writes to it
        file_digests(data)
    (data / "pipe.beton").unlink()
    with pytest.raises(ConfigError, match=r"data.root: val_96_raw.beton in .*/data: the content is not that of"):
        train(there)
