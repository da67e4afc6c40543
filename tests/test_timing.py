"""The timing harness."""

from __future__ import annotations

import pytest
import torch

from vitlocal.plan import Feed
from vitlocal.train import timing

CPU = torch.device("cpu")


def test_work_is_repeated_until_both_limits_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work() -> None:
        calls.append(now[0])
        now[0] += 2.0

    found = timing.Timing()
    assert found.measure(work, CPU, calls=3) == 2.0 and len(calls) == 3
    assert found.measure(work, CPU, seconds=7.0) == 2.0 and len(calls) == 7
    assert (found.calls, found.seconds) == (7, 14.0)


def test_phases_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 10.0, 17.0, 20.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    timer = timing.PhaseTimer(CPU)
    for phases in (["forward", "backward", "forward"], ["forward", "backward"]):
        timer.begin()
        for phase in phases:
            timer.mark(phase)
    # With micro-batches, a phase occurs twice.
    assert timer.milliseconds() == [{"forward": 2e3, "backward": 2e3}, {"forward": 7e3, "backward": 3e3}]


def test_a_noise_step_trains_on_the_same_batch_with_new_step_numbers() -> None:
    seen = []
    train = timing.noise_step(lambda *arguments: seen.append(arguments), Feed(8, 6), 4, CPU, "mode")
    train()
    train()
    (first, *numbers), (second, *more) = seen
    assert first is second and first.images.shape == (6, 3, 8, 8) and first.images.dtype == torch.uint8
    assert first.images.is_contiguous(memory_format=torch.channels_last) and first.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert (numbers, more) == ([0, timing.LR, "mode"], [1, timing.LR, "mode"])


def test_device_memory_is_zero_on_a_cpu() -> None:
    before = timing.reset_peak(CPU)
    torch.zeros(100)
    assert (before, timing.peak_memory(CPU)) == (0, 0)
