"""The folder of a run: errors, locks, and the state after a kill."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import time
from itertools import repeat
from pathlib import Path

import pytest
import torch
from fake_time import FakeTime
from trainers import open_trainer

from vitlocal.bench.arms import machine_of
from vitlocal.data.sources import open_sources
from vitlocal.errors import ConfigError, DataError
from vitlocal.progress import Length, Progress
from vitlocal.report.run_folder import read_log, read_origin
from vitlocal.stored_config import changed_options
from vitlocal.tasks.metrics import METRICS
from vitlocal.train.budget import read_spent
from vitlocal.train.build import open_run
from vitlocal.train.checkpoint import CHECKPOINT, PREVIOUS, load_checkpoint, save_checkpoint
from vitlocal.train.command import start_warnings, train
from vitlocal.train.output import RunOutput
from vitlocal.train.run_folder import JOURNAL, run_folder_lock
from vitlocal.train.trainer import Trainer

ROOT = Path(__file__).parent.parent


def test_a_run_of_another_configuration_is_refused(configure, decoder):
    train(configure("--budget.length=1ep"))
    with pytest.raises(ConfigError, match=r"train.lr was 0.001 and is now 0.5"):
        train(configure("--budget.length=1ep", "--train.lr=0.5"))
    with pytest.raises(ConfigError, match="already holds a run"):
        train(configure("--budget.length=1ep", "--run.resume=never"))


def test_other_data_are_refused(configure, decoder, folder: Path, tmp_path: Path):
    train(configure("--budget.length=1ep"))
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / "train.json"
    for split in ("train", "val"):
        path = tmp_path / "data" / f"{split}.json"
        path.write_text(path.read_text().replace('"arrow"', '"aim"', 1))
    with pytest.raises(ConfigError, match="has 120 training images of 20 classes, and the run"):
        train(configure("--budget.length=1ep", f"--data.root={tmp_path}/data"))


def test_results_without_a_checkpoint_are_not_overwritten(configure, decoder, tmp_path: Path):
    """Without its checkpoint a run cannot continue. Its budget is spent, so it would export an untrained model."""
    train(configure())
    run = tmp_path / "run"
    for path in (run / CHECKPOINT, run / PREVIOUS):
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"no checkpoint of the run can be read.*remove {run} and run the same command"):
        train(configure())
    for path in (run / CHECKPOINT, run / PREVIOUS):
        path.unlink()
    before = (run / "model.safetensors").read_bytes()
    for part in (set(), {"model.safetensors"}):  # by its log alone, too
        for name in part:
            (run / name).unlink()
        with pytest.raises(ConfigError, match="no checkpoint to continue from .* remove the folder"):
            train(configure())
        assert part or (run / "model.safetensors").read_bytes() == before
    shutil.rmtree(run)
    assert train(configure()) == 0 and (run / "model.safetensors").read_bytes() == before


def test_a_spent_budget_without_a_saved_step_is_an_error(configure, decoder, tmp_path: Path):
    """A run that was killed before its first checkpoint has spent its budget: it must not export random weights."""
    config = configure("--budget.length=2s", "--methods=none")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.yaml())
    (tmp_path / "run" / "spent.json").write_text(json.dumps({"train_seconds": 3.0, "wall_seconds": 3.0}))
    with pytest.raises(DataError, match="no step was saved. Remove"):
        train(config)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_resuming_nothing_is_refused_and_leaves_nothing(configure, decoder, tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no run to continue"):
        train(configure("--run.resume=must"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--model.name=vitlocal_smal_patch16_224"], "timm knows no model"),
        (["--model.name=resnet18", "--model.convolution=no", "--methods=none"], "add --model.convolution=none"),
        (["--model.patch_size=7", "--methods=none"], "patch_size"),
        (["--model.heads=3"], "heads"),
        (["--model.width=16384"], r"model.width=16384.* weights need \d+ GiB .* use smaller ones"),
        (["--image_size.step_pixels=20"], "image_size 36: expected multiples of 8"),
        (["--evaluate.size=50"], "evaluate.size 50: expected multiples of 8"),
        (["--train.precision=fp16"], "fp16 needs a CUDA device"),
        (["--train.kernel=fused"], "fused needs a CUDA device"),
        (["--methods=batch_size,image_size"], "put it last"),
        (["--train.cuda_graphs=yes", "--train.compile=no"], "train.cuda_graphs: yes needs train.compile"),
        (["--model.size=1024", "--augment.random_erasing=0.1"], "augment.random_erasing: its noise covers"),
        (["--methods=image_size,batch_size", "--batch_size.limit=8"], "batch_size.limit: got 8"),
        (["--run.device=cuda:99"], "run.device"),
        (["--run.device=gpu"], "run.device"),
        (["--data.workers=4096"], "data.workers"),
    ],
)
def test_wrong_options_leave_no_folder(configure, tmp_path: Path, options: list[str], part: str, monkeypatch, shared):
    if "workers" not in options[0]:
        monkeypatch.setattr("vitlocal.data.reader.LoaderResources", lambda workers=0: shared)
    monkeypatch.setattr("vitlocal.train.build_checks.memory", lambda: 16 << 30)  # of this machine
    with pytest.raises(ConfigError, match=part):
        train(configure(*options))
    assert not (tmp_path / "run").exists()


def test_an_error_before_the_first_step_leaves_no_folder(configure, decoder, tmp_path: Path, monkeypatch):
    """An example is a model without fused attention."""

    def prepare(self: Trainer) -> None:
        assert (tmp_path / "run" / "config.yaml").exists()
        raise ConfigError("cannot")

    monkeypatch.setattr(Trainer, "prepare", prepare)
    with pytest.raises(ConfigError, match="cannot"):
        train(configure())
    assert not (tmp_path / "run").exists()


def test_start_warnings(configure, decoder, capsys, tmp_path: Path):
    train(configure("--train.batch_size=500", "--train.warmup=1ep", "--budget.length=1steps", "--evaluate.every=0"))
    said = capsys.readouterr().out
    assert "note: train.batch_size is 500, and there are 120 images" in said and "warm-up" not in said
    options = ["--train.warmup=2ep", "--budget.length=3steps", f"--run.folder={tmp_path}/other"]
    with open_run(configure(*options)) as run:
        (said,) = start_warnings(run)
        assert "the warm-up (2ep) is longer than the budget (3steps)" in said
        run.trainer.sources.train.side = 32
        assert "up to 48 px, but the stored images have long edges of at most 32 px" in start_warnings(run)[-1]
        assert "--sides 72" in start_warnings(run)[-1]
        run.trainer.sources.train.side = None  # original images
        assert len(start_warnings(run)) == 1
    for precision, warns in (("bf16", True), ("fp32", False)):
        scaled = [f"--train.precision={precision}", "--model.layer_scale=1e-4", f"--run.folder={tmp_path}/{precision}"]
        with open_run(configure(*scaled)) as run:
            assert (
                any("model.layer_scale=0.0001 makes branches so small" in text for text in start_warnings(run)) == warns
            )


def test_end_warnings(configure, decoder, no_report, capsys, tmp_path: Path):
    options = ["--methods=image_size", "--image_size.stages=16px until 1ep, 32px until 2ep, 48px"]
    short = [*options, "--train.warmup=2ep", "--budget.length=2steps"]
    assert train(configure(*short)) == 0
    said = capsys.readouterr().out
    assert "note: the budget ended before images of 32, 48 px" in said
    assert "note: the budget ended in the warm-up (2ep)" in said
    border = [*options, "--budget.length=1ep", f"--run.folder={tmp_path}/border"]  # the next stage would begin
    assert train(configure(*border)) == 0
    assert "note: the budget ended before images of 32, 48 px" in capsys.readouterr().out
    assert train(configure(*short)) == 0 and "this run is finished" in capsys.readouterr().out


def test_options_of_unused_methods_do_not_change_a_run(configure):
    """A default may have changed since the run began: it counts only if one of the recipes has the method."""
    plain, searched = configure("--methods=image_size"), configure("--methods=autoprog")
    older = {"autoprog.ema_decays": [0.998, 0.9986, 0.999, 0.9996]}
    assert changed_options(plain.flat() | older, plain) == []
    assert [phrase.split()[0] for phrase in changed_options(searched.flat() | older, searched)] == [
        "autoprog.ema_decays"
    ]


def test_two_processes_cannot_train_in_one_folder(configure, decoder):
    with open_trainer(configure()):
        with pytest.raises(ConfigError, match="another process is training"):
            train(configure())


def test_the_second_process_in_a_new_folder_leaves_it_alone(tmp_path: Path, monkeypatch):
    """Two processes found no folder and made it. The other process was the first to lock it."""
    folder = tmp_path / "run"
    folder.mkdir()
    with run_folder_lock(folder):
        (folder / "config.yaml").touch()
        monkeypatch.setattr(Path, "exists", lambda path: False)
        with pytest.raises(ConfigError, match="another process is training"), run_folder_lock(folder):
            pass
        assert (folder / "config.yaml").is_file()


def test_a_run_that_another_process_trained_meanwhile_is_continued(configure, decoder, monkeypatch):
    """A scheduler may start the command again while the earlier process is still saving."""
    config, opened = configure(), []

    def open_later(*arguments, **named):
        if not opened:
            opened.append(True)
            with open_trainer(config) as before:
                before.prepare()
                with before.sources.train.open(before.plan().feed, before.state.clock.position) as batches:
                    before.train_step(next(batches), before.plan())
                before.save()
        return open_sources(*arguments, **named)

    monkeypatch.setattr("vitlocal.train.build.open_sources", open_later)
    with open_trainer(config) as trainer:
        assert trainer.state.clock.step == 1


def test_loading_time_is_in_the_journal(configure, decoder, killed_after, tmp_path: Path, monkeypatch):
    """If all time counts, a run that is killed while it loads has spent the time of loading."""
    options = ("--budget.length=30s", "--budget.counts=wall", "--run.save_every=1steps", "--evaluate.every=0")
    with killed_after(2):
        train(configure(*options))
    spent, killed = [], RuntimeError("killed")

    def load(path: Path) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (spent and spent[-1] > spent[0]):
            spent.append(read_spent(tmp_path / "run" / "spent.json")[1])
            time.sleep(0.05)
        raise killed

    monkeypatch.setattr("vitlocal.train.checkpoint.load_checkpoint", load)
    with pytest.raises(RuntimeError, match="killed"):
        train(configure(*options), time.monotonic() - 5.0)
    assert 5 < spent[0] < spent[-1]


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path):
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(path, {"a": torch.zeros(10)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # Python ignores the signal of a larger file
    try:
        with pytest.raises((DataError, OSError), match=r"last\.pt"):
            save_checkpoint(path, {"a": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_kill_9_of_the_command_then_the_same_command(configure, folder: Path, tmp_path: Path):
    """The whole command as a user runs it, killed once it has logged a pass."""
    config = configure("--run.save_every=2steps", "--data.workers=1", "--budget.length=4ep")
    (tmp_path / "recipe.yaml").write_text(config.yaml())
    command = [sys.executable, "train_imagenet.py", "--config-file", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert log.read_text(), "no pass was logged in time"
    assert train(config) == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, 12, 16]


def test_killed_runs_keep_count_of_their_time(configure, folder: Path, tmp_path: Path, monkeypatch):
    """A run is killed before and after its first checkpoint. The rest of its budget ends at the nearest step."""
    config = configure("--run.save_every=2s", "--data.workers=1", "--budget.length=60s", "--methods=none",
                       "--evaluate.every=0")  # fmt: skip
    run, spent = tmp_path / "run", 0.0
    for least, saved in ((1.0, False), (3.5, True)):
        process = multiprocessing.get_context("forkserver").Process(target=train, args=(config,))
        process.start()
        deadline, before = time.monotonic() + 120, spent
        while spent < least or (saved and not (run / CHECKPOINT).exists()):
            assert process.is_alive() and time.monotonic() < deadline, process.exitcode
            time.sleep(0.02)
            spent = read_spent(run / JOURNAL)[0]
        process.kill()
        process.join()
        spent = read_spent(run / JOURNAL)[0]
        assert spent > before
    step = load_checkpoint(run / CHECKPOINT)["clock"]["step"]
    FakeTime(monkeypatch, repeat(1.0), step=2.0)
    assert train(config) == 0
    last = read_log(run)[-1]
    assert last["train_seconds"] == pytest.approx(60, abs=1.0) and last["lr"] == pytest.approx(1e-5)
    assert last["step"] == step + round((last["train_seconds"] - spent) / 2)  # the time of lost steps is spent
    assert train(config) == 0 and read_log(run)[-1] == last  # nothing is left


def test_the_origin_lists_every_machine_that_trained(configure, decoder, no_report, tmp_path: Path, monkeypatch):
    run, options = tmp_path / "run", ("--budget.length=2steps", "--run.save_every=1steps")
    monkeypatch.setattr("vitlocal.train.run_folder.hardware", lambda: {"cpu": "one", "gpu": None})
    with open_trainer(configure(*options)) as opened:
        opened.prepare()
        with opened.sources.train.open(opened.plan().feed, opened.state.clock.position) as batches:
            opened.train_step(next(batches), opened.plan())
        opened.save()
    monkeypatch.setattr("vitlocal.train.run_folder.hardware", lambda: {"cpu": "two", "gpu": "H"})
    assert train(configure(*options)) == 0
    monkeypatch.setattr("vitlocal.train.run_folder.hardware", lambda: {"cpu": "three", "gpu": None})
    assert train(configure(*options)) == 0  # trains no more
    assert [origin["machine"]["cpu"] for origin in read_origin(run)] == ["one", "two"]
    assert read_origin(run)[0]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (machine_of(run)["cpu"], machine_of(run)["gpu"]) == ("one, two", "H")
    assert machine_of(tmp_path) == {"cpu": None, "gpu": None, "commit": None}
    (run / "trained_on.jsonl").write_text("{")
    assert read_origin(run) == []


@pytest.mark.parametrize("progress", [True, False])
def test_progress_lines_without_a_terminal(tmp_path: Path, monkeypatch, capsys, progress: bool):
    """Lines come after pauses of 10, 20 and 40 seconds, and finally every ten minutes."""
    now = 1000.0
    monkeypatch.setattr("vitlocal.train.output.time.monotonic", lambda: now)
    monkeypatch.setattr("vitlocal.train.output.sys.stderr.isatty", lambda: False)
    output, printed = RunOutput(tmp_path, Length.parse("24h"), METRICS["classification"], progress), []
    output.begin(0, 0)
    for _ in range(3000):
        now += 1
        output.show(Progress(epoch=0.25, step=int(now), fraction=0.1), 6.9, 1e-3, 128, 2345.6)
        if lines := capsys.readouterr().out:
            printed.append(now - 1000)
            assert lines == "10.0 % of 24h: epoch 0.25  128 px  loss 6.900  2,346 images/s\n"
    output.close()
    assert printed == ([10, 30, 70, 150, 310, 630, 1230, 1830, 2430] if progress else [])
