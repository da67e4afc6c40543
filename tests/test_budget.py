"""The budget's clock, timer and reserve."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitlocal.progress import Length
from vitlocal.schedule import LRSchedule
from vitlocal.train.budget import FINISH_SECONDS, Clock, FinalReserve, journal, journal_interval, read_spent

IMAGES, BATCH = 1000, 50


class Machine:
    """Takes steps of a clock, and is the only one that moves its time."""

    def __init__(self, length: str, counts: str = "train"):
        self.time = 0.0
        self.length, self.counts = length, counts
        self.schedule = LRSchedule("linear", 1.0, 0.001)
        self.clock = self.started()
        self.rate = math.nan

    def started(self) -> Clock:
        clock = Clock(self.length, self.counts, IMAGES, now=lambda: self.time)
        clock.start()
        return clock

    def step(self, seconds: float) -> None:
        self.rate = self.schedule(self.clock.after_step(BATCH))
        self.time += seconds
        self.clock.record_step(BATCH)
        self.clock.advance()

    def killed(self, state: dict, lost: float) -> None:
        """The process dies, and another one continues from ``state``, which is ``lost`` seconds old, an hour later."""
        timer = self.clock.timer
        spent = timer.train_seconds, timer.wall_seconds
        assert spent[0] - state["train_seconds"] == pytest.approx(lost)
        self.time += 3600
        self.clock = self.started()
        self.clock.load_state_dict(state)
        self.clock.timer.resume(*spent)


@pytest.mark.parametrize("slow", [1.0, 3.7], ids=["even", "slower in the middle"])
def test_time_ends_within_half_a_step_at_the_final_rate(slow: float):
    machine = Machine("45s")
    while not machine.clock.progress.is_end:
        middle = 15 < machine.clock.timer.train_seconds < 25
        machine.step(0.7 * (slow if middle else 1.0) + 0.01 * (machine.clock.step % 3))
    assert abs(machine.clock.timer.train_seconds - 45) <= 0.36
    assert machine.rate == 0.001


def test_a_run_that_is_killed_twice_ends_in_time():
    machine = Machine("45s")
    for lost in (2.1, 0.7):
        for _ in range(20):
            machine.step(0.7)
        state = machine.clock.state_dict()
        for _ in range(round(lost / 0.7)):
            machine.step(0.7)
        machine.killed(state, lost)
    while not machine.clock.progress.is_end:
        machine.step(0.7)
    assert abs(machine.clock.timer.train_seconds - 45) <= 0.36
    assert machine.clock.step == round(45 / 0.7) - 4  # repeated steps count as time, and once as steps
    assert machine.rate == 0.001


def test_a_spent_clock_stays_spent():
    machine = Machine("10s")
    while not machine.clock.progress.is_end:
        machine.step(0.7)
    assert machine.clock.timer.train_seconds < 10
    machine.killed(machine.clock.state_dict(), 0)
    assert machine.clock.progress.is_end


def test_one_slow_step_does_not_end_a_run_early():
    machine = Machine("20s")
    for seconds in (0.5, 0.5, 0.5, 12.0, 0.5):
        machine.step(seconds)
        assert not machine.clock.progress.is_end


@pytest.mark.parametrize(("length", "steps"), [("2ep", 40), ("17steps", 17)])
def test_the_last_of_counted_steps_is_at_the_final_rate(length: str, steps: int):
    machine = Machine(length)
    rates = []
    while not machine.clock.progress.is_end:
        machine.step(0.1)
        rates.append(machine.rate)
    assert len(rates) == steps and rates[-1] == 0.001
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(1 - 0.999 / steps)


def test_a_wall_clock_budget_keeps_its_reserve():
    machine = Machine("60s", "wall")
    machine.clock.reserve_seconds = 8.0
    while not machine.clock.progress.is_end:
        machine.step(0.5)
        if machine.clock.step == 20:
            with machine.clock.timer.paused():
                machine.time += 10  # an evaluation
    assert machine.clock.timer.wall_seconds == pytest.approx(52, abs=0.26)
    assert machine.clock.timer.train_seconds == pytest.approx(42, abs=0.26)
    assert machine.rate == 0.001


def test_a_reserve_that_shrinks_does_not_move_the_schedule_back():
    machine = Machine("60s", "wall")
    machine.clock.reserve_seconds = 20.0
    for _ in range(50):
        machine.step(0.5)
    before = machine.clock.progress.fraction
    machine.clock.reserve_seconds = 5.0
    assert machine.clock.progress.fraction == before


def test_time_before_the_first_step_is_not_part_of_the_schedule():
    machine = Machine("60s", "wall")
    machine.clock = Clock("60s", "wall", IMAGES, now=lambda: machine.time)
    machine.time = 15.0
    assert machine.clock.progress.fraction == 0.0
    machine.clock.start()
    assert machine.clock.progress.fraction == 0.0
    machine.step(0.5)
    assert machine.clock.progress.fraction == pytest.approx(0.5 / 45)


def test_has_time_for():
    machine = Machine("10s", "wall")
    for _ in range(10):
        machine.step(0.5)
    machine.clock.reserve_seconds = 1.0
    assert machine.clock.has_time_for(3.4, BATCH) and not machine.clock.has_time_for(3.6, BATCH)
    assert not machine.clock.ends_within(7) and machine.clock.ends_within(8)
    training = Machine("10s")
    training.step(9.0)
    assert training.clock.has_time_for(100.0, BATCH)  # evaluation and saving do not count


def test_the_reserve_is_an_evaluation_two_checkpoints_and_a_constant():
    reserve = FinalReserve()
    assert reserve.total_seconds == FINISH_SECONDS
    for seconds in (3.0, 9.0, 4.0):  # one that was delayed does not count
        reserve.evaluations.append(seconds)
    reserve.checkpoints.append(1.0)
    assert reserve.total_seconds == 4.0 + 2 * 1.0 + FINISH_SECONDS
    for _ in range(3):  # the last three count
        reserve.evaluations.append(2.0)
    assert reserve.evaluation_seconds == 2.0 and reserve.total_seconds == 2.0 + 2 * 1.0 + FINISH_SECONDS


def test_processor_time_stands_while_the_process_sleeps():
    clock = Clock("1h", "cpu", IMAGES)
    clock.start()
    timer = clock.timer
    before, began = timer.train_seconds, timer.wall_seconds
    time.sleep(0.3)
    assert timer.train_seconds - before < 0.2 and timer.wall_seconds - began >= 0.3
    assert not clock.reserves and clock.progress.seconds < 0.3


def test_a_process_leaves_with_its_output_flushed_and_nothing_destroyed():
    code = """
import atexit, sys
from vitlocal.machine import leave
atexit.register(print, "destroyed")
print("output"), print("error", file=sys.stderr)
leave(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "output\n", "error\n")


# --- a manual clock --------------------------------------------------------------------------------------------------


class ManualTime:
    """The time of a clock, moved by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def manual_clock(length: str, counts: str = "train") -> tuple[Clock, ManualTime]:
    now = ManualTime()
    return Clock(length, counts, images_per_epoch=100, now=now), now


def test_training_time_stops_in_pauses():
    clock, now = manual_clock("60s")
    now.time += 5  # set-up
    clock.start()
    now.time += 30
    with clock.timer.paused():
        now.time += 1000
    assert clock.progress.fraction == 0.5 and not clock.progress.is_end
    now.time += 30
    assert clock.progress.is_end and clock.timer.train_seconds == 60 and clock.timer.wall_seconds == 1065


def test_wall_time_counts_everything():
    clock, now = manual_clock("60s", "wall")
    clock.start()
    now.time += 15
    with clock.timer.paused():
        now.time += 15
    assert clock.progress.fraction == 0.5


def test_time_survives_a_restart():
    clock, now = manual_clock("10h")
    clock.start()
    now.time += 3600
    state = clock.state_dict()
    again, now = manual_clock("10h")
    again.load_state_dict(state)
    now.time += 999  # not training
    assert again.progress.fraction == pytest.approx(0.1)
    again.start()
    now.time += 3600
    assert again.progress.fraction == pytest.approx(0.2)


def test_time_after_the_last_checkpoint_is_spent_as_well():
    clock, _ = manual_clock("100s")
    clock.load_state_dict(clock.state_dict() | {"train_seconds": 30.0, "wall_seconds": 40.0})
    clock.timer.resume(45.0, 35.0)  # of training more than the checkpoint knew
    assert (clock.timer.train_seconds, clock.timer.wall_seconds) == (45, 40) and clock.progress.fraction == 0.45


def test_wall_time_begins_with_the_process():
    now = ManualTime()
    clock = Clock("60s", "wall", 100, now=now, began=now.time - 6)
    assert clock.progress.seconds == 6 and clock.timer.train_seconds == 0
    assert clock.progress.fraction == 0  # until the schedule begins
    clock.start()
    now.time += 27
    assert clock.progress.fraction == 0.5


def test_epochs_and_steps():
    clock, _ = manual_clock("2ep")
    for images in (40, 40, 20):
        clock.record_step(images)
    assert (clock.position.epoch, clock.position.images, clock.step) == (1, 0, 3)
    assert clock.progress.fraction == 0.5
    clock, _ = manual_clock("4steps")
    clock.record_step(32)
    assert clock.progress.fraction == 0.25


# --- the journal ------------------------------------------------------------------------------------------------------


def test_the_journal_is_written_all_the_time(tmp_path: Path):
    clock = Clock("1h", now=time.monotonic, began=time.monotonic() - 5.0)
    clock.timer.resume(1.0, 2.0)
    path = tmp_path / "spent.json"
    with journal(path, clock.timer, interval=0.05):
        train_seconds, wall_seconds = read_spent(path)
        assert train_seconds == 1.0 and wall_seconds >= 7.0
        deadline = time.monotonic() + 60
        while read_spent(path)[1] == wall_seconds and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_spent(path)[1] > wall_seconds
    assert journal_interval(Length.parse("2m")) == pytest.approx(0.12)
    assert journal_interval(Length.parse("24h")) == journal_interval(Length.parse("90ep")) == 1.0


def test_a_damaged_journal_counts_as_none(tmp_path: Path, capsys):
    (tmp_path / "spent.json").write_text("")
    assert read_spent(tmp_path / "spent.json") == (0.0, 0.0) and "is damaged" in capsys.readouterr().err
