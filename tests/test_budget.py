"""Budgets: the clock, where a schedule ends, stages as parts, what speeds buy."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest

from vitlocal.config import BudgetConfig, TrainConfig, read_config
from vitlocal.errors import ConfigError
from vitlocal.machine import awake_seconds
from vitlocal.methods.image_size import ImageSize
from vitlocal.methods.method import MethodContext
from vitlocal.plan import Feed, Plan, fold
from vitlocal.progress import Length, Progress, Stage
from vitlocal.train.checks import end_warnings
from vitlocal.train.clock import Clock
from vitlocal.train.ema import ModelEma
from vitlocal.train.folder import CHECKPOINT, JOURNAL
from vitlocal.train.journal import read_spent
from vitlocal.train.log import read_log
from vitlocal.train.loop import train
from vitlocal.train.optim import Schedule
from vitlocal.train.room import leaving_seconds, rehearse_evaluation
from vitlocal.train.run import Run, open_run
from vitlocal.train.simulate import Speed, spend

IMAGES, BATCH = 1000, 50


class Machine:
    """Steps of a clock under a time that only this moves."""

    def __init__(self, length: str, counts: str = "train"):
        self.time = 0.0
        self.budget = BudgetConfig(Length.parse(length), counts)
        self.schedule = Schedule(TrainConfig(lr=1.0, lr_batch=0, end_lr=0.001, schedule="linear"))
        self.clock = self.started()
        self.rate = math.nan

    def started(self) -> Clock:
        clock = Clock(self.budget, IMAGES, now=lambda: self.time)
        clock.start()
        return clock

    def step(self, seconds: float) -> None:
        self.rate = self.schedule(self.clock.ahead(BATCH))
        self.time += seconds
        self.clock.tick(BATCH)

    def killed(self, state: dict, lost: float) -> None:
        """The process dies and another one goes on from ``state``, of ``lost`` seconds ago; an hour passes."""
        spent = self.clock.train_seconds, self.clock.wall_seconds
        assert spent[0] - state["train_seconds"] == pytest.approx(lost)
        self.time += 3600
        self.clock = self.started()
        self.clock.load_state_dict(state)
        self.clock.spent_before(*spent)


@pytest.mark.parametrize("slow", [1.0, 3.7], ids=["even", "slowed down in the middle"])
def test_time_is_spent_to_half_a_step_with_the_rate_at_its_end(slow: float):
    machine = Machine("45s")
    while not machine.clock.spent:
        middle = 15 < machine.clock.train_seconds < 25
        machine.step(0.7 * (slow if middle else 1.0) + 0.01 * (machine.clock.step % 3))
    assert abs(machine.clock.train_seconds - 45) <= 0.36
    assert machine.rate == 0.001


def test_killed_twice_the_time_is_spent_all_the_same():
    machine = Machine("45s")
    for lost in (2.1, 0.7):
        for _ in range(20):
            machine.step(0.7)
        state = machine.clock.state_dict()
        for _ in range(round(lost / 0.7)):
            machine.step(0.7)
        machine.killed(state, lost)
    while not machine.clock.spent:
        machine.step(0.7)
    assert abs(machine.clock.train_seconds - 45) <= 0.36
    assert machine.clock.step == round(45 / 0.7) - 4  # those done again count as time, and once as steps
    assert machine.rate == 0.001


def test_a_spent_clock_stays_spent():
    machine = Machine("10s")
    while not machine.clock.spent:
        machine.step(0.7)
    assert machine.clock.train_seconds < 10
    machine.killed(machine.clock.state_dict(), 0)
    assert machine.clock.spent


def test_one_slow_step_does_not_end_a_run_early():
    machine = Machine("20s")
    for seconds in (0.5, 0.5, 0.5, 12.0, 0.5):
        machine.step(seconds)
        assert not machine.clock.spent


@pytest.mark.parametrize(("length", "steps"), [("2ep", 40), ("17steps", 17)])
def test_the_last_of_counted_steps_is_at_the_end_rate(length: str, steps: int):
    machine = Machine(length)
    rates = []
    while not machine.clock.spent:
        machine.step(0.1)
        rates.append(machine.rate)
    assert len(rates) == steps and rates[-1] == 0.001
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(1 - 0.999 / steps)


def test_room_is_kept_of_a_budget_in_which_all_counts():
    machine = Machine("60s", "wall")
    machine.clock.room = 8.0
    while not machine.clock.spent:
        machine.step(0.5)
        if machine.clock.step == 20:
            with machine.clock.paused():
                machine.time += 10  # an evaluation
    assert machine.clock.wall_seconds == pytest.approx(52, abs=0.26)
    assert machine.clock.train_seconds == pytest.approx(42, abs=0.26)
    assert machine.rate == 0.001


# --- stages ---------------------------------------------------------------------------------------------------------


def sizes_at(stages: str, *points: Progress) -> list[int]:
    config = read_config([f"--image_size.stages={stages}"], {})
    method, start = ImageSize(MethodContext(config)), Plan(Feed(224, 8))
    return [fold([method], start, at).feed.size for at in points]


def test_stages_end_by_parts_of_the_budget():
    fractions = [Progress(fraction=part) for part in (0, 0.0999, 0.1, 0.29, 0.3, 1.0)]
    assert sizes_at("32px until 10 %, 64px until 30%, 224px", *fractions) == [32, 32, 64, 64, 224, 224]


def test_stages_end_by_any_length():
    at = [Progress(epoch=1.9), Progress(epoch=2, step=9), Progress(epoch=2, step=10), Progress(3, 11, 0, 3600, 0.5)]
    assert sizes_at("32px until 2ep, 64px until 10steps, 96px until 1h, 128px", *at) == [32, 64, 96, 128]


@pytest.mark.parametrize(
    ("stages", "part"),
    [
        ("32px until 10%", "the last not"),
        ("32px, 64px", "each stage but the last"),
        ("32px until 10%, 64px until 5%, 224px", "5% does not come after 10%"),
        ("32 until 10%, 224px", "a size and its end"),
        ("32px until 120%, 224px", "a size and its end"),
        ("32px until 10%, 256px", "256 px is larger than model.size"),
    ],
)
def test_wrong_stages(stages: str, part: str):
    with pytest.raises(ConfigError, match=part):
        read_config(["--methods=image_size", f"--image_size.stages={stages}"], {})


def test_stages_are_written_into_a_runs_recipe(tmp_path: Path):
    config = read_config(["--methods=image_size", "--image_size.stages=32px until 10%, 224px"], {})
    (tmp_path / "again.yaml").write_text(config.yaml())
    assert read_config(["-C", str(tmp_path / "again.yaml")], {}) == config


@pytest.mark.parametrize("option", ["budget.length=50%", "train.warmup=120%", "train.ema_length=x"])
def test_parts_that_are_none(option: str):
    with pytest.raises(ConfigError, match=option.partition("=")[0]):
        read_config([f"--{option}"], {})


# --- what a budget buys ---------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("no_report")

SPEEDS = {32: Speed(100.0, 10), 64: Speed(25.0, 10)}


def test_spending_walks_through_stages():
    stages = (Stage.parse("32px until 2ep"), Stage.parse("64px"))
    first, last = spend(stages, Length.parse("60s"), 1000, SPEEDS)
    assert (first.images, first.seconds, first.epochs) == (2000, pytest.approx(20), pytest.approx(2))
    assert (last.images, last.seconds, last.epochs) == (1000, pytest.approx(40), pytest.approx(1))
    assert last.end.step == 300 and last.end.fraction == pytest.approx(1)


@pytest.mark.parametrize("budget", ["100s", "4ep", "400steps"])
def test_spending_by_parts(budget: str):
    stages = (Stage.parse("32px until 25%"), Stage.parse("64px"))
    first, last = spend(stages, Length.parse(budget), 1000, SPEEDS)
    assert Length.parse(budget).fraction_done(first.end) == pytest.approx(0.25)
    assert Length.parse(budget).fraction_done(last.end) == pytest.approx(1)


def test_spending_ends_where_the_budget_does():
    stages = (Stage.parse("32px until 5ep"), Stage.parse("64px until 9ep"), Stage.parse("32px"))
    spent = spend(stages, Length.parse("20s"), 1000, SPEEDS, used=10.0)
    assert [part.images for part in spent] == [1000, 0, 0]


# --- runs -----------------------------------------------------------------------------------------------------------


def test_the_average_forgets_over_a_part_of_the_budget(configure, decoder, tmp_path: Path):
    average = ModelEma.__new__(ModelEma)
    average.decay, average.length = None, Length.parse("10%")
    kept = average.decay_between(Progress(fraction=0.30), Progress(fraction=0.35))
    assert kept == pytest.approx(math.exp(-0.5))
    assert train(configure("--train.ema_length=20%", "--budget.length=1ep")) == 0
    with pytest.raises(ConfigError, match="keep one of the two"):
        configure("--train.ema_length=20%", "--train.ema_decay=0.9")


def test_a_budget_that_counts_everything_keeps_room(configure, decoder, tmp_path: Path, monkeypatch):
    # The real rehearsal would find seconds where other tests keep the machine busy.
    monkeypatch.setattr("vitlocal.train.room.rehearse_finish", lambda run: (0.1, 1.0))
    assert train(configure("--budget.length=6s", "--budget.counts=wall", "--evaluate.every=0")) == 0
    last = read_log(tmp_path / "run")[-1]
    assert last["train_seconds"] < last["wall_seconds"]
    assert last["lr"] == pytest.approx(1e-5, rel=0.1) and last["top1"] is not None


class Watched:
    """A watch on which half a second passes in each step, two in the export, and what is said in each evaluation and
    checkpoint."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, evaluations: Iterator[float], saves: Iterator[float] | None = None
    ):  # fmt: skip
        self.now = 0.0

        def save(path: Path, state: dict) -> None:
            self.now += next(saves) if saves else 0.0

        monkeypatch.setattr("vitlocal.train.run.save_checkpoint", save)

        def taking(name: str, seconds: Callable[[], float]) -> None:
            original = getattr(Run, name)

            def timed(run: Run, *operands: object) -> object:
                self.now += seconds()
                return original(run, *operands)

            monkeypatch.setattr(Run, name, timed)

        monkeypatch.setattr("vitlocal.train.run.Clock", lambda *budget, began: Clock(*budget, now=lambda: self.now))
        monkeypatch.setattr("vitlocal.train.run.perf_counter", lambda: self.now)
        monkeypatch.setattr("vitlocal.train.room.rehearse_evaluation", lambda run: 3.0)
        monkeypatch.setattr("vitlocal.train.room.rehearse_finish", lambda run: (0.0, 2.0))
        taking("train_on", lambda: 0.5)
        taking("evaluate", lambda: next(evaluations))
        taking("export", lambda: 2.0)


COUNTED = ("--budget.counts=wall", "--methods=none", "--train.batch_size=32")  # epochs of two seconds


def test_room_is_kept_for_what_comes_after_training(configure, decoder, tmp_path: Path, monkeypatch):
    """An evaluation that would leave no step waits for the end: the third epoch ends at 12, training at 13.4."""
    watch = Watched(monkeypatch, repeat(3.0))
    assert train(configure("--budget.length=18.4s", *COUNTED)) == 0
    records = read_log(tmp_path / "run")
    assert [record["epoch"] for record in records if record["top1"] is not None] == [1, 2, records[-1]["epoch"]]
    assert records[-1]["epoch"] > 3 and records[-1]["lr"] == pytest.approx(1e-5)
    assert watch.now == pytest.approx(18.4, abs=0.5)


def test_an_evaluation_that_was_held_up_does_not_end_the_run_early(configure, decoder, tmp_path: Path, monkeypatch):
    watch = Watched(monkeypatch, chain([3.0, 9.0], repeat(3.0)))
    assert train(configure("--budget.length=40s", *COUNTED)) == 0
    assert watch.now == pytest.approx(40, abs=0.5)
    assert read_log(tmp_path / "run")[-1]["lr"] == pytest.approx(1e-5)


def test_a_checkpoint_that_leaves_no_step_after_it_is_left_out(configure, decoder, tmp_path: Path, monkeypatch):
    """Saving takes 1.5 seconds here; the second epoch ends 1.2 before the room that is kept."""
    watch = Watched(monkeypatch, repeat(3.0), repeat(1.5))
    monkeypatch.setattr("vitlocal.train.room.rehearse_finish", lambda run: (1.5, 2.0))
    options = ("--budget.length=14.7s", "--evaluate.every=0", "--run.save_every=none")
    assert train(configure(*options, *COUNTED)) == 0
    assert watch.now == pytest.approx(14.7, abs=0.5) and read_log(tmp_path / "run")[-1]["lr"] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("saves", "every"), [((0.0, 6.0, 0.0), "10%"), ((4.0,), "10%"), ((4.0,), "60%")],
    ids=["one held up", "slower than rehearsed", "slower than rehearsed, and one"],
)  # fmt: skip
def test_checkpoints_keep_the_room_that_they_take(saves, every, configure, decoder, tmp_path: Path, monkeypatch):
    watch = Watched(monkeypatch, repeat(3.0), chain(saves, repeat(saves[-1])))
    options = ("--budget.length=60s", "--evaluate.every=0", f"--run.save_every={every}")
    assert train(configure(*options, *COUNTED)) == 0
    assert watch.now == pytest.approx(60, abs=0.6)
    assert read_log(tmp_path / "run")[-1]["lr"] == pytest.approx(1e-5)


def test_compiling_that_takes_what_was_left_is_followed_by_no_step(configure, decoder, tmp_path: Path, monkeypatch):
    """Of 24 seconds, 17 are for training; compiling for the second epoch takes 20."""
    watch, warm, warmed = Watched(monkeypatch, repeat(3.0)), Run.warm, []

    def compiling(run: Run, plan: Plan) -> None:
        warmed.append(run.clock.step)
        watch.now += 20.0 if run.clock.step == 4 else 0.0
        warm(run, plan)

    monkeypatch.setattr(Run, "warm", compiling)
    options = ("--budget.length=24s", "--evaluate.every=0", "--train.compile_at=stage", *COUNTED)
    assert train(configure(*options)) == 0
    last = read_log(tmp_path / "run")[-1]
    assert warmed == [0, 4] and last["step"] == 4 and last["top1"] is not None


def test_a_signal_while_compiling_takes_what_was_left_leaves_evaluation_to_the_next(
    configure, decoder, tmp_path: Path, monkeypatch
):
    """Nothing is exported that was not evaluated; the same command evaluates it."""
    options = (
        "--budget.length=30s",
        "--evaluate.every=0",
        "--train.compile_at=stage",
        "--run.save_every=1steps",
        *COUNTED,
    )
    with monkeypatch.context() as patch:
        warm, count = Run.warm, [0]

        def compiling(run: Run, plan: Plan) -> None:
            count[0] += 1
            if run.clock.step == 4:
                run.clock.pass_over(30.0)
                os.kill(os.getpid(), signal.SIGTERM)
            warm(run, plan)

        patch.setattr(Run, "warm", compiling)
        assert train(configure(*options)) == 143
    run = tmp_path / "run"
    assert not (run / "model.safetensors").exists() and (run / CHECKPOINT).exists()
    monkeypatch.setattr(Run, "train_on", None)
    assert train(configure(*options)) == 0
    last = read_log(run)[-1]
    assert last["step"] == 4 and last["top1"] is not None and (run / "model.safetensors").exists()


def test_a_batch_that_was_held_up_is_not_multiplied(configure, decoder, monkeypatch):
    """Five batches of eight are rehearsed, at 0.1 s each and 0.2 s to open the source; one takes a second more."""
    with open_run(configure("--budget.length=1h", "--budget.counts=wall", "--evaluate.batch_size=10")) as run:
        now, held_up = [0.0], chain([0.0] * 3, [1.0], repeat(0.0))

        def accuracy(stop: Callable[[], bool] = lambda: False, limit: int = 99, plan: Plan | None = None) -> None:
            now[0] += 0.2
            for _ in range(limit):
                stop()
                now[0] += 0.1 + next(held_up)

        run.accuracy = accuracy
        monkeypatch.setattr("vitlocal.train.room.perf_counter", lambda: now[0])
        assert rehearse_evaluation(run) == pytest.approx(0.2 + 8 * 0.1 + 1.0)


def test_a_cold_disk_does_not_make_leaving_slow_and_a_busy_machine_does(tmp_path: Path, monkeypatch):
    before = awake_seconds()
    time.sleep(0.5)
    assert awake_seconds() - before < 0.4
    (tmp_path / "schedstat").write_text("3500000000 1500000000 965\n")
    assert awake_seconds(tmp_path / "schedstat") == 5.0
    (tmp_path / "schedstat").write_text("0 0 0\n")  # a kernel that does not count
    for path in (tmp_path / "schedstat", tmp_path / "none"):
        assert awake_seconds(path) == pytest.approx(time.process_time(), abs=0.1)
    monkeypatch.setattr("vitlocal.train.room.awake_seconds", lambda: 5.0)
    monkeypatch.setattr("vitlocal.train.room.monotonic", lambda: 100.0)
    assert leaving_seconds(began=40.0) == pytest.approx(0.3)
    assert leaving_seconds(began=99.0) == pytest.approx(0.06)  # in a process that did something else before


def test_what_a_process_takes_to_end_is_counted_when_a_run_is_stopped(configure, decoder, tmp_path: Path):
    with open_run(configure("--budget.length=1h", "--budget.counts=wall")) as run:
        run.leaving, run.interrupted = 50.0, signal.SIGINT
    assert 50 < read_spent(tmp_path / "run" / JOURNAL)[1] < 150


def test_a_process_leaves_with_all_said_and_nothing_taken_apart():
    code = """
import atexit, sys
from vitlocal.machine import leave
atexit.register(print, "taken apart")
print("said"), print("and why", file=sys.stderr)
leave(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "and why\n")


def test_the_collector_spares_what_compiling_made_while_a_run_trains(configure, decoder):
    with open_run(configure("--budget.length=1h")) as run:
        run.step.warm = lambda feed, classes: 1.0  # seconds that it took to compile
        run.warm_up()
        assert gc.get_freeze_count() > 100_000
    assert gc.get_freeze_count() == 0


def test_processor_time_stands_while_others_have_the_processor():
    clock = Clock(BudgetConfig(Length.parse("1h"), "cpu"), IMAGES)
    clock.start()
    before, began = clock.train_seconds, clock.wall_seconds
    time.sleep(0.3)
    assert clock.train_seconds - before < 0.2 and clock.wall_seconds - began >= 0.3
    assert not clock.counts_all and clock.seconds < 0.3


def test_a_damaged_journal_leaves_what_the_checkpoint_knows(tmp_path: Path, capsys):
    (tmp_path / "spent.json").write_text("")
    assert read_spent(tmp_path / "spent.json") == (0.0, 0.0) and "is damaged" in capsys.readouterr().err


def test_a_budget_with_no_time_to_train_is_refused(configure, decoder, tmp_path: Path):
    with pytest.raises(ConfigError, match="nothing is left to train"):
        train(configure("--budget.length=0.01s", "--budget.counts=wall"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("counts", "told"), [("wall", True), ("train", False)])
def test_a_run_that_hardly_trained_says_so(configure, decoder, counts: str, told: bool):
    with open_run(configure("--budget.length=1h", f"--budget.counts={counts}"), time.monotonic() - 100) as run:
        assert any(note.startswith("0 of 100 s were training") for note in end_warnings(run)) == told


def test_a_run_killed_in_its_last_evaluation_has_only_that_left(configure, decoder, tmp_path: Path, monkeypatch):
    class Killed(Exception):
        pass

    def evaluate(self: Run) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", evaluate)
        with pytest.raises(Killed):
            train(configure("--budget.length=2s", "--evaluate.every=0"))
    steps = []
    monkeypatch.setattr(Run, "train_on", lambda *arguments: steps.append(arguments))
    assert train(configure("--budget.length=2s", "--evaluate.every=0")) == 0
    assert not steps and read_log(tmp_path / "run")[-1]["top1"] is not None


def test_a_run_whose_time_went_by_before_it_was_killed_is_evaluated(configure, decoder, tmp_path: Path, monkeypatch):
    """Time after the last checkpoint counts, though its steps are lost: no further step may be left."""
    count = [0]
    original = Run.train_on

    def train_on(self: Run, batch, plan) -> None:
        original(self, batch, plan)
        count[0] += 1
        if count[0] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "train_on", train_on)
    options = ("--budget.length=1h", "--evaluate.every=0", "--image_size.step_epochs=100")
    assert train(configure(*options)) == 143
    (tmp_path / "run" / "spent.json").write_text('{"train_seconds": 3600.0, "wall_seconds": 3601.0}\n')
    assert train(configure(*options)) == 0
    last = read_log(tmp_path / "run")[-1]
    assert last["step"] == 6 and last["top1"] is not None
    assert (tmp_path / "run" / CHECKPOINT).exists()
    assert train(configure(*options)) == 0 and read_log(tmp_path / "run")[-1] == last


@pytest.mark.parametrize("part", ["even", "odd"])
def test_half_of_the_rows_count(configure, decoder, tmp_path: Path, part: str):
    assert train(configure("--budget.length=1ep", f"--evaluate.rows={part}")) == 0
    classes = json.loads((tmp_path / "run" / "classes.json").read_text())
    whole = sum(entry["images"] for entry in classes)
    assert len(classes) == 20 and whole == 40  # of 80
    top1 = 100 * sum(entry["right"] for entry in classes) / whole
    assert read_log(tmp_path / "run")[-1]["top1"] == pytest.approx(top1)


def test_a_budget_in_flops(configure, decoder, tmp_path: Path):
    """Ends at the step nearest to it, with the last learning rate there, whatever the sizes cost."""
    options = ["--image_size.stages=16px until 30%,48px", "--budget.length=0.004TF", "--evaluate.every=0"]
    assert train(configure(*options)) == 0
    records = read_log(tmp_path / "run")
    last = records[-1]
    step = 6 * last["macs_per_image"] * 32
    assert last["flops"] == pytest.approx(4e9, abs=step / 2) and last["lr"] == pytest.approx(1e-5, rel=0.1)
    small = [record for record in records if record["image_size"] == 16][-1]
    assert small["flops"] == pytest.approx(1.2e9, abs=6 * small["macs_per_image"] * 32)
    spent = spend(tuple(map(Stage.parse, ("16px until 30%", "48px"))), Length.parse("0.004TF"), 120,
                  {16: Speed(100.0, 32, 6.0 * small["macs_per_image"]), 48: Speed(50.0, 32, step / 32)})  # fmt: skip
    assert [part.images for part in spent] == [
        pytest.approx(1.2e9 / (6 * small["macs_per_image"]), abs=1), pytest.approx(2.8e9 / (step / 32), abs=1)
    ]  # fmt: skip
