"""Several processes: two of them, with gloo on the CPU, train as one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_processes import WAITING, start_ranks
from safetensors.torch import load_file
from trainers import open_trainer

from vitlocal.config import read_config
from vitlocal.data.shares import Share
from vitlocal.errors import ConfigError, DataError, Diverged
from vitlocal.train.budget import FINISH_SECONDS
from vitlocal.train.build import build_run, sources_of
from vitlocal.train.command import train
from vitlocal.train.distributed import ALONE, Ranks, find_ranks

ROOT = Path(__file__).parent.parent
# A batch of 34 can be shared evenly. The last batch of an epoch has 18 of 120 images: 4 pairs for one process and 5 for
# the other. Evaluation in batches of 79 leaves one image for the last batch.
OPTIONS = [
    "--model.name=vitlocal_tiny_patch8_64", "--model.size=48", "--model.depth=2", "--model.width=32",
    "--model.heads=2", "--model.drop_path=0.2", "--methods=image_size", "--image_size.init=16",
    "--image_size.step_pixels=16", "--image_size.step_epochs=1", "--train.batch_size=34", "--train.lr_batch=0",
    "--train.ema_decay=0.9", "--train.clip_norm=1", "--augment.randaugment=9", "--augment.mixup=0.8",
    "--augment.cutmix=1",
    "--augment.random_erasing=0.5", "--evaluate.batch_size=79", "--budget.length=3ep", "--run.device=cpu",
    "--run.progress=no",
    "--run.threads=1", "--data.workers=1",
]  # fmt: skip


WITH_PACKAGE = os.environ | {"PYTHONPATH": str(ROOT)}  # for scripts in another folder


def command(
    processes: int, folder: Path, run: Path, *options: str, script: str | Path = "train_imagenet.py"
) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*start, str(script), *options_of(folder, run), *options]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def accuracies(run: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["top1"], line["top5"]) for line in lines]


def farthest(one: Path, other: Path) -> float:
    """The largest difference between two runs' exported weights."""
    first, second = (load_file(run / "model.safetensors") for run in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def options_of(folder: Path, run: Path) -> list[str]:
    return [*OPTIONS, f"--data.root={folder}", f"--run.folder={run}"]


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(read_config(options_of(folder, run), {})) == 0
    return run


def test_two_processes_train_as_one(folder: Path, alone: Path, tmp_path: Path):
    run = tmp_path / "run"
    start = command(2, folder, run, "--train.grad_accum_steps=2")
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done:") == 1 and "2 processes" in done.stdout  # one of them speaks
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
    assert accuracies(run) == accuracies(alone)  # every image of the validation split once
    assert farthest(run, alone) < 1e-5


def test_processes_whose_launcher_is_killed_save_and_one_continues(folder: Path, alone: Path, tmp_path: Path, capsys):
    """Linux sends them SIGTERM. Then a single process continues from the checkpoint."""
    run, script = tmp_path / "run", tmp_path / "waiting.py"
    script.write_text(WAITING)
    process = subprocess.Popen(command(2, folder, run, script=script), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, start_new_session=True, env=WITH_PACKAGE)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    out, err = process.communicate(timeout=120)  # returns when the last process has closed its output
    assert "stopped by SIGTERM at step" in out and "Traceback" not in err and len(losses(run)) < 3
    assert (run / "checkpoints" / "last.pt").exists()
    capsys.readouterr()
    assert train(read_config(options_of(folder, run), {})) == 0
    assert "continuing at epoch" in capsys.readouterr().out
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
    assert farthest(run, alone) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_signal_to_one_process_ends_all(folder: Path, tmp_path: Path, lost: int, number: signal.Signals):
    run = tmp_path / "run"
    options = [*options_of(folder, run), "--budget.length=100000steps", "--methods=none", "--evaluate.every=0"]
    processes = start_ranks(3, [*options, "--run.save_every=4steps"])
    while not (run / "checkpoints" / "last.pt").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[lost].send_signal(number)
    texts = [process.communicate(timeout=60)[0] for rank, process in enumerate(processes) if rank != lost]
    processes[lost].kill()
    texts += processes[lost].communicate()
    assert "Traceback" not in "".join(filter(None, texts)) and "frame #" not in "".join(filter(None, texts))
    codes = {process.returncode for rank, process in enumerate(processes) if rank != lost}
    assert codes == {143 if number == signal.SIGTERM else 1} and (run / "checkpoints" / "last.pt").exists()
    assert number == signal.SIGTERM or all(f"has lost rank {lost} (" in text for text in texts[:2])


SPOILED = """
import sys, torch
from vitlocal.train.step import TrainStep
original = TrainStep._update
def update(self, lr, ema_decay, number):
    original(self, lr, ema_decay, number)
    if number == 5 and self.ranks.rank == 1 and self.seed == 0:
        next(self.ema.model.parameters()).data.view(-1)[0] = float("nan")  # of one process only
TrainStep._update = update
from vitlocal.launch import train
train()
"""


def test_two_processes_rewind_together(folder: Path, tmp_path: Path):
    run, script = tmp_path / "run", tmp_path / "spoiled.py"
    script.write_text(SPOILED)
    options = ("--run.on_nan=rewind", "--run.save_every=2steps", "--budget.length=2ep")
    start = command(2, folder, run, *options, script=script)
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=300, env=WITH_PACKAGE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(rewind 1 of 3)") == 1
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record.get("rewinds") for record in records] == [None, 1]


@pytest.mark.slow
def test_two_processes_end_together_when_the_time_is_up(folder: Path, tmp_path: Path):
    start = command(2, folder, tmp_path / "run", "--budget.length=2s", "--methods=none", "--evaluate.every=0")
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["fraction"] == 1 and last["top1"] is not None


def test_wrong_starts_are_errors(configure, decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = configure("--train.batch_size=3", "--evaluate.size=32")
    monkeypatch.setattr(Ranks, "wrap", lambda ranks, module, uses_all=True: module)  # no other process is there
    with pytest.raises(ConfigError, match="3 is too small for 2 processes"):
        build_run(config, sources_of(config, torch.device("cpu")), torch.device("cpu"), ranks=Ranks(0, 2, 0, 2))
    with pytest.raises(ConfigError, match="LOCAL_RANK, LOCAL_WORLD_SIZE is not set"):
        find_ranks({"WORLD_SIZE": "2", "RANK": "0"})
    assert find_ranks({}).world == 1


class Follower(Ranks):
    """Rank 1 of two processes. A test states the values that rank 0 sends."""

    def __init__(self, change) -> None:
        super().__init__(1, 2, 1, 2)
        self.change = change

    def broadcast_floats(self, values: list[float]) -> list[float]:
        return self.change(*values)


def test_rank_0_decides_the_clock_and_the_end_and_plans_are_compared(configure, decoder):
    with open_trainer(configure()) as trainer:
        plan = trainer.plan()
        trainer._ranks = Follower(
            lambda seconds, pace, stop, over, mark: [77.0, pace, float(signal.SIGTERM), 0.0, mark]
        )
        trainer.sync_ranks(plan)
        assert trainer.state.clock.progress.seconds == 77 and trainer.stop_signal is signal.SIGTERM and trainer.stopped
        trainer._ranks = Follower(lambda seconds, pace, stop, over, mark: [78.0, pace, 0.0, 0.0, mark + 1])
        with pytest.raises(RuntimeError, match="rank 1 differs from rank 0"):
            trainer.sync_ranks(plan)
        trainer._ranks = Follower(lambda seconds, pace, stop, over, mark: [78.0, pace, 0.0, 1.0, mark])
        with pytest.raises(Diverged):  # rank 0 has seen a loss that is not finite
            trainer.sync_ranks(plan)
        trainer._ranks = ALONE


def test_a_process_that_lost_the_others_reports_it(monkeypatch: pytest.MonkeyPatch):
    """This happens, for example, if rank 0 refuses a checkpoint."""

    def lost(*_, **__) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    for name in ("broadcast", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, lost)
    ranks = Ranks(1, 2, 1, 2)
    for hears in (lambda: ranks.broadcast_floats([1.0]), lambda: ranks.broadcast({})):
        with pytest.raises(DataError, match=r"rank 1 has lost the other processes \(Connection closed"):
            with ranks.named_losses():
                hears()

    def broken(*_, **__) -> None:
        raise RuntimeError("op.preamble.length <= op.nbytes. 32 vs 24")

    monkeypatch.setattr(torch.distributed, "broadcast", broken)
    with pytest.raises(RuntimeError, match="preamble"):  # our own mistake keeps its traceback
        with ranks.named_losses():
            ranks.broadcast_floats([1.0])


def test_rank_0_decides_the_reserve(configure, decoder, monkeypatch):
    with open_trainer(configure("--budget.length=1h", "--budget.counts=wall")) as trainer:
        trainer._ranks = Follower(lambda *values: list(values))
        trainer._ranks = Follower(lambda seconds: [4.0])  # rank 0 measured this
        monkeypatch.setattr(trainer.evaluator, "estimate_seconds", lambda plan: 1000.0)  # and this process that
        trainer.state.reserve.evaluations.append(trainer._of_rank_0(trainer.evaluator.estimate_seconds(trainer.plan())))
        trainer._update_reserve()
        assert trainer.state.clock.reserve_seconds == 4 + FINISH_SECONDS
        trainer._ranks = ALONE


def test_short_batches_are_for_the_first_processes():
    """Rank 0's BatchNorm is the one that is evaluated."""
    for total in range(1, 20):
        sizes = [len(Share(rank, 8).places(total)) for rank in range(8)]
        assert sum(sizes) == total and sizes[0] and max(sizes) - min(sizes) <= 3  # a pair, and the middle


def test_alone_everything_is_free():
    ranks = find_ranks({})
    module = torch.nn.Linear(2, 2)
    assert (
        ranks.first
        and ranks.wrap(module) is module
        and ranks.broadcast_floats([1.5]) == [1.5]
        and ranks.broadcast("x") == "x"
    )
    assert ranks.share.places(5).tolist() == [0, 1, 2, 3, 4]
