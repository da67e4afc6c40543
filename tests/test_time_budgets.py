"""Runs under a budget in time: the reserve for their end, kills, compiling, and evaluations."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import pytest
from fake_time import FakeTime
from trainers import open_trainer

from vitlocal.errors import ConfigError, DataError
from vitlocal.plan import Plan
from vitlocal.report.run_folder import read_log
from vitlocal.train.budget import FINISH_SECONDS
from vitlocal.train.build import open_run
from vitlocal.train.command import end_warnings, train
from vitlocal.train.evaluator import Evaluator
from vitlocal.train.run_folder import CHECKPOINT
from vitlocal.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")

COUNTED = ("--budget.counts=wall", "--methods=none", "--train.batch_size=32")  # epochs of two seconds


def test_a_budget_of_training_time_ends_at_the_nearest_step(configure, decoder, tmp_path: Path, monkeypatch):
    """Steps take half a second. Evaluations and checkpoints do not count."""
    clock = FakeTime(monkeypatch, repeat(3.0), repeat(1.0))
    assert train(configure("--budget.length=10.1s", "--methods=none")) == 0
    last = read_log(tmp_path / "run")[-1]
    assert (last["train_seconds"], last["step"]) == (10.0, 20) and clock.now > 20
    assert last["lr"] == pytest.approx(1e-5) and last["top1"] is not None


def test_a_real_clock_ends_a_wall_clock_budget(configure, decoder, tmp_path: Path):
    """On a busy machine, the start may take the whole of a short budget, which is an error then."""
    for length in (4, 20, 100):
        options = (f"--budget.length={length}s", "--budget.counts=wall", "--evaluate.every=0")
        try:
            assert train(configure(*options, f"--run.folder={tmp_path}/{length}")) == 0
            break
        except (ConfigError, DataError):
            assert length < 100
    last = read_log(tmp_path / str(length))[-1]
    assert last["fraction"] == 1 and last["train_seconds"] < last["wall_seconds"] and last["top1"] is not None


def test_an_evaluation_that_would_leave_no_step_waits_for_the_end(configure, decoder, tmp_path: Path, monkeypatch):
    """The third epoch ends at 12 seconds, training at 13.4."""
    clock = FakeTime(monkeypatch, repeat(3.0))
    length = 16.4 + FINISH_SECONDS
    assert train(configure(f"--budget.length={length}s", *COUNTED)) == 0
    records = read_log(tmp_path / "run")
    assert [record["epoch"] for record in records if record["top1"] is not None] == [1, 2, records[-1]["epoch"]]
    assert records[-1]["epoch"] > 3 and records[-1]["lr"] == pytest.approx(1e-5)
    assert clock.now == pytest.approx(length, abs=0.5)


def test_a_delayed_evaluation_does_not_end_the_run_early(configure, decoder, tmp_path: Path, monkeypatch):
    clock = FakeTime(monkeypatch, chain([3.0, 9.0], repeat(3.0)))
    assert train(configure("--budget.length=40s", *COUNTED)) == 0
    assert clock.now == pytest.approx(40, abs=0.5)
    assert read_log(tmp_path / "run")[-1]["lr"] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("saves", "every"),
    [((1.5,), "none"), ((0.1, 6.0, 0.1), "10%"), ((4.0,), "10%"), ((4.0,), "60%")],
    ids=["at epochs only", "one delayed", "slow", "slow and few"],
)
def test_checkpoints_fit_into_the_budget(saves, every, configure, decoder, tmp_path: Path, monkeypatch):
    clock = FakeTime(monkeypatch, repeat(3.0), chain(saves, repeat(saves[-1])))
    options = ("--budget.length=60s", "--evaluate.every=0", f"--run.save_every={every}")
    assert train(configure(*options, *COUNTED)) == 0
    assert clock.now == pytest.approx(60, abs=0.6)
    assert read_log(tmp_path / "run")[-1]["lr"] == pytest.approx(1e-5)


def test_compiling_that_takes_the_rest_is_followed_by_no_step(configure, decoder, tmp_path: Path, monkeypatch):
    """Compiling for the second epoch takes 20 of 24 seconds."""
    clock, compile_for, compiled = FakeTime(monkeypatch, repeat(3.0)), Trainer.compile_for, []

    def compiling(self: Trainer, plan: Plan) -> None:
        compiled.append(self.state.clock.step)
        clock.now += 20.0 if self.state.clock.step == 4 else 0.0
        compile_for(self, plan)

    monkeypatch.setattr(Trainer, "compile_for", compiling)
    options = ("--budget.length=24s", "--evaluate.every=0", "--train.compile_at=stage", *COUNTED)
    assert train(configure(*options)) == 0
    last = read_log(tmp_path / "run")[-1]
    assert compiled == [0, 4] and last["step"] == 4 and last["top1"] is not None


def test_a_signal_while_compiling_takes_the_rest_leaves_the_evaluation_to_the_next_process(
    configure, decoder, tmp_path: Path, monkeypatch
):
    options = (
        "--budget.length=30s",
        "--evaluate.every=0",
        "--train.compile_at=stage",
        "--run.save_every=1steps",
        *COUNTED,
    )
    with monkeypatch.context() as patch:
        compile_for = Trainer.compile_for

        def compiling(self: Trainer, plan: Plan) -> None:
            if self.state.clock.step == 4:
                self.state.clock.timer.resume(0.0, 30.0)
                os.kill(os.getpid(), signal.SIGTERM)
            compile_for(self, plan)

        patch.setattr(Trainer, "compile_for", compiling)
        assert train(configure(*options)) == 143
    run = tmp_path / "run"
    assert not (run / "model.safetensors").exists() and (run / CHECKPOINT).exists()
    monkeypatch.setattr(Trainer, "train_step", None)
    assert train(configure(*options)) == 0
    last = read_log(run)[-1]
    assert last["step"] == 4 and last["top1"] is not None and (run / "model.safetensors").exists()


def test_one_delayed_batch_counts_once_in_the_estimate_of_an_evaluation(configure, decoder, monkeypatch):
    """Five of eight batches are measured, at 0.1 s each after 0.2 s to open the source; one takes a second more."""
    with open_trainer(configure("--budget.length=1h", "--budget.counts=wall", "--evaluate.batch_size=10")) as trainer:
        now, delays = [0.0], chain([0.0] * 3, [1.0], repeat(0.0))

        def accuracy(plan: Plan, stop: Callable[[], bool] = lambda: False, limit: int = 99) -> None:
            now[0] += 0.2
            for _ in range(limit):
                stop()
                now[0] += 0.1 + next(delays)

        monkeypatch.setattr(trainer.evaluator, "scores", accuracy)
        monkeypatch.setattr("vitlocal.train.evaluator.perf_counter", lambda: now[0])
        assert trainer.evaluator.estimate_seconds(trainer.plan()) == pytest.approx(0.2 + 8 * 0.1 + 1.0)


def test_objects_that_compiling_made_are_not_collected_while_a_run_trains(configure, decoder, monkeypatch):
    with open_trainer(configure("--budget.length=1h")) as trainer:
        monkeypatch.setattr(trainer.step, "warm_up", lambda feed, num_classes, rest: 1.0)  # seconds of compiling
        trainer.prepare()
        assert gc.get_freeze_count() > 100_000
    assert gc.get_freeze_count() == 0


def test_a_budget_with_no_time_to_train_is_refused(configure, decoder, tmp_path: Path):
    with pytest.raises(ConfigError, match="nothing is left to train"):
        train(configure("--budget.length=0.01s", "--budget.counts=wall"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("counts", "warns"), [("wall", True), ("train", False)])
def test_a_run_with_little_training_time_warns(configure, decoder, counts: str, warns: bool):
    with open_run(configure("--budget.length=1h", f"--budget.counts={counts}"), time.monotonic() - 100) as run:
        # More than 100 s, because building the run takes time too.
        assert any(re.match(r"0 of 1\d\d s were training", warning) for warning in end_warnings(run)) == warns


@pytest.mark.parametrize(("seconds", "warns"), [(35.0, True), (10.0, False)])
def test_a_run_that_evaluated_for_longer_than_it_trained_warns(configure, decoder, seconds: float, warns: bool):
    with open_run(configure("--evaluate.every=0.5"), None) as run:
        run.trainer.state.reserve.evaluations += [seconds / 2] * 2
        expected = (
            "evaluations took 35 s, and training 0 s; for fewer of them, set evaluate.every to more than 0.5 epochs"
        )
        assert (expected in end_warnings(run)) == warns
        run.trainer.state.reserve.evaluations[:] = [seconds]  # the last one
        assert expected not in end_warnings(run)


def test_a_run_killed_in_its_last_evaluation_only_repeats_that(configure, decoder, tmp_path: Path, monkeypatch):
    class Killed(Exception):
        pass

    def accuracy(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "scores", accuracy)
        with pytest.raises(Killed):
            train(configure("--budget.length=2s", "--evaluate.every=0"))
    steps = []
    monkeypatch.setattr(Trainer, "train_step", lambda *arguments: steps.append(arguments))
    assert train(configure("--budget.length=2s", "--evaluate.every=0")) == 0
    assert not steps and read_log(tmp_path / "run")[-1]["top1"] is not None


def test_a_run_that_had_spent_its_time_when_it_was_killed_is_evaluated(configure, decoder, stop_after, tmp_path: Path):
    """Time after the last checkpoint counts although its steps are lost, so that no step may be left."""
    stop_after(6)
    options = ("--budget.length=1h", "--evaluate.every=0", "--image_size.step_epochs=100")
    assert train(configure(*options)) == 143
    (tmp_path / "run" / "spent.json").write_text('{"train_seconds": 3600.0, "wall_seconds": 3601.0}\n')
    assert train(configure(*options)) == 0
    last = read_log(tmp_path / "run")[-1]
    assert last["step"] == 6 and last["top1"] is not None
    assert (tmp_path / "run" / CHECKPOINT).exists()
    assert train(configure(*options)) == 0 and read_log(tmp_path / "run")[-1] == last


@pytest.mark.parametrize("rows", ["even", "odd"])
def test_half_of_the_rows_are_counted(configure, decoder, tmp_path: Path, rows: str):
    assert train(configure("--budget.length=1ep", f"--evaluate.rows={rows}")) == 0
    classes = json.loads((tmp_path / "run" / "classes.json").read_text())
    total = sum(entry["images"] for entry in classes)
    assert len(classes) == 20 and total == 40  # of 80
    top1 = 100 * sum(entry["right"] for entry in classes) / total
    assert read_log(tmp_path / "run")[-1]["top1"] == pytest.approx(top1)


def test_the_average_can_forget_over_a_part_of_the_budget(configure, decoder, tmp_path: Path):
    assert train(configure("--train.ema_length=20%", "--budget.length=1ep")) == 0
    with pytest.raises(ConfigError, match="remove one of the two"):
        configure("--train.ema_length=20%", "--train.ema_decay=0.9")


def test_an_average_that_has_not_left_its_start_warns(configure, decoder, tmp_path: Path, capsys):
    """0.99 ** 8 = 92.3 % at the start and, as the run has as many steps as planned, at the end."""
    assert train(configure("--train.ema_decay=0.99", "--budget.length=8steps")) == 0
    text, a, b = capsys.readouterr().out, tmp_path / "a", tmp_path / "b"
    assert text.count("92.3 % of the weight average") == 2 and "use a smaller train.ema_decay" in text
    assert train(configure("--train.ema_length=9ep", "--budget.length=1ep", f"--run.folder={a}")) == 0
    assert capsys.readouterr().out.count("% of the weight average") == 1
    assert train(configure("--train.ema_length=10%", "--budget.length=1ep", f"--run.folder={b}")) == 0
    assert "of the weight average" not in capsys.readouterr().out


def test_a_budget_in_flops(configure, decoder, tmp_path: Path):
    """The run ends at the nearest step, with the final learning rate, although sizes cost different times."""
    options = ["--image_size.stages=16px until 30%,48px", "--budget.length=0.004TF", "--evaluate.every=0"]
    assert train(configure(*options)) == 0
    records = read_log(tmp_path / "run")
    last = records[-1]
    step = 6 * last["macs_per_image"] * 32
    assert last["flops"] == pytest.approx(4e9, abs=step / 2) and last["lr"] == pytest.approx(1e-5, rel=0.1)
    small = [record for record in records if record["image_size"] == 16][-1]
    assert small["flops"] == pytest.approx(1.2e9, abs=6 * small["macs_per_image"] * 32)


def test_the_first_plan_is_that_of_a_run_that_begins(configure, decoder, tmp_path: Path):
    """Time that passes before the first step is not part of the schedule, however much it is."""
    options = ("--budget.length=1h", "--budget.counts=wall", "--image_size.stages=16px until 30%,48px")
    with open_trainer(configure(*options), time.monotonic() - 1800) as trainer:
        assert trainer.plan().feed.size == 16 and trainer.state.initialized_shape == trainer.plan().shape
        trainer.prepare()
        assert trainer.plan().feed.size == 16 and trainer.state.clock.progress.fraction < 0.01
