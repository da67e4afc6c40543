"""Signs of life: which process is lost, and that a busy one is not."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vitlocal.train import heartbeat
from vitlocal.train.heartbeat import Heartbeats, join_store, make_store

Start = Callable[[int], list[Heartbeats]]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses with which processes left."""
    statuses: list[int] = []
    monkeypatch.setattr(heartbeat, "leave", statuses.append)
    return statuses


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, left) -> Iterator[Start]:
    """``start(3)``: the heartbeats of three ranks, each with its own connection to the store of rank 0."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for name, seconds in (("PERIOD", 0.02), ("LOST_SECONDS", 1.5), ("SILENT_SECONDS", 0.5), ("FAREWELL_SECONDS", 1.5)):
        monkeypatch.setattr(heartbeat, name, seconds)
    started: list[Heartbeats] = []

    def begin(world: int) -> list[Heartbeats]:
        store = make_store(world)
        places = [f"host{rank}, process {rank}" for rank in range(world)]
        stores = [store, *(join_store(store.port) for _ in range(1, world))]
        started.extend(Heartbeats(each, rank, places) for rank, each in enumerate(stores))
        return started

    yield begin
    for each in reversed(started):
        each.close(failed=False)
    for thread in [thread for each in started for thread in each._threads]:
        thread.join(60)  # one that is about to leave would otherwise end the process of the tests, after `left` is gone
        assert not thread.is_alive()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fall_silent(lost: Heartbeats) -> None:
    """As a process that was killed or stopped."""
    lost._closing.set()


def test_processes_that_work_and_leave_are_not_lost(start: Start, left, capsys):
    ranks = start(3)
    assert [each.any_signal(0) for each in ranks] == [0, 0, 0]
    ranks[1].any_signal(15)  # of any rank, all hear
    wait_for(lambda: all(each.any_signal(15 * (each is ranks[1])) == 15 for each in ranks))
    ranks[2].close(failed=False)
    wait_for(lambda: ranks[0]._words(2)[1] == heartbeat.LEFT)
    assert [each._lost_rank(1000.0) for each in ranks[:2]] == [None, None]
    assert not left and capsys.readouterr().err == ""


def test_a_silent_process_ends_the_others_although_they_only_wait(start: Start, left, capsys):
    fall_silent(start(3)[1])
    wait_for(lambda: left == [1, 1])
    text = capsys.readouterr().err
    for rank, other in ((0, 2), (2, 0)):  # one of the two may hear it from the other
        said = re.search(rf"error: rank {rank} has lost rank 1 \(host1, process 1\): (.*?)\. ", text)
        assert said is not None, text
        assert said[1].startswith("no sign of life for") or said[1] == f"as rank {other} says"


def test_a_checkpoint_is_written_to_its_end(start: Start, left, monkeypatch: pytest.MonkeyPatch):
    ranks = start(2)
    monkeypatch.setattr(heartbeat, "FAREWELL_SECONDS", 60.0)
    with ranks[0].saving:
        fall_silent(ranks[1])
        wait_for(lambda: ranks[0]._lost_rank(heartbeat.LOST_SECONDS))
        time.sleep(10 * heartbeat.PERIOD)
        assert not left
    wait_for(lambda: left == [1])


def test_an_error_of_a_connection_names_who_is_silent_or_has_failed(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heartbeat, "LOST_SECONDS", 1000.0)
    ranks = start(3)
    fall_silent(ranks[2])
    error = RuntimeError("Connection closed by peer")
    # Not at once, if this process did not run for a while.
    wait_for(lambda: "rank 1 has lost rank 2 (host2, process 2): no sign of life" in ranks[1].explain(error))
    ranks[1].close(failed=True)  # it says which one it lost
    wait_for(lambda: ranks[0]._words(1)[1] == heartbeat.FAILED)
    ranks[0]._heard_at[2] = time.monotonic() + 1000
    assert "rank 0 has lost rank 2 (host2, process 2): as rank 1 says" in ranks[0].explain(error)


def test_a_store_that_does_not_answer_is_a_lost_rank_0(start: Start, left, monkeypatch: pytest.MonkeyPatch, capsys):
    ranks = start(2)
    fall_silent(ranks[0])
    frozen = threading.Event()  # the process of the store is stopped
    original = ranks[1]._leave_sign
    monkeypatch.setattr(ranks[1], "_leave_sign", lambda: (frozen.wait(), original()))
    wait_for(lambda: left == [1])
    frozen.set()
    assert "rank 1 has lost rank 0 (host0, process 0): no sign of life for" in capsys.readouterr().err
