"""The curriculum and the budget in a loop of one's own."""

import json
import multiprocessing
from pathlib import Path
from queue import Queue

import pytest
import torch

from vitlocal import Budget, Curriculum
from vitlocal.errors import ConfigError
from vitlocal.progress import Progress


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_curriculum_follows_the_fraction():
    curriculum = Curriculum.parse("32px until 10%, 64px until 30%, 224px")
    found = [curriculum.size(fraction) for fraction in (0, 0.0999, 0.1, 0.2999, 0.3, 1, 1.1)]
    assert found == [32, 32, 64, 64, 224, 224, 224]
    assert curriculum.sizes == (32, 64, 224) and str(curriculum) == "32px until 10%, 64px until 30%, 224px"
    assert Curriculum.parse("96px").size(0.5) == 96


def test_a_curriculum_follows_epochs_and_times():
    curriculum = Curriculum.parse("32px until 5ep, 64px until 2h, 96px")
    assert curriculum.size(Progress(epoch=4.99)) == 32
    assert curriculum.size(Progress(epoch=5)) == 64
    assert curriculum.size(Progress(epoch=5, seconds=7200)) == 96
    with pytest.raises(ConfigError, match="the end 5ep is not a fraction of the budget"):
        curriculum.size(0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("32px, 64px", "expected an end for each stage except the last"),
        ("32px until 10%", "expected an end for each stage except the last"),
        ("32px until 0%, 64px", "is empty"),
        ("32px until 20%, 64px until 10%, 96px", "10% does not come after 20%"),
        ("small", "curriculum: got 'small', expected a size and its end"),
        ("32px until noon, 64px", "curriculum: got .* expected a number and a unit"),
    ],
)
def test_a_wrong_curriculum_is_named(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        Curriculum.parse(text)


def test_a_time_budget_counts_steps_and_leaves_pauses_out():
    clock = FakeClock()
    budget = Budget("100s", now=clock)
    assert budget.spent == budget.fraction == 0 and not budget.over
    for _ in range(4):
        clock.seconds += 10
        budget.step(32)
    assert budget.spent == 40 and budget.fraction == pytest.approx(0.4)
    with budget.pause():
        with budget.pause():
            clock.seconds += 500
        clock.seconds += 500
        assert budget.spent == 40
    with pytest.raises(ConfigError, match="expected at least 1 image"):
        budget.step(0)
    clock.seconds += 54
    budget.step(32)
    assert budget.spent == 94 and not budget.over and budget.progress.step == 5
    clock.seconds += 2
    assert budget.over and budget.fraction == 1  # less than half of a usual step is left


def test_a_budget_continues_from_its_state():
    clock = FakeClock()
    budget = Budget("1h", now=clock)
    clock.seconds += 600
    budget.step(32)
    state = json.loads(json.dumps(budget.state_dict()))
    clock.seconds += 5000  # no process runs
    again = Budget("2h", now=clock)
    again.load_state_dict(state)
    assert again.spent == 600 and again.progress.images_seen == 32
    assert again.fraction == pytest.approx(1 / 6)  # schedules do not go back
    clock.seconds += 3000
    assert again.spent == 3600 and again.fraction == pytest.approx(1 / 2)
    assert again.after_step(32).seconds == 3600 + 600  # the last step took 600 s
    with pytest.raises(ConfigError, match="the state counts seconds"):
        Budget("90ep", images_per_epoch=10).load_state_dict(state)


def test_budgets_in_steps_epochs_and_flops():
    steps = Budget("4steps")
    epochs = Budget("2ep", images_per_epoch=100)
    flops = Budget("1TF")
    for number in range(4):
        assert not (steps.over or epochs.over)
        steps.step(50)
        epochs.step(50)
        flops.step(50, flops=0.2e12)
        assert steps.fraction == epochs.fraction == (number + 1) / 4
    assert steps.over and epochs.over and steps.spent == 4 and epochs.spent == 2
    assert not flops.over
    flops.step(50, flops=0.2e12)
    assert flops.over


@pytest.mark.parametrize("length", ["10%", "0s", "a day", "90ep"])
def test_wrong_budgets_are_named(length: str):
    with pytest.raises(ConfigError, match="budget: "):
        Budget(length)


def _count(rank: int, address: str, results: "Queue[tuple[int, int]]") -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    clock = FakeClock()
    budget, steps = Budget("10s", now=clock), 0
    while not budget.over:
        clock.seconds += 1 + rank  # rank 1 would stop after half of the steps
        budget.step(8)
        steps += 1
    results.put((rank, steps))
    torch.distributed.destroy_process_group()


def test_processes_end_together(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    address = f"file://{tmp_path}/rendezvous"
    processes = [context.Process(target=_count, args=(rank, address, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert found == {0: 10, 1: 10}
