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


class Device:
    """A simulated accelerator: it runs work in order, and the host may be ahead of it."""

    def __init__(self) -> None:
        self.now = self.free = 0.0  # ms; when the device will have done everything that was issued

    def run(self, step: float, host: float) -> None:
        """The device begins as soon as the host launches the first of a step's kernels, and ends after the last."""
        self.free = max(self.free, self.now) + step
        self.now += host
        self.free = max(self.free, self.now)

    def event(self, device: torch.device | None = None) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device):
        self.device = device

    def record(self) -> None:
        self.at = max(self.device.now, self.device.free)

    def query(self) -> bool:
        return self.device.now >= self.at

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.mark.parametrize(
    ("host", "step", "loader", "idle"),
    [
        (8.0, 30.0, 29.0, 0.0),  # the host waits for most of a step, and the device for nothing
        (8.0, 30.0, 33.0, 3 / 33),
        (8.0, 30.0, 60.0, 30 / 60),
        (8.0, 5.0, 4.0, 0.0),  # the host is too slow, not the loader: no wait for data
    ],
)
def test_a_wait_for_data_is_the_time_without_work_of_the_device(
    monkeypatch: pytest.MonkeyPatch, host: float, step: float, loader: float, idle: float
) -> None:
    """A step takes ``step`` ms of the device and ``host`` ms of the host, and a batch is there every ``loader`` ms."""
    device, ahead, steps = Device(), [], 1000
    monkeypatch.setattr(timing, "synchronize", lambda _: None)
    meter = timing.WaitMeter(torch.device("cuda"), lambda: device.now, device.event)
    for number in range(steps):
        asked = meter.begin()
        device.now = max(device.now, (number + 1) * loader)
        meter.end(asked)
        device.run(step, host)
        ahead.append(device.event())
        ahead[-1].record()
        if len(ahead) > 2:
            ahead.pop(0).synchronize()
    assert meter.take() == pytest.approx(1e-3 * idle * device.free, abs=1e-3 * (loader + host))
    assert meter.take() == 0


def test_on_a_cpu_a_wait_is_the_hosts() -> None:
    now = iter([1.0, 3.0, 10.0, 14.0])
    meter = timing.WaitMeter(CPU, lambda: next(now))
    for _ in range(2):
        meter.end(meter.begin())
    assert meter.take() == 6 and meter.take() == 0


def test_a_noise_step_trains_on_the_same_batch_with_new_step_numbers() -> None:
    seen = []
    train = timing.noise_step(lambda *arguments: seen.append(arguments), timing.noise_batch(Feed(8, 6), 4, CPU), "mode")
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
